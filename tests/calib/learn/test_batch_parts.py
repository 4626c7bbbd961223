"""How batches are cut follows from what a sample keeps, which is counted as it is."""

import pytest
import torch

from postquant.calib.learn.batch_parts import BatchParts, batch_parts, kept_bytes

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize("size", [1, 3, 8, 40])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_parts_hold_every_sample_once_in_order(size: int, count: int) -> None:
    parts = BatchParts(size, 1).cut(range(count))
    assert [sample for part in parts for sample in part] == list(range(count))
    lengths = [len(part) for part in parts]
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("tensor", "size"),
    [
        (KIB, 32),
        (7 * KIB, 32),
        (8 * KIB, 16),
        (31 * KIB, 16),
        (32 * KIB, 8),
        (MIB, 8),
        (2 * MIB, 5),
        (4 * MIB, 2),
        (200 * MIB, 1),
    ],
)
def test_parts_are_neither_too_small_for_torch_nor_too_large_for_memory(tensor: int, size: int) -> None:
    parts = batch_parts([tensor] * 10, 32)
    assert parts.size == size
    assert parts.at_once == 1 or parts.at_once * parts.size * tensor * 10 <= 224 * MIB
    assert parts.size == 1 or parts.size * tensor * 10 <= 112 * MIB


def test_bytes_are_those_of_tensors_that_gradients_need() -> None:
    weight = torch.randn(20, 30, requires_grad=True)
    x = torch.randn(4, 20)
    # The product keeps x and the weight, tanh its result; the sum keeps nothing.
    found = kept_bytes(lambda: torch.tanh(x @ weight).sum(), 4, [weight])
    assert sorted(found) == [20 * 4, 30 * 4]
    with torch.no_grad():
        x.requires_grad_()  # then the product keeps the weight as well
        assert sorted(kept_bytes(lambda: torch.tanh(x @ weight).sum(), 2, [])) == [20 * 8, 30 * 8, 20 * 30 * 2]
