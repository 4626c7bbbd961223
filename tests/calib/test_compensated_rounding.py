"""Compensated rounding: a literal, slow GPTQ, and what must never happen."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from postquant.calib.compensated_rounding import DAMPING, Compensation, compensate
from postquant.calib.moments import Moments, MomentSums
from postquant.calib.weight_search import SearchOptions, WeightProblem, problem_of, quantize_matrix, search_weight

KINDS = ("Conv", "grouped", "depthwise", "ConvTranspose", "transposed groups", "Gemm", "MatMul")

Array = np.ndarray[Any, np.dtype[np.float32]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]


def slow_gptq(weights: Doubles, scale: Doubles, moments: Doubles, qmin: int, qmax: int) -> Doubles:
    """Optimal brain quantization of a (K, M) matrix, one row after the other, inverting what is left each time."""
    depth = len(weights)
    order = list(np.argsort(-np.diag(moments), kind="stable"))
    damped = moments + np.eye(depth) * max(DAMPING * float(np.mean(np.diag(moments))), 1e-12)
    work, codes = weights / scale, np.zeros_like(weights)
    while order:
        inverse = np.linalg.inv(damped[np.ix_(order, order)])
        k = order.pop(0)
        codes[k] = np.clip(np.rint(work[k]), qmin, qmax)
        for position, other in enumerate(order, start=1):
            work[other] -= (work[k] - codes[k]) * inverse[0, position] / inverse[0, 0]
    return codes


def compensated_codes(matrix: Array, scale: Array, square: Doubles, qmin: int, qmax: int, *, block: int = 64) -> Array:
    return Compensation(square, block=block).round(matrix / scale, lambda ratio: np.clip(np.rint(ratio), qmin, qmax))


def error_of(case: Any, codes: Array, scale: Array) -> Doubles:
    """(G, M) mean squared error of the outputs."""
    d = codes.astype(np.float64) * scale - case.layer.matrix(case.weight)
    errors: Doubles = np.square(np.einsum("pgk,gkm->pgm", case.rows.astype(np.float64), d)).mean(0)
    return errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("block", [1, 3, 64])
def test_equals_a_literal_gptq(layer_case: Any, kind: str, bits: int, block: int) -> None:
    case = layer_case(kind, seed=bits)
    start = case.start(bits)
    matrix, square = case.layer.matrix(case.weight), case.moments().square
    scale = np.ascontiguousarray(case.layer.per_output(start.scale), np.float32)
    spec = start.spec
    found = compensated_codes(matrix, scale, square, spec.qmin, spec.qmax, block=block)
    for group in range(case.layer.groups):
        exact = matrix[group].astype(np.float64), scale[group].astype(np.float64), square[group]
        expected = slow_gptq(*exact, spec.qmin, spec.qmax)
        assert np.mean(found[group] != expected) < 0.01  # ties fall either way in float32


def test_it_helps_where_inputs_are_correlated(layer_case: Any) -> None:
    case = layer_case("Conv", count=500)
    start = case.start(3)
    scale = np.ascontiguousarray(case.layer.per_output(start.scale), np.float32)
    matrix = case.layer.matrix(case.weight)
    nearest = quantize_matrix(matrix, scale, start.spec.qmin, start.spec.qmax)
    codes = compensated_codes(matrix, scale, case.moments().square, start.spec.qmin, start.spec.qmax)
    assert error_of(case, codes, scale).sum() < 0.7 * error_of(case, nearest, scale).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_never_worse_than_what_it_is_given(layer_case: Any, kind: str, searched: bool, per_channel: bool) -> None:
    for seed in range(3):
        case = layer_case(kind, seed, count=30)
        options = SearchOptions(candidates=12, centred=False)
        given = case.start(3, per_channel=per_channel)
        if searched:
            given = search_weight(case.layer, case.weight, given, case.moments(), options)
        problem = problem_of(case.layer, case.weight, case.moments(), options)
        found = compensate(case.layer, problem, given)
        before, after = case.errors(given), case.errors(found)
        if given.spec.axis is None:
            before, after = before.sum(), after.sum()
        assert (after <= before * (1 + 1e-4) + 1e-9).all()
        assert found.codes is not None
        assert found.codes.dtype == np.int8
        assert np.abs(found.codes.astype(int)).max() <= given.spec.qmax
        assert found.scale.shape == given.scale.shape


def problem_with(case: Any, square: Doubles) -> WeightProblem:
    return WeightProblem(case.layer, case.weight, Moments(10, np.zeros(square.shape[:2]), square))


def test_independent_inputs_are_rounded_to_nearest(layer_case: Any) -> None:
    case = layer_case("MatMul")
    start = case.start(4)
    square = np.eye(case.layer.depth)[np.newaxis]
    found = compensate(case.layer, problem_with(case, square), start)
    assert found.codes is not None
    np.testing.assert_array_equal(found.codes, start.quantize(case.weight))


def test_one_row(layer_case: Any) -> None:
    case = layer_case("MatMul", inputs=1)
    start = case.start(4)
    scale = np.ascontiguousarray(case.layer.per_output(start.scale), np.float32)
    matrix = case.layer.matrix(case.weight)
    codes = compensated_codes(matrix, scale, case.moments().square, -7, 7)
    np.testing.assert_array_equal(codes, quantize_matrix(matrix, scale, -7, 7))


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_singular_moments(layer_case: Any, size: float) -> None:
    """Fewer samples than inputs, an input that is always zero, two equal ones; in any unit."""
    case = layer_case("Conv", count=5)
    rows = case.rows * np.float32(size**0.5)
    rows[:, :, 3] = 0
    rows[:, :, 5] = rows[:, :, 4]
    singular = dataclasses.replace(case, rows=rows)
    found = compensate(case.layer, problem_with(case, singular.moments().square), case.start(3))
    assert (singular.errors(found) <= singular.errors(case.start(3)) * (1 + 1e-4)).all()


def test_dead_layers(layer_case: Any) -> None:
    case = layer_case("depthwise")
    square = case.moments().square
    square[2] = 0  # nothing arrives in one group
    weight = case.weight.copy()
    weight[4] = 0  # another group has no weights
    dead = dataclasses.replace(case, weight=weight)
    start = dead.start(4)
    found = compensate(case.layer, problem_with(dead, square), start)
    assert found.codes is not None
    assert np.isfinite(found.scale).all()
    np.testing.assert_array_equal(found.codes[2], start.quantize(weight)[2])
    assert not found.codes[4].any()


@pytest.mark.parametrize(("kind", "block"), [("Conv", 8), ("grouped", 6), ("MatMul", 3), ("Gemm", 2)])
def test_blocks_of_moments_stand_for_inputs_that_never_meet(layer_case: Any, kind: str, block: int) -> None:
    """Blocks of the moments of rows are whole moments of rows in which the inputs of only one block are not zero."""
    case = layer_case(kind)
    layer = case.layer
    own = np.arange(layer.depth) // block
    blocks = layer.depth // block
    apart = np.concatenate([case.rows * (own == i) for i in range(blocks)]) * np.float32(blocks**0.5)
    separated = dataclasses.replace(case, rows=apart)
    sums = MomentSums(layer.groups, layer.depth, block)
    sums.update(case.rows)
    start, options = case.start(4), SearchOptions(centred=False)

    def found(moments: Moments) -> list[Doubles]:
        problem = problem_of(layer, case.weight, moments, options)
        searched = search_weight(layer, case.weight, start, moments, options)
        rounded = compensate(layer, problem, searched)
        errors = [separated.errors(quantizer) for quantizer in (start, searched, rounded)]
        np.testing.assert_allclose(problem.error(layer.matrix(start.simulate(case.weight))), errors[0], rtol=1e-4)
        return errors

    by_block, whole = found(sums.result()), found(separated.moments())
    for errors, expected in zip(by_block, whole, strict=True):
        # Ties fall either way in float32.
        np.testing.assert_allclose(errors.sum(), expected.sum(), rtol=0.02)
    assert by_block[2].sum() < by_block[1].sum() < by_block[0].sum()


@pytest.mark.parametrize("moment", [0.0, -1e-9, np.inf, np.nan])
def test_moments_that_tell_nothing_round_to_nearest(moment: float) -> None:
    """Constant inputs leave the rounding noise of a covariance, enormous ones leave infinity: no error, no change."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(1, 6, 4)).astype(np.float32)
    scale = np.full((1, 1, 4), 0.1, np.float32)
    found = Compensation(np.full((1, 6, 6), moment)).round(matrix / scale, lambda r: np.clip(np.rint(r), -127, 127))
    np.testing.assert_array_equal(found, np.clip(np.rint(matrix / scale), -127, 127))


