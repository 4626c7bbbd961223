"""Learns what brings an objective down: :func:`reconstruct`.

Some samples only judge, with every quantizer on and weights rounded, a few times on the way: the best state is what is
learned, a state that has become far worse ends it, and one that is never better than without learning keeps what it
had.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Sequence

import torch

from postquant.calib.learn.block_quantizers import BlockQuantizers
from postquant.calib.learn.curvature import measure_stiffness
from postquant.calib.learn.objective import Judged, Objective
from postquant.calib.learn.optimizer import learned_leaves, make_optimizer
from postquant.calib.learn.parallel_steps import ParallelSteps
from postquant.calib.learn.quantizers import DropMasks
from postquant.calib.learn.recipe import Recipe, Rounding
from postquant.calib.learn.sample_split import SampleSplit

Tensor = torch.Tensor
# How often it says how far it is.
_TOLD = 50


@dataclasses.dataclass(frozen=True)
class BlockOutcome:
    """What learning did.

    Attributes:
        before: Error of the output relative to its variance on judging samples, as the plan was.
        after: The same as learned.
        kept: Whether the learned state is better.
        hopeless: Whether it ended early, because it had become far worse.
        iterations: Steps taken.
        seconds: Time that they took.
    """

    before: float
    after: float
    kept: bool
    hopeless: bool
    iterations: int
    seconds: float

    def after_another(self, first: BlockOutcome) -> BlockOutcome:
        """With the steps and the time of an earlier try."""
        return dataclasses.replace(
            self, iterations=first.iterations + self.iterations, seconds=first.seconds + self.seconds
        )


def reconstruct(
    objective: Objective,
    groups: Sequence[Sequence[int]],
    quantizers: BlockQuantizers,
    recipe: Recipe,
    *,
    judging: Collection[int],
    seed: int,
    device: torch.device,
    steps: ParallelSteps,
    progress: Callable[[int, float], None],
) -> BlockOutcome:
    """Learns a block, or a network; the result is in ``quantizers``.

    Args:
        objective: What is to come close to the float network.
        groups: Samples that can form a batch.
        quantizers: Of its nodes.
        recipe: How.
        judging: Indices of the samples that only judge, at least one.
        seed: Of the order of samples and the masks.
        device: Where.
        steps: Threads for the parts of a batch; how many changes no result.
        progress: Told the number of iterations done and the loss from time to time.

    Returns:
        The errors before and after, on samples that were not learned from.

    Raises:
        BlockDiffersError: If torch does not give what onnxruntime does.
    """
    begun = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    split = SampleSplit(groups, judging, generator)
    objective.check(split)
    objective.settle(quantizers, split)
    objective.measure(quantizers, split)
    before = objective.judge(quantizers.unlearned(), split)
    if _springs(recipe):
        measure_stiffness(
            quantizers.weights,
            lambda part, constants: objective.output(part, quantizers.reader(constants=constants)),
            lambda: objective.parts.cut(split.batch(recipe.batch)),
            objective.variance,
            generator,
            steps,
            at_once=objective.parts.at_once,
        )
    masks = DropMasks(generator, device, recipe.keep) if recipe.keep < 1 else None
    optimizer, schedule = make_optimizer(quantizers, recipe, objective.bias_sizes(split))
    leaves = learned_leaves(optimizer)
    best = _Best(leaves, quantizers, before, recipe.hopeless)
    points = {math.ceil(recipe.iterations * share) for share in recipe.judged}
    for iteration in range(recipe.iterations):
        schedule(iteration)
        quantizers.advance(iteration / recipe.iterations)
        objective.settle(quantizers, split)
        optimizer.zero_grad(set_to_none=True)
        loss = objective.backward(split.batch(recipe.batch), quantizers, masks, leaves)
        regulariser = _regulariser(quantizers, recipe, iteration)
        if regulariser is not None:
            torch.autograd.backward(regulariser)
        optimizer.step()
        if iteration % _TOLD == 0 or iteration + 1 == recipe.iterations:
            progress(iteration + 1, loss)
        if iteration + 1 in points:
            with torch.no_grad():
                constants = quantizers.constants(hard=True)
            best.judge(objective.judge(quantizers.reader(hard=True, all_steps=True, constants=constants), split))
            if best.hopeless:
                break
    best.restore()
    kept = best.after.loss < before.loss
    return BlockOutcome(before.error, best.after.error, kept, best.hopeless, iteration + 1, time.monotonic() - begun)


class _Best:
    """The best judged state of what is learned.

    Args:
        leaves: The state.
        quantizers: What they have beside that.
        before: Without learning.
        hopeless: A loss of so many times the best one does not come back.

    Attributes:
        after: Of the learned state with the smallest loss.
        hopeless: Whether the last state was far worse than the best one or no learning.
    """

    def __init__(self, leaves: Sequence[Tensor], quantizers: BlockQuantizers, before: Judged, hopeless: float) -> None:
        self._limit = hopeless
        self._quantizers = quantizers
        self._leaves = leaves
        self._state = [leaf.detach().clone() for leaf in leaves]
        self._before = before
        self.after = Judged(math.inf, math.inf)
        self.hopeless = False

    def judge(self, found: Judged) -> None:
        """Keeps the present state if its loss is the smallest so far."""
        self.hopeless = not found.loss <= self._limit * min(self.after.loss, self._before.loss)
        if found.loss < self.after.loss:
            self.after, self._state = found, [leaf.detach().clone() for leaf in self._leaves]
            self._quantizers.remember()

    def restore(self) -> None:
        """Puts the best state back."""
        for leaf, kept in zip(self._leaves, self._state, strict=True):
            leaf.data.copy_(kept)
        self._quantizers.recall()


def _springs(recipe: Recipe) -> bool:
    """Whether latent weights are held at their levels."""
    return recipe.rounding is Rounding.FREE and recipe.damping > 0 and recipe.rounding_rate > 0


def _regulariser(quantizers: BlockQuantizers, recipe: Recipe, iteration: int) -> Tensor | None:
    """The springs, or what drives the choice between neighbours: nothing in the warm-up, then a falling exponent."""
    weights = quantizers.weights.values()
    share = (iteration / recipe.iterations - recipe.warm_up) / (1 - recipe.warm_up)
    if not weights or not (_springs(recipe) or (recipe.rounding is Rounding.NEIGHBOURS and share > 0)):
        return None
    first, last = recipe.beta
    beta = last + (first - last) * (1 - share)
    total = torch.stack([w.regulariser(beta) for w in weights]).sum()
    if recipe.rounding is Rounding.FREE:
        return recipe.damping * total
    return recipe.regularisation * total / sum(w.variable.numel() for w in weights)
