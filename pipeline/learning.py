"""The stage that learns a network block by block: :func:`learn`."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import TYPE_CHECKING

import onnx_ir as ir

from postquant.calib.border import MOST_BITS
from postquant.calib.learn.available import require_torch
from postquant.calib.learn.recipe import Borders, Device, Recipe, judging_samples, network_recipe, recipe_for
from postquant.calib.source import SubsetSource
from postquant.calib.trial import Trial
from postquant.calib.work import forward_work
from postquant.passes.blocks import Block, cut_blocks
from postquant.passes.border_plan import border_sites
from postquant.passes.plan import QuantPlan
from postquant.pipeline.config import Border, QuantConfig
from postquant.pipeline.job import Job
from postquant.pipeline.progress import NullProgress
from postquant.pipeline.stage_log import StageLog
from postquant.runtime_ops.errors import ConfigError
from postquant.runtime_ops.law_adaptive import Feature
from postquant.runtime_ops.quantizer import TensorQuantizer

if TYPE_CHECKING:
    from postquant.calib.learn.learner import LearnedBlock

# Weights of so many bits gain nothing from the layers that they would share a block with.
_WIDE = 8


# What an adaptive step sees of its sample.
ADAPTIVE_FEATURES = Feature.MEANS | Feature.DEVIATION | Feature.MAXIMUM
_BORDERS = dict.fromkeys(Border, Borders.OFF) | {
    Border.LEARNED_OWN: Borders.OWN,
    Border.LEARNED_NEIGHBOURS: Borders.NEIGHBOURS,
}


def check_learning(config: QuantConfig) -> None:
    """Tells before any work that blocks cannot be learned here.

    Raises:
        ConfigError: If torch is missing, or the device.
    """
    if not config.learn:
        return
    require_torch()
    import torch

    if config.device is Device.CUDA and not torch.cuda.is_available():
        raise ConfigError(
            "torch finds no CUDA device",
            where="device",
            found=f"torch {torch.__version__}",
            hint='use device = "cpu", or a torch that was built for CUDA on a machine with a GPU',
        )


def learn(
    job: Job,
    reference: ir.Model,
    model: ir.Model,
    plan: QuantPlan,
    log: StageLog,
    folder: pathlib.Path,
    *,
    threads: int,
) -> QuantPlan:
    """Learns every block, where that was asked for.

    Args:
        job: What to do.
        reference: The float model whose outputs are the reference.
        model: The float model that the plan is about.
        plan: A decided plan.
        log: Told what was learned.
        folder: Existing folder for temporary files.
        threads: Samples that are run at the same time where the result is measured, and parts of a batch that are
            learned from at the same time.

    Returns:
        The plan, changed or not.
    """
    if not job.config.learn:
        return plan
    saved = job.checkpoint.load("learn")
    if saved is not None:
        log.resume("learn", saved.data())
        return saved.plan()
    blocks = learning_blocks(model, plan, max_layers=job.config.max_layers)
    if not blocks:
        log.note("nothing was learned: no layer is quantized")
        return plan
    run = _Run(job, model, blocks, folder, threads)
    judges = judging_samples(len(job.source), run.recipe.validation)
    trial = Trial(reference, SubsetSource(job.source, judges), samples=len(judges), threads=threads)
    before = trial.measure(model, plan)
    learned, found = run.learn(plan)
    after = trial.measure(model, learned)
    kept = after.error < before.error
    for block in found:
        log.add(f"learn {block.name}", _detail(block), kept=block.kept, sqnr_db=block.after)
    gain = 20 * math.log10(max(before.error, 1e-30) / max(after.error, 1e-30))
    count = sum(block.kept for block in found)
    log.add("learning", f"{count} of {len(found)} blocks, {gain:.2f} dB", kept=kept, sqnr_db=after.sqnr_db)
    _tell_roundings(job, model, plan, learned, log, kept=kept)
    plan = learned if kept else plan
    job.checkpoint.save("learn", plan=plan, data=log.since_resume())
    return plan


def _tell_roundings(
    job: Job, model: ir.Model, plan: QuantPlan, learned: QuantPlan, log: StageLog, *, kept: bool
) -> None:
    """How many inputs have learned borders and adaptive steps, and which ones cannot."""
    entries = [entry for entry in learned.requants.values() if isinstance(entry, TensorQuantizer)]
    wanted = (
        (job.config.border.learned, "rounding borders", sum(e.border is not None for e in entries)),
        (job.config.adaptive_step, "adaptive steps", sum(e.adaptive is not None for e in entries)),
    )
    for asked, name, count in wanted:
        if asked:
            log.add(f"learned {name}", f"{count} inputs of layers", kept=kept and count > 0)
    if any(asked for asked, _, _ in wanted):
        refused = border_sites(model, plan, bits=MOST_BITS)[1]
        log.note(*(f"{name} is rounded to nearest, with a fixed step: {reason}" for name, reason in refused.items()))


def learning_blocks(model: ir.Model, plan: QuantPlan, *, max_layers: int = 6) -> tuple[Block, ...]:
    """All blocks; where weights have fewer than 8 bits, layers that have 8, such as the first and the last, are alone.

    Args:
        model: The float model that the plan is about.
        plan: Its widths count.
        max_layers: Quantized layers that a block may hold, at least 1.
    """
    bits = _layer_bits(model, plan)
    wide = {name for name, width in bits.items() if width >= _WIDE}
    alone = wide if len(wide) < len(bits) else set()
    return cut_blocks(model, set(bits), max_layers=max_layers, alone=alone)


def _layer_bits(model: ir.Model, plan: QuantPlan) -> dict[str, int]:
    """Bits of the weights of every quantized layer, in the order of the graph."""
    bits = {}
    for node in model.graph:
        entries = [plan.weights.get(value.name or "") for value in node.inputs if value is not None]
        widths = [entry.spec.bits for entry in entries if isinstance(entry, TensorQuantizer)]
        if widths and node.name:
            bits[node.name] = min(widths)
    return bits


class _Run:
    """Learns the blocks that are not saved, and then the whole network.

    Args:
        job: What to do.
        model: The float model that the plan is about.
        blocks: Its blocks.
        folder: Existing folder for temporary files.
        threads: Parts of a batch that are computed at the same time.

    Attributes:
        recipe: How blocks are learned.
    """

    def __init__(
        self, job: Job, model: ir.Model, blocks: tuple[Block, ...], folder: pathlib.Path, threads: int
    ) -> None:
        self._job = job
        self._model = model
        self._folder = folder
        self._threads = threads
        work = forward_work(model, job.source)
        self.recipe = dataclasses.replace(
            recipe_for(job.config.effort, work),
            borders=_BORDERS[job.config.border],
            adaptive=int(ADAPTIVE_FEATURES) if job.config.adaptive_step else 0,
        )
        self._blocks = blocks
        self._whole = network_recipe(job.config.effort, work)

    def learn(self, plan: QuantPlan) -> tuple[QuantPlan, tuple[LearnedBlock, ...]]:
        """The learned plan, and what happened to every block."""
        whole = 0 if self._whole is None else self._whole.iterations
        self._job.progress.stage("learn", len(self._blocks) * self.recipe.iterations + whole)
        plan, found = self._learn_blocks(plan)
        if self._whole is not None:
            plan, network = self._learn_network(plan, self._whole)
            found = (*found, network)
        return plan, found

    def _learn_blocks(self, plan: QuantPlan) -> tuple[QuantPlan, tuple[LearnedBlock, ...]]:
        import torch

        from postquant.calib.learn.block_cache import BlockCache
        from postquant.calib.learn.learner import Learner

        job, done = self._job, []
        for index in range(len(self._blocks)):
            saved = self._saved(index)
            if saved is None:
                break
            plan, block = saved
            done.append(block)
        if done:
            job.progress.say(f"{len(done)} learned blocks are there already")
        job.progress.advance(len(done) * self.recipe.iterations)
        bar, count = _Bar(job.progress, self.recipe.iterations), len(done)

        def save(plan: QuantPlan, block: LearnedBlock) -> None:
            nonlocal count
            self._save(count, plan, block, bar)
            count += 1

        learner = Learner(
            self._model,
            self._blocks,
            BlockCache(self._model, self._blocks, job.source, self._folder, memory=job.config.memory),
            self.recipe,
            seed=job.config.seed,
            device=torch.device(job.config.device.value),
            threads=self._threads,
        )
        return learner.run(
            plan, done=done, save=save, progress=lambda block, step, loss: bar.show(block.name, step, loss)
        )

    def _learn_network(self, plan: QuantPlan, recipe: Recipe) -> tuple[QuantPlan, LearnedBlock]:
        import torch

        from postquant.calib.learn.network_learner import NAME, learn_network

        job, index = self._job, len(self._blocks)
        saved = self._saved(index)
        if saved is not None:
            return saved
        bar = _Bar(job.progress, recipe.iterations)
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
        job.progress.say(f"{block.name}: {_detail(block)}, {block.seconds:.0f} s")


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


def _detail(block: LearnedBlock) -> str:
    """What happened to a block, for people; without times, so that equal runs give equal reports."""
    if block.before is None or block.after is None:
        return block.reason or ""
    change = f"{block.before:.1f} -> {block.after:.1f} dB in {block.iterations} iterations"
    return change if block.kept else f"{change}: {block.reason}"
