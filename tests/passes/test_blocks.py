"""Blocks of networks of all kinds: each layer once, one exit, in an order in which they can be learned."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postquant.passes import semantics
from postquant.passes.blocks import Block, cut_blocks
from postquant.passes.subgraph import extract, find_cut

LAYERS = frozenset({"Conv", "Gemm", "MatMul"})


def network(body: str, inputs: str = "float[N,4,8,8] x", outputs: str = "float[N,a,b,c] y") -> ir.Model:
    """A model in which every undeclared ``w...`` is a 3 x 3 weight of 4 channels, ``p...`` 1 x 1, ``m...`` a matrix.

    A weight ``w8_2`` has 8 outputs and 2 inputs.
    """
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    known = {value.name for value in proto.graph.input}
    known |= {name for node in proto.graph.node for name in node.output}
    for name in dict.fromkeys(name for node in proto.graph.node for name in node.input if name and name not in known):
        digits = name.split("_")[0][1:]
        outs, ins = (int(digits), int(name.split("_")[1])) if digits and "_" in name else (4, 4)
        shape = {"w": (outs, ins, 3, 3), "p": (outs, ins, 1, 1), "m": (ins, outs)}.get(name[0], (1,))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    model: ir.Model = ir.from_proto(proto)
    return model


def layers_of(model: ir.Model) -> list[str]:
    return [node.name or "" for node in model.graph if semantics.weight_index(node) is not None]


def cut(model: ir.Model, **settings: Any) -> list[tuple[str, ...]]:
    """The blocks' layers; what holds for all blocks is checked."""
    layers = layers_of(model)
    blocks = cut_blocks(model, layers, **settings)
    check(model, blocks, layers)
    return [block.layers for block in blocks]


def check(model: ir.Model, blocks: Sequence[Block], layers: Collection[str]) -> None:
    assert sorted(name for block in blocks for name in block.layers) == sorted(layers)
    order = {node.name: index for index, node in enumerate(model.graph)}
    makers = {value.name: node for node in model.graph for value in node.outputs}
    learned: set[str] = set()
    for block in blocks:
        assert list(block.nodes) == sorted(block.nodes, key=lambda name: order[name])
        # The nodes are exactly what lies between the inputs and the output.
        between = find_cut(model.graph, block.inputs, [block.output])
        assert {node.name for node in between.nodes} == set(block.nodes)
        # What leaves the block, shapes left out, is its output.
        graph_outputs = {value.name for value in model.graph.outputs}
        for name in block.nodes:
            node = makers[next(v.name for n in model.graph if n.name == name for v in n.outputs)]
            if node.op_type == "Shape" or not depends_on_data(node):
                continue
            for value in node.outputs:
                outside = [
                    use for use in value.uses() if use.node.name not in block.nodes and use.node.op_type != "Shape"
                ]
                assert value.name == block.output or not (outside or value.name in graph_outputs)
        # Everything in front of it has been learned.
        before = find_cut(model.graph, None, block.inputs).nodes if block.inputs else ()
        assert {node.name for node in before} & set(layers) <= learned
        learned.update(block.layers)


def depends_on_data(node: ir.Node) -> bool:
    stack = [node]
    while stack:
        current = stack.pop()
        if current.op_type == "Shape":
            continue
        for value in current.inputs:
            if value is None:
                continue
            if value.is_graph_input():
                return True
            maker = value.producer()
            if maker is not None:
                stack.append(maker)
    return False


RESIDUAL = """
s = Conv <pads = [1, 1, 1, 1]> (x, w0) t = Relu (s)
a = Conv <pads = [1, 1, 1, 1]> (t, w1) b = Relu (a) c = Conv <pads = [1, 1, 1, 1]> (b, w2) d = Add (t, c) e = Relu (d)
f = Conv <pads = [1, 1, 1, 1]> (e, w3) h = Relu (f) i = Conv <pads = [1, 1, 1, 1]> (h, w4) j = Conv (e, p5)
k = Add (i, j) l = Relu (k)
y = GlobalAveragePool (l)
"""


def test_residual_blocks() -> None:
    model = network(RESIDUAL)
    assert cut(model) == [("s",), ("a", "c"), ("f", "i", "j")]
    first, second, third = cut_blocks(model, layers_of(model))
    assert (second.inputs, second.output, second.nodes) == (("t",), "e", ("a", "b", "c", "d", "e"))
    assert (third.inputs, third.output) == (("e",), "l")
    assert first.name == first.output == "t"


