"""Codes of 8 bits to levels, groups of channels in turn, each of which makes up for earlier errors: FeedbackRequantize.

At every position for itself, with ``code`` and the nearest level of
:func:`postquant.runtime_ops.law_levels.lut_requantize`, and errors e that are 0 at first, for group 0 to group 7:

    s     = clip(round_half_even(float32(left e) * left_scale), -127, 127)
    shift = clip(round_half_even(float32(right[c] s) * right_scale[c]), -255, 255)
    y[c]  = nearest level of table[c] to clip(code[c] - shift, 0, 255)      for every channel c of the group
    e[c]  = clip(y[c] - code[c], -127, 127)

With a cell of n > 1, a position is a square of n by n places on the last two axes, the first one at the corner of every
plane, and its channels are those of all its places: channel ``(i n + j) C + c`` is channel c of x at row i and column j
of the square. Where squares reach beyond the plane nothing is rounded, and e is 0.

So ``diag(right_scale) right diag(left_scale) left`` is how much of the errors of earlier channels a channel takes over,
as towards the nearest plane of Babai's algorithm. The sums are of small integers, which float32 holds exactly in any
order, and the rest is single float32 operations: every implementation gives the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.array_parts import ArrayParts
from postquant.runtime_ops.code_book import nearest_codes
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.law_levels import Codes, Real, check_channels, check_table, level_codes

Small = npt.NDArray[np.int8]
T = TypeVar("T", bound=np.generic)

GROUPS = 8
FEWEST_CHANNELS = 2
# Errors and what is made of them: they fit 8 bits, and a coefficient of 127 times the largest sum is below 2^24.
LARGEST_ERROR = 127
LARGEST_SHIFT = 255
# Side of a cell.
LARGEST_CELL = 8
# The channels' axis where there are cells: rows and columns are behind it.
CELL_AXIS = -3
# float32 holds sums of integers up to 2^24 exactly: what the coefficients of one sum may add up to.
COEFFICIENT_WEIGHT = 2**24 // LARGEST_ERROR


@dataclasses.dataclass(frozen=True, eq=False)
class Feedback(ArrayParts):
    """How errors of channels change other channels.

    Attributes:
        group: (C,) uint8 from 0 to 7, C >= 2: which channels are rounded when.
        left: (R, C) int8 in ``[-127, 127]``, R >= 1, at most 132104 in absolute sum per row.
        left_scale: (R,) float32.
        right: (C, R) int8 in ``[-127, 127]``, at most 132104 in absolute sum per row.
        right_scale: (C,) float32.
        cell: Side of the squares of places whose channels are rounded together, 1 to 8: C is its square times the
            channels of the tensor.

    Raises:
        ModelError: If the parts do not fit together.
    """

    whole = "an error feedback"

    group: Codes
    left: Small
    left_scale: Real
    right: Small
    right_scale: Real
    cell: int = 1

    def __post_init__(self) -> None:
        self._check_shapes()
        if not 1 <= self.cell <= LARGEST_CELL or len(self.group) % self.cell**2:
            raise ModelError(
                "the channels are not those of whole cells",
                where="attribute cell",
                expected=f"1 to {LARGEST_CELL}, its square a divisor of {len(self.group)} channels",
                found=str(self.cell),
            )
        if self.group.max() >= GROUPS:
            raise ModelError(
                "a channel is in a group that there is not",
                where="input group",
                expected=f"0 to {GROUPS - 1}",
                found=str(self.group.max()),
            )
        for name in ("left_scale", "right_scale"):
            if not np.isfinite(getattr(self, name)).all():
                raise ModelError("a scale of the feedback is not finite", where=f"input {name}")
        for name in ("left", "right"):
            coefficients = getattr(self, name)
            if (coefficients == -128).any():
                raise ModelError("a coefficient of the feedback is below -127", where=f"input {name}")
            weight = int(np.abs(coefficients.astype(np.int64)).sum(axis=1).max())
            if weight > COEFFICIENT_WEIGHT:
                raise ModelError(
                    "the coefficients of a row are too large for exact sums",
                    where=f"input {name}",
                    expected=f"an absolute sum of at most {COEFFICIENT_WEIGHT}",
                    found=str(weight),
                )

    @property
    def channels(self) -> int:
        """How many a tensor has that is rounded with it."""
        return len(self.group) // self.cell**2

    @property
    def rank(self) -> int:
        """R."""
        return len(self.left)

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in super()._names() if name != "cell"]

    def _check_shapes(self) -> None:
        channels = len(self.group) if self.group.ndim == 1 else 0
        rank = len(self.left) if self.left.ndim == 2 else 0
        if self.group.dtype != np.uint8 or channels < FEWEST_CHANNELS:
            raise ModelError(
                "the groups of the channels have not the operator's form",
                where="input group",
                expected=f"uint8 of shape (C,) with C >= {FEWEST_CHANNELS}",
                found=f"{self.group.dtype} of shape {self.group.shape}",
            )
        shapes = {
            "left": (max(rank, 1), channels),
            "left_scale": (rank,),
            "right": (channels, rank),
            "right_scale": (channels,),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            dtype = np.dtype(np.float32 if name.endswith("scale") else np.int8)
            if array.dtype != dtype or array.shape != shape:
                raise ModelError(
                    "the parts of a feedback do not fit together",
                    where=f"input {name}",
                    expected=f"{dtype} of shape {shape}",
                    found=f"{array.dtype} of shape {array.shape}",
                )


def feedback_requantize(
    x: Codes,
    x_scale: Real,
    x_zero_point: Codes,
    scale: Real,
    zero_point: Codes,
    table: Codes,
    feedback: Feedback,
    axis: int,
) -> Codes:
    """FeedbackRequantize.

    Args:
        x: uint8 codes of one dimension or more.
        x_scale: () float32, > 0.
        x_zero_point: () uint8.
        scale: () float32, > 0, the step of the levels.
        zero_point: () uint8, the level of 0.
        table: (1, m) or (C, m) uint8 levels, each row sorted, 2 <= m <= 16.
        feedback: Groups and coefficients of the C channels.
        axis: The channels' axis, from -8 to -1, the last one; -3 where there are cells.

    Returns:
        uint8 levels of the shape of ``x``.

    Raises:
        ModelError: If the inputs do not fit together.

    >>> one = np.float32(1)
    >>> half = Feedback(np.uint8([0, 1]), np.int8([[1, 0]]), np.float32([1]), np.int8([[0], [1]]), np.float32([1, 0.5]))
    >>> numbers = one, np.uint8(0), one, np.uint8(0)
    >>> feedback_requantize(np.uint8([[24, 24], [16, 26]]), *numbers, np.uint8([[0, 20, 30]]), half, -1).tolist()
    [[20, 30], [20, 20]]
    """
    code = level_codes(x_scale, x_zero_point, scale, zero_point)
    check_table(table)
    channels = feedback.channels
    if feedback.cell > 1 and axis != CELL_AXIS:
        raise ModelError("cells are those of planes", where="attribute axis", expected=str(CELL_AXIS), found=str(axis))
    if len(table) not in (1, channels):
        raise ModelError(
            "the levels are not those of the channels",
            where="input table",
            expected=f"1 or {channels} rows",
            found=str(len(table)),
        )
    check_channels(x, channels, axis)
    return feedback_levels(code[x], nearest_codes(table), feedback, axis)


def feedback_levels(codes: npt.NDArray[np.integer], nearest: Codes, feedback: Feedback, axis: int) -> Codes:
    """What the operator makes of codes on the levels' grid.

    Args:
        codes: Integers from 0 to 255, C of them on ``axis``.
        nearest: (1, 256) or (C, 256) uint8, the nearest level of every code.
        feedback: Groups and coefficients of the C channels.
        axis: The channels' axis, counted from the last one, -1.

    Returns:
        uint8 levels of the shape of ``codes``.
    """
    first = np.moveaxis(codes, axis, 0)
    if feedback.cell == 1:
        y = _requantize(first.reshape(feedback.channels, -1).astype(np.int32), nearest, feedback, None)
        return np.ascontiguousarray(np.moveaxis(y.reshape(first.shape), 0, axis))
    cells = in_cells(first, feedback.cell)
    exists = np.broadcast_to(in_cells(np.ones_like(first, np.float32), feedback.cell), cells.shape)
    rows = nearest if len(nearest) == 1 else np.tile(nearest, (feedback.cell**2, 1))
    channels = len(feedback.group)
    y = _requantize(cells.reshape(channels, -1).astype(np.int32), rows, feedback, exists.reshape(channels, -1))
    return np.ascontiguousarray(np.moveaxis(out_of_cells(y.reshape(cells.shape), first.shape), 0, axis))


def in_cells(x: npt.NDArray[T], cell: int) -> npt.NDArray[T]:
    """The places of every cell as channels.

    Args:
        x: (C, ..., H, W).
        cell: n.

    Returns:
        (n n C, ..., ceil(H / n), ceil(W / n)), 0 where there is no place.

    >>> in_cells(np.arange(1, 7).reshape(1, 2, 3), 2)[:, 0].tolist()
    [[1, 3], [2, 0], [4, 6], [5, 0]]
    """
    height, width = x.shape[-2:]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -height % cell), (0, -width % cell)])
    rows, columns = padded.shape[-2] // cell, padded.shape[-1] // cell
    split = padded.reshape(*x.shape[:-2], rows, cell, columns, cell)
    moved = np.moveaxis(split, (-3, -1), (0, 1))
    return moved.reshape(cell * cell * x.shape[0], *x.shape[1:-2], rows, columns)


def out_of_cells(cells: npt.NDArray[T], shape: tuple[int, ...]) -> npt.NDArray[T]:
    """The inverse of :func:`in_cells`.

    Args:
        cells: What it returns.
        shape: That of its argument.
    """
    cell = math.isqrt(len(cells) // shape[0])
    rows, columns = cells.shape[-2:]
    split = np.moveaxis(cells.reshape(cell, cell, *shape[:-2], rows, columns), (0, 1), (-3, -1))
    whole = split.reshape(*shape[:-2], rows * cell, columns * cell)
    return whole[..., : shape[-2], : shape[-1]]


def _requantize(code: npt.NDArray[np.int32], levels: Codes, feedback: Feedback, exists: Real | None) -> Codes:
    """Levels (C, P) of codes (C, P); there is no error where ``exists`` is 0."""
    left, right = feedback.left.astype(np.float32), feedback.right.astype(np.float32)
    y = np.empty(code.shape, np.uint8)
    total = np.zeros((len(left), code.shape[1]), np.float32)
    for group in range(GROUPS):
        members = np.flatnonzero(feedback.group == group)
        if not len(members):
            continue
        inner = _rounded(total, feedback.left_scale, LARGEST_ERROR)
        shift = _rounded(_product(right[members], inner), feedback.right_scale[members], LARGEST_SHIFT)
        aim = np.clip(code[members] - shift.astype(np.int32), 0, 255)
        y[members] = levels[members[:, None] if len(levels) > 1 else 0, aim]
        error = np.clip(y[members] - code[members], -LARGEST_ERROR, LARGEST_ERROR)
        errors = error.astype(np.float32)
        total += _product(left[:, members], errors if exists is None else errors * exists[members])
    return y


def _product(first: Real, second: Real) -> Real:
    """Of matrices of small integers."""
    # OpenBLAS 0.3.31 reads beyond narrow matrices, and warns of NaNs that happen to lie there.
    with np.errstate(invalid="ignore"):
        found: Real = first @ second
    return found


def _rounded(sums: Real, scale: Real, largest: int) -> Real:
    """Scaled sums (K, P), rounded; products beyond float32 are infinite, and saturate."""
    with np.errstate(over="ignore"):
        scaled: Real = np.clip(np.rint(sums * scale[:, None]), -largest, largest)
    return scaled
