"""Levels of codes: what they are for every element, and what is left of the function body on onnxruntime."""

from __future__ import annotations

import collections
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

from postquant.runtime_ops.code_book import nearest_codes
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.law_levels import lut_requantize

NUMBERS: dict[str, npt.NDArray[Any]] = {
    "x_scale": np.asarray(0.031, np.float32),
    "x_zero_point": np.asarray(13, np.uint8),
    "scale": np.asarray(0.043, np.float32),
    "zero_point": np.asarray(7, np.uint8),
}
# Shape of the codes, axis, rows of the table.
PLACES = [
    ((2, 3, 5, 7), -3, 3),
    ((2, 3, 5, 7), -3, 1),
    ((2, 3, 5, 7), -1, 7),
    ((4, 6), -2, 4),
    ((9,), -1, 9),
    ((9,), -8, 1),
    ((2, 1, 3, 2, 70), -3, 3),
    ((0, 3, 4), -2, 3),
]


class GatherElements(OpRun):
    """The operator by its definition; that of onnx's evaluator knows no more than 64 elements."""

    op_domain = ""

    def _run(self, data: Any, indices: Any, axis: int) -> tuple[Any]:
        return (np.take_along_axis(data, indices, axis),)


def table_of(rng: np.random.Generator, rows: int, count: int = 16) -> npt.NDArray[np.uint8]:
    return np.sort(rng.integers(0, 256, (rows, count)), axis=1).astype(np.uint8)


def nearest(levels: list[int], code: int) -> int:
    """The upper one of two that are equally near."""
    return min((abs(level - code), -level, level) for level in levels)[2]


@settings(deadline=None)
@given(data=st.data())
def test_every_element_gets_the_nearest_level_of_its_code(data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    axis = -draw(st.integers(1, len(shape)))
    rows, count = draw(st.sampled_from([1, shape[axis]])), draw(st.integers(2, 16))
    level, code = st.integers(0, 255), st.integers(0, 255)
    table = [sorted(draw(st.lists(level, min_size=count, max_size=count))) for _ in range(rows)]
    x = np.array(draw(st.lists(code, min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))), np.uint8)
    x = x.reshape(shape)
    scales = st.floats(2.0**-6, 2.0**6, width=32)
    x_scale, scale = np.float32(draw(scales)), np.float32(draw(scales))
    x_zero, zero = draw(code), draw(code)
    observed = lut_requantize(
        x,
        np.asarray(x_scale),
        np.asarray(x_zero, np.uint8),
        np.asarray(scale),
        np.asarray(zero, np.uint8),
        np.array(table, np.uint8),
        axis,
    )
    assert (observed.dtype, observed.shape) == (x.dtype, x.shape)
    for place, stored in np.ndenumerate(x):
        real = np.float32(int(stored) - x_zero) * x_scale
        new = min(max(round(float(real / scale)) + zero, 0), 255)  # Python rounds half to even, too
        assert observed[place] == nearest(table[0 if rows == 1 else place[axis]], new)


def test_ties_and_equal_numbers() -> None:
    """With the numbers of the codes themselves: every code's nearest level, the upper one in the middle."""
    table = np.array([[0, 10, 20, 255], [7, 7, 8, 8]], np.uint8)
    x = np.tile(np.arange(256, dtype=np.uint8), (2, 1))
    same = {**NUMBERS, "scale": NUMBERS["x_scale"], "zero_point": NUMBERS["x_zero_point"]}
    observed = lut_requantize(x, **same, table=table, axis=-2)
    np.testing.assert_array_equal(observed, nearest_codes(table))
    assert observed[0, [4, 5, 14, 15, 137, 138]].tolist() == [0, 10, 10, 20, 20, 255]


@pytest.mark.parametrize(("x_scale", "scale"), [(3e38, 1e-38), (1e-38, 3e38), (1e-45, 1e-45), (3e38, 3e38)])
def test_extreme_scales_saturate(operators: Any, x_scale: float, scale: float) -> None:
    table = np.array([[3, 90, 200]], np.uint8)
    x = np.arange(256, dtype=np.uint8)
    constants: dict[str, npt.NDArray[Any]] = {
        "x_scale": np.asarray(x_scale, np.float32),
        "x_zero_point": np.asarray(100, np.uint8),
        "scale": np.asarray(scale, np.float32),
        "zero_point": np.asarray(80, np.uint8),
    }
    law = lut_requantize(x, **constants, table=table, axis=-1)
    assert law[100] == 90
    ends = {0: 3, 255: 200} if x_scale >= scale else {0: 90, 255: 90}
    assert {place: int(law[place]) for place in ends} == ends
    model = operators.model("LutRequantize", x, {**constants, "table": table}, {"axis": -1})
    np.testing.assert_array_equal(operators.on_onnxruntime(model, x)[0][0], law)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize(("shape", "axis", "rows"), PLACES, ids=str)
