"""Second moments: against X'X, however the stream is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postquant.calib.moments import MomentSums, block_depth


@given(st.lists(st.integers(0, 700), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 9))
def test_any_split_of_the_stream(cuts: list[int], groups: int, depth: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((sum(cuts), groups, depth)) + 0.3).astype(np.float32)
    sums = MomentSums(groups, depth)
    begin = 0
    for cut in cuts:
        sums.update(rows[begin : begin + cut])
        begin += cut
    found = sums.result()
    assert found.rows == len(rows)
    assert found.square.shape == (groups, depth, depth)
    exact = rows.astype(np.float64)
    count = max(len(rows), 1)
    np.testing.assert_allclose(found.mean, exact.sum(0) / count, rtol=1e-6, atol=1e-7)
    expected = np.einsum("pgk,pgl->gkl", exact, exact) / count
    np.testing.assert_allclose(found.square, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.square, found.square.transpose(0, 2, 1))


def test_a_result_may_be_asked_for_in_between() -> None:
    rows = np.ones((10, 1, 2), np.float32)
    sums = MomentSums(1, 2)
    assert sums.result().rows == 0
    assert not sums.result().square.any()
    sums.update(rows)
    assert sums.result().rows == 10
    sums.update(2 * rows)
    found = sums.result()
    assert found.rows == 20
    np.testing.assert_allclose(found.mean, 1.5)
    np.testing.assert_allclose(found.square, 2.5)


@pytest.mark.parametrize("size", [1e16, 1e30, 1e38])
def test_large_values_do_not_overflow(size: float) -> None:
    rows = (np.random.default_rng(0).uniform(-1, 1, (600, 2, 3)) * size).astype(np.float32)
    sums = MomentSums(2, 3)
    sums.update(rows)
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(sums.result().square, np.einsum("pgk,pgl->gkl", exact, exact) / 600, rtol=1e-12)


@pytest.mark.parametrize("kind", ["Conv", "depthwise", "MatMul"])
def test_errors_of_any_weight_follow_from_them(layer_case: Any, kind: str) -> None:
    case = layer_case(kind)
    moments = case.moments()
    change = np.random.default_rng(5).standard_normal(case.weight.shape).astype(np.float32)
    d = case.layer.matrix(change).astype(np.float64)
    for centred in (False, True):
        square = (moments.centred() if centred else moments).square
        expected = np.square(case.outputs(change, centred=centred)).mean(0)
        np.testing.assert_allclose(np.einsum("gkm,gkl,glm->gm", d, square, d), expected, rtol=1e-4)


@pytest.mark.parametrize(("groups", "depth", "block"), [(1, 6, 3), (2, 6, 2), (3, 4, 1), (2, 5, 5)])
def test_blocks_are_the_diagonal_of_the_whole(groups: int, depth: int, block: int) -> None:
    rows = np.random.default_rng(0).standard_normal((900, groups, depth)).astype(np.float32)
    whole, parts = MomentSums(groups, depth), MomentSums(groups, depth, block)
    for sums in (whole, parts):
        sums.update(rows[:100])
        sums.update(rows[100:])
    full, found = whole.result(), parts.result()
    assert found.square.shape == (groups * depth // block, block, block)
    np.testing.assert_allclose(found.mean.reshape(full.mean.shape), full.mean, rtol=1e-6)
    for centred, square in ((full.centred().square, found.centred().square), (full.square, found.square)):
        diagonal = [
            centred[group, begin : begin + block, begin : begin + block]
            for group in range(groups)
            for begin in range(0, depth, block)
        ]
        np.testing.assert_allclose(square, diagonal, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 5000), st.integers(1, 3000))
def test_the_size_of_a_block(depth: int, limit: int) -> None:
    block = block_depth(depth, limit)
    assert block <= limit
    assert depth % block == 0
    assert not any(depth % size == 0 for size in range(block + 1, min(depth, limit) + 1))
