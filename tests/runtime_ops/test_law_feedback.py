"""Levels with feedback: what they are for every element, in places and in cells of places."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def only(constants: Any, exists: list[bool]) -> Any:
    """The inputs of the channels of a cell that there are, each with the table of its channel in all."""
    return constants | {
        "table": np.resize(constants["table"], (len(exists), constants["table"].shape[1]))[exists],
        "group": constants["group"][exists],
        "left": constants["left"][:, exists],
        "right": constants["right"][exists],
        "right_scale": constants["right_scale"][exists],
    }


@settings(deadline=None)
@given(data=st.data())
def test_every_element_gets_the_level_of_the_specification(feedbacks: Any, data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    at, channels, rank = draw(st.integers(0, len(shape))), draw(st.integers(2, 7)), draw(st.integers(1, 4))
    axis = at - len(shape) - 1
    shape.insert(at, channels)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = draw(st.sampled_from([1, channels]))
    constants = feedbacks.constants(rng, channels, rank, rows=rows, count=draw(st.integers(2, 16)))
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
    observed = feedbacks.law(x, constants, axis)
    assert (observed.dtype, observed.shape) == (x.dtype, x.shape)
    columns, levels = (np.moveaxis(a, axis, -1).reshape(-1, channels).tolist() for a in (x, observed))
    for column, found in zip(columns, levels, strict=True):
        assert found == one_position(column, constants)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    ("cell", "shape"), [(2, (2, 5, 7)), (2, (3, 2, 4, 2)), (3, (2, 1, 2, 7, 5)), (5, (2, 3, 1))], ids=str
)
def test_every_cell_gets_the_levels_of_the_specification(
    feedbacks: Any, cell: int, shape: tuple[int, ...], rows: int
) -> None:
    rng = np.random.default_rng(cell)
    x = rng.integers(0, 256, shape).astype(np.uint8)
    constants = feedbacks.constants(rng, cell * cell * 2, 3, rows=rows)
    observed = feedbacks.law(x, constants, -3, cell)
    assert (observed.dtype, observed.shape) == (x.dtype, x.shape)
    height, width = shape[-2:]
    for outer in np.ndindex(*shape[:-3]):
        for top, left in itertools.product(range(0, height, cell), range(0, width, cell)):
            places = [
                (c, top + i, left + j) for i, j, c in itertools.product(range(cell), range(cell), range(shape[-3]))
            ]
            exists = [row < height and column < width for _, row, column in places]
            at = [place for place, there in zip(places, exists, strict=True) if there]
            levels = one_position([int(x[outer][place]) for place in at], only(constants, exists))
            assert [int(observed[outer][place]) for place in at] == levels


def test_cells_with_a_single_place_are_positions(feedbacks: Any) -> None:
    """What a cell has beyond its plane is nothing to the rest of it."""
    rng = np.random.default_rng(6)
    x = rng.integers(0, 256, (4, 3, 1, 1)).astype(np.uint8)
    constants = feedbacks.constants(rng, 12, 2)
    first = {
        "group": constants["group"][:3],
        "left": constants["left"][:, :3],
        "right": constants["right"][:3],
        "right_scale": constants["right_scale"][:3],
    }
    np.testing.assert_array_equal(feedbacks.law(x, constants, -3, 2), feedbacks.law(x, constants | first, -3))


@pytest.mark.parametrize("rows", [1, 6])
def test_without_coefficients_or_with_one_group_there_is_no_feedback(feedbacks: Any, rows: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (3, 6, 50)).astype(np.uint8)
    constants = feedbacks.constants(rng, 6, 2, rows=rows)
    plain = lut_requantize(x, **NUMBERS, table=constants["table"], axis=-2)
    assert (feedbacks.law(x, constants, -2) != plain).any()
    for changes in (
        {"left": np.zeros((2, 6), np.int8)},
        {"right_scale": np.zeros(6, np.float32)},
        {"group": np.full(6, 5, np.uint8)},
    ):
        np.testing.assert_array_equal(feedbacks.law(x, constants | changes, -2), plain)


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


def test_the_largest_coefficients_are_exact(operators: Any, feedbacks: Any) -> None:
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
    law = feedbacks.law(x, constants, -1)
    for row, stored in zip(law.tolist(), x.tolist(), strict=True):
        assert row == one_position(stored, constants)
    model = operators.model("FeedbackRequantize", x, constants, {"axis": -1, "cell": 1})
    np.testing.assert_array_equal(operators.on_onnxruntime(model, x)[0][0], law)


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

# The same channels in cells of 2.
IN_CELLS: dict[str, Any] = {
    "cell": 2,
    "group": np.zeros(12, np.uint8),
    "left": np.zeros((2, 12), np.int8),
    "right": np.zeros((12, 2), np.int8),
    "right_scale": np.zeros(12, np.float32),
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
        ({"cell": 0}, "attribute cell\\): expected 1 to 8"),
        ({"cell": 9, "axis": -3}, "attribute cell"),
        ({"cell": 2, "axis": -3}, "attribute cell\\): expected 1 to 8, its square a divisor of 3 channels, found 2"),
        (IN_CELLS | {"axis": -2}, "attribute axis\\): expected -3, found -2"),
        (IN_CELLS | {"axis": -3}, "expected 3 channels on axis -3, found shape \\(2, 3, 4\\)"),
        (IN_CELLS | {"axis": -3, "x": np.zeros((3, 4), np.uint8)}, "3 channels on axis -3"),
        (
            IN_CELLS | {"axis": -3, "table": np.zeros((12, 4), np.uint8)},
            "input table\\): expected 1 or 3 rows, found 12",
        ),
    ],
    ids=str,
)
def test_nodes_that_do_not_fit_are_explained(feedbacks: Any, changes: dict[str, Any], words: str) -> None:
    x = GOOD["x"]
    assert feedbacks.law(x, {k: v for k, v in GOOD.items() if k != "x"}, -2).shape == x.shape
    inputs = GOOD | {"axis": -2, "cell": 1} | changes
    x, axis, cell = inputs.pop("x"), inputs.pop("axis"), inputs.pop("cell")
    with pytest.raises(ModelError, match=words):
        feedbacks.law(x, inputs, axis, cell)


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
