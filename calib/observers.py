"""From statistics to a range: the simple methods, and :class:`Observer`, which streams for one method.

    min-max     [min x, max x] over everything
    mean        [mean_i min x_i, mean_i max x_i] over samples i
    percentile  the range that keeps P percent of the values

Lp error and entropy have files of their own (:mod:`postquant.calib.lp_error`, :mod:`postquant.calib.entropy`). Every
method returns ``(low, high)`` with ``low <= 0 <= high``, within the data and the known bounds.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from postquant.calib.histogram import Density
from postquant.calib.statistics import UNBOUNDED, Bounds, TensorStatistics
from postquant.runtime_ops.spec import QuantSpec

Range = tuple[float, float]


class RangeMethod(abc.ABC):
    """A rule that turns statistics into a range for a format. Instances are immutable.

    Attributes:
        name: Key in tables and in :func:`candidate_ranges`.
        needs_histogram: Whether the statistics must have been collected with a histogram.
    """

    name: ClassVar[str]
    needs_histogram: ClassVar[bool] = True

    @abc.abstractmethod
    def range(self, statistics: TensorStatistics, spec: QuantSpec) -> Range:
        """The range to represent.

        Args:
            statistics: Of the tensor.
            spec: The format that will represent the range; its axis plays no part.

        Returns:
            ``low <= 0`` and ``high >= 0`` in units of the tensor; (0, 0) for an empty or all-zero tensor.

        Raises:
            ValueError: If a histogram is needed and there is none.
        """


def with_zero(low: float, high: float) -> Range:
    """The range widened to contain 0, which every format represents exactly."""
    return min(low, 0.0), max(high, 0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class MinMax(RangeMethod):
    """Everything seen is represented: no clipping, the coarsest step."""

    name: ClassVar[str] = "minmax"
    needs_histogram: ClassVar[bool] = False

    def range(self, statistics: TensorStatistics, spec: QuantSpec) -> Range:
        """See :meth:`RangeMethod.range`."""
        return with_zero(statistics.low, statistics.high)


@dataclasses.dataclass(frozen=True, slots=True)
class SampleMean(RangeMethod):
    """Mean over samples of each sample's minimum and maximum: robust to a few samples with huge values."""

    name: ClassVar[str] = "mean"
    needs_histogram: ClassVar[bool] = False

    def range(self, statistics: TensorStatistics, spec: QuantSpec) -> Range:
        """See :meth:`RangeMethod.range`."""
        return with_zero(statistics.mean_low, statistics.mean_high)


@dataclasses.dataclass(frozen=True, slots=True)
class Percentile(RangeMethod):
    """The range that keeps ``percent`` of all values.

    A symmetric format cuts by magnitude; otherwise values of both signs lose half of the rest at each end, and
    values of one sign lose all of it at the far end.

    Attributes:
        percent: 0 < percent <= 100.
    """

    name: ClassVar[str] = "percentile"
    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 0.0 < self.percent <= 100.0:
            raise ValueError(f"a percentile lies in (0, 100], not {self.percent}")

    def range(self, statistics: TensorStatistics, spec: QuantSpec) -> Range:
        """See :meth:`RangeMethod.range`."""
        if statistics.is_empty:
            return 0.0, 0.0
        density = statistics.density()
        cut = 1.0 - self.percent / 100.0
        if density.low >= 0.0:
            return with_zero(0.0, density.quantile(1.0 - cut))
        if density.high <= 0.0:
            return with_zero(density.quantile(cut), 0.0)
        if spec.symmetric:
            top = magnitude_quantile(density, 1.0 - cut)
            return max(-top, density.low), min(top, density.high)
        return with_zero(density.quantile(cut / 2), density.quantile(1.0 - cut / 2))


def magnitude_quantile(density: Density, fraction: float) -> float:
    """The magnitude below which ``fraction`` (0 to 1) of the values lies.

    Between two magnitudes at which a bin begins or ends the mass grows linearly, so the answer is found by one
    search among them and one interpolation.
    """
    tops: npt.NDArray[np.float64] = np.unique(np.append(np.abs(density.edges), 0.0))
    inside = density.mass_below(tops, inclusive=True) - density.mass_below(-tops, inclusive=False)
    target = fraction * inside[-1]
    j = min(int(np.searchsorted(inside, target, side="left")), len(tops) - 1)
    if j == 0:
        return float(tops[0])
    # Mass just below tops[j]: a point mass at it needs no interpolation.
    before = np.array([tops[j]])
    nearly = float(density.mass_below(before, inclusive=False)[0] - density.mass_below(-before, inclusive=True)[0])
    if target >= nearly or nearly <= inside[j - 1]:
        return float(tops[j])
    share = (target - inside[j - 1]) / (nearly - inside[j - 1])
    return float(tops[j - 1] + share * (tops[j] - tops[j - 1]))


class Observer:
    """Streams one tensor for one method. Any split or order of the samples gives the same result.

    Args:
        method: How the range is chosen.
        name: The tensor, for messages.
        bounds: What the values will be clipped to.

    >>> from postquant.runtime_ops.spec import QuantSpec
    >>> observer = Observer(SampleMean())
    >>> for sample in ([-1.0, 2.0], [-3.0, 4.0]):
    ...     observer.update(np.float32(sample))
    >>> observer.result(QuantSpec(8, signed=False, symmetric=False))
    (-2.0, 3.0)
    """

    def __init__(self, method: RangeMethod, *, name: str = "tensor", bounds: Bounds = UNBOUNDED) -> None:
        self.method = method
        self.statistics = TensorStatistics(name, histogram=method.needs_histogram, bounds=bounds)

    def update(self, values: npt.NDArray[np.generic]) -> None:
        """Takes in one sample (:meth:`TensorStatistics.update`)."""
        self.statistics.update(values)

    def merge(self, other: Observer) -> None:
        """Adds what ``other`` has seen; both must have the same method.

        Raises:
            ValueError: If the methods, tensors or bounds differ.
        """
        if self.method != other.method:
            raise ValueError(f"an observer of {other.method} cannot be merged into one of {self.method}")
        self.statistics.merge(other.statistics)

    def result(self, spec: QuantSpec) -> Range:
        """The range for ``spec`` (:meth:`RangeMethod.range`)."""
        return self.method.range(self.statistics, spec)


def candidate_ranges(statistics: TensorStatistics, spec: QuantSpec, methods: Sequence[RangeMethod]) -> dict[str, Range]:
    """The range that each method would choose, from the same statistics.

    Args:
        statistics: Of one tensor.
        spec: The format that will represent the range.
        methods: Whose ranges to compute; names must differ.

    Returns:
        Method name -> (low, high), in the order of ``methods``.

    Raises:
        ValueError: If a method needs a histogram and there is none, or two names are equal.
    """
    if len({method.name for method in methods}) < len(methods):
        raise ValueError(f"two of the methods have the same name: {[method.name for method in methods]}")
    return {method.name: method.range(statistics, spec) for method in methods}
