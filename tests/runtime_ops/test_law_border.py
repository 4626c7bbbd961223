"""The rounding border: what it computes and that every runner computes the same bits; that it pays."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from postquant.runtime_ops.border_coefficients import window_codes
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.law_border import Border, border_quantize, sigmoid_border

NAMES = (
    "scale",
    "zero_point",
    "border",
    "window",
    "window_scale",
    "left",
    "left_scale",
    "right",
    "right_scale",
)


def make(
    rng: np.random.Generator,
    channels: int,
    *,
    levels: bool = False,
    window: tuple[int, int] = (1, 1),
    rank: int = 0,
    qmin: int = 2,
    qmax: int = 17,
) -> Border:
    def small(*shape: int) -> npt.NDArray[np.int8]:
        return rng.integers(-127, 128, shape).astype(np.int8)

    largest = 511 // math.prod(window)
    taps = rng.integers(-min(largest, 127), min(largest, 127) + 1, (channels, *window)).astype(np.int8)
    return Border(
        np.asarray(0.1, np.float32),
        np.asarray(7, np.uint8),
        rng.uniform(0.2, 0.8, (channels, qmax - qmin + 1 if levels else 1)).astype(np.float32),
        taps if math.prod(window) > 1 else np.zeros_like(taps),
        rng.uniform(0, 0.002, channels).astype(np.float32),
        small(rank, channels),
        rng.uniform(0.001, 0.02, rank).astype(np.float32),
        small(channels, rank),
        rng.uniform(0, 0.0003, channels).astype(np.float32),
        qmin,
        qmax,
    )


def nearest(channels: int, **changes: Any) -> Border:
    values: dict[str, Any] = {
        "scale": np.asarray(0.125, np.float32),
        "zero_point": np.asarray(4, np.uint8),
        "border": np.full((channels, 1), 0.5, np.float32),
        "window": np.zeros((channels, 1, 1), np.int8),
        "window_scale": np.zeros(channels, np.float32),
        "left": np.zeros((0, channels), np.int8),
        "left_scale": np.zeros(0, np.float32),
        "right": np.zeros((channels, 0), np.int8),
        "right_scale": np.zeros(channels, np.float32),
        "qmin": 0,
        "qmax": 15,
    }
    return Border(**(values | changes))


def constants(border: Border) -> dict[str, npt.NDArray[Any]]:
    return {name: getattr(border, name) for name in NAMES}


def test_a_border_of_one_half_rounds_to_nearest_with_ties_down() -> None:
    x = np.arange(-3, 3, 1 / 32, dtype=np.float32)[:, None]
    expected = np.clip(np.ceil(x / np.float32(0.125) - 0.5), -4, 11) + 4
    np.testing.assert_array_equal(border_quantize(x, nearest(1)), expected)


def test_codes_are_what_the_formula_says() -> None:
    rng = np.random.default_rng(3)
    border = make(rng, 3, levels=True, window=(3, 5), rank=2)
    x = rng.normal(0, 1, (2, 3, 4, 6)).astype(np.float32)
    codes = border_quantize(x, border)
    ratio = np.clip(x / border.scale, np.float32(-5), np.float32(10))
    residual = np.rint((np.rint(ratio) - ratio) * 128).astype(int)
    assert np.abs(residual).max() <= 64
    for n, c, i, j in itertools.product(*(range(d) for d in x.shape)):
        window = sum(
            int(border.window[c, a, b]) * residual[n, c, i + a - 1, j + b - 2]
            for a, b in itertools.product(range(3), range(5))
            if 0 <= i + a - 1 < 4 and 0 <= j + b - 2 < 6
        )
        inner = [
            int(np.clip(np.rint(np.float32(row.astype(int) @ residual[n, :, i, j]) * s), -127, 127))
            for row, s in zip(border.left, border.left_scale, strict=True)
        ]
        across = sum(int(r) * t for r, t in zip(border.right[c], inner, strict=True))
        below = np.floor(ratio[n, c, i, j])
        limit = border.border[c, int(below) + 5]
        limit = np.float32(limit + np.float32(window) * border.window_scale[c])
        limit = np.float32(limit + np.float32(across) * border.right_scale[c])
        up = ratio[n, c, i, j] - below > max(limit, 0)
        assert codes[n, c, i, j] == int(below) + 7 + up


def test_codes_are_those_of_floor_or_ceil_however_large_the_border() -> None:
    rng = np.random.default_rng(4)
    x = rng.uniform(-1, 1.5, (500, 1)).astype(np.float32)
    ratio = np.clip(x / np.float32(0.125), -4, 11)
    for value, expected in ((-9.0, np.ceil(ratio)), (9.0, np.floor(ratio))):
        codes = border_quantize(x, nearest(1, border=np.array([[value]], np.float32)))
        np.testing.assert_array_equal(codes, expected + 4)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("levels", [False, True], ids=["one border", "a border per level"])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_body_gives_the_same_bits_everywhere(operators: Any, rank: int, levels: bool, opset: int) -> None:
    rng = np.random.default_rng(rank)
    for shape, window in (
        ((3, 5, 7, 6), (3, 3)),
        ((2, 4, 3, 3), (1, 1)),
        ((2, 3, 9), (1, 5)),
        ((4, 6), (1, 1)),
        ((1, 2, 3, 2), (5, 7)),
    ):
        border = make(rng, shape[1], levels=levels, window=window, rank=rank)
        x = rng.normal(size=shape).astype(np.float32)
        x.flat[:5] = [0.05, 0.15, -0.05, 1e30, -1e30]
        expected = border_quantize(x, border)
        attributes = {"channels": shape[1], "qmin": border.qmin, "qmax": border.qmax}
        model = operators.model("BorderQuantize", x, constants(border), attributes, opset=opset)
        (observed,), kernels = operators.on_onnxruntime(model, x)
        assert "If" not in kernels
        results = [observed, operators.on_onnxruntime(model, x, optimize=False)[0][0]]
        results += [operators.on_evaluator(model, x)[0]] if opset >= 18 else []
        results += [operators.on_evaluator(model, x, reference=True)[0]]
        for result in results:
            assert result.dtype == np.uint8
            np.testing.assert_array_equal(result, expected)


def test_sums_stay_exact_at_the_limits(operators: Any) -> None:
    """The largest allowed coefficients on a wide tensor: onnxruntime's float sums must still be integers."""
    rng = np.random.default_rng(6)
    channels = 2064
    border = nearest(
        channels,
        left=np.full((2, channels), 127, np.int8),
        left_scale=np.full(2, 2.0**-14, np.float32),
        right=np.full((channels, 2), 127, np.int8),
        right_scale=np.full(channels, 1e-4, np.float32),
        window=np.broadcast_to(np.array([[127, 127, 127], [-127, 0, 3], [0, 0, 0]], np.int8), (channels, 3, 3)).copy(),
        window_scale=np.full(channels, 1e-4, np.float32),
    )
    x = (rng.normal(size=(1, channels, 4, 4)) + 0.3).astype(np.float32)
    attributes = {"channels": channels, "qmin": 0, "qmax": 15}
    model = operators.model("BorderQuantize", x, constants(border), attributes)
    np.testing.assert_array_equal(operators.on_onnxruntime(model, x)[0][0], border_quantize(x, border))


