"""Fixed-point requantization against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from postquant.runtime_ops.integer import Affine, requantize
from postquant.runtime_ops.law_fixed_point import (
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    requantize_fixed_point,
)


def exact(total: int, multiplier: int, shift: int) -> int:
    """The two roundings, in rational numbers: to nearest with ties upwards, then with ties away from zero."""
    shifted = max(min(total * 2 ** max(shift, 0), 2**31 - 1), -(2**31))
    high = math.floor(Fraction(shifted * multiplier, 2**31) + Fraction(1, 2))
    value = Fraction(high, 2 ** max(-shift, 0))
    rounded = math.floor(abs(value) + Fraction(1, 2))
    return rounded if value >= 0 else -rounded


def test_multiplier_and_shift_stand_for_the_factor() -> None:
    factors = np.exp(np.random.default_rng(0).uniform(-20, 10, 1000))
    multiplier, shift = quantize_multiplier(factors)
    assert (multiplier >= 2**30).all()
    back = multiplier.astype(np.float64) * 2.0 ** (shift.astype(np.float64) - 31)
    np.testing.assert_allclose(back, factors, rtol=2.0**-31)


def test_a_mantissa_that_rounds_to_one_moves_into_the_shift() -> None:
    multiplier, shift = quantize_multiplier(1.0 - 2.0**-40)
    assert (int(multiplier), int(shift)) == (2**30, 1)


def test_factors_that_move_nothing_are_zero() -> None:
    assert [int(number) for number in quantize_multiplier(2.0**-40)] == [0, 0]
    assert [int(number) for number in quantize_multiplier(0.0)] == [0, 0]


@pytest.mark.parametrize("factor", [-0.5, math.inf, math.nan, 2.0**31])
def test_impossible_factors_are_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="fixed-point factor"):
        quantize_multiplier(factor)


def test_products_equal_rational_arithmetic() -> None:
    rng = np.random.default_rng(1)
    for scale in (1e-9, 3e-4, 0.02, 0.5, 0.75, 1.5, 300.0):
        multiplier, shift = quantize_multiplier(scale * rng.uniform(0.9, 1.1))
        ends = np.array([-(2**31), 2**31 - 1, 0, 1, -1], np.int32)
        sums = np.concatenate([rng.integers(-(2**31), 2**31, 200), rng.integers(-5000, 5000, 200), ends])
        found = multiply_by_quantized_multiplier(sums.astype(np.int32), multiplier, shift)
        for total, value in zip(sums.tolist(), found.tolist(), strict=True):
            wanted = max(min(exact(total, int(multiplier), int(shift)), 2**31 - 1), -(2**31))
            assert value == wanted, (total, scale)


def test_ties_go_away_from_zero() -> None:
    multiplier, shift = quantize_multiplier(0.125)
    sums = np.array([4, 12, -4, -12], np.int32)
    assert multiply_by_quantized_multiplier(sums, multiplier, shift).tolist() == [1, 2, -1, -2]


def test_two_roundings_differ_from_one() -> None:
    multiplier, shift = quantize_multiplier(0.125)
    # 3 / 8 becomes 2 / 4 in the first rounding, and 1 in the second.
    assert multiply_by_quantized_multiplier(np.array([3, -3], np.int32), multiplier, shift).tolist() == [1, 0]


def test_channels_have_factors_of_their_own_and_codes_are_limited() -> None:
    multiplier, shift = quantize_multiplier([0.5, 0.25])
    sums = np.array([[[100, -100]], [[100, -100]]], np.int32)  # (2, 1, 2): channels along axis 0
    codes = requantize_fixed_point(sums, multiplier, shift, -3, -40, 30, axis=0)
    assert codes.tolist() == [[[30, -40]], [[22, -28]]]


def test_codes_differ_from_those_of_a_float_factor_by_one_at_most() -> None:
    """onnxruntime multiplies int32 sums by one float32 factor; two integer roundings agree but for values near ties."""
    rng = np.random.default_rng(2)
    sums = rng.integers(-60000, 60000, 200_000).astype(np.int32)
    factor = np.float32(0.0021)
    out = Affine(np.ones((), np.float32), np.array(10, np.int32), np.dtype(np.uint8))
    wanted = requantize(sums, np.asarray(factor), out, 0).codes
    found = requantize_fixed_point(sums, *quantize_multiplier(factor), 10, 0, 255, axis=0)
    difference = np.abs(found - wanted)
    assert difference.max() == 1
    assert 0 < np.count_nonzero(difference) < 0.01 * difference.size
