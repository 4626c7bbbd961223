"""The function body of FeedbackRequantize: what it gives on onnxruntime, and what is left of it there."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

# Shape of the codes, axis, cell.
PLACES = [
    ((2, 6, 5, 7), -3, 1),
    ((2, 3, 40), -1, 1),
    ((4, 6), -2, 1),
    ((19,), -1, 1),
    ((2, 1, 3, 2, 70), -3, 1),
    ((0, 3, 4), -2, 1),
    ((0, 3, 4, 5), -3, 2),
    ((2, 3, 5, 7), -3, 2),
    ((3, 8, 4), -3, 2),
    ((2, 2, 1, 9, 1), -3, 2),
    ((2, 2, 7, 5), -3, 3),
    ((1, 2, 3, 2, 6, 3), -3, 3),
    ((2, 1, 3, 11), -3, 8),
]


class GatherElements(OpRun):
    """The operator by its definition; that of onnx's evaluator knows no more than 64 elements."""

    op_domain = ""

    def _run(self, data: Any, indices: Any, axis: int) -> tuple[Any]:
        return (np.take_along_axis(data, indices, axis),)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize(("shape", "axis", "cell"), PLACES, ids=str)
def test_bodies_on_onnxruntime_and_in_the_evaluator(
    operators: Any, feedbacks: Any, shape: tuple[int, ...], axis: int, cell: int, opset: int
) -> None:
    rng = np.random.default_rng(opset)
    channels = shape[axis]
    x = rng.integers(0, 256, shape).astype(np.uint8)
    for rank, count, rows in ((1, 2, 1), (3, 4, channels), (5, 16, channels)):
        constants = feedbacks.constants(rng, channels * cell**2, rank, rows=rows, count=count)
        law = feedbacks.law(x, constants, axis, cell)
        model = operators.model("FeedbackRequantize", x, constants, {"axis": axis, "cell": cell}, opset=opset)
        inlined = inline_local_functions(model)
        results = [operators.on_onnxruntime(model, x, optimize=optimize)[0][0] for optimize in (True, False)]
        results.append(operators.on_onnxruntime(inlined, x)[0][0])
        if opset >= 19:
            # The evaluator does not show operators of ours to functions.
            evaluator: Any = ReferenceEvaluator(inlined, new_ops=[GatherElements])
            results += [evaluator.run(None, {"x": x})[0], operators.on_evaluator(model, x, reference=True)[0]]
        for observed in results:
            assert (observed.dtype, observed.shape) == (np.uint8, x.shape)
            np.testing.assert_array_equal(observed, law)


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(("cell", "most"), [(1, 25), (2, 42)])
def test_tables_and_coefficients_are_computed_when_the_model_is_loaded(
    operators: Any, feedbacks: Any, tmp_path: pathlib.Path, cell: int, most: int, rows: int, opset: int
) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 9, 4, 5)).astype(np.uint8)
    constants = feedbacks.constants(rng, 9 * cell**2, 3, rows=rows)
    model = operators.model("FeedbackRequantize", x, constants, {"axis": -3, "cell": cell}, opset=opset)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert not {"QuantizeLinear", "TopK", "Range", "Expand", "ReduceSum", "ReduceMax", "If"} & set(kinds)
    # Cells have a number of missing places, and an answer to which those are.
    assert [kinds.count(kind) for kind in ("Less", "Mod")] == [int(cell > 1)] * 2
    # The time of loading grows with the square of their number in a network.
    assert len(kinds) <= most
    stored = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Gather":
            assert node.input[1] in stored
    (loop,) = (node for node in graph.node if node.op_type == "Loop")
    assert loop.input[0] in stored
    body = loop.attribute[0].g.node
    # All but the codes of x, and which of them there are.
    assert [node.input[0] in stored for node in body if node.op_type == "Slice"].count(False) == 1 + int(cell > 1)
    assert all(node.input[0] in stored for node in body if node.op_type == "Gather")


@pytest.mark.parametrize("opset", [14, 18, 21])
@pytest.mark.parametrize(
    ("shape", "axis", "cell"),
    [
        ((2, 0, 3, 4), -2, 1),
        ((3, 0), -2, 1),
        ((1, 3, 0, 4), -3, 1),
        ((0, 0, 3), -1, 1),
        ((2, 3, 5, 0), -3, 2),
        ((1, 0, 3, 4, 4), -3, 2),
        ((0, 3, 0, 0), -3, 3),
    ],
    ids=str,
)
def test_there_may_be_no_positions(
    operators: Any, feedbacks: Any, shape: tuple[int, ...], axis: int, cell: int, opset: int
) -> None:
    """As there may be at opset 13, when the first dimension is 0."""
    constants = feedbacks.constants(np.random.default_rng(0), 3 * cell**2, 2)
    x = np.zeros(shape, np.uint8)
    model = operators.model("FeedbackRequantize", x, constants, {"axis": axis, "cell": cell}, opset=opset)
    for optimize in (True, False):
        observed = operators.on_onnxruntime(model, x, optimize=optimize)[0][0]
        assert (observed.dtype, observed.shape) == (np.uint8, shape)


@pytest.mark.parametrize("cell", [1, 2])
def test_all_inputs_may_be_computed(operators: Any, feedbacks: Any, cell: int) -> None:
    """Nothing of the body asks for constants."""
    rng = np.random.default_rng(4)
    x = rng.integers(0, 256, (2, 9, 5, 7)).astype(np.uint8)
    channels = 9 * cell**2
    constants = feedbacks.constants(rng, channels, 4, rows=9)
    model = operators.model("FeedbackRequantize", x, constants, {"axis": -3, "cell": cell})
    del model.graph.initializer[:]
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
        for name, value in constants.items()
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for groups in ([0, 1, 2, 3, 4, 5, 6, 7, 0], [7] * 9, [1, 1, 0, 6, 6, 1, 0, 0, 0]):
        constants["group"] = np.resize(np.array(groups, np.uint8), channels)
        expected = feedbacks.law(x, constants, -3, cell)
        np.testing.assert_array_equal(session.run(None, {"x": x, **constants})[0], expected)


def test_cells_that_do_not_fit_fail(operators: Any, feedbacks: Any) -> None:
    """Not with a sentence of ours, as in the library, but not with levels either."""
    rng = np.random.default_rng(7)
    x = rng.integers(0, 256, (2, 3, 4, 4)).astype(np.uint8)
    for channels, axis in ((12, -2), (8, -3), (16, -3), (3, -3)):
        model = operators.model(
            "FeedbackRequantize", x, feedbacks.constants(rng, channels, 2), {"axis": axis, "cell": 2}
        )
        with pytest.raises(Exception, match=r"Reshape|Gather|indices"):
            operators.on_onnxruntime(model, x)
