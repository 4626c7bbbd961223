"""Integer coefficients of a border stand for the real ones."""

from __future__ import annotations

import numpy as np
import pytest

from postquant.runtime_ops.border_coefficients import across_codes, window_codes
from postquant.runtime_ops.law_border import WINDOW_WEIGHT


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (1, 7)], ids=str)
def test_windows_keep_their_values_and_the_limit(kernel: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(0, 0.05, (9, *kernel))
    real[3] = 0.1  # the limit on the sum, not on each, is what counts here
    real[4] = 0
    codes, scale = window_codes(real)
    assert np.abs(codes.astype(int)).sum(axis=(1, 2)).max() <= WINDOW_WEIGHT
    assert (scale > 0).all()
    restored = codes * (scale * 128)[:, None, None]
    assert (np.abs(restored - real) <= 0.5001 * 128 * scale[:, None, None]).all()
    assert np.abs(restored - real).max() < 0.004


def test_low_rank_factors_keep_their_product() -> None:
    rng = np.random.default_rng(1)
    left, right = rng.normal(0, 0.2, (4, 32)), rng.normal(0, 0.2, (32, 4))
    (left_codes, left_scale), (right_codes, right_scale) = across_codes(left, right)
    residual = np.rint(rng.uniform(-64, 64, (32, 1000)))
    inner = np.clip(np.rint((left_codes.astype(int) @ residual) * left_scale[:, None]), -127, 127)
    observed = (right_codes.astype(int) @ inner) * right_scale[:, None]
    expected = right @ (left @ residual / 128)
    assert np.sqrt(np.square(observed - expected).mean()) < 0.02 * expected.std()


def test_rank_zero_and_zero_factors_have_harmless_scales() -> None:
    for rank in (0, 2):
        (left, left_scale), (right, right_scale) = across_codes(np.zeros((rank, 3)), np.zeros((3, rank)))
        assert (left.shape, left_scale.shape) == ((rank, 3), (rank,))
        assert (right.shape, right_scale.shape) == ((3, rank), (3,))
        assert np.isfinite(left_scale).all()
        assert np.isfinite(right_scale).all()
