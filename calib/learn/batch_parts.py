"""Into which parts a batch is cut: :func:`batch_parts`.

Parts are large enough that torch's operators, and not Python between them, take the time, and small enough that what
is kept for gradients fits into memory. Both follow from what one sample keeps, so that the same batch is always cut
the same way.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch

Tensor = torch.Tensor

# Parts, and the bytes that their tensors have on average at least: with fewer, threads would wait for Python. More
# parts serve more threads, and cost more time between operators.
_USEFUL = ((4, 256 << 10), (2, 128 << 10))
# What one part, and all parts in work at the same time, may keep for gradients.
_PART_BYTES = 112 << 20
_ALL_BYTES = 224 << 20


@dataclasses.dataclass(frozen=True)
class BatchParts:
    """How batches are cut.

    Attributes:
        size: Most samples in a part, at least 1.
        at_once: How many parts may be in work at the same time, at least 1.
    """

    size: int
    at_once: int

    def cut(self, chosen: Sequence[int]) -> list[list[int]]:
        """Parts whose sizes differ by one at most.

        >>> BatchParts(size=3, at_once=2).cut([1, 2, 3, 4, 5, 6, 7])
        [[1, 2], [3, 4], [5, 6, 7]]
        """
        count = -(-len(chosen) // self.size)
        bounds = [index * len(chosen) // count for index in range(count + 1)]
        return [list(chosen[first:last]) for first, last in itertools.pairwise(bounds)]


def batch_parts(kept: Sequence[int], batch: int) -> BatchParts:
    """How a batch is cut.

    Args:
        kept: Bytes of every tensor that one sample keeps for gradients (:func:`kept_bytes`).
        batch: Samples in a batch, at least 1.

    >>> batch_parts([64 << 10] * 20, 32)
    BatchParts(size=8, at_once=22)
    """
    sample = max(sum(kept), 1)
    tensors = batch * sample / max(len(kept), 1)
    useful = next((parts for parts, least in _USEFUL if tensors >= parts * least), 1)
    size = max(min(-(-batch // useful), _PART_BYTES // sample), 1)
    return BatchParts(size, max(_ALL_BYTES // (size * sample), 1))


def kept_bytes(run: Callable[[], Tensor], samples: int, shared: Iterable[Tensor]) -> list[int]:
    """What autograd keeps of a run.

    Args:
        run: Computes something differentiable; its graph lives no longer than this call.
        samples: Of how many samples, at least 1.
        shared: Tensors that do not depend on the samples, such as weights.

    Returns:
        Bytes per sample of every piece of memory that is kept until the gradients are known, without the shared ones.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in shared}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return [-(-size // samples) for size in found.values()]
