"""The stage that learns a network block by block: :func:`learn`."""

from __future__ import annotations

import math
import pathlib

import onnx_ir as ir

from postquant.calib.border import MOST_BITS
from postquant.calib.learn.available import require_torch
from postquant.calib.learn.recipe import Device, judging_samples
from postquant.calib.source import SubsetSource
from postquant.calib.trial import Trial
from postquant.passes.blocks import Block, cut_blocks
from postquant.passes.border_plan import border_sites
from postquant.passes.plan import QuantPlan
from postquant.pipeline.config import QuantConfig
from postquant.pipeline.job import Job
from postquant.pipeline.learning_run import LearningRun, block_detail
from postquant.pipeline.stage_log import StageLog
from postquant.runtime_ops.errors import ConfigError
from postquant.runtime_ops.quantizer import TensorQuantizer


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
    run = LearningRun(job, model, blocks, folder, threads)
    judges = judging_samples(len(job.source), run.recipe.validation)
    trial = Trial(reference, SubsetSource(job.source, judges), samples=len(judges), threads=threads)
    before = trial.measure(model, plan)
    learned, found = run.learn(plan, before.error, lambda plan: trial.measure(model, plan).error)
    after = trial.measure(model, learned)
    kept = after.error < before.error
    log.note(*run.notes)
    for block in found:
        log.add(f"learn {block.name}", block_detail(block), kept=block.kept, sqnr_db=block.after)
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
    """All blocks.

    Layers of 8 bits share them with others: the first one's biases and scales suit its output to the codes of the
    layer behind it (docs/learning.md).

    Args:
        model: The float model that the plan is about.
        plan: Tells which layers are quantized.
        max_layers: Quantized layers that a block may hold, at least 1.
    """
    layers = {
        node.name
        for node in model.graph
        if node.name
        and any(v is not None and isinstance(plan.weights.get(v.name or ""), TensorQuantizer) for v in node.inputs)
    }
    return cut_blocks(model, layers, max_layers=max_layers)
