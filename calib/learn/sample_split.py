"""Which samples a block is learned from and which ones judge it: :class:`SampleSplit`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch


class SampleSplit:
    """Random batches of learning samples, and all judging samples, both of equal shapes.

    A single sample does both.

    Args:
        groups: Samples that can form a batch.
        judges: Indices of the samples that judge, at least one.
        generator: Chooses the batches.
    """

    def __init__(self, groups: Sequence[Sequence[int]], judges: Collection[int], generator: torch.Generator) -> None:
        judging = frozenset(judges)
        self._judging = [[i for i in group if i in judging] for group in groups]
        learning = [[i for i in group if i not in judging] for group in groups]
        self._learning = [group for group in learning if group] or self._judging
        self._generator = generator

    def batch(self, size: int) -> list[int]:
        """Learning samples: one group, by the number of its samples, and ``size`` of its members at random."""
        sizes = torch.tensor([len(group) for group in self._learning])
        place = int(torch.randint(0, int(sizes.sum()), (), generator=self._generator))
        group = self._learning[int(torch.searchsorted(sizes.cumsum(0), place, right=True))]
        # Without repetition: a batch of a small group holds all of it.
        order = torch.randperm(len(group), generator=self._generator)[:size]
        return [group[int(index)] for index in order]

    def few(self) -> list[int]:
        """Two samples of equal shapes, or one where no two are equal."""
        return max(self._learning, key=len)[:2]

    def judging(self, size: int) -> Iterator[list[int]]:
        """All judging samples, in parts of at most ``size``."""
        for group in self._judging:
            for start in range(0, len(group), size):
                yield group[start : start + size]
