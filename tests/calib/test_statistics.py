"""Statistics of a tensor: exact, mergeable, bounded."""

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from postquant.calib.statistics import Bounds, TensorStatistics
from postquant.runtime_ops.errors import CalibrationError

SAMPLES = st.lists(
    hnp.arrays(np.float32, st.integers(0, 12), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
    min_size=1,
    max_size=8,
)


def f32(values: object) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def statistics_of(samples: list[npt.NDArray[np.float32]], **options: object) -> TensorStatistics:
    statistics = TensorStatistics(**options)  # type: ignore[arg-type]
    for sample in samples:
        statistics.update(sample)
    return statistics


@given(SAMPLES, st.data())
def test_any_split_and_order_of_samples(samples: list[npt.NDArray[np.float32]], data: st.DataObject) -> None:
    whole = statistics_of(samples)
    shuffled = data.draw(st.permutations(samples))
    assert statistics_of(shuffled) == whole
    cut = data.draw(st.integers(0, len(samples)))
    left, right = statistics_of(shuffled[:cut]), statistics_of(shuffled[cut:])
    left.merge(right)
    assert left == whole


@given(SAMPLES)
def test_means_are_correctly_rounded(samples: list[npt.NDArray[np.float32]]) -> None:
    filled = [sample for sample in samples if sample.size]
    statistics = statistics_of(samples)
    assert statistics.samples == len(samples)
    assert statistics.elements == sum(sample.size for sample in samples)
    if not filled:
        assert statistics.is_empty
        assert (statistics.low, statistics.high, statistics.mean_low) == (0.0, 0.0, 0.0)
        return
    expected = sum((Fraction(float(sample.min())) for sample in filled), Fraction()) / len(filled)
    assert statistics.mean_low == float(expected)
    assert statistics.observed == (min(s.min() for s in filled), max(s.max() for s in filled))


def test_bounds_clip_every_sample() -> None:
    statistics = TensorStatistics("y", bounds=Bounds(0.0, 6.0))
    statistics.update(f32([-1.0, 4.0]))
    statistics.update(f32([1.0, 9.0]))
    assert (statistics.low, statistics.high) == (0.0, 6.0)
    assert (statistics.mean_low, statistics.mean_high) == (0.5, 5.0)
    assert statistics.observed == (-1.0, 9.0)
    density = statistics.density()
    assert (density.low, density.high) == (0.0, 6.0)


def test_bounds_must_be_ordered() -> None:
    with pytest.raises(ValueError, match="empty"):
        Bounds(1.0, 0.0)
    with pytest.raises(ValueError, match="empty"):
        Bounds(math.nan, 0.0)


@pytest.mark.parametrize(
    ("bad", "said"), [(np.nan, "1 NaN and 0 infinite of 3"), (-np.inf, "0 NaN and 1 infinite of 3")]
)
def test_not_finite_names_tensor_and_sample(bad: float, said: str) -> None:
    statistics = statistics_of([np.zeros(2, np.float32)], name="conv_out")
    before = statistics_of([np.zeros(2, np.float32)], name="conv_out")
    with pytest.raises(CalibrationError, match="'conv_out', sample 1") as caught:
        statistics.update(f32([1.0, bad, 2.0]))
    assert said in str(caught.value)
    assert statistics == before


def test_subsampling_keeps_extremes_and_visits_every_position() -> None:
    statistics = TensorStatistics(max_elements=100)
    tensor = np.zeros((1, 8, 16, 16), np.float32)
    tensor[0, 3, 5, 7] = 100.0
    for _ in range(21):
        statistics.update(tensor)
    assert statistics.subsampled
    assert statistics.high == 100.0
    assert statistics.histogram is not None
    assert 21 * 90 < statistics.histogram.count <= 21 * 100
    assert statistics.histogram.density().counts[-1] == 1  # stride 21: once in 21 samples


def test_small_tensors_are_not_subsampled() -> None:
    statistics = TensorStatistics(max_elements=100)
    statistics.update(np.ones(100, np.float32))
    assert not statistics.subsampled
    with pytest.raises(ValueError, match="positive"):
        TensorStatistics(max_elements=0)


def test_only_statistics_of_one_tensor_merge() -> None:
    with pytest.raises(ValueError, match="belong together"):
        TensorStatistics("a").merge(TensorStatistics("b"))
    with pytest.raises(ValueError, match="belong together"):
        TensorStatistics("a").merge(TensorStatistics("a", histogram=False))


def test_without_histogram_there_is_no_density() -> None:
    statistics = statistics_of([np.ones(3, np.float32)], histogram=False)
    with pytest.raises(ValueError, match="without a histogram"):
        statistics.density()