def table_nearest(table: list[int]) -> Any:
    """Nearest entries, by trying all."""
    levels = np.array(table, np.float32)
    return lambda ratio: levels[np.abs(ratio[..., np.newaxis] - levels).argmin(-1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 4, 64])
def test_descent_never_hurts_and_ends_where_no_single_code_helps(layer_case: Any, kind: str, block: int) -> None:
    case = layer_case(kind, count=100)
    matrix, square = case.layer.matrix(case.weight), case.moments().square
    table = [-9, -4, -2, 0, 1, 3, 6, 10]
    scale = (np.abs(matrix).max(axis=1, keepdims=True) / 10).astype(np.float32)
    nearest = table_nearest(table)
    start = nearest(matrix / scale)
    found = Compensation(square, block=block).descend(matrix / scale, start, nearest, sweeps=50)
    before, after = error_of(case, start, scale), error_of(case, found, scale)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.9 * before.sum()
    assert np.isin(found, table).all()
    for k in range(matrix.shape[1]):
        for level in table:
            other = found.copy()
            other[:, k] = level
            assert (error_of(case, other, scale) >= after * (1 - 1e-4)).all()


def test_descent_leaves_alone_what_nothing_hears(layer_case: Any) -> None:
    case = layer_case("depthwise")
    square = case.moments().square
    square[2] = 0
    matrix = case.layer.matrix(case.weight)
    start = np.rint(matrix * 3)
    found = Compensation(square).descend(matrix * 3, start, lambda ratio: np.clip(np.rint(ratio), -7, 7), sweeps=5)
    np.testing.assert_array_equal(found[2], start[2])
