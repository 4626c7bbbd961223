"""Large tensors in pieces: :func:`pieces`.

A chain of element-wise operators over tensors of megabytes waits for memory in every one of them. On a piece that stays
in the cache, only the first operator reads from memory and only the last one writes to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

Tensor = torch.Tensor
# Elements: a handful of such float32 arrays fits into the cache of one core.
PIECE = 1 << 16


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of every tensor, piece by piece.

    Where the pieces are cut follows from the tensors alone, so that sums over them are always the same.

    Args:
        tensors: At least one, of one shape, any layout. They stay whole on other devices than the CPU, and where they
            lie in memory in different orders or with gaps.

    Yields:
        Views of every tensor: (n,) with n <= ``PIECE``, or the tensors themselves.

    >>> [(part.shape, part.sum().item()) for (part,) in pieces(torch.ones(3, PIECE - 1))]
    [(torch.Size([65536]), 65536.0), (torch.Size([65536]), 65536.0), (torch.Size([65533]), 65533.0)]
    """
    size = tensors[0].numel()
    if size <= PIECE or tensors[0].device.type != "cpu" or not _same_order(tensors):
        yield tensors
        return
    flat = [tensor.as_strided((size,), (1,)) for tensor in tensors]
    for first in range(0, size, PIECE):
        yield tuple(tensor[first : first + PIECE] for tensor in flat)


def _same_order(tensors: Sequence[Tensor]) -> bool:
    """Whether all hold their elements in the same order in memory, without gaps."""
    orders = [torch.contiguous_format, *([torch.channels_last] if tensors[0].ndim == 4 else [])]
    return any(all(tensor.is_contiguous(memory_format=order) for tensor in tensors) for order in orders)
