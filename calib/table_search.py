"""Learns a layer's table of int8 levels by the layer's output error: :func:`learn_table`.

With codes and scales fixed, the output error is a quadratic form of the table ``t``. For one-hot codes ``Z``
(``w~_km = s_m sum_i t_i Z_kmi``) it is smallest at

    A t = b     A = sum_m s_m^2 Z_m' H Z_m     b = sum_m s_m Z_m' H w_m

which is the centre step of k-means in the metric of the layer's second moments. The other step, codes and scales for a
table, is coordinate descent (:mod:`postquant.calib.table_rounding`). The two alternate from several starts, on real
numbers with the largest at 127; rounding to int8 at the end adds an error a thousand times smaller than what the steps
between 16 levels cause.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from postquant.calib.table_rounding import Codes, Levels, Rounder
from postquant.runtime_ops.code_book import Table, post_table, uniform_table

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

# Largest magnitude of a level where the integer kernel does not ask for less.
LARGEST_LEVEL = 127
_TURNS = 8
# A turn that gains less ends the alternation.
_LEAST_GAIN = 1e-3
# Pull of levels towards where they are, as a share of the mean diagonal of A: an unused level stays.
_PULL = 1e-4
# Output channels that a table is learned on: more do not change it.
_PRODUCTS, _FEWEST, _MOST = 1 << 16, 16, 128
# Learned tables that are tried with compensated rounding, and rounds of improving the winner with it.
_TRIED = 2
_POLISHES = 3


def learn_table(rounder: Rounder, bits: int, *, largest: int = LARGEST_LEVEL) -> Table:
    """The best of the tables that several starts lead to.

    Args:
        rounder: The layer.
        bits: 2 or 4.
        largest: Largest magnitude of a level.

    Returns:
        (2**bits,) sorted int8.
    """
    part = rounder.subset(_channels(rounder))
    starts = (post_table(bits), uniform_table(bits), quantiles(part.matrix, bits))
    learned = sorted((_learn(part, start, largest) for start in starts), key=lambda found: found[1])
    # Compensated rounding helps some tables more than others.
    errors = [part.best(Levels.of_table(table))[1].total for table, _ in learned[:_TRIED]]
    return learned[int(np.argmin(errors))][0]


def polished(rounder: Rounder, table: Table, codes: Codes, *, largest: int = LARGEST_LEVEL) -> tuple[Table, Codes]:
    """A table and its compensated codes, improved together.

    Args:
        rounder: The layer.
        table: (2**bits,) sorted int8.
        codes: Of the table.
        largest: Largest magnitude of a level.

    Returns:
        The table and the codes; their output error is not larger.
    """
    channels = _channels(rounder)
    part = rounder.subset(channels)
    for _ in range(1 if rounder.large else _POLISHES):
        exact = table.astype(np.float64)
        index = _indices(codes, exact)
        solved, factor = _normal(_solved(part, codes.subset(channels), index[:, :, channels], exact), largest)
        other = _rounded(solved, largest)
        format = Levels.of_table(other)
        found = rounder.fitted(other.astype(np.float32)[index], codes.scale / np.float32(factor))
        found = rounder.descended(rounder.compensated(found, format), format)
        enough = found.total > codes.total * (1 - _LEAST_GAIN)
        if found.total < codes.total:
            table, codes = other, found
        if enough:
            break
    return table, codes


def _channels(rounder: Rounder) -> npt.NDArray[np.int64]:
    """The output channels of every group that a table is learned on, evenly spaced."""
    _, depth, outputs = rounder.matrix.shape
    count = min(int(np.clip(_PRODUCTS // max(depth, 1), _FEWEST, _MOST)), outputs)
    channels: npt.NDArray[np.int64] = np.arange(count) * outputs // max(count, 1)
    return channels


def quantiles(matrix: FloatArray, bits: int) -> DoubleArray:
    """Levels between even ones and those that equally many weights are near to, in units of the largest weight.

    Args:
        matrix: (G, K, M) weights; each output channel counts in units of its own largest.
        bits: 2 or 4.

    Returns:
        (2**bits,) sorted.
    """
    top = np.abs(matrix).max(axis=1, keepdims=True, initial=0.0)
    ratio = np.divide(matrix, top, out=np.zeros_like(matrix), where=top > 0)
    count = 1 << bits
    even = np.linspace(-1, 1, count)
    filled = np.quantile(ratio, (np.arange(count) + 0.5) / count)
    return np.asarray((even + filled) / 2, np.float64)


def _learn(rounder: Rounder, start: npt.NDArray[np.number], largest: int) -> tuple[Table, float]:
    """The table that a start leads to, and its output error without compensated rounding."""
    table = _normal(start.astype(np.float64), largest)[0]
    codes = rounder.nearest(Levels.of_reals(table))
    best, best_error = table, codes.total
    for turn in range(_TURNS):
        if turn:
            codes = rounder.descended(codes, Levels.of_reals(table))
        index = _indices(codes, table)
        table, factor = _normal(_solved(rounder, codes, index, table), largest)
        scale = codes.scale / np.float32(factor)
        codes = rounder.fitted(table.astype(np.float32)[index], scale)
        if codes.total >= best_error * (1 - _LEAST_GAIN):
            break
        best, best_error = table, codes.total
    return _rounded(best, largest), best_error


def _rounded(table: DoubleArray, largest: int) -> Table:
    return np.clip(np.rint(table), -largest, largest).astype(np.int8)


def _indices(codes: Codes, table: DoubleArray) -> npt.NDArray[np.int64]:
    exact = table.astype(np.float32)
    return np.searchsorted((exact[1:] + exact[:-1]) / 2, codes.levels)


def _normal(table: DoubleArray, largest: int) -> tuple[DoubleArray, float]:
    """The table in units in which its largest level is the largest that there is, and the factor."""
    factor = largest / max(float(np.abs(table).max()), 1e-30)
    return table * factor, factor


def _solved(rounder: Rounder, codes: Codes, index: npt.NDArray[np.int64], table: DoubleArray) -> DoubleArray:
    """The sorted levels with the smallest output error for these codes and scales."""
    count = len(table)
    hot = np.zeros((*index.shape, count), np.float32)
    np.put_along_axis(hot, index[..., np.newaxis], codes.scale[..., np.newaxis], axis=3)
    square, right = rounder.quadratic(hot)
    pull = _PULL * max(float(np.trace(square)) / count, 1e-30)
    return np.sort(np.linalg.solve(square + pull * np.eye(count), right + pull * table))
