"""Codes of 8 bits to the levels of a code book, one for all channels or one for each: LutRequantize.

    real = float32((x - x_zero_point) * x_scale)
    code = saturate(round_half_even(real / scale) + zero_point)          8 bits
    y    = table[c][#{i : table[c][i] + table[c][i + 1] <= 2 * code}]    the nearest level, the upper of two

``code`` is what QuantizeLinear makes of what DequantizeLinear makes of ``x``, in float32 with a true division; the
level is that of :func:`postquant.runtime_ops.code_book.nearest_codes`. Codes have 256 values, so all of it is one table
of 256 levels for each channel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops import law
from postquant.runtime_ops.code_book import nearest_codes
from postquant.runtime_ops.errors import ModelError

Codes = npt.NDArray[np.uint8]
Real = npt.NDArray[np.float32]

FEWEST_LEVELS = 2
MOST_LEVELS = 16
# Lowest axis, counted from the last one, -1: onnxruntime's tensors of more dimensions have no native kernels.
FIRST_AXIS = -8


def lut_requantize(
    x: Codes, x_scale: Real, x_zero_point: Codes, scale: Real, zero_point: Codes, table: Codes, axis: int
) -> Codes:
    """LutRequantize.

    Args:
        x: uint8 codes of one dimension or more.
        x_scale: () float32, > 0.
        x_zero_point: () uint8.
        scale: () float32, > 0, the step of the levels.
        zero_point: () uint8, the level of 0.
        table: (C, n) uint8 levels, each row sorted, 2 <= n <= 16; C is 1 or the size of ``axis``.
        axis: The channels' axis, from -8 to -1, the last one. It plays no part where C is 1.

    Returns:
        uint8 levels of the shape of ``x``.

    Raises:
        ModelError: If the inputs do not fit together.

    >>> numbers = np.float32(0.5), np.uint8(10), np.float32(1), np.uint8(0)
    >>> lut_requantize(np.uint8([[0, 12, 30], [0, 12, 30]]), *numbers, np.uint8([[0, 9], [1, 3]]), -2).tolist()
    [[0, 0, 9], [1, 1, 3]]
    """
    code = level_codes(x_scale, x_zero_point, scale, zero_point)
    check_table(table)
    check_channels(x, len(table), axis)
    levels = nearest_codes(table)[:, code]
    if len(levels) == 1:
        shared: Codes = levels[0][x]
        return shared
    return levels[law.along_axis(np.arange(len(levels)), x.ndim, axis), x]


def level_codes(x_scale: Real, x_zero_point: Codes, scale: Real, zero_point: Codes) -> npt.NDArray[np.int32]:
    """The code on the levels' grid of every code of the stored tensor: ``code`` above.

    Args:
        x_scale: () float32, > 0.
        x_zero_point: () uint8.
        scale: () float32, > 0, the step of the levels.
        zero_point: () uint8, the level of 0.

    Returns:
        (256,) int32 from 0 to 255, which never falls.

    Raises:
        ModelError: If one is not what the operators read.

    >>> level_codes(np.float32(0.5), np.uint8(1), np.float32(1), np.uint8(7))[:5].tolist()
    [7, 7, 7, 8, 9]
    """
    scalars: dict[str, npt.NDArray[Any]] = {
        "x_scale": x_scale,
        "x_zero_point": x_zero_point,
        "scale": scale,
        "zero_point": zero_point,
    }
    for name, value in scalars.items():
        dtype = np.dtype(np.float32 if name.endswith("scale") else np.uint8)
        if value.dtype != dtype or value.shape != ():
            raise ModelError(
                "a number of the codes is not what the operator reads",
                where=f"input {name}",
                expected=f"{dtype} of shape ()",
                found=f"{value.dtype} of shape {value.shape}",
            )
        if dtype.kind == "f" and not (np.isfinite(value) and value > 0):
            raise ModelError("a scale must be finite and positive", where=f"input {name}", found=str(value))
    # Huge quotients are infinite, and saturate.
    with np.errstate(over="ignore"):
        real = np.asarray((np.arange(256) - np.int64(x_zero_point)).astype(np.float32) * x_scale, np.float32)
        return law.quantize(real, scale, zero_point, qmin=0, qmax=255)


def check_table(table: Codes) -> None:
    """Raises ModelError if the levels are not (C, n) uint8 in sorted rows, C >= 1, 2 <= n <= 16."""
    if (
        table.dtype != np.uint8
        or table.ndim != 2
        or not (FEWEST_LEVELS <= table.shape[1] <= MOST_LEVELS)
        or not len(table)
    ):
        raise ModelError(
            "the levels have not the operator's form",
            where="input table",
            expected=f"uint8 of shape (C, n) with C >= 1 and {FEWEST_LEVELS} <= n <= {MOST_LEVELS}",
            found=f"{table.dtype} of shape {table.shape}",
        )
    if (table[:, 1:] < table[:, :-1]).any():
        raise ModelError("the levels of a channel must be sorted", where="input table")


def check_channels(x: Codes, channels: int, axis: int) -> None:
    """Raises ModelError if ``x`` has not so many channels on ``axis`` (any number of them for ``channels`` of 1)."""
    if not FIRST_AXIS <= axis <= -1:
        raise ModelError(
            "the axis is counted from the last one, which is -1",
            where="attribute axis",
            expected=f"{FIRST_AXIS} to -1",
            found=str(axis),
        )
    if x.dtype != np.uint8 or x.ndim < 1:
        raise ModelError(
            "codes have one dimension or more",
            where="input x",
            expected="uint8",
            found=f"{x.dtype} of shape {x.shape}",
        )
    if channels > 1 and (x.ndim < -axis or x.shape[axis] != channels):
        raise ModelError(
            "the levels are not those of the channels",
            where="input x",
            expected=f"{channels} channels on axis {axis}",
            found=f"shape {x.shape}",
        )
