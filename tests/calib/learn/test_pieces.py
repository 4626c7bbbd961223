"""Pieces hold every element once, and share the memory of their tensors."""

from collections.abc import Callable

import pytest
import torch

from postquant.calib.learn.pieces import PIECE, pieces


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 7])
def test_every_element_is_in_one_piece(size: int) -> None:
    storage = torch.arange(size + 5, dtype=torch.float32)
    values, result = storage[5:], torch.zeros(size)  # the views keep the offset
    seen = 0
    for part, to in pieces(values, result):
        assert part.numel() <= PIECE
        to.add_(part)
        seen += part.numel()
    assert seen == size
    assert torch.equal(result, values)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(1, 3),
        lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
        lambda x: x[:, :1].expand(x.shape),
    ],
)
@pytest.mark.parametrize("other", [torch.contiguous_format, torch.channels_last])
def test_pieces_of_different_layouts_hold_the_same_elements(
    layout: Callable[[torch.Tensor], torch.Tensor], other: torch.memory_format
) -> None:
    values = layout(torch.randn(2, 50, 50, 50, generator=torch.Generator().manual_seed(0)))
    result = torch.zeros(values.shape).contiguous(memory_format=other)
    for part, to in pieces(values, result):
        to.add_(part)
    assert torch.equal(result, values)
    assert len(list(pieces(result))) == -(-result.numel() // PIECE)
