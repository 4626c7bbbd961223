"""Code books of activations: the levels with the least squared error (Lloyd 1957, Max 1960): :func:`fit_levels`.

    levels = argmin sum over values x of min over i of (x - level_i)^2

Codes of few bits with equal gaps cannot be both fine where most values are and wide enough for the others: most values
behind a ReLU lie below a tenth of the largest, and one channel's largest is another one's smallest. The levels follow
from histograms, of every channel by itself where there are enough values. They start where the asymptotic density of
levels, the third root of that of the values (Panter and Dite 1951), puts them; then values and levels find each other
in turns. Zero is always a level: padding, and most values behind a ReLU, are zero.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from postquant.calib.channel_histogram import ChannelHistogram
from postquant.runtime_ops.code_book import CodeBook
from postquant.runtime_ops.quantizer import SMALLEST_SCALE, TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

Reals = npt.NDArray[np.float64]
_ROUNDS = 200
# Levels that move by less than this share of their span are settled.
_SETTLED = 1e-6
_LARGEST_CODE = 255
# So many values other than zero a channel needs per level to have levels of its own.
_VALUES_PER_LEVEL = 16


def fit_levels(spec: QuantSpec, histogram: ChannelHistogram, axis: int | None = None) -> TensorQuantizer:
    """The quantizer with the levels of the least squared error.

    Args:
        spec: An unsigned, asymmetric format of at most 4 bits, without a code book.
        histogram: How often which values occur; in every channel where there is an axis.
        axis: The axis, counted from the last one, -1, of channels that get levels of their own. A channel with few
            values has those of all values.

    Returns:
        A quantizer with ``2**bits`` levels (per channel) among the codes of 8 bits over the span of all.
    """
    count = 1 << spec.bits
    values, counts = histogram.values(), histogram.counts
    all_values = least_squares_levels(values, counts.sum(axis=0, keepdims=True), count)[0]
    enough = counts[:, values != 0].sum(axis=1) >= _VALUES_PER_LEVEL * count
    if axis is None or not enough.any():
        return quantizer_with_levels(spec, all_values)
    levels = np.tile(all_values, (len(counts), 1))
    levels[enough] = least_squares_levels(values, counts[enough], count)
    return quantizer_with_levels(spec, levels, axis)


def quantizer_with_levels(spec: QuantSpec, levels: Reals, axis: int | None = None) -> TensorQuantizer:
    """The quantizer whose levels are nearest to some real ones.

    Args:
        spec: As for :func:`fit_levels`; it may have a code book already.
        levels: (2**bits,) sorted, 0 among them; (C, 2**bits) where there is an axis.
        axis: The axis of channels that have levels of their own.
    """
    low, high = float(levels.min()), float(levels.max())
    scale = np.float32(max((high - low) / _LARGEST_CODE, float(SMALLEST_SCALE)))
    zero_point = np.int32(np.clip(np.rint(-low / float(scale)), 0, _LARGEST_CODE))
    codes = np.clip(np.rint(levels / float(scale)) + zero_point, 0, _LARGEST_CODE).astype(np.uint8)
    book = dataclasses.replace(spec, code_book=CodeBook.LEARNED)
    return TensorQuantizer(book, np.asarray(scale), np.asarray(zero_point), table=codes, table_axis=axis)


def least_squares_levels(values: Reals, counts: npt.NDArray[np.integer], count: int) -> Reals:
    """The levels with the least squared error of every channel, 0 among them.

    Args:
        values: (B,) increasing, 0 among them.
        counts: (C, B) how often every channel has each.
        count: How many levels, at least 2.

    Returns:
        (C, count), every row sorted; fewer different ones where fewer values occur.

    >>> float(least_squares_levels(np.arange(5.0), np.array([[9, 5, 0, 0, 2]]), 4)[0, -1])
    4.0
    """
    occurring = values[counts.any(axis=0)]
    anchor = None if not len(occurring) else 0 if occurring[0] >= 0 else count - 1 if occurring[-1] <= 0 else None
    levels = np.stack([_start(values, row, count, anchor) for row in counts])
    sums, totals = (
        np.concatenate((np.zeros((len(counts), 1)), np.cumsum(part, axis=1)), axis=1)
        for part in (counts * values, counts)
    )
    span = max(float((levels[:, -1] - levels[:, 0]).max()), 1e-300)
    rows = np.arange(len(counts))
    for _ in range(_ROUNDS):
        ends = np.zeros((len(counts), count + 1), np.intp)
        ends[:, 1:-1] = np.searchsorted(values, (levels[:, 1:] + levels[:, :-1]) / 2)
        ends[:, -1] = len(values)
        mass, sum_ = (np.diff(np.take_along_axis(part, ends, axis=1), axis=1) for part in (totals, sums))
        moved = np.where(mass > 0, sum_ / np.maximum(mass, 1e-300), levels)
        moved[rows, np.abs(moved).argmin(axis=1) if anchor is None else anchor] = 0.0
        settled = np.abs(moved - levels).max() < _SETTLED * span
        levels = moved
        if settled:
            break
    return levels


def _start(values: Reals, counts: npt.NDArray[np.integer], count: int, anchor: int | None) -> Reals:
    """Quantiles of the third root of the density, with zero at its place."""
    root = np.cbrt(counts)
    if anchor is not None:
        root[values == 0] = 0.0  # zero has a level of its own
    if not root.any():
        return np.zeros(count)
    edges = np.concatenate((values[:1], (values[1:] + values[:-1]) / 2, values[-1:]))
    cumulated = np.concatenate(([0.0], np.cumsum(root))) / root.sum()
    free = count if anchor is None else count - 1
    levels = np.interp((np.arange(free) + 0.5) / free, cumulated, edges)
    if anchor is None:
        levels[np.abs(levels).argmin()] = 0.0
        return levels
    return np.concatenate(([0.0], levels) if anchor == 0 else (levels, [0.0]))
