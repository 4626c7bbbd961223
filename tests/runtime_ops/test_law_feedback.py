"""Levels with feedback: what they are for every element, and what is left of the function body on onnxruntime."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.law_feedback import Feedback, feedback_requantize
from postquant.runtime_ops.law_levels import lut_requantize

Array = npt.NDArray[Any]

NUMBERS: dict[str, Array] = {
    "x_scale": np.asarray(0.031, np.float32),
    "x_zero_point": np.asarray(13, np.uint8),
    "scale": np.asarray(0.043, np.float32),
    "zero_point": np.asarray(7, np.uint8),
}
# Shape of the codes, axis.
PLACES = [((2, 6, 5, 7), -3), ((2, 3, 40), -1), ((4, 6), -2), ((19,), -1), ((2, 1, 3, 2, 70), -3), ((0, 3, 4), -2)]


class GatherElements(OpRun):
    """The operator by its definition; that of onnx's evaluator knows no more than 64 elements."""

    op_domain = ""

    def _run(self, data: Any, indices: Any, axis: int) -> tuple[Any]:
        return (np.take_along_axis(data, indices, axis),)


def constants_of(rng: np.random.Generator, channels: int, rank: int, *, rows: int = 1, count: int = 4) -> Any:
    """Random inputs, with shifts that reach from small ones to those beyond the limits."""
    return {
        **NUMBERS,
        "table": np.sort(rng.integers(0, 256, (rows, count)), axis=1).astype(np.uint8),
        "group": rng.integers(0, 8, channels).astype(np.uint8),
        "left": rng.integers(-127, 128, (rank, channels)).astype(np.int8),
        "left_scale": rng.uniform(0, 0.02, rank).astype(np.float32),
        "right": rng.integers(-127, 128, (channels, rank)).astype(np.int8),
        "right_scale": rng.uniform(-0.02, 0.02, channels).astype(np.float32),
    }


def by_law(x: Array, constants: Any, axis: int) -> Array:
    """The law of the inputs of a node."""
    inputs = dict(constants)
    parts = {name: inputs.pop(name) for name in ("group", "left", "left_scale", "right", "right_scale")}
    return feedback_requantize(x, **inputs, feedback=Feedback(**parts), axis=axis)


def limited(value: float, low: int, high: int) -> int:
    """To the nearest integer, half to even as Python rounds, between two."""
    return round(min(max(value, low), high))


def product(total: int, scale: np.float32, limit: int) -> int:
    with np.errstate(over="ignore"):
        return limited(float(np.float32(total) * scale), -limit, limit)


def one_position(stored: list[int], constants: Any) -> list[int]:
    """The levels of all channels at one position, by the text of the specification, one number at a time."""
    x_scale, scale = constants["x_scale"][()], constants["scale"][()]
    x_zero, zero = int(constants["x_zero_point"]), int(constants["zero_point"])
    left, right = constants["left"].tolist(), constants["right"].tolist()
    tables, groups = constants["table"].tolist(), constants["group"].tolist()
    codes = []
    for k in stored:
        quotient = float(np.float32(np.float32(k - x_zero) * x_scale) / scale)
        codes.append(limited(quotient, -zero, 255 - zero) + zero)
    errors, levels = [0] * len(stored), [0] * len(stored)
    for group in range(8):
        inner = [
            product(sum(a * e for a, e in zip(row, errors, strict=True)), constants["left_scale"][k], 127)
            for k, row in enumerate(left)
        ]
        for c in [c for c, g in enumerate(groups) if g == group]:
            shift = product(sum(b * s for b, s in zip(right[c], inner, strict=True)), constants["right_scale"][c], 255)
            aim = limited(codes[c] - shift, 0, 255)
            table = tables[0 if len(tables) == 1 else c]
            levels[c] = min((abs(level - aim), -level, level) for level in table)[2]
            # No channel of a group sees the others of it.
        for c in [c for c, g in enumerate(groups) if g == group]:
            errors[c] = limited(levels[c] - codes[c], -127, 127)
    return levels


