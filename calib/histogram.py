"""A streaming histogram whose result does not depend on how the stream was split or ordered.

Bins have the width ``w = 2^e`` and hold the values with ``trunc(x / w) = k``, rounding towards zero:

    k > 0: [k w, (k + 1) w)        k = 0: (-w, w)        k < 0: (-(|k| + 1) w, -|k| w]

Division by a power of two is exact in float32, and ``trunc(trunc(x / w) / 2) = trunc(x / 2w)``, so doubling the width
merges whole bins and never splits one. ``e`` is the smallest exponent with which the span of the data, widened
to contain 0, fits :data:`MAX_BINS`: a function of the exact minimum and maximum only. Counts are integers. Hence
any order, any split and any merge of the same values give the same histogram, bit for bit.

Truncation rather than floor because float32 products underflow towards zero: a denormal lands in bin 0 at
every width.
"""

from __future__ import annotations

import dataclasses
import math
import threading

import numpy as np
import numpy.typing as npt

# A tensor that spans 0 .. max fills 2049 to 4096 bins: at least 8 bins per step of 8 bits.
MAX_BINS = 4096
# 2^120 is still a float32, so that x * 2^-e is exact for every finite x; smaller values are all "zero".
_SMALLEST_EXPONENT = -120
# The two buffers of a chunk (128 and 256 KiB) stay in the second-level cache.
_CHUNK = 1 << 15


class _Workspace(threading.local):
    """Buffers of one chunk per thread: the hot loop allocates nothing but bincount's result."""

    def __init__(self) -> None:
        self.scaled = np.empty(_CHUNK, np.float32)
        self.index = np.empty(_CHUNK, np.intp)


_WORKSPACE = _Workspace()


@dataclasses.dataclass(frozen=True, eq=False)
class Density:
    """Counts between edges, for reading: inside a bin the values are taken as uniformly spread.

    A bin whose two edges are equal is a point mass, for instance what a known bound clips.

    Attributes:
        edges: (B + 1,) float64, not decreasing, units of the tensor.
        counts: (B,) int64, >= 0.
        zero: Index of the bin around 0, the only one that holds exact zeros.
        width: Width of a bin between its neighbours, a power of two; the one around 0 is twice as wide.
    """

    edges: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    zero: int
    width: float

    @property
    def low(self) -> float:
        """Smallest value."""
        return float(self.edges[0])

    @property
    def high(self) -> float:
        """Largest value."""
        return float(self.edges[-1])

    def quantile(self, fraction: float) -> float:
        """The value below which ``fraction`` (0 to 1) of the mass lies, linear inside a bin.

        >>> h = Histogram()
        >>> h.update(np.arange(1, 1025, dtype=np.float32))
        >>> round(h.density().quantile(0.5))
        512
        """
        cumulated = np.cumsum(self.counts)
        target = fraction * float(cumulated[-1])
        # The first bin that reaches the target and is not empty.
        j = int(np.searchsorted(cumulated, target, side="left"))
        j = min(j, len(cumulated) - 1)
        before = float(cumulated[j] - self.counts[j])
        inside = (target - before) / float(self.counts[j]) if self.counts[j] else 0.0
        return float(self.edges[j] + inside * (self.edges[j + 1] - self.edges[j]))

    def mass_below(self, x: npt.NDArray[np.float64], *, inclusive: bool) -> npt.NDArray[np.float64]:
        """How many values are below ``x``.

        Args:
            x: Any shape, units of the tensor.
            inclusive: Whether a point mass exactly at ``x`` counts.

        Returns:
            Number of values, the shape of ``x``; linear inside a bin.
        """
        cumulated = np.concatenate(([0], np.cumsum(self.counts))).astype(np.float64)
        j = np.searchsorted(self.edges, x, side="right" if inclusive else "left")
        inner = np.clip(j, 1, len(self.counts))
        below = self.edges[inner - 1]
        width = self.edges[inner] - below
        share = np.divide(x - below, width, out=np.zeros_like(width), where=width > 0.0)
        mass = cumulated[inner - 1] + self.counts[inner - 1] * share
        return np.where(j == 0, 0.0, np.where(j > len(self.counts), cumulated[-1], mass))


