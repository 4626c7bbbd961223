"""Histograms of channels against NumPy's, sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postquant.calib.channel_histogram import ChannelHistogram

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 8, 8), 1), ((4, 7, 3), 2), ((5, 6), 1), ((4, 4), None)])
@pytest.mark.parametrize(("low", "high"), [(0.0, 3.0), (-2.0, 1.0), (-1.0, 0.0)])
def test_values_are_counted_by_channel(shape: tuple[int, ...], axis: int | None, low: float, high: float) -> None:
    channels = 1 if axis is None else shape[axis]
    found = ChannelHistogram(low, high, channels, axis)
    samples = [RNG.uniform(1.5 * low, 1.5 * high, shape).astype(np.float32) for _ in range(3)]
    for sample in samples:
        found.update(sample)
    values = found.values()
    for channel in range(channels):
        x = np.stack(samples) if axis is None else np.take(np.stack(samples), channel, axis + 1)
        x = np.clip(x, low, high).ravel()
        counts = found.counts[channel]
        assert counts.sum() == x.size
        # Every value is within a bin of what it is counted as.
        width = (high - low) / 1024
        assert np.abs(np.sort(x) - np.repeat(values, counts)).max() <= 1.001 * width
        assert counts @ values == pytest.approx(x.sum(), abs=x.size * width)


@given(st.permutations(range(4)))
def test_the_order_of_samples_does_not_matter(order: list[int]) -> None:
    samples = [np.full((1, 2, 3), value, np.float32) for value in (0.0, 0.5, 1.0, 7.0)]
    found, other = ChannelHistogram(0.0, 2.0, 2, 1), ChannelHistogram(0.0, 2.0, 2, 1)
    for index, sample in zip(order, samples, strict=True):
        found.update(sample)
        other.update(samples[index])
    np.testing.assert_array_equal(found.counts, other.counts)


def test_large_tensors_enter_in_part_at_all_positions() -> None:
    found = ChannelHistogram(0.0, 4095.0, 2, 1)
    places = np.arange(64 * 64, dtype=np.float32)
    for _ in range(9):
        found.update(np.broadcast_to(places, (1, 2, 64 * 64)))
    assert found.counts[0].sum() < 9 * 513
    assert (found.counts > 0).mean() > 0.99  # every bin of four positions was seen


@pytest.mark.parametrize(("low", "high"), [(0.1, 1.0), (-1.0, -0.5), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_range_holds_zero(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="a range around 0"):
        ChannelHistogram(low, high)
