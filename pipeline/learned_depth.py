"""How far into a network learned blocks are used: :class:`LearnedDepth`.

    depth = argmin over k of the error of the network's outputs with the first k blocks as learned, k = 0, 1, ...

on samples that were not learned from; the first one of equals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from postquant.passes.plan import QuantPlan

if TYPE_CHECKING:
    from postquant.calib.learn.learner import LearnedBlock

LEFT = "the network's outputs are best with fewer learned blocks"


class LearnedDepth:
    """How far into the network learned blocks make its outputs better.

    Where a block's layers have more weights than the samples can determine, it learns what the blocks in front made of
    these samples. Its own output is better on others as well, and the network's outputs are not.

    Args:
        plan: Before anything was learned.
        error: Of the network's outputs with this plan, >= 0.
        measure: The error with another plan.

    Attributes:
        plan: The best one so far.
        error: Its error.
    """

    def __init__(self, plan: QuantPlan, error: float, measure: Callable[[QuantPlan], float]) -> None:
        self.plan = plan
        self._measure = measure
        self.error = error
        self._found: list[LearnedBlock] = []
        self._depth = 0

    def add(self, plan: QuantPlan, block: LearnedBlock) -> None:
        """One more block, and the plan behind it."""
        self._found.append(block)
        if not block.kept:
            return
        error = self._measure(plan)
        if error < self.error:
            self.plan, self.error, self._depth = plan, error, len(self._found)

    @property
    def blocks(self) -> tuple[LearnedBlock, ...]:
        """All blocks; those behind the best depth are not kept."""
        left = [
            dataclasses.replace(block, kept=False, reason=LEFT) if block.kept else block
            for block in self._found[self._depth :]
        ]
        return (*self._found[: self._depth], *left)