@settings(deadline=None)
@given(data=st.data())
def test_every_element_gets_the_level_of_the_specification(data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    at, channels, rank = draw(st.integers(0, len(shape))), draw(st.integers(2, 7)), draw(st.integers(1, 4))
    axis = at - len(shape) - 1
    shape.insert(at, channels)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = draw(st.sampled_from([1, channels]))
    constants = constants_of(rng, channels, rank, rows=rows, count=draw(st.integers(2, 16)))
    scales = st.floats(2.0**-9, 2.0**3, width=32)
    signed = st.sampled_from([-1, 1, 0])
    constants |= {
        "x_scale": np.asarray(draw(scales), np.float32),
        "scale": np.asarray(draw(scales), np.float32),
        "x_zero_point": np.asarray(draw(st.integers(0, 255)), np.uint8),
        "zero_point": np.asarray(draw(st.integers(0, 255)), np.uint8),
        "left_scale": np.array([draw(scales) * draw(signed) for _ in range(rank)], np.float32),
        "right_scale": np.array([draw(scales) * draw(signed) for _ in range(channels)], np.float32),
    }
    x = rng.integers(0, 256, shape).astype(np.uint8)
    observed = by_law(x, constants, axis)
    assert (observed.dtype, observed.shape) == (x.dtype, x.shape)
    columns, levels = (np.moveaxis(a, axis, -1).reshape(-1, channels).tolist() for a in (x, observed))
    for column, found in zip(columns, levels, strict=True):
        assert found == one_position(column, constants)


@pytest.mark.parametrize("rows", [1, 6])
def test_without_coefficients_or_with_one_group_there_is_no_feedback(rows: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (3, 6, 50)).astype(np.uint8)
    constants = constants_of(rng, 6, 2, rows=rows)
    plain = lut_requantize(x, **NUMBERS, table=constants["table"], axis=-2)
    assert (by_law(x, constants, -2) != plain).any()
    for changes in (
        {"left": np.zeros((2, 6), np.int8)},
        {"right_scale": np.zeros(6, np.float32)},
        {"group": np.full(6, 5, np.uint8)},
    ):
        np.testing.assert_array_equal(by_law(x, constants | changes, -2), plain)


def test_errors_are_made_up_for() -> None:
    """The sum of all channels is kept, up to half a step of the last one, though every channel rounds coarsely."""
    rng = np.random.default_rng(2)
    x = rng.integers(64, 192, (8, 1000)).astype(np.uint8)
    one = np.asarray(1, np.float32)
    zero = np.asarray(0, np.uint8)
    table = np.arange(0, 256, 17, dtype=np.uint8)[None]
    # s = sum of all errors, as all of it is still for the next channel to make up for.
    feedback = Feedback(
        np.arange(8, dtype=np.uint8),
        np.full((1, 8), 1, np.int8),
        np.ones(1, np.float32),
        np.full((8, 1), 1, np.int8),
        np.full(8, 1, np.float32),
    )
    y = feedback_requantize(x, one, zero, one, zero, table, feedback, -2)
    assert np.abs(y.astype(int).sum(axis=0) - x.astype(int).sum(axis=0)).max() <= 8
    assert np.abs(y.astype(int) - x).max() <= 17


def test_the_largest_coefficients_are_exact(operators: Any) -> None:
    """Sums of 2^24 - 16, products beyond float32."""
    channels = 1042
    x = np.tile(np.array([[0], [255]], np.uint8), (1, channels))
    coefficients = np.full((1, channels), 127, np.int8)
    coefficients[:, 1040:] = [[24, 0]]
    constants = {
        **NUMBERS,
        "x_scale": NUMBERS["scale"],
        "table": np.array([[128, 129]], np.uint8),
        "group": np.array([0] * (channels - 1) + [1], np.uint8),
        "left": coefficients,
        "left_scale": np.array([2.0**-17 / 127], np.float32),
        "right": np.full((channels, 1), 127, np.int8),
        "right_scale": np.full(channels, 3e38, np.float32),
    }
    assert np.abs(coefficients.astype(int)).sum() == 132104
    law = by_law(x, constants, -1)
    for row, stored in zip(law.tolist(), x.tolist(), strict=True):
        assert row == one_position(stored, constants)
    model = operators.model("FeedbackRequantize", x, constants, {"axis": -1})
    np.testing.assert_array_equal(operators.on_onnxruntime(model, x)[0][0], law)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize(("shape", "axis"), PLACES, ids=str)
def test_bodies_on_onnxruntime_and_in_the_evaluator(
    operators: Any, shape: tuple[int, ...], axis: int, opset: int
) -> None:
    rng = np.random.default_rng(opset)
    channels = shape[axis]
    x = rng.integers(0, 256, shape).astype(np.uint8)
    for rank, count, rows in ((1, 2, 1), (3, 4, channels), (5, 16, channels)):
        constants = constants_of(rng, channels, rank, rows=rows, count=count)
        law = by_law(x, constants, axis)
        model = operators.model("FeedbackRequantize", x, constants, {"axis": axis}, opset=opset)
        results = [operators.on_onnxruntime(model, x, optimize=optimize)[0][0] for optimize in (True, False)]
        if opset >= 19:
            # The evaluator does not show operators of ours to functions.
            evaluator: Any = ReferenceEvaluator(inline_local_functions(model), new_ops=[GatherElements])
            results += [evaluator.run(None, {"x": x})[0], operators.on_evaluator(model, x, reference=True)[0]]
        for observed in results:
            assert (observed.dtype, observed.shape) == (np.uint8, x.shape)
            np.testing.assert_array_equal(observed, law)


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("rows", [1, 9])
def test_tables_and_coefficients_are_computed_when_the_model_is_loaded(
    operators: Any, tmp_path: pathlib.Path, rows: int, opset: int
) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 9, 4, 5)).astype(np.uint8)
    constants = constants_of(rng, 9, 3, rows=rows)
    model = operators.model("FeedbackRequantize", x, constants, {"axis": -3}, opset=opset)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert not {"QuantizeLinear", "TopK", "Range", "Less", "Mod", "Expand", "ReduceSum", "ReduceMax"} & set(kinds)
    # The time of loading grows with the square of their number in a network.
    assert len(kinds) <= 25
    stored = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Gather":
            assert node.input[1] in stored
    (loop,) = (node for node in graph.node if node.op_type == "Loop")
    assert loop.input[0] in stored
    body = loop.attribute[0].g.node
    # All but the codes of x.
    assert [node.input[0] in stored for node in body if node.op_type == "Slice"].count(False) == 1
    assert all(node.input[0] in stored for node in body if node.op_type == "Gather")