class Histogram:
    """Counts of all values seen, in bins of a power-of-two width that grows with the range.

    Memory is bounded by :data:`MAX_BINS` counts. Two histograms of the same values are equal (``==``) however
    the values were split, ordered and merged.

    >>> a, b = Histogram(), Histogram()
    >>> a.update(np.float32([0.0, 1.0]))
    >>> a.update(np.float32([-300.0]))
    >>> b.update(np.float32([-300.0, 1.0, 0.0]))
    >>> a == b, a.width
    (True, 0.125)
    """

    __slots__ = ("_counts", "_exponent", "_first", "_high", "_low")

    def __init__(self) -> None:
        self._low = math.inf
        self._high = -math.inf
        self._exponent = _SMALLEST_EXPONENT
        self._first = 0
        self._counts = np.zeros(1, np.int64)

    @property
    def low(self) -> float:
        """Exact smallest value covered; inf before the first one."""
        return self._low

    @property
    def high(self) -> float:
        """Exact largest value covered; -inf before the first one."""
        return self._high

    @property
    def width(self) -> float:
        """Width of a bin, a power of two."""
        return math.ldexp(1.0, self._exponent)

    @property
    def count(self) -> int:
        """Number of values counted."""
        return int(self._counts.sum())

    @property
    def bins(self) -> int:
        """Number of bins from the one of the smallest value (or 0) to the one of the largest (or 0)."""
        return len(self._counts)

    def update(self, values: npt.NDArray[np.generic]) -> None:
        """Counts ``values``.

        Args:
            values: Any shape and numeric dtype, finite as float32; an empty array changes nothing.

        Raises:
            ValueError: If a value is NaN or infinite.
        """
        flat = np.ravel(np.asarray(values)).astype(np.float32, copy=False)
        if flat.size:
            self.update_within(flat, float(flat.min()), float(flat.max()))

    def update_within(self, flat: npt.NDArray[np.float32], low: float, high: float) -> None:
        """Counts ``flat`` and covers ``[low, high]``, which the caller has measured already.

        Args:
            flat: (n,) float32, every value within ``[low, high]``. It may be a part of the tensor on which
                the bounds were measured; the bins then depend on the whole tensor, the counts on the part.
            low: Smallest value.
            high: Largest value.

        Raises:
            ValueError: If a bound is NaN or infinite.
        """
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("a histogram holds finite values only")
        self._cover(low, high)
        inverse = np.float32(math.ldexp(1.0, -self._exponent))
        # Bins are counted from that of this update's own minimum: bincount then spans as few as needed.
        first = min(_truncated(low, self._exponent), 0)
        bins = max(_truncated(high, self._exponent), 0) - first + 1
        begin = first - self._first
        target = self._counts[begin : begin + bins]
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            scaled = _WORKSPACE.scaled[: chunk.size]
            index = _WORKSPACE.index[: chunk.size]
            np.multiply(chunk, inverse, out=scaled)
            np.copyto(index, scaled, casting="unsafe")  # the conversion rounds towards zero
            if first:
                np.subtract(index, first, out=index)
            target += np.bincount(index, minlength=bins)

    def merge(self, other: Histogram) -> None:
        """Adds the values of ``other``, which stays as it is."""
        if other._low > other._high:
            return
        self._cover(other._low, other._high)
        self._add(other._counts, other._first, other._exponent)

    def density(self, low: float = -math.inf, high: float = math.inf, *, max_bins: int = MAX_BINS) -> Density:
        """The histogram for reading, with the values clipped to known bounds.

        Args:
            low: Values below it become a point mass at it.
            high: Values above it become a point mass at it.
            max_bins: Neighbouring bins are merged until there are at most so many.

        Returns:
            Edges run from the exact smallest to the exact largest clipped value.

        Raises:
            ValueError: If nothing was counted.
        """
        if self._low > self._high:
            raise ValueError("an empty histogram has no density")
        view = self
        while view.bins > max_bins:
            coarser = Histogram()
            coarser._low, coarser._high, coarser._exponent = view._low, view._high, view._exponent + 1
            coarser._allocate()
            coarser._add(view._counts, view._first, view._exponent)
            view = coarser
        k = np.arange(view._first, view._first + view.bins, dtype=np.float64)
        edges = np.append(np.where(k > 0, k, k - 1), max(k[-1], 0.0) + 1.0) * view.width
        edges = np.clip(np.clip(edges, self._low, self._high), low, high)
        return Density(edges, view._counts.copy(), -view._first, view.width)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        return (
            (self._low, self._high, self._exponent, self._first)
            == (other._low, other._high, other._exponent, other._first)
        ) and np.array_equal(self._counts, other._counts)

    __hash__ = None  # type: ignore[assignment]  # it grows

    def _cover(self, low: float, high: float) -> None:
        """Widens the bins until they cover ``[low, high]`` too."""
        low, high = min(low, self._low), max(high, self._high)
        if low == self._low and high == self._high:
            return
        counts, first, exponent = self._counts, self._first, self._exponent
        self._low, self._high = low, high
        self._exponent = _exponent(low, high)
        self._allocate()
        self._add(counts, first, exponent)

    def _allocate(self) -> None:
        """Makes zero counts for exactly the bins from min(low, 0) to max(high, 0)."""
        self._first = min(_truncated(self._low, self._exponent), 0)
        last = max(_truncated(self._high, self._exponent), 0)
        self._counts = np.zeros(last - self._first + 1, np.int64)

    def _add(self, counts: npt.NDArray[np.int64], first: int, exponent: int) -> None:
        """Adds counts of bins that are not wider than these and lie within them."""
        shift = self._exponent - exponent
        if shift == 0:
            self._counts[first - self._first :][: len(counts)] += counts
            return
        k = np.arange(first, first + len(counts))
        # A shift of 63 already moves every index to 0; a longer one is undefined.
        merged = np.sign(k) * (np.abs(k) >> min(shift, 63))
        np.add.at(self._counts, merged - self._first, counts)


def _truncated(value: float, exponent: int) -> int:
    """``trunc(value / 2^exponent)``, exactly."""
    return math.trunc(math.ldexp(value, -exponent))


def _exponent(low: float, high: float) -> int:
    """The smallest exponent whose bins cover ``[low, high]`` and 0 with :data:`MAX_BINS` bins."""
    top = max(high, -low, 0.0)
    # One side alone needs at least this one: top / 2^e is in [2048, 4096).
    exponent = max(math.frexp(top)[1] - 12, _SMALLEST_EXPONENT)
    while max(_truncated(high, exponent), 0) - min(_truncated(low, exponent), 0) + 1 > MAX_BINS:
        exponent += 1
    return exponent