def test_a_residual_block_with_too_many_layers_is_taken_apart() -> None:
    model = network(RESIDUAL)
    assert cut(model, max_layers=2) == [("s",), ("a", "c"), ("f", "i"), ("j",)]
    assert cut(model, max_layers=1) == [("s",), ("a",), ("c",), ("f",), ("i",), ("j",)]


def test_a_chain_is_cut_where_it_is_narrow() -> None:
    # An inverted residual without its sum: 2 -> 8 -> 8 -> 2 channels, twice, behind a layer.
    body = """
    a = Conv (x, p2_4)
    b = Conv (a, p8_2) c = Relu (b) d = Conv <group = 8> (c, w8_1) e = Relu (d) f = Conv (e, p2_8)
    g = Conv (f, p8_2_) h = Relu (g) i = Conv <group = 8> (h, w8_1_) j = Relu (i) y = Conv (j, p2_8_)
    """
    model = network(body)
    assert cut(model) == [("a",), ("b", "d", "f"), ("g", "i", "y")]
    assert cut(model, max_layers=2) == [("a",), ("b", "d"), ("f", "g"), ("i", "y")]


ATTENTION = """
z = MatMul (x, m0) n = Relu (z)
q = MatMul (n, m1) k = MatMul (n, m2) v = MatMul (n, m3) kt = Transpose <perm = [0, 2, 1]> (k)
s = MatMul (q, kt) t = Add (s, mask) u = Softmax (t) c = MatMul (u, v) o = MatMul (c, m4) r = Add (o, n)
l = LayerNormalization <axis = -1> (r, g1, g2)
h = MatMul (l, m5) e = Erf (h) e1 = Mul (e, half) e2 = Mul (h, e1) i = MatMul (e2, m6) j = Add (l, i)
{rest}
"""


def test_attention_and_mlp_with_a_mask_that_all_read() -> None:
    again = """
    q2 = MatMul (j, m7) k2 = Transpose <perm = [0, 2, 1]> (q2) s2 = MatMul (q2, k2) t2 = Add (s2, mask)
    u2 = Softmax (t2) c2 = MatMul (u2, q2) y = Add (c2, j)
    """
    inputs = "float[N,L,4] x, float[N,L,L] mask"
    model = network(ATTENTION.format(rest=again), inputs, "float[N,a,b] y")
    assert cut(model) == [("z",), ("q", "k", "v", "o"), ("h", "i"), ("q2",)]
    attention = cut_blocks(model, layers_of(model))[1]
    assert attention.inputs == ("n", "mask")
    assert attention.output == "l"


def test_shapes_belong_to_every_block_that_needs_them() -> None:
    body = """
    s = Shape (x) t = Mul (s, ones) a = Conv <pads = [1, 1, 1, 1]> (x, w1)
    b = Relu (a) c = Conv <pads = [1, 1, 1, 1]> (b, w2) d = Expand (c, t) e = Add (d, b)
    f = Conv <pads = [1, 1, 1, 1]> (e, w3) h = Expand (f, t) y = Add (h, e)
    """
    model = network(body)
    model.graph.initializers["ones"].const_value = ir.tensor(np.ones(1, np.int64), name="ones")
    assert cut(model) == [("a",), ("c",), ("f",)]
    for block in cut_blocks(model, layers_of(model))[1:]:
        assert block.nodes[:2] == ("s", "t")
        assert "x" in block.inputs


def test_branches_that_a_concat_joins() -> None:
    body = """
    a = Conv (x, w0) b = Relu (a)
    c = Conv (b, p1) d = Conv (b, p2) e = Conv <pads = [1, 1, 1, 1]> (d, w3) f = MaxPool <kernel_shape = [1, 1]> (b)
    g = Concat <axis = 1> (c, e, f) y = Conv (g, p4_12)
    """
    assert cut(network(body)) == [("a",), ("c", "d", "e"), ("y",)]


def test_a_gate_stays_in_its_chain() -> None:
    body = """
    a = Conv (x, w0) b = Relu (a) c = GlobalAveragePool (b) d = Conv (c, p1) e = Sigmoid (d) f = Mul (b, e)
    y = Conv (f, p2)
    """
    assert cut(network(body)) == [("a", "d", "y")]