@pytest.mark.parametrize("opset", [14, 18, 21])
@pytest.mark.parametrize(("shape", "axis"), [((2, 0, 3, 4), -2), ((3, 0), -2), ((1, 3, 0, 4), -3), ((0, 0, 3), -1)])
def test_there_may_be_no_positions(operators: Any, shape: tuple[int, ...], axis: int, opset: int) -> None:
    """As there may be at opset 13, when the first dimension is 0."""
    constants = constants_of(np.random.default_rng(0), 3, 2)
    x = np.zeros(shape, np.uint8)
    model = operators.model("FeedbackRequantize", x, constants, {"axis": axis}, opset=opset)
    for optimize in (True, False):
        observed = operators.on_onnxruntime(model, x, optimize=optimize)[0][0]
        assert (observed.dtype, observed.shape) == (np.uint8, shape)


def test_all_inputs_may_be_computed(operators: Any) -> None:
    """Nothing of the body asks for constants."""
    rng = np.random.default_rng(4)
    x = rng.integers(0, 256, (2, 9, 5, 7)).astype(np.uint8)
    constants = constants_of(rng, 9, 4, rows=9)
    model = operators.model("FeedbackRequantize", x, constants, {"axis": -3})
    del model.graph.initializer[:]
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
        for name, value in constants.items()
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for groups in ([0, 1, 2, 3, 4, 5, 6, 7, 0], [7] * 9, [1, 1, 0, 6, 6, 1, 0, 0, 0]):
        constants["group"] = np.array(groups, np.uint8)
        np.testing.assert_array_equal(session.run(None, {"x": x, **constants})[0], by_law(x, constants, -3))


