"""The histogram is the same for every split and order of the stream, and its counts are NumPy's."""

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from postquant.calib.histogram import MAX_BINS, Histogram

# Every finite float32, denormals and both zeros included.
FLOATS = hnp.arrays(
    np.float32,
    st.integers(0, 40),
    elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
)


def f32(values: object) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def histogram_of(*parts: npt.NDArray[np.generic]) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.update(part)
    return histogram


def naive_counts(values: npt.NDArray[np.float32], width: float) -> dict[int, int]:
    """Bin index -> count, by exact Python arithmetic, one value at a time."""
    counts: dict[int, int] = {}
    for value in values.tolist():
        k = int(value / width) if abs(value) >= width else 0
        counts[k] = counts.get(k, 0) + 1
    return counts


@given(st.lists(FLOATS, max_size=6), st.data())
def test_any_order_split_and_merge_gives_the_same(parts: list[npt.NDArray[np.float32]], data: st.DataObject) -> None:
    whole = histogram_of(np.concatenate([np.zeros(0, np.float32), *parts]))
    assert histogram_of(*parts) == whole
    assert histogram_of(*data.draw(st.permutations(parts))) == whole

    merged = Histogram()
    for part in parts:
        merged.merge(histogram_of(part))
    assert merged == whole
    right = Histogram()
    for part in reversed(parts):
        other = histogram_of(part)
        other.merge(right)
        right = other
    assert right == whole


@given(FLOATS)
def test_counts_are_exact(values: npt.NDArray[np.float32]) -> None:
    histogram = histogram_of(values)
    assert histogram.count == values.size
    assert histogram.bins <= MAX_BINS
    if values.size:
        density = histogram.density()
        found = {k - density.zero: int(c) for k, c in enumerate(density.counts) if c}
        assert found == naive_counts(values, histogram.width)
        assert (density.low, density.high) == (float(values.min()), float(values.max()))
        assert (np.diff(density.edges) >= 0).all()


def test_counts_equal_numpy_on_the_same_edges() -> None:
    values = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    density = histogram_of(values).density()
    expected, _ = np.histogram(values, density.edges)
    # Bins of negative values are closed on the other side; no value of this sample lies on an inner edge.
    np.testing.assert_array_equal(density.counts, expected)


@pytest.mark.parametrize(
    ("value", "bins"),
    [(0.0, 1), (-0.0, 1), (3.0, 3073), (-3.0, 3073), (1e-45, 1), (3.4e38, None), (-3.4e38, None)],
)
def test_constant_tensors(value: float, bins: int | None) -> None:
    histogram = histogram_of(np.full((3, 5), value, np.float32))
    assert histogram.count == 15
    assert bins is None or histogram.bins == bins
    density = histogram.density()
    assert density.low == density.high == float(np.float32(value))
    assert density.quantile(0.5) == float(np.float32(value))


def test_at_least_eight_bins_per_step_of_eight_bits() -> None:
    for top in (1.0, 1.99, 2.0, 2.01, 5e-20, 7e30):
        histogram = histogram_of(f32([0.0, top]))
        assert top / 255 / histogram.width >= 8


def test_empty_arrays_change_nothing() -> None:
    histogram = histogram_of(np.zeros((0, 3), np.float32))
    assert histogram == Histogram()
    assert histogram.count == 0
    with pytest.raises(ValueError, match="empty histogram"):
        histogram.density()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_values_are_refused_and_leave_it_unchanged(bad: float) -> None:
    histogram = histogram_of(f32([1.0, 2.0]))
    with pytest.raises(ValueError, match="finite"):
        histogram.update(f32([0.5, bad]))
    assert histogram == histogram_of(f32([1.0, 2.0]))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint8, np.int64, np.bool_])
def test_other_dtypes_count_as_float32(dtype: type[np.generic]) -> None:
    values = np.array([0, 1, 1, 0, 1], dtype)
    assert histogram_of(values) == histogram_of(values.astype(np.float32))


def test_views_that_are_not_contiguous() -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert histogram_of(values[:, ::2], values.T[1::2]) == histogram_of(values)


def test_bounds_become_point_masses() -> None:
    values = np.random.default_rng(1).normal(size=10_000).astype(np.float32)
    density = histogram_of(values).density(0.0, 1.0)
    assert (density.low, density.high) == (0.0, 1.0)
    assert density.counts.sum() == values.size
    at_zero = float(density.mass_below(np.array([0.0]), inclusive=True)[0])
    assert at_zero == pytest.approx((values <= 0).sum(), abs=2 * int(density.counts[density.zero]))
    assert density.mass_below(np.array([0.0]), inclusive=False)[0] == 0
    assert density.quantile(0.1) == 0.0
    assert density.quantile(0.99) == 1.0


def test_coarser_view_keeps_the_mass() -> None:
    values = np.random.default_rng(2).normal(size=10_000).astype(np.float32)
    histogram = histogram_of(values)
    density = histogram.density(max_bins=100)
    assert len(density.counts) <= 100
    np.testing.assert_array_equal(density.counts, np.histogram(values, density.edges)[0])


@given(hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-100, 100, width=32)), st.floats(0, 1))
def test_quantile_is_within_a_bin_of_numpy(values: npt.NDArray[np.float32], fraction: float) -> None:
    histogram = histogram_of(values)
    # The value that NumPy finds has the order statistics around the fraction on its two sides.
    low = np.quantile(values, max(fraction - 1 / len(values), 0), method="lower")
    high = np.quantile(values, min(fraction + 1 / len(values), 1), method="higher")
    found = histogram.density().quantile(fraction)
    assert low - 2 * histogram.width <= found <= high + 2 * histogram.width


def test_memory_does_not_grow_with_the_stream() -> None:
    values = np.random.default_rng(3).normal(size=200_000).astype(np.float32)
    histogram = histogram_of(values)  # the workspace and the counts are there
    tracemalloc.start()
    for _ in range(20):
        histogram.update(values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000
