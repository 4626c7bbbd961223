"""Joints and sections, against the definition of dominance."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postquant.passes.sections import Dataflow


def parsed(body: str, inputs: str = "float[n] x", outputs: str = "float[n] y") -> ir.Graph:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
    return ir.from_proto(proto).graph


def names(sections: list[list[ir.Node]]) -> list[list[str]]:
    return [[node.outputs[0].name or "" for node in section] for section in sections]


def test_sections_of_a_residual_network() -> None:
    graph = parsed("a = Relu (x) b = Relu (a) c = Tanh (b) d = Add (a, c) e = Relu (d) y = Add (e, e)")
    flow = Dataflow(graph)
    assert names(flow.sections(flow.nodes)) == [["a"], ["b", "c", "d"], ["e"], ["y"]]


def test_a_value_that_does_not_count_crosses_anywhere() -> None:
    graph = parsed("a = Relu (x) b = Relu (a) c = Add (b, m) d = Relu (c) y = Add (d, m)", "float[n] x, float[n] m")
    flow = Dataflow(graph)
    assert names(flow.sections(flow.nodes)) == [["a", "b", "c", "d", "y"]]
    longest = flow.longest(flow.nodes, frozenset())
    assert longest is not None
    assert longest.name == "m"
    assert names(flow.sections(flow.nodes, {longest})) == [["a"], ["b"], ["c"], ["d"], ["y"]]


def test_constants_and_shapes_are_no_data() -> None:
    graph = parsed("s = Shape (x) t = Cast <to = 1> (s) a = Relu (x) b = Relu (a) y = Reshape (b, s)")
    flow = Dataflow(graph)
    assert [node.op_type for node in flow.nodes] == ["Relu", "Relu", "Reshape"]
    assert names(flow.sections(flow.nodes)) == [["a"], ["b"], ["y"]]


def test_components_are_the_branches() -> None:
    graph = parsed("a = Relu (x) b = Relu (a) c = Tanh (x) d = Tanh (c) e = Sigmoid (x) y = Sum (b, d, e)")
    flow = Dataflow(graph)
    assert names(flow.components(flow.nodes[:-1])) == [["a", "b"], ["c", "d"], ["e"]]
    assert len(flow.components(flow.nodes)) == 1


def test_exits_are_what_others_read() -> None:
    graph = parsed("a = Relu (x) b = Relu (a) y = Add (a, b)", outputs="float[n] y, float[n] b")
    flow = Dataflow(graph)
    assert [value.name for value in flow.exits(set(flow.nodes[:2]))] == ["a", "b"]
    assert [value.name for value in flow.exits(set(flow.nodes))] == ["b", "y"]


@st.composite
def networks(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """What each node reads: 0 is the input, i the output of node i - 1; the last node reads all loose ends."""
    count = draw(st.integers(1, 9))
    reads = [tuple(draw(st.lists(st.integers(0, i), min_size=1, max_size=3, unique=True))) for i in range(count)]
    loose = set(range(count + 1)) - {value for read in reads for value in read}
    return [*reads, tuple(sorted(loose))]


def passes_all(reads: list[tuple[int, ...]], value: int) -> bool:
    """Whether every way from the input to the last node leads through ``value``: without it there is none."""
    reached = {0} - {value}
    for index, read in enumerate(reads):
        if reached.intersection(read) and index + 1 != value:
            reached.add(index + 1)
    return len(reads) not in reached


@settings(max_examples=200)
@given(networks())
def test_joints_are_the_values_that_everything_passes(reads: list[tuple[int, ...]]) -> None:
    body = " ".join(
        f"v{index + 1} = Sum ({', '.join(f'v{value}' for value in read)})" for index, read in enumerate(reads)
    )
    flow = Dataflow(parsed(body, "float[n] v0", f"float[n] v{len(reads)}"))
    ends = {section[-1].outputs[0].name for section in flow.sections(flow.nodes)}
    assert ends == {f"v{value}" for value in range(1, len(reads) + 1) if passes_all(reads, value)}


@pytest.mark.parametrize("op_type", ["Shape", "Size"])
def test_a_graph_without_data_has_no_sections(op_type: str) -> None:
    flow = Dataflow(parsed(f"y = {op_type} (x)", outputs="int64[k] y"))
    assert flow.nodes == ()
    assert flow.sections(flow.nodes) == []
