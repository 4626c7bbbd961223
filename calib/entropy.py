"""The range that loses the least information: a search for the smallest Kullback-Leibler divergence.

For a threshold T the values are clipped to [-T, T] (and to the data). The reference P is the histogram inside,
with everything outside added to its outermost bins; the candidate Q is the histogram inside after quantization: the
bins that share a code share their mass equally (among those that are not empty). The best T minimises

    KL(P || Q) = sum P log(P / Q)

over many thresholds from the one at which every bin has a code of its own (nothing is lost by rounding there, so
that smaller ones only clip more) to the maximum. This is TensorRT's method, with the codes of the actual format.
Two of its known traps are handled as there: exact zeros (half of a tensor after Relu) are represented exactly by any
format, so the bin of 0 must not count as lost structure and takes its neighbours' height; and Q is smoothed where it
is 0.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from postquant.calib.histogram import Density
from postquant.calib.observers import Range, RangeMethod
from postquant.calib.statistics import TensorStatistics
from postquant.runtime_ops.quantizer import scale_and_zero_point
from postquant.runtime_ops.spec import QuantSpec

_BINS = 2048
_THRESHOLDS = 128
# Q of a bin that clipping alone fills: a clipped mass m costs about m log(m / _EMPTY).
_EMPTY = 1e-6
# Divergences closer than this are equal, and the wider range wins.
_TIE = 1e-12


@dataclasses.dataclass(frozen=True, slots=True)
class Entropy(RangeMethod):
    """The threshold with the smallest Kullback-Leibler divergence."""

    name: ClassVar[str] = "entropy"

    def range(self, statistics: TensorStatistics, spec: QuantSpec) -> Range:
        """See :meth:`RangeMethod.range`."""
        if statistics.is_empty:
            return 0.0, 0.0
        density = statistics.density(max_bins=_BINS)
        low, high = min(density.low, 0.0), max(density.high, 0.0)
        if low == high:
            return 0.0, 0.0
        tops = _thresholds(density, 2**spec.bits)
        divergences = np.array([divergence(density, spec, max(-top, low), min(top, high)) for top in tops])
        # The thresholds fall, so the first within the tie is the widest.
        best = float(tops[int(np.flatnonzero(divergences <= divergences.min() + _TIE)[0])])
        return max(-best, low), min(best, high)


def _thresholds(density: Density, levels: int) -> npt.NDArray[np.float64]:
    """Falling magnitudes at bin edges, from the largest value to where ``levels`` bins are inside."""
    tops = np.unique(np.abs(density.edges))
    tops = tops[tops > 0.0]
    signs = 2 if density.low < 0.0 < density.high else 1
    fewest = min(max(levels // signs, 1), len(tops))
    picked = np.unique(np.linspace(fewest - 1, len(tops) - 1, _THRESHOLDS).round().astype(np.intp))
    return tops[picked][::-1]


def divergence(density: Density, spec: QuantSpec, low: float, high: float) -> float:
    """KL(P || Q) of one range, in nats.

    Args:
        density: Of the tensor.
        spec: The format; its axis plays no part.
        low: Smallest value to represent, <= 0.
        high: Largest value to represent, >= 0.

    Returns:
        The divergence, >= 0 up to smoothing.
    """
    counts = density.counts.astype(np.float64)
    zero = density.zero
    neighbours = [counts[i] for i in (zero - 1, zero + 1) if 0 <= i < len(counts)]
    if neighbours:
        counts[zero] = sum(neighbours) / len(neighbours)
    centres = 0.5 * (density.edges[:-1] + density.edges[1:])
    inside = np.flatnonzero((centres >= low) & (centres <= high))
    if not inside.size:
        return float("inf")
    begin, end = int(inside[0]), int(inside[-1]) + 1
    kept = counts[begin:end]
    reference = kept.copy()
    reference[0] += counts[:begin].sum()
    reference[-1] += counts[end:].sum()
    if kept.sum() == 0.0 or reference.sum() == 0.0:
        return float("inf")

    scale, point = scale_and_zero_point(spec, low, high)
    codes = np.clip(np.rint(centres[begin:end] / float(scale)), spec.qmin - int(point), spec.qmax - int(point))
    starts = np.flatnonzero(np.diff(codes, prepend=codes[0] - 1.0))
    filled = kept > 0.0
    mass = np.add.reduceat(kept, starts)
    share = mass / np.maximum(np.add.reduceat(filled.astype(np.float64), starts), 1.0)
    quantized = np.where(filled, np.repeat(share, np.diff(starts, append=len(kept))), 0.0)

    p = reference / reference.sum()
    q = np.maximum(quantized / quantized.sum(), _EMPTY)
    some = p > 0.0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))
