"""The outline of a graph: every node once, merged activations, formats as in the plan, reasons."""

from __future__ import annotations

from typing import Any

import pytest

from postquant.passes.place import PlacementSettings
from postquant.pipeline.graph_outline import graph_outline
from postquant.pipeline.tensor_statistics import OutlineNode


@pytest.fixture(scope="module")
def case(cases: Any) -> Any:
    return cases.build(settings=PlacementSettings(wbits=4, abits=4))


@pytest.fixture(scope="module")
def rows(case: Any) -> dict[str, OutlineNode]:
    return {row.name: row for row in graph_outline(case.model, case.plan)}


def test_nodes_in_order_with_their_sources(case: Any, rows: dict[str, OutlineNode]) -> None:
    names = list(rows)
    assert names[0] == "image"
    assert [n for n in names[1:] if n in {node.name for node in case.model.graph}] == names[1:]
    for position, row in enumerate(rows.values()):
        assert all(source < position for source in row.inputs)
    # relu1 is part of conv1; the sum reads the projection and conv1.
    assert rows["conv1"].ops == ("Conv", "Relu")
    assert "relu1" not in rows
    assert rows["residual"].inputs == (names.index("conv1"), names.index("project"))


def test_formats_are_those_of_the_plan(case: Any, rows: dict[str, OutlineNode]) -> None:
    for node in case.model.graph:
        row = rows.get(node.name)
        weight = case.plan.weights.get(node.inputs[1].name) if len(node.inputs) > 1 else None
        if row is None or weight is None:
            continue
        read = case.plan.requants.get(f"{node.name}:0") or case.plan.activation_quantizer(node.inputs[0].name)
        assert (row.wbits, row.weights, row.reads) == (weight.spec.bits, "int", read.spec.bits)
        constants = [value.const_value for value in node.inputs[1:] if value is not None]
        assert row.parameters == sum(int(tensor.size) for tensor in constants)
    assert rows["conv1"].wbits == 8
    assert rows["project"].wbits == 4
    assert rows["image"].abits == 8
    assert rows["maxpool"].wbits is None


def test_float_nodes_tell_why(case: Any, rows: dict[str, OutlineNode]) -> None:
    told = {name: row.reason for name, row in rows.items() if row.reason is not None}
    assert told == {name: reason for name, reason in case.plan.floats.items() if name in rows}


def test_a_relu_that_others_need_is_a_row_of_its_own(cases: Any) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[1,2,4,4] x) => (float[1,2,4,4] y, float[1,2,4,4] z)
    <float[2,2,1,1] w> { [conv] y = Conv (x, w)  [relu] z = Relu (y) }"""
    case = cases.build(text)
    assert [row.name for row in graph_outline(case.model, case.plan)] == ["x", "conv", "relu"]
