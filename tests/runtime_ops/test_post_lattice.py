"""The exact form of POST: two integer sums are the powers of sqrt(2); and how far the lattice is from them."""

from __future__ import annotations

import numpy as np
import pytest

from postquant.runtime_ops.code_book import post_table
from postquant.runtime_ops.post_lattice import PLANE_UNIT, exact_levels, lattice_scale, plane_scales, two_planes


@pytest.mark.parametrize("bits", [2, 4])
def test_planes_are_powers_of_two_and_together_powers_of_their_root(bits: int) -> None:
    even, odd = two_planes(bits)
    assert not ((even != 0) & (odd != 0)).any()
    for plane in (even, odd):
        halvings = np.log2(PLANE_UNIT / np.abs(plane[plane != 0].astype(int)))
        np.testing.assert_array_equal(halvings, np.rint(halvings))
        assert np.abs(plane.astype(int)).max() <= PLANE_UNIT
    exponents = -2 * np.log2(np.abs(exact_levels(bits)[exact_levels(bits) != 0]))
    np.testing.assert_allclose(exponents, np.rint(exponents), atol=1e-12)
    largest = 6 if bits == 4 else 1
    assert sorted(set(np.rint(exponents))) == list(range(largest + 1))
    assert (np.sign(exact_levels(bits)) == np.sign(post_table(bits))).all()


def test_the_lattice_is_within_a_sixth_of_a_percent() -> None:
    exact, lattice = exact_levels(4), post_table(4) / 96
    used = exact != 0
    deviation = np.abs(lattice[used] / exact[used] - 1)
    assert 0.0017 < deviation.max() < 0.00174
    assert (lattice[~used] == 0).all()


def test_two_integer_sums_give_the_exact_product() -> None:
    rng = np.random.default_rng(0)
    even, odd = two_planes(4)
    x, codes = rng.integers(0, 256, 500), rng.integers(0, 16, 500)
    sums = int(x @ even[codes].astype(int)), int(x @ odd[codes].astype(int))
    np.testing.assert_allclose((sums[0] + sums[1] / np.sqrt(2)) / PLANE_UNIT, x @ exact_levels(4)[codes], rtol=1e-13)
    # Against the lattice the output moves by about a tenth of a percent of its size.
    weights = rng.integers(0, 16, (500, 300))
    real, near = x @ exact_levels(4)[weights], x @ (post_table(4) / 96)[weights]
    assert 3e-4 < np.sqrt(np.square(real - near).mean() / np.square(real).mean()) < 2e-3


def test_scales_of_the_planes_make_the_levels() -> None:
    rng = np.random.default_rng(2)
    scale = np.exp(rng.uniform(-12, 3, 1000)).astype(np.float32)
    even, odd = plane_scales(scale)
    np.testing.assert_array_equal(lattice_scale(even), scale)
    first, second = (plane.astype(np.float64) for plane in two_planes(4))
    real = first[:, None] * even.astype(np.float64) + second[:, None] * odd.astype(np.float64)
    np.testing.assert_allclose(real, exact_levels(4)[:, None] * 96 * scale.astype(np.float64), rtol=1e-7)