def test_bodies_on_onnxruntime_and_in_the_evaluator(
    operators: Any, shape: tuple[int, ...], axis: int, rows: int, opset: int
) -> None:
    rng = np.random.default_rng(rows)
    x = rng.integers(0, 256, shape).astype(np.uint8)
    for count in (2, 3, 16):
        constants = {**NUMBERS, "table": table_of(rng, rows, count)}
        law = lut_requantize(x, **constants, axis=axis)
        model = operators.model("LutRequantize", x, constants, {"axis": axis}, opset=opset)
        results = [operators.on_onnxruntime(model, x, optimize=optimize)[0][0] for optimize in (True, False)]
        if opset >= 19:
            # The evaluator does not show operators of ours to functions.
            evaluator: Any = ReferenceEvaluator(inline_local_functions(model), new_ops=[GatherElements])
            results += [evaluator.run(None, {"x": x})[0], operators.on_evaluator(model, x, reference=True)[0]]
        for observed in results:
            assert (observed.dtype, observed.shape) == (np.uint8, x.shape)
            np.testing.assert_array_equal(observed, law)


@pytest.mark.parametrize("opset", [13, 15, 17, 21])
@pytest.mark.parametrize("rows", [1, 3])
def test_only_the_lookup_is_left_for_a_run(operators: Any, tmp_path: pathlib.Path, rows: int, opset: int) -> None:
    x = np.zeros((2, 3, 4, 5), np.uint8)
    constants = {**NUMBERS, "table": table_of(np.random.default_rng(0), rows)}
    model = operators.model("LutRequantize", x, constants, {"axis": -3}, opset=opset)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    left = collections.Counter(node.op_type for node in graph.node)
    # onnxruntime leaves out the addition of nothing that a single row needs.
    kinds = ["Cast", *(["Add"] if rows > 1 else []), "Reshape", "Reshape", "GatherElements", "Shape"]
    assert left == collections.Counter(kinds)


def test_the_table_may_be_computed(operators: Any) -> None:
    """Nothing of the body asks for constants."""
    rng = np.random.default_rng(4)
    x = rng.integers(0, 256, (2, 3, 5, 7)).astype(np.uint8)
    constants = {**NUMBERS, "table": table_of(rng, 3)}
    model = operators.model("LutRequantize", x, constants, {"axis": -3})
    feeds = {"x": x, **constants}
    del model.graph.initializer[:]
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
        for name, value in constants.items()
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    law = lut_requantize(x, **constants, axis=-3)
    np.testing.assert_array_equal(session.run(None, feeds)[0], law)


GOOD: dict[str, Any] = {"x": np.zeros((2, 3, 4), np.uint8), **NUMBERS, "table": np.zeros((3, 4), np.uint8), "axis": -2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": np.zeros((2, 3, 4), np.int8)}, "input x"),
        ({"x": np.zeros((), np.uint8), "table": np.zeros((1, 4), np.uint8)}, "one dimension or more"),
        ({"x": np.zeros((2, 4, 4), np.uint8)}, "expected 3 channels on axis -2, found shape \\(2, 4, 4\\)"),
        ({"x": np.zeros(3, np.uint8)}, "expected 3 channels"),
        ({"x_scale": np.ones(1, np.float32)}, "input x_scale"),
        ({"x_scale": np.asarray(0, np.float32)}, "finite and positive"),
        ({"scale": np.asarray(np.nan, np.float32)}, "input scale"),
        ({"scale": np.asarray(0.1)}, "expected float32 of shape"),
        ({"x_zero_point": np.asarray(0, np.int8)}, "input x_zero_point"),
        ({"zero_point": np.zeros(3, np.uint8)}, "input zero_point"),
        ({"table": np.zeros((3, 4), np.int8)}, "input table"),
        ({"table": np.zeros(4, np.uint8)}, "input table"),
        ({"table": np.zeros((0, 4), np.uint8)}, "C >= 1"),
        ({"table": np.zeros((3, 1), np.uint8)}, "2 <= n <= 16"),
        ({"table": np.zeros((3, 17), np.uint8)}, "2 <= n <= 16"),
        ({"table": np.array([[0, 1], [1, 0], [0, 1]], np.uint8)}, "sorted"),
        ({"axis": 0}, "attribute axis"),
        ({"axis": -9}, "expected -8 to -1, found -9"),
        ({"axis": -3}, "3 channels on axis -3"),
    ],
    ids=str,
)
def test_nodes_that_do_not_fit_are_explained(changes: dict[str, Any], words: str) -> None:
    assert lut_requantize(**GOOD).shape == (2, 3, 4)
    with pytest.raises(ModelError, match=words):
        lut_requantize(**(GOOD | changes))
