"""Learns the blocks of a network that no earlier run has learned, and then the whole: :class:`LearningRun`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from postquant.calib.learn.recipe import Borders, Recipe, judging_samples, network_recipe, recipe_for, sample_worth
from postquant.calib.work import forward_work
from postquant.passes.blocks import Block
from postquant.passes.plan import QuantPlan
from postquant.pipeline.block_metrics import block_metrics
from postquant.pipeline.config import Border
from postquant.pipeline.job import Job
from postquant.pipeline.learned_depth import LEFT, LearnedDepth
from postquant.pipeline.progress import NullProgress
from postquant.runtime_ops.law_adaptive import Feature

if TYPE_CHECKING:
    from postquant.calib.learn.copied_source import CopiedSource
    from postquant.calib.learn.learner import LearnedBlock

# What an adaptive step sees of its sample.
ADAPTIVE_FEATURES = Feature.DEVIATION | Feature.MAXIMUM
NO_GAIN = "the network's outputs are no better"
_BORDERS = dict.fromkeys(Border, Borders.OFF) | {
    Border.LEARNED_OWN: Borders.OWN,
    Border.LEARNED_NEIGHBOURS: Borders.NEIGHBOURS,
}


class LearningRun:
    """Learns the blocks that are not saved, and then the whole network.

    Args:
        job: What to do.
        model: The float model that the plan is about.
        blocks: Its blocks.
        folder: Existing folder for temporary files.
        threads: Parts of a batch that are computed at the same time.

    Attributes:
        recipe: How blocks are learned.
        notes: What the report must not be silent about.
    """

    def __init__(
        self, job: Job, model: ir.Model, blocks: tuple[Block, ...], folder: pathlib.Path, threads: int
    ) -> None:
        self._job = job
        self._model = model
        self._folder = folder
        self._threads = threads
        self.notes: list[str] = []
        self._work = forward_work(model, job.source)
        self.recipe = dataclasses.replace(
            recipe_for(job.config.effort, self._work),
            borders=_BORDERS[job.config.border],
            adaptive=int(ADAPTIVE_FEATURES) if job.config.adaptive_step else 0,
        )
        self._blocks = blocks

    def learn(
        self, plan: QuantPlan, error: float, measure: Callable[[QuantPlan], float]
    ) -> tuple[QuantPlan, tuple[LearnedBlock, ...]]:
        """Learns.

        Args:
            plan: A decided plan.
            error: Of the network's outputs with this plan, >= 0.
            measure: The error with another plan.

        Returns:
            The learned plan, and what happened to every block.
        """
        whole = network_recipe(self._job.config.effort, self._work, plan.narrowest_bits)
        last = 0 if whole is None else whole.iterations
        self._job.progress.stage("learn", len(self._blocks) * self.recipe.iterations + last)
        depth = LearnedDepth(plan, error, measure)
        self._learn_blocks(depth)
        if whole is None:
            return depth.plan, depth.blocks
        plan, network = self._learn_network(depth.plan, whole)
        if network.kept and not measure(plan) < depth.error:
            # What lies between the blocks counts in its loss, too.
            plan, network = depth.plan, dataclasses.replace(network, kept=False, reason=NO_GAIN)
            self._job.progress.say(f"the whole network is left as it was: {NO_GAIN}")
        return plan, (*depth.blocks, network)

    def _learn_blocks(self, depth: LearnedDepth) -> None:
        import torch

        from postquant.calib.learn.block_cache import BlockCache
        from postquant.calib.learn.learner import Learner

        job, done, plan = self._job, [], depth.plan
        for index in range(len(self._blocks)):
            saved = self._saved(index)
            if saved is None:
                break
            plan, block = saved
            done.append(block)
            depth.add(plan, block)
        if done:
            job.progress.say(f"{len(done)} learned blocks are there already")
        job.progress.advance(len(done) * self.recipe.iterations)
        bar, count = _Bar(job.progress, self.recipe.iterations), len(done)

        def save(plan: QuantPlan, block: LearnedBlock) -> None:
            nonlocal count
            self._save(count, plan, block, bar)
            depth.add(plan, block)
            count += 1

        metrics, notes = block_metrics(job, self._model, self._blocks, self.recipe)
        self.notes += notes
        source = self._copied()
        learner = Learner(
            self._model,
            self._blocks,
            BlockCache(self._model, self._blocks, source, self._folder, memory=job.config.memory),
            self.recipe,
            seed=job.config.seed,
            device=torch.device(job.config.device.value),
            positions=self._work.layers,
            threads=self._threads,
            metrics=metrics,
            judging=source.judging,
            copies=source.copies,
        )
        learner.run(plan, done=done, save=save, progress=lambda block, step, loss: bar.show(block.name, step, loss))
        left = sum(block.reason == LEFT for block in depth.blocks)
        if left:
            job.progress.say(f"{left} learned blocks are left as they were: {LEFT}")

    def _copied(self) -> CopiedSource:
        """What blocks are learned from."""
        from postquant.calib.learn.copied_source import CopiedSource, copies_for

        job = self._job
        copies = copies_for(job.source, sample_worth(self._work.positions)) if job.config.augment else 0
        if copies:
            self.notes.append("blocks were learned from a mirrored and shifted copy of every image, too")
        judging = judging_samples(len(job.source), self.recipe.validation)
        return CopiedSource(job.source, judging, copies, job.config.seed)

    def _learn_network(self, plan: QuantPlan, recipe: Recipe) -> tuple[QuantPlan, LearnedBlock]:
        import torch

        from postquant.calib.learn.network_learner import NAME, learn_network

        job, index = self._job, len(self._blocks)
        saved = self._saved(index)
        bar = _Bar(job.progress, recipe.iterations)
        if saved is not None:
            bar.finish()
            return saved
        plan, network = learn_network(
            self._model,
            plan,
            self._blocks,
            job.source,
            recipe,
            self._folder,
            memory=job.config.memory,
            augment=job.config.augment,
            seed=job.config.seed,
            device=torch.device(job.config.device.value),
            threads=self._threads,
            progress=lambda step, loss: bar.show(NAME, step, loss),
        )
        self._save(index, plan, network, bar)
        return plan, network

    def _saved(self, index: int) -> tuple[QuantPlan, LearnedBlock] | None:
        """The plan behind a block, and what happened to it, if an earlier run has finished it."""
        from postquant.calib.learn.learner import LearnedBlock

        saved = self._job.checkpoint.load(f"learn-{index}")
        if saved is None:
            return None
        data = saved.data()
        return saved.plan(), LearnedBlock(**{**data, "layers": tuple(data["layers"])})

    def _save(self, index: int, plan: QuantPlan, block: LearnedBlock, bar: _Bar) -> None:
        job = self._job
        job.checkpoint.save(f"learn-{index}", plan=plan, data=dataclasses.asdict(block))
        bar.finish()
        job.progress.say(f"{block.name}: {block_detail(block)}, {block.seconds:.0f} s")


class _Bar:
    """Progress of one block after the other, in steps.

    Args:
        progress: Where it is shown.
        steps: Of each block.
    """

    def __init__(self, progress: NullProgress, steps: int) -> None:
        self._progress = progress
        self._steps = steps
        self._told = 0

    def show(self, name: str, step: int, loss: float) -> None:
        """How far a block is; a second try begins at 0 again, and nothing moves until it is further."""
        self._progress.advance(max(step - self._told, 0))
        self._told = max(step, self._told)
        self._progress.detail(f"{name}, error {loss:.3f}")

    def finish(self) -> None:
        """The block is done."""
        self._progress.advance(self._steps - self._told)
        self._told = 0


def block_detail(block: LearnedBlock) -> str:
    """What happened to a block, for people; without times, so that equal runs give equal reports."""
    if block.before is None or block.after is None:
        return block.reason or ""
    change = f"{block.before:.1f} -> {block.after:.1f} dB in {block.iterations} iterations"
    return change if block.kept else f"{change}: {block.reason}"
