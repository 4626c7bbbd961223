"""The range with the smallest Lp quantization error: ``min E |x - Q(x)|^p``, clipping and rounding together.

Inside a histogram bin [a, b] values are taken as uniform, so the bin's mean error is the integral of ``|x - Q(x)|^p``
divided by b - a. With u = x / scale, the levels are the integers r from ``qmin - z`` to ``qmax - z``; let r be the one
nearest to u and f = u - r (beyond the outer levels |f| > 1/2: clipping). The antiderivative is

    E(u) = (r - r0) c + sign(f) |f|^(p + 1) / (p + 1),   c = 2 (1/2)^(p + 1) / (p + 1)

with c the integral over a whole cell; jumps of r cancel in differences. So a candidate costs one evaluation per bin
edge, whatever its number of levels, and the expectation is exact for the histogram's density.

The search is a grid of shrunken ranges (geometric: the best range of a tensor with outliers is a small part of
it), then two finer grids around the best. Formats of one free number (symmetric, or data of one sign) need one
dimension, others both ends.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from postquant.calib.histogram import MAX_BINS, Density
from postquant.calib.observers import Range, RangeMethod
from postquant.calib.statistics import TensorStatistics
from postquant.runtime_ops.quantizer import scale_and_zero_point
from postquant.runtime_ops.spec import QuantSpec

FloatArray = npt.NDArray[np.float64]

# Shrink factors of the first grid: 1 down to 1/64.
_SMALLEST_SHARE = 1.0 / 64.0
_POINTS_1D = 64
_POINTS_2D = 24
# The first grid of two dimensions looks at a coarser histogram (4 bins or more per 8-bit step).
_COARSE_BINS = MAX_BINS // 4
# Points of a refinement from one neighbour of the best to the other.
_REFINE_1D = 17
_REFINE_2D = 9
# Candidates evaluated at once: temporaries of 32 x 4097 float64 stay at 1 MiB each.
_BATCH = 32
# Bins narrower than this many steps are point masses: the difference of integrals would be rounding noise.
_NARROW = 1e-6


@dataclasses.dataclass(frozen=True, slots=True)
class LpError(RangeMethod):
    """The range with the smallest expected ``|x - Q(x)|^p`` over the histogram.

    Attributes:
        p: 1 to 8. 2 is the mean squared error; larger values fear clipping more.
    """

    name: ClassVar[str] = "mse"
    p: float = 2.0

    def __post_init__(self) -> None:
        if not 1.0 <= self.p <= 8.0:
            raise ValueError(f"the exponent of an Lp error lies in [1, 8], not {self.p}")

    def range(self, statistics: TensorStatistics, spec: QuantSpec) -> Range:
        """See :meth:`RangeMethod.range`."""
        if statistics.is_empty:
            return 0.0, 0.0
        density = statistics.density()
        low, high = min(density.low, 0.0), max(density.high, 0.0)
        if low == high:
            return 0.0, 0.0
        if spec.symmetric or low == 0.0 or high == 0.0:
            found = self._search_1d(density, spec, low, high)
        else:
            found = self._search_2d(statistics.density(max_bins=_COARSE_BINS), density, spec, low, high)
        # + 0.0 turns a share of 0 of a negative number, -0.0, into 0.0.
        return max(found[0], low) + 0.0, min(found[1], high) + 0.0

    def _search_1d(self, density: Density, spec: QuantSpec, low: float, high: float) -> Range:
        top = max(-low, high)
        down, up = (-top, top) if spec.symmetric else (low, high)
        shares = np.geomspace(1.0, _SMALLEST_SHARE, _POINTS_1D)
        ratio = float(shares[0] / shares[1])
        best = 1.0
        for _ in range(3):
            # argmin takes the first of equals: the widest range.
            errors = expected_error(density, spec, shares * down, shares * up, self.p)
            best = float(shares[int(np.argmin(errors))])
            shares = np.minimum(best * ratio ** np.linspace(1.0, -1.0, _REFINE_1D), 1.0)
            ratio **= 2.0 / (_REFINE_1D - 1)
        return best * down, best * up

    def _search_2d(self, coarse: Density, fine: Density, spec: QuantSpec, low: float, high: float) -> Range:
        shares = np.geomspace(1.0, _SMALLEST_SHARE, _POINTS_2D)
        ratio = float(shares[0] / shares[1])
        # Share 0 drops one sign altogether: right for a few bits and a short negative tail.
        lows, highs = (grid.ravel() for grid in np.meshgrid(np.append(shares, 0.0), np.append(shares, 0.0)))
        lows, highs = lows[:-1], highs[:-1]
        best_low, best_high = 1.0, 1.0
        for density in (coarse, fine, fine):
            errors = expected_error(density, spec, lows * low, highs * high, self.p)
            at = int(np.argmin(errors))
            best_low, best_high = float(lows[at]), float(highs[at])
            window = ratio ** np.linspace(1.0, -1.0, _REFINE_2D)
            lows, highs = (
                grid.ravel()
                for grid in np.meshgrid(np.minimum(best_low * window, 1.0), np.minimum(best_high * window, 1.0))
            )
            ratio **= 2.0 / (_REFINE_2D - 1)
        return best_low * low, best_high * high


def expected_error(density: Density, spec: QuantSpec, lows: FloatArray, highs: FloatArray, p: float) -> FloatArray:
    """``E |x - Q(x)|^p`` of many ranges.

    Args:
        density: Of x.
        spec: The format; its axis plays no part.
        lows: (C,) smallest values to represent.
        highs: (C,) largest values to represent.
        p: Exponent, >= 1.

    Returns:
        (C,) mean error per value, >= 0, in units of the tensor to the power p.
    """
    scales, zeros = scale_and_zero_point(spec, lows, highs)
    weights = density.counts / max(float(density.counts.sum()), 1.0)
    used = np.flatnonzero(weights)
    if not used.size:
        return np.zeros(len(scales))
    # Empty bins beyond the last one that counts cost nothing.
    begin, end = int(used[0]), int(used[-1]) + 1
    edges, weights = density.edges[begin : end + 1], weights[begin:end]
    widths = np.diff(edges)
    errors = np.empty(len(scales))
    for start in range(0, len(scales), _BATCH):
        part = slice(start, start + _BATCH)
        scale = scales[part, None].astype(np.float64)
        zero = zeros[part, None].astype(np.float64)
        u = edges / scale
        nearest = np.clip(np.rint(u), spec.qmin - zero, spec.qmax - zero)
        f = u - nearest
        steps = widths / scale
        integral = nearest * (2.0 * 0.5 ** (p + 1.0) / (p + 1.0)) + _signed_power(f, p + 1.0) / (p + 1.0)
        narrow = steps < _NARROW
        mean = np.diff(integral, axis=1) / np.where(narrow, 1.0, steps)
        if narrow.any():
            mean = np.where(narrow, np.abs(f[:, :-1]) ** p, mean)
        errors[part] = (mean @ weights) * scale[:, 0] ** p
    return errors


def _signed_power(x: FloatArray, exponent: float) -> FloatArray:
    """``sign(x) |x|^exponent``; the exponent of the mean squared error without a logarithm."""
    if exponent == 3.0:
        return x * x * x
    return np.sign(x) * np.abs(x) ** exponent
