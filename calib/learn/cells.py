"""Squares of places as channels, differentiable: :func:`in_cells`, :func:`out_of_cells`.

The order is that of FeedbackRequantize (:mod:`postquant.runtime_ops.law_feedback`).
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def in_cells(x: Tensor, cell: int) -> Tensor:
    """The places of every cell as channels.

    Args:
        x: (N, C, H, W).
        cell: n, the side of a cell.

    Returns:
        (N, n n C, ceil(H / n), ceil(W / n)), 0 where there is no place.

    >>> in_cells(torch.arange(1.0, 7.0).reshape(1, 1, 2, 3), 2)[0, :, 0].tolist()
    [[1.0, 3.0], [2.0, 0.0], [4.0, 6.0], [5.0, 0.0]]
    """
    batch, channels, height, width = x.shape
    if height % cell or width % cell:
        x = torch.nn.functional.pad(x, (0, -width % cell, 0, -height % cell))
    rows, columns = x.shape[2] // cell, x.shape[3] // cell
    split = x.reshape(batch, channels, rows, cell, columns, cell).permute(0, 3, 5, 1, 2, 4)
    return split.reshape(batch, cell * cell * channels, rows, columns)


def out_of_cells(cells: Tensor, cell: int, like: Tensor) -> Tensor:
    """The inverse of :func:`in_cells`.

    Args:
        cells: What it returns.
        cell: n.
        like: Its argument, whose shape and memory order the result has.
    """
    batch, channels, height, width = like.shape
    rows, columns = cells.shape[2:]
    split = cells.reshape(batch, cell, cell, channels, rows, columns).permute(0, 3, 4, 1, 5, 2)
    whole = split.reshape(batch, channels, rows * cell, columns * cell)[..., :height, :width]
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return whole.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def existing_places(x: Tensor, cell: int) -> Tensor | None:
    """Where cells have places: 1, and 0 elsewhere; None where all have.

    Args:
        x: (N, C, H, W).
        cell: n.

    Returns:
        float32 of the shape of ``in_cells(x, cell)``.
    """
    height, width = x.shape[2:]
    if height % cell == 0 and width % cell == 0:
        return None
    batch, channels = x.shape[:2]
    places = in_cells(torch.ones(1, 1, height, width, device=x.device), cell)
    return places.repeat_interleave(channels, dim=1).expand(batch, -1, -1, -1)