GOOD: dict[str, Any] = {
    "x": np.zeros((2, 3, 4), np.uint8),
    **NUMBERS,
    "table": np.zeros((3, 4), np.uint8),
    "group": np.zeros(3, np.uint8),
    "left": np.zeros((2, 3), np.int8),
    "left_scale": np.zeros(2, np.float32),
    "right": np.zeros((3, 2), np.int8),
    "right_scale": np.zeros(3, np.float32),
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": np.zeros((2, 3, 4), np.int8)}, "input x"),
        ({"x": np.zeros((), np.uint8)}, "one dimension or more"),
        ({"x": np.zeros((2, 4, 4), np.uint8)}, "expected 3 channels on axis -2, found shape \\(2, 4, 4\\)"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "table": np.zeros((1, 4), np.uint8)}, "expected 3 channels"),
        ({"x": np.zeros(3, np.uint8)}, "expected 3 channels"),
        ({"x_scale": np.ones(1, np.float32)}, "input x_scale"),
        ({"scale": np.asarray(np.nan, np.float32)}, "input scale"),
        ({"x_zero_point": np.asarray(0, np.int8)}, "input x_zero_point"),
        ({"table": np.zeros((3, 17), np.uint8)}, "2 <= n <= 16"),
        ({"table": np.zeros((2, 4), np.uint8)}, "input table\\): expected 1 or 3 rows, found 2"),
        ({"table": np.array([[0, 1], [1, 0], [0, 1]], np.uint8)}, "sorted"),
        ({"group": np.zeros(3, np.int8)}, "input group"),
        ({"group": np.zeros((3, 1), np.uint8)}, "input group"),
        ({"group": np.zeros(1, np.uint8)}, "C >= 2"),
        ({"group": np.array([0, 8, 1], np.uint8)}, "input group\\): expected 0 to 7, found 8"),
        ({"left": np.zeros((2, 4), np.int8)}, "input left\\): expected int8 of shape \\(2, 3\\)"),
        ({"left": np.zeros((0, 3), np.int8)}, "input left\\): expected int8 of shape \\(1, 3\\)"),
        ({"left": np.zeros(3, np.int8)}, "input left"),
        ({"left": np.zeros((2, 3), np.uint8)}, "input left"),
        ({"left": np.full((2, 3), -128, np.int8)}, "below -127 \\(input left"),
        ({"left_scale": np.zeros(3, np.float32)}, "input left_scale"),
        ({"left_scale": np.full(2, np.inf, np.float32)}, "not finite \\(input left_scale"),
        ({"right": np.zeros((2, 3), np.int8)}, "input right"),
        ({"right": np.full((3, 2), -128, np.int8)}, "below -127 \\(input right"),
        ({"right_scale": np.zeros(3)}, "input right_scale"),
        ({"right_scale": np.full(3, np.nan, np.float32)}, "not finite \\(input right_scale"),
        ({"axis": 0}, "attribute axis"),
        ({"axis": -3}, "3 channels on axis -3"),
    ],
    ids=str,
)
def test_nodes_that_do_not_fit_are_explained(changes: dict[str, Any], words: str) -> None:
    x = GOOD["x"]
    assert by_law(x, {k: v for k, v in GOOD.items() if k != "x"}, -2).shape == x.shape
    inputs = GOOD | {"axis": -2} | changes
    x, axis = inputs.pop("x"), inputs.pop("axis")
    with pytest.raises(ModelError, match=words):
        by_law(x, inputs, axis)


@pytest.mark.parametrize("name", ["left", "right"])
def test_rows_beyond_exact_sums_are_refused(name: str) -> None:
    channels = 1042
    parts: dict[str, Any] = {
        "group": np.zeros(channels, np.uint8),
        "left": np.zeros((1042, channels), np.int8),
        "left_scale": np.zeros(1042, np.float32),
        "right": np.zeros((channels, 1042), np.int8),
        "right_scale": np.zeros(channels, np.float32),
    }
    parts[name][5, :1040] = -127
    parts[name][5, 1040] = 24
    Feedback(**parts)
    parts[name][5, 1041] = 1
    with pytest.raises(ModelError, match=f"input {name}\\): expected an absolute sum of at most 132104, found 132105"):
        Feedback(**parts)
