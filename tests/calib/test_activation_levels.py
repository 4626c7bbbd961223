"""Code books of activations have the least squared error, or at least none of their neighbours has less."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postquant.calib.activation_levels import fit_levels, least_squares_levels, quantizer_with_levels
from postquant.calib.channel_histogram import ChannelHistogram
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec


def spec(bits: int) -> QuantSpec:
    """What placement gives an activation."""
    return QuantSpec(bits, signed=False, symmetric=False)


def histogram(x: np.ndarray, axis: int | None = None) -> ChannelHistogram:
    """Of all values, over their own range."""
    channels = 1 if axis is None else x.shape[axis]
    found = ChannelHistogram(min(float(x.min()), 0.0), max(float(x.max()), 0.0), channels, axis)
    for sample in x.astype(np.float32) if axis else (x.astype(np.float32),):
        found.update(sample[None])
    return found


def error(entry: TensorQuantizer, x: np.ndarray) -> float:
    """Squared error of a tensor."""
    return float(((entry.simulate(x.astype(np.float32)) - x) ** 2).sum())


SHAPES = {
    "relu": lambda rng: np.maximum(rng.standard_normal(20000), 0),
    "heavy": lambda rng: np.maximum(rng.standard_normal(20000), 0) * rng.exponential(1, 20000),
    "signed": lambda rng: rng.laplace(size=20000),
    "negative": lambda rng: -rng.exponential(size=20000),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fewer_errors_than_with_any_equal_gaps(name: str, bits: int) -> None:
    x = SHAPES[name](np.random.default_rng(0))
    found = fit_levels(spec(bits), histogram(x))
    ends = [(share * min(x.min(), 0), share * max(x.max(), 0)) for share in np.geomspace(0.05, 1, 60)]
    even = min(error(TensorQuantizer.from_range(spec(bits), low, high), x) for low, high in ends)
    gain = 10 * np.log10(even / error(found, x))
    # 2 bits have little to distribute; of 4, Laplace's and heavier tails gain 1 to 4 dB.
    assert gain > (1.0 if bits == 4 and name != "relu" else 0.2), gain
    assert found.table is not None
    assert int(found.zero_point) in found.table.tolist()


def test_levels_are_the_means_of_their_values() -> None:
    x = SHAPES["heavy"](np.random.default_rng(1))
    found = histogram(x)
    levels = least_squares_levels(found.values(), found.counts, 16)[0]
    nearest = np.abs(x[:, None] - levels).argmin(1)
    for index in range(1, 16):
        assert levels[index] == pytest.approx(x[nearest == index].mean(), rel=0.05)
    assert levels[0] == 0.0


@settings(deadline=None)
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12), bits=st.sampled_from([2, 3, 4]))
def test_any_values_give_a_quantizer_that_has_zero(values: list[float], bits: int) -> None:
    x = np.array(values, np.float32)
    found = fit_levels(spec(bits), histogram(x))
    assert found.simulate(np.zeros(1, np.float32)).tolist() == [0.0]
    low, high = (float(end) for end in found.range())
    width = 2 * (max(x.max(), 0.0) - min(x.min(), 0.0)) / 1024 + float(found.scale)
    assert low >= min(float(x.min()), 0.0) - width
    assert high <= max(float(x.max()), 0.0) + width


def test_real_levels_become_codes() -> None:
    found = quantizer_with_levels(spec(2), np.array([-1.0, 0.0, 0.24, 4.1]))
    assert found.table is not None
    assert found.table.tolist() == [0, 50, 62, 255]
    assert int(found.zero_point) == 50
    assert float(found.scale) == pytest.approx(0.02)


def test_channels_have_levels_of_their_own() -> None:
    rng = np.random.default_rng(2)
    x = np.maximum(rng.standard_normal((64, 5, 40)), 0) * np.array([0.1, 1.0, 3.0, 10.0, 0.0])[:, None]
    found = fit_levels(spec(4), histogram(x, axis=1), axis=-2)
    one = fit_levels(spec(4), histogram(x))
    assert found.table is not None
    assert found.table.shape == (5, 16)
    for channel, least_gain in enumerate((8.0, 8.0, 3.0, 0.0)):
        alone = x[:, [channel]]
        parts = (x * (np.arange(5) == channel)[:, None], x)
        assert error(found, parts[0]) < 10 ** (-least_gain / 10) * error(one, alone)
        # As good as levels of a tensor that is this channel, but for the coarser codes they are among.
        own = fit_levels(spec(4), histogram(alone))
        rounding = alone.size * float(found.scale) ** 2 / 12
        assert error(found, parts[0]) < 1.1 * error(own, alone) + 2 * rounding


def test_a_channel_with_few_values_has_those_of_all() -> None:
    rng = np.random.default_rng(3)
    x = np.maximum(rng.standard_normal((64, 3, 40)), 0)
    x[:, 1] = 0.0
    x[0, 1, :5] = 0.1  # a channel that hardly ever says something
    found = fit_levels(spec(4), histogram(x, axis=1), axis=-2)
    one = fit_levels(spec(4), histogram(x))
    assert found.table is not None
    assert one.table is not None
    np.testing.assert_allclose(
        found.dequantize(found.table[1]), one.dequantize(one.table), atol=float(found.scale + one.scale)
    )
    few = fit_levels(spec(4), histogram(x[:1, :, :4], axis=1), axis=-2)
    assert few.table_axis is None
    assert few.table is not None
    assert few.table.ndim == 1