def test_a_border_that_sees_residuals_lowers_the_error_of_the_layer_behind() -> None:
    """One Jacobi step from nearest rounding: a * H_ij / H_ii for a depthwise layer, H its kernel's autocorrelation."""
    rng = np.random.default_rng(8)
    kernel = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float64) / 16
    autocorrelation = np.zeros((5, 5))
    for i, j, k, m in itertools.product(range(3), repeat=4):
        autocorrelation[i - k + 2, j - m + 2] += kernel[i, j] * kernel[k, m]
    ratios = 0.2 * autocorrelation / autocorrelation[2, 2]
    ratios[2, 2] = 0
    x = np.maximum(rng.normal(size=(1, 1, 64, 64)) * 0.4, 0).astype(np.float32)

    def error(border: Border) -> float:
        codes = border_quantize(x, border).astype(np.float64)[0, 0] - 4
        difference = codes * 0.125 - np.minimum(x[0, 0], 11 * 0.125)
        blurred = sum(
            kernel[i, j] * difference[i : i + 62, j : j + 62] for i, j in itertools.product(range(3), repeat=2)
        )
        return float(np.square(blurred).mean())

    window, window_scale = window_codes(ratios[None])
    seeing = nearest(1, window=window, window_scale=window_scale)
    assert error(seeing) < 0.85 * error(nearest(1))


def test_sigmoid_borders() -> None:
    table = sigmoid_border(np.array([[0, 0, 0], [0, 2, -1]], np.float64), 0, 15)
    assert table.dtype == np.float32
    assert table.shape == (2, 16)
    assert (table[0] == 0.5).all()
    assert table[1, 15] == np.float32(1 / (1 + math.exp(-1)))
    x = np.array([[0.0625, 1.9375 - 0.03]], np.float32)  # fractions 0.5 at level 0, and 0.26 at level 15 - 0
    assert border_quantize(x, nearest(2, border=table, zero_point=np.asarray(0, np.uint8))).tolist() == [[0, 15]]


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": np.array([1], np.float32)},
        {"scale": np.float32(0)},
        {"zero_point": np.int8(0)},
        {"border": np.full((2, 3), 0.5, np.float32)},
        {"border": np.full((1, 1), 0.5, np.float32)},
        {"border": np.full((2, 1), np.nan, np.float32)},
        {"window": np.zeros((2, 2, 1), np.int8)},
        {"window": np.zeros((2, 1), np.int8)},
        {"window": np.full((2, 3, 3), 127, np.int8)},
        {"window": np.full((2, 1, 1), -128, np.int8)},
        {"window_scale": np.zeros(1, np.float32)},
        {"left": np.zeros((1, 2), np.int8)},
        {"left": np.zeros((0, 3), np.int8)},
        {"right": np.zeros((2, 1), np.int8)},
        {"right_scale": np.zeros((2, 1), np.float32)},
        {"qmin": 15},
        {"qmax": 256},
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_explained(changes: dict[str, Any]) -> None:
    nearest(2)
    with pytest.raises(ModelError):
        nearest(2, **changes)


@pytest.mark.parametrize("shape", [(2,), (1, 3), (1, 2, 1, 1, 1)], ids=str)
def test_inputs_that_do_not_fit_are_explained(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError):
        border_quantize(np.zeros(shape, np.float32), nearest(2))
