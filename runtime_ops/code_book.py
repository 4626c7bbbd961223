"""Weights as codes of a table of int8 levels: the POST lattice, a learned table, or any other. Activations likewise.

    w = level * scale          level = table[code]          0 <= code < 2^b, b = 2 or 4

Levels are int8 numbers, so such a weight *is* an int8 weight with zero point 0 that has few different values: integer
kernels run it as it is, and only its storage (codes and a table) is special. Quantizing takes the nearest level, and of
two that are equally near the upper one:

    level = table[#{i : w / scale >= (table[i] + table[i + 1]) / 2}]          table sorted

The POST lattice stands for powers of sqrt(2): 17 / 12 and 24 / 17 differ from it by 0.17 %. It *is* the definition, so
nothing is approximated behind it.

An activation's levels are uint8 numbers, codes of the 8 bits that it is stored in (:func:`nearest_codes`):

    code = clip(round(x / scale) + zero_point, 0, 255)          level = the nearest one of the table, the upper of two

and its table may have a row for every channel.
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.int8]

# Widths of codes that the operators of ai.postquant unpack.
CODE_BITS = (2, 4)
# Activations of more bits have no code books.
MOST_LEVEL_BITS = 4
_LATTICE = (12, 17, 24, 34, 48, 68, 96)


class CodeBook(enum.Enum):
    """Which values a weight or an activation may have, in units of its scale."""

    UNIFORM = "int"
    POST = "post"
    LEARNED = "lut"


def post_table(bits: int) -> Table:
    """The POST lattice: zero and powers of sqrt(2), as int8.

    At 4 bits 15 levels (zero is there twice), at 2 bits -1, 0, 1 / sqrt(2) and 1, in units of 96.

    Args:
        bits: 2 or 4.

    Returns:
        (2**bits,) int8, sorted.

    >>> post_table(2).tolist()
    [-96, 0, 68, 96]
    """
    if bits == 2:
        return np.array([-96, 0, 68, 96], np.int8)
    return np.array([*(-level for level in reversed(_LATTICE)), 0, 0, *_LATTICE], np.int8)


def uniform_table(bits: int) -> Table:
    """All codes of a signed integer of ``bits`` bits, for uniform weights that are stored like a table's.

    >>> uniform_table(2).tolist()
    [-2, -1, 0, 1]
    """
    return np.arange(-(1 << (bits - 1)), 1 << (bits - 1)).astype(np.int8)


def nearest_levels(ratio: npt.NDArray[np.floating], table: Table) -> npt.NDArray[np.int8]:
    """The law of quantization: the nearest level.

    Middles between two int8 levels are multiples of one half, so ``floor(2 * ratio)`` tells on which side of all of
    them a value lies, exactly.

    Args:
        ratio: Any shape, ``w / scale``.
        table: (n,) sorted levels.

    Returns:
        int8 levels of the shape of ``ratio``.

    >>> nearest_levels(np.float32([-200, 34.1, 81.9, 82, 500]), post_table(2)).tolist()
    [-96, 68, 68, 96, 96]
    """
    levels: npt.NDArray[np.int8] = nearest_of_steps(table)[half_steps(ratio)]
    return levels


def half_steps(ratio: npt.NDArray[np.floating]) -> npt.NDArray[np.int16]:
    """``floor(2 * ratio)``, from 0 for -128 and less to 511 for 127.5 and more: the index of :func:`nearest_of_steps`.

    >>> half_steps(np.float32([-1e9, -0.1, 0, 0.5])).tolist()
    [0, 255, 256, 257]
    """
    steps = np.clip(ratio, -128, 127.5)
    steps *= 2
    np.floor(steps, out=steps)
    index: npt.NDArray[np.int16] = steps.astype(np.int16)
    index += 256
    return index


def nearest_of_steps(table: Table) -> npt.NDArray[np.int8]:
    """The nearest level of every half-open interval ``[k / 2, (k + 1) / 2)`` for k from -256 to 255.

    Args:
        table: (n,) sorted levels.

    Returns:
        (512,) int8.
    """
    levels = table.astype(np.int64)
    # Twice the middles are sums of neighbours.
    nearest: npt.NDArray[np.int8] = table[np.searchsorted(levels[:-1] + levels[1:], np.arange(-256, 256), side="right")]
    return nearest


def nearest_codes(table: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The nearest level of every 8-bit code, the upper one of two that are equally near.

    Args:
        table: (n,) or (C, n) uint8, sorted along the last axis.

    Returns:
        (256,) or (C, 256) uint8.

    >>> nearest_codes(np.uint8([0, 10, 20, 255]))[[4, 5, 14, 138]].tolist()
    [0, 10, 10, 255]
    """
    levels = table.reshape(-1, table.shape[-1])
    # The first code that is not below a middle; how many middles a code has passed is which level it gets.
    first = (levels[:, :-1].astype(np.intp) + levels[:, 1:] + 1) // 2
    rows = 256 * np.arange(len(levels))[:, None]
    passed = np.bincount((rows + first).ravel(), minlength=256 * len(levels)).reshape(-1, 256).cumsum(axis=1)
    return np.take_along_axis(levels, passed, axis=1).reshape(*table.shape[:-1], 256)


def table_rows(channels: int, axis: int) -> npt.NDArray[np.int32]:
    """Where every channel's levels of 256 codes begin, for codes whose channels lie on an axis.

    Args:
        channels: How many.
        axis: Counted from the last one, -1.

    Returns:
        (channels, 1, ..., 1) int32 with ``-axis`` dimensions.

    >>> table_rows(2, -3).shape, table_rows(3, -1).tolist()
    ((2, 1, 1), [0, 256, 512])
    """
    return 256 * np.arange(channels, dtype=np.int32).reshape(-1, *[1] * (-axis - 1))


def table_indices(levels: npt.NDArray[np.integer], table: Table) -> npt.NDArray[np.uint8]:
    """Codes of levels: the first entry of the table that holds each.

    Args:
        levels: Any shape; every one is in the table.
        table: (n,) sorted levels.

    Raises:
        ValueError: If a level is not in the table.

    >>> table_indices(np.int8([0, 96]), post_table(2)).tolist()
    [1, 3]
    """
    codes = np.minimum(np.searchsorted(table, levels), len(table) - 1)
    if not np.array_equal(table[codes], levels):
        raise ValueError("a level is not in the table")
    return codes.astype(np.uint8)