def test_linked_branches_get_the_oldest_value_from_the_side() -> None:
    # A U-Net of two levels.
    body = """
    a = Conv <pads = [1, 1, 1, 1]> (x, w1) b = Relu (a) c = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b)
    d = Conv <pads = [1, 1, 1, 1]> (c, w2) e = Relu (d) f = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (e)
    g = Conv <pads = [1, 1, 1, 1]> (f, w3) h = Relu (g)
    i = ConvTranspose <strides = [2, 2]> (h, p4) j = Concat <axis = 1> (i, e)
    k = Conv <pads = [1, 1, 1, 1]> (j, w4_8) l = Relu (k)
    n = ConvTranspose <strides = [2, 2]> (l, p5) o = Concat <axis = 1> (n, b) y = Conv (o, p4_8)
    """
    model = network(body)
    assert cut(model) == [("a",), ("d", "g", "i", "k", "n"), ("y",)]
    assert cut(model, max_layers=3) == [("a",), ("d",), ("g", "i"), ("k", "n"), ("y",)]
    assert cut(model, max_layers=1) == [("a",), ("d",), ("g",), ("i",), ("k",), ("n",), ("y",)]
    last = cut_blocks(model, layers_of(model))[-1]
    assert (last.inputs, last.output) == (("o",), "y")


def test_two_heads() -> None:
    body = "a = Conv (x, w0) b = Relu (a) c = Conv (b, w1) y = Relu (c) d = Conv (b, w2) z = Sigmoid (d)"
    model = network(body, outputs="float[N,a,b,c] y, float[N,a,b,c] z")
    assert cut(model) == [("a",), ("c",), ("d",)]


def test_an_output_in_the_middle_ends_a_block() -> None:
    body = "a = Conv (x, w0) b = Relu (a) c = Conv (b, w1) y = Relu (c)"
    model = network(body, outputs="float[N,a,b,c] y, float[N,a,b,c] a")
    assert cut(model) == [("a",), ("c",)]


def test_samples_lie_along_the_first_axis_at_both_ends() -> None:
    body = """
    a = Conv (x, p0) b = Transpose <perm = [1, 0, 2, 3]> (a) c = Transpose <perm = [1, 0, 2, 3]> (b)
    d = Conv (c, p1) e = Conv (c, p2) f = Add (d, e) y = Transpose <perm = [1, 0, 2, 3]> (f)
    """
    first, second = cut_blocks(network(body), ["a", "d", "e"])
    assert (first.inputs, first.output) == (("x",), "a")
    assert (second.inputs, second.output) == (("a",), "f")


def test_layers_that_are_not_quantized_are_not_counted() -> None:
    model = network("a = Conv (x, w0) b = Relu (a) c = Conv (b, w1) y = Relu (c)")
    (block,) = cut_blocks(model, ["c"])
    assert (block.layers, block.inputs, block.output) == (("c",), ("b",), "y")
    assert cut_blocks(model, []) == ()


def test_wrong_arguments() -> None:
    model = network("y = Conv (x, w0)")
    with pytest.raises(ValueError, match="at least one layer"):
        cut_blocks(model, ["y"], max_layers=0)
    with pytest.raises(ValueError, match="no node z"):
        cut_blocks(model, ["z"])


@st.composite
def random_networks(draw: st.DrawFn) -> str:
    """Convolutions, activations and sums that read any earlier values; what nothing reads is summed at the end."""
    values, lines, read = ["x"], [], set()
    for index in range(draw(st.integers(1, 10))):
        kind = draw(st.sampled_from(["Conv", "Conv", "Relu", "Add"]))
        sources = draw(st.lists(st.sampled_from(values), min_size=2, max_size=2))
        name = f"v{index}"
        lines.append(
            {
                "Conv": f"{name} = Conv <pads = [1, 1, 1, 1]> ({sources[0]}, w{index})",
                "Relu": f"{name} = Relu ({sources[0]})",
                "Add": f"{name} = Add ({sources[0]}, {sources[1]})",
            }[kind]
        )
        read.update(sources if kind == "Add" else sources[:1])
        values.append(name)
    ends = [value for value in values[1:] if value not in read]
    return " ".join([*lines, f"y = Sum ({', '.join(ends)})"])


@settings(max_examples=150)
@given(random_networks(), st.integers(1, 6))
def test_any_network_is_covered(body: str, most: int) -> None:
    model = network(body)
    assert all(len(layers) <= most for layers in cut(model, max_layers=most))


def test_a_block_runs_alone(shared_data: pathlib.Path) -> None:
    model = ir.load(shared_data / "cifar10" / "resnet20.onnx")
    blocks = cut_blocks(model, layers_of(model))
    check(model, blocks, layers_of(model))
    assert [len(block.layers) for block in blocks] == [1, *[2] * 9, 1]
    for block in blocks:
        part = extract(model, block.inputs, [block.output])
        assert {node.name for node in part.graph} == set(block.nodes)
