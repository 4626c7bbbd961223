"""Code books of activations: the levels with the least squared error (Lloyd 1957, Max 1960): :func:`fit_levels`.

    levels = argmin sum over values x of min over i of (x - level_i)^2

Codes of few bits with equal gaps cannot be both fine where most values are and wide enough for the others: most values
behind a ReLU lie below a tenth of the largest. The levels follow from a histogram. They start where the asymptotic
density of levels, the third root of that of the values (Panter and Dite 1951), puts them; then values and levels find
each other in turns. Zero is always a level: padding, and most values behind a ReLU, are zero.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from postquant.calib.histogram import Density
from postquant.runtime_ops.code_book import CodeBook
from postquant.runtime_ops.quantizer import SMALLEST_SCALE, TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

Reals = npt.NDArray[np.float64]
_ROUNDS = 200
# Levels that move by less than this share of their span are settled.
_SETTLED = 1e-6
_LARGEST_CODE = 255


def fit_levels(spec: QuantSpec, density: Density) -> TensorQuantizer:
    """The quantizer with the levels of the least squared error.

    Args:
        spec: An unsigned, asymmetric format of at most 4 bits, without a code book.
        density: How often which values occur.

    Returns:
        A quantizer with ``2**bits`` levels among the codes of 8 bits over their span.
    """
    return quantizer_with_levels(spec, least_squares_levels(density, 1 << spec.bits))


def quantizer_with_levels(spec: QuantSpec, levels: Reals) -> TensorQuantizer:
    """The quantizer whose levels are nearest to some real ones.

    Args:
        spec: As for :func:`fit_levels`; it may have a code book already.
        levels: (2**bits,) sorted, 0 among them.
    """
    low, high = float(levels[0]), float(levels[-1])
    scale = np.float32(max((high - low) / _LARGEST_CODE, float(SMALLEST_SCALE)))
    zero_point = np.int32(np.clip(np.rint(-low / float(scale)), 0, _LARGEST_CODE))
    codes = np.clip(np.rint(levels / float(scale)) + zero_point, 0, _LARGEST_CODE).astype(np.uint8)
    book = dataclasses.replace(spec, code_book=CodeBook.LEARNED)
    return TensorQuantizer(book, np.asarray(scale), np.asarray(zero_point), table=codes)


def least_squares_levels(density: Density, count: int) -> Reals:
    """The levels with the least squared error, 0 among them.

    Args:
        density: How often which values occur.
        count: How many levels, at least 2.

    Returns:
        (count,) sorted; fewer different ones where fewer values occur.

    >>> from postquant.calib.histogram import Histogram
    >>> h = Histogram()
    >>> h.update(np.float32([0, 0, 0, 0, 1, 1, 4, 4]))
    >>> [round(float(level), 1) for level in least_squares_levels(h.density(), 4)][-1]
    4.0
    """
    counts = density.counts.astype(np.float64)
    middles = (density.edges[:-1] + density.edges[1:]) / 2
    # Nearly all of the bin around zero are exact zeros where there is nothing on one side of it.
    if density.low >= 0 or density.high <= 0:
        middles[density.zero] = 0.0
    occurring = counts > 0
    values, counts = middles[occurring], counts[occurring]
    if not len(values):
        return np.zeros(count)
    anchor = 0 if values[0] >= 0 else count - 1 if values[-1] <= 0 else None
    levels = _start(density, count, anchor)
    sums, totals = (np.concatenate(([0.0], np.cumsum(part))) for part in (counts * values, counts))
    span = max(levels[-1] - levels[0], 1e-300)
    for _ in range(_ROUNDS):
        ends = np.concatenate(([0], np.searchsorted(values, (levels[1:] + levels[:-1]) / 2), [len(values)]))
        mass = np.diff(totals[ends])
        moved = np.where(mass > 0, np.diff(sums[ends]) / np.maximum(mass, 1e-300), levels)
        moved[np.abs(moved).argmin() if anchor is None else anchor] = 0.0
        settled = np.abs(moved - levels).max() < _SETTLED * span
        levels = moved
        if settled:
            break
    return levels


def _start(density: Density, count: int, anchor: int | None) -> Reals:
    """Quantiles of the third root of the density, with zero at its place."""
    widths = np.maximum(np.diff(density.edges), density.width * 1e-3)
    root = widths * np.cbrt(density.counts / widths)
    if anchor is not None:
        root[density.zero] = 0.0  # zero has a level of its own
    if not root.any():
        return np.zeros(count)
    cumulated = np.concatenate(([0.0], np.cumsum(root))) / root.sum()
    free = count if anchor is None else count - 1
    levels = np.interp((np.arange(free) + 0.5) / free, cumulated, density.edges)
    if anchor is None:
        levels[np.abs(levels).argmin()] = 0.0
        return levels
    return np.concatenate(([0.0], levels) if anchor == 0 else (levels, [0.0]))
