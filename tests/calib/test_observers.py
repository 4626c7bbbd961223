"""Every method's range against an independent law on the raw data."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from postquant.calib.entropy import Entropy
from postquant.calib.histogram import Histogram
from postquant.calib.lp_error import LpError, expected_error
from postquant.calib.methods import DEFAULT_METHODS
from postquant.calib.observers import MinMax, Observer, Percentile, RangeMethod, SampleMean, candidate_ranges
from postquant.calib.statistics import Bounds, TensorStatistics
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

Array = npt.NDArray[np.float32]
U8 = QuantSpec(8, signed=False, symmetric=False)
S8 = QuantSpec(8, signed=True, symmetric=True)
SPECS = [
    QuantSpec(bits, signed=signed, symmetric=symmetric, narrow=narrow)
    for bits in (2, 3, 4, 6, 8)
    for signed, symmetric, narrow in (
        (False, False, False),
        (True, True, False),
        (True, True, True),
        (False, True, False),
    )
]


def f32(values: object) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def make(name: str, size: int = 40_000) -> Array:
    rng = np.random.default_rng(sum(name.encode()))
    x = rng.normal(size=size)
    values = {
        "normal": x,
        "relu": np.maximum(x, 0.0),
        "relu6": np.clip(6.0 * x, 0.0, 6.0),
        "negative": -np.abs(x),
        "silu": 3.0 * x / (1.0 + np.exp(-3.0 * x)),
        "laplace": rng.laplace(size=size) + 0.5,
        "outlier": np.append(x, 60.0),
    }
    return values[name].astype(np.float32)


NAMES = ("normal", "relu", "relu6", "negative", "silu", "laplace", "outlier")


def statistics_of(*samples: Array, bounds: Bounds | None = None) -> TensorStatistics:
    statistics = TensorStatistics(bounds=bounds or Bounds())
    for sample in samples:
        statistics.update(sample)
    return statistics


def mean_error(x: Array, spec: QuantSpec, low: float, high: float, p: float = 2.0) -> float:
    quantized = TensorQuantizer.from_range(spec, low, high).simulate(x)
    return float(np.mean(np.abs(x.astype(np.float64) - quantized) ** p))


def test_min_max_and_mean_of_samples() -> None:
    statistics = statistics_of(f32([-1.0, 5.0]), f32([-3.0, 1.0]))
    assert MinMax().range(statistics, U8) == (-3.0, 5.0)
    assert SampleMean().range(statistics, U8) == (-2.0, 3.0)
    only_large = statistics_of(f32([2.0, 3.0]))
    assert MinMax().range(only_large, U8) == (0.0, 3.0)
    assert SampleMean().range(only_large, U8) == (0.0, 3.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("percent", [99.99, 99.0, 100.0])
def test_percentile_is_close_to_numpy(name: str, percent: float) -> None:
    x = make(name)
    statistics = statistics_of(x)
    assert statistics.histogram is not None
    near = 2.5 * statistics.histogram.width + 0.15 * float(x.std())
    low, high = Percentile(percent).range(statistics, U8)
    cut = 100.0 - percent
    if x.min() >= 0:
        expected = (0.0, float(np.percentile(x, percent)))
    elif x.max() <= 0:
        expected = (float(np.percentile(x, cut)), 0.0)
    else:
        expected = (float(np.percentile(x, cut / 2)), float(np.percentile(x, 100.0 - cut / 2)))
    assert (low, high) == pytest.approx(expected, abs=near)
    symmetric = Percentile(percent).range(statistics, S8)
    assert max(-symmetric[0], symmetric[1]) == pytest.approx(np.percentile(np.abs(x), percent), abs=near)


@given(
    hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-50, 50, width=32)),
    st.floats(1.0, 100.0),
)
def test_percentile_keeps_as_much_as_it_says(x: Array, percent: float) -> None:
    statistics = statistics_of(x)
    assert statistics.histogram is not None
    slack = 2 * statistics.histogram.width
    for spec in (U8, S8):
        low, high = Percentile(percent).range(statistics, spec)
        kept = ((x >= low - slack) & (x <= high + slack)).mean()
        assert kept >= percent / 100.0 - 2.0 / len(x)
        assert min(0.0, x.min()) <= low <= 0.0 <= high <= max(0.0, x.max())


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("name", NAMES)
def test_expected_error_is_the_error_on_the_data(name: str, p: float) -> None:
    x = make(name)
    density = statistics_of(x).density()
    for spec in SPECS:
        lows = np.array([1.0, 0.7, 0.3]) * min(float(x.min()), 0.0)
        highs = np.array([1.0, 0.5, 0.3]) * max(float(x.max()), 0.0)
        found = expected_error(density, spec, lows, highs, p)
        expected = [mean_error(x, spec, low, high, p) for low, high in zip(lows, highs, strict=True)]
        # Exact zeros have no error, values spread over the bin around zero have a little.
        floor = float(density.counts[density.zero]) / x.size * width_of(x) ** p
        np.testing.assert_allclose(found, expected, rtol=0.08, atol=floor)


def width_of(x: Array) -> float:
    histogram = Histogram()
    histogram.update(x)
    return histogram.width


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_mse_search_is_close_to_brute_force(name: str, spec: QuantSpec) -> None:
    x = make(name, 4000)
    low, high = LpError().range(statistics_of(x), spec)
    bottom, top = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    shares = np.linspace(0.02, 1.0, 50)
    if spec.symmetric or bottom == 0.0 or top == 0.0:
        candidates = [(share * bottom, share * top) for share in shares]
    else:
        candidates = [(a * bottom, b * top) for a in shares[::3] for b in shares[::3]]
    best = min(mean_error(x, spec, *candidate) for candidate in candidates)
    assert mean_error(x, spec, low, high) <= best * 1.03
    assert bottom <= low <= 0.0 <= high <= top


def test_larger_exponents_clip_less() -> None:
    statistics = statistics_of(make("laplace"))
    spec = QuantSpec(4, signed=True, symmetric=True)
    tops = [LpError(p).range(statistics, spec)[1] for p in (1.0, 2.0, 2.4, 4.0)]
    assert tops == sorted(tops)
    assert tops[0] < tops[-1]
    with pytest.raises(ValueError, match="exponent"):
        LpError(0.5)


@pytest.mark.parametrize("spec", [U8, S8, QuantSpec(7, signed=True, symmetric=True, narrow=True)], ids=str)
@pytest.mark.parametrize("name", ["normal", "relu", "laplace"])
def test_entropy_clips_an_outlier(name: str, spec: QuantSpec) -> None:
    x = make(name)
    statistics = statistics_of(x, f32([50.0 * float(x.std())]))
    low, high = Entropy().range(statistics, spec)
    assert high < 0.5 * statistics.high  # onnxruntime's keeps the full range here
    assert high > 2.0 * x.std()
    # What it clips is next to nothing, and the bulk is much more accurate for it.
    assert (x > high).mean() < 0.002
    assert mean_error(x, spec, low, high) < 0.5 * mean_error(x, spec, *MinMax().range(statistics, spec))


def test_entropy_keeps_data_without_tails() -> None:
    x = np.random.default_rng(0).uniform(0.0, 1.0, 100_000).astype(np.float32)
    low, high = Entropy().range(statistics_of(x), U8)
    assert low == 0.0
    assert high > 0.98


def test_entropy_is_not_led_by_exact_zeros() -> None:
    x = make("relu")
    mostly_zero = np.append(x, np.zeros(10 * x.size, np.float32))
    without = Entropy().range(statistics_of(x), U8)[1]
    assert Entropy().range(statistics_of(mostly_zero), U8)[1] == pytest.approx(without, rel=0.15)


@pytest.mark.parametrize("method", DEFAULT_METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_degenerate_tensors(method: RangeMethod, spec: QuantSpec) -> None:
    assert method.range(TensorStatistics(), spec) == (0.0, 0.0)
    assert method.range(statistics_of(np.zeros((0, 4), np.float32)), spec) == (0.0, 0.0)
    assert method.range(statistics_of(np.zeros(9, np.float32)), spec) == (0.0, 0.0)
    for constant in (3.0, -0.25, 1e-42, 3e38):
        low, high = method.range(statistics_of(np.full(9, constant, np.float32)), spec)
        assert (low, high) == (min(float(np.float32(constant)), 0.0), max(float(np.float32(constant)), 0.0))


@pytest.mark.parametrize("method", DEFAULT_METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("spec", [U8, S8, QuantSpec(4, signed=False, symmetric=False)], ids=str)
def test_ranges_respect_known_bounds(method: RangeMethod, spec: QuantSpec) -> None:
    x = 6.0 * make("normal")
    bounded = statistics_of(x, bounds=Bounds(0.0, 6.0))
    low, high = method.range(bounded, spec)
    assert low == 0.0
    assert 0.0 < high <= 6.0
    # Clipping afterwards is the same as having clipped the data.
    clipped = method.range(statistics_of(np.clip(x, 0.0, 6.0)), spec)
    assert (low, high) == pytest.approx(clipped, rel=0.1)


@pytest.mark.parametrize("method", DEFAULT_METHODS, ids=lambda method: method.name)
def test_observers_stream_and_merge(method: RangeMethod) -> None:
    x = make("laplace", 6000)
    whole, left, right = (Observer(method, name="t") for _ in range(3))
    for i, sample in enumerate(np.split(x, 6)):
        whole.update(sample)
        (left if i % 2 else right).update(sample)
    left.merge(right)
    assert left.result(U8) == whole.result(U8)
    with pytest.raises(ValueError, match="cannot be merged"):
        whole.merge(Observer(Percentile(50.0), name="t"))


def test_candidates_of_one_pass() -> None:
    found = candidate_ranges(statistics_of(make("outlier")), U8, DEFAULT_METHODS)
    assert list(found) == ["minmax", "mean", "percentile", "mse", "entropy"]
    assert all(low <= 0.0 <= high for low, high in found.values())
    assert found["percentile"][1] < found["minmax"][1]
    with pytest.raises(ValueError, match="same name"):
        candidate_ranges(TensorStatistics(), U8, (LpError(2.0), LpError(2.4)))


def test_percent_must_make_sense() -> None:
    for percent in (0.0, 101.0):
        with pytest.raises(ValueError, match="percentile"):
            Percentile(percent)
