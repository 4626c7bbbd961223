"""What one pass over the calibration data leaves of a tensor: :class:`TensorStatistics`.

Every observer reads its range from the same statistics, so that one pass serves all of them. Everything kept is
exact and independent of the order of the samples: integer counts, minimum and maximum, and the sums of the
per-sample minima and maxima as integers (a float32 is an integer multiple of 2^-149). Memory per tensor is constant.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from postquant.calib.histogram import MAX_BINS, Density, Histogram
from postquant.runtime_ops.errors import CalibrationError

# The smallest positive float32 is 2^-149.
_UNIT_EXPONENT = 149


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """Limits that a tensor's values end up in, such as those of a Relu or Clip that the quantizer stands for.

    Values beyond a bound count as the bound, and no range reaches beyond it.

    Attributes:
        low: Lower bound, -inf where there is none.
        high: Upper bound, inf where there is none.

    Raises:
        ValueError: If the bounds are not ordered or NaN.
    """

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"bounds [{self.low}, {self.high}] are empty")

    def clip(self, value: float) -> float:
        """The nearest value within the bounds."""
        return min(max(value, self.low), self.high)


UNBOUNDED = Bounds()


class TensorStatistics:
    """Streaming, mergeable statistics of one tensor.

    One ``update`` is one sample. Splitting the samples over several objects and merging them gives an equal
    object, except for what ``max_elements`` leaves out: which values those are depends on the sample's position.
    Minimum, maximum and the per-sample sums are exact always.

    Args:
        name: The tensor, for messages.
        histogram: Whether to keep a histogram; without it only min-max and mean-of-samples ranges exist.
        bounds: What the values will be clipped to.
        max_elements: At most so many values of a sample enter the histogram, strided over the whole tensor;
            None takes all.

    Attributes:
        name: The tensor.
        bounds: What the values will be clipped to.
        samples: Number of updates.
        elements: Number of values seen.
        histogram: The histogram of the values before clipping, or None.
        subsampled: Whether some values did not enter the histogram.
    """

    def __init__(
        self,
        name: str = "tensor",
        *,
        histogram: bool = True,
        bounds: Bounds = UNBOUNDED,
        max_elements: int | None = None,
    ) -> None:
        if max_elements is not None and max_elements < 1:
            raise ValueError(f"max_elements must be positive, not {max_elements}")
        self.name = name
        self.bounds = bounds
        self.samples = 0
        self.elements = 0
        self.histogram = Histogram() if histogram else None
        self.subsampled = False
        self._max_elements = max_elements
        self._filled = 0  # samples that had values
        self._min = math.inf
        self._max = -math.inf
        self._min_sum = 0  # of the per-sample clipped minima, in units of 2^-149
        self._max_sum = 0

    @property
    def is_empty(self) -> bool:
        """Whether no value was seen."""
        return self._filled == 0

    @property
    def observed(self) -> tuple[float, float]:
        """Exact minimum and maximum before clipping; (inf, -inf) when empty."""
        return self._min, self._max

    @property
    def low(self) -> float:
        """Smallest value after clipping to the bounds; 0 when empty."""
        return 0.0 if self.is_empty else self.bounds.clip(self._min)

    @property
    def high(self) -> float:
        """Largest value after clipping to the bounds; 0 when empty."""
        return 0.0 if self.is_empty else self.bounds.clip(self._max)

    @property
    def mean_low(self) -> float:
        """Mean over samples of the sample's clipped minimum, correctly rounded; 0 when empty."""
        return 0.0 if self.is_empty else float(Fraction(self._min_sum, self._filled << _UNIT_EXPONENT))

    @property
    def mean_high(self) -> float:
        """Mean over samples of the sample's clipped maximum, correctly rounded; 0 when empty."""
        return 0.0 if self.is_empty else float(Fraction(self._max_sum, self._filled << _UNIT_EXPONENT))

    def update(self, values: npt.NDArray[np.generic]) -> None:
        """Takes in the tensor of one sample.

        Args:
            values: Any shape and numeric dtype, finite as float32; may be empty.

        Raises:
            CalibrationError: If a value is NaN or infinite; it names the tensor and the sample (the number of
                updates before). The statistics are unchanged then.
        """
        array = np.asarray(values)
        flat = np.ravel(array).astype(np.float32, copy=False)
        if flat.size:
            # Both are NaN if any value is: no separate pass looks for NaN.
            low, high = float(flat.min()), float(flat.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise _not_finite(self.name, self.samples, flat)
            if self.histogram is not None:
                part = self._part(flat, array.shape)
                self.histogram.update_within(part, low, high)
                self.subsampled |= part.size < flat.size
            self._min, self._max = min(self._min, low), max(self._max, high)
            self._min_sum += _units(self.bounds.clip(low))
            self._max_sum += _units(self.bounds.clip(high))
            self._filled += 1
        self.elements += flat.size
        self.samples += 1

    def merge(self, other: TensorStatistics) -> None:
        """Adds the samples of ``other``, which stays as it is.

        Raises:
            ValueError: If the two describe different tensors or were made with different options.
        """
        mine = (self.name, self.bounds, self.histogram is None, self._max_elements)
        if mine != (other.name, other.bounds, other.histogram is None, other._max_elements):
            raise ValueError(f"statistics of {self.name!r} and {other.name!r} do not belong together")
        if self.histogram is not None and other.histogram is not None:
            self.histogram.merge(other.histogram)
        self.subsampled |= other.subsampled
        self.samples += other.samples
        self.elements += other.elements
        self._filled += other._filled
        self._min, self._max = min(self._min, other._min), max(self._max, other._max)
        self._min_sum += other._min_sum
        self._max_sum += other._max_sum

    def density(self, *, max_bins: int = MAX_BINS) -> Density:
        """The histogram of the clipped values, for reading.

        Args:
            max_bins: Neighbouring bins are merged until there are at most so many.

        Raises:
            ValueError: If there is no histogram or no value was seen.
        """
        if self.histogram is None:
            raise ValueError(f"the statistics of {self.name!r} were collected without a histogram")
        return self.histogram.density(self.bounds.low, self.bounds.high, max_bins=max_bins)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorStatistics):
            return NotImplemented
        return all(getattr(self, key) == getattr(other, key) for key in self.__dict__)

    __hash__ = None  # type: ignore[assignment]  # it grows

    def _part(self, flat: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """The values that enter the histogram."""
        if self._max_elements is None or flat.size <= self._max_elements:
            return flat
        stride = -(-flat.size // self._max_elements)
        # A stride that shares a factor with a dimension would see some columns or channels only.
        while math.gcd(stride, math.prod(shape)) > 1:
            stride += 1
        # Another phase in every sample: over the samples, all positions are seen.
        return np.ascontiguousarray(flat[self.samples % stride :: stride])


def _units(value: float) -> int:
    """A float32 value (or a bound) in units of 2^-149; exact for every float32."""
    return int(math.ldexp(value, _UNIT_EXPONENT))


def _not_finite(name: str, sample: int, flat: npt.NDArray[np.float32]) -> CalibrationError:
    nan = int(np.isnan(flat).sum())
    inf = int(np.isinf(flat).sum())
    return CalibrationError(
        "an activation is not finite in the float model",
        where=f"tensor {name!r}, sample {sample}",
        found=f"{nan} NaN and {inf} infinite of {flat.size} values",
        hint="check that sample's input, or remove the sample",
    )
