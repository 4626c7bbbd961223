"""The stage in which channels of activations make up for each other's rounding errors: :func:`decide_feedback`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from postquant.calib.feedback import choose
from postquant.calib.source import CalibrationSource
from postquant.calib.trial import Trial
from postquant.passes.plan import QuantPlan
from postquant.pipeline.budget import Budget, BudgetKind
from postquant.pipeline.job import Job
from postquant.pipeline.stage_log import StageLog
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.quantizer import TensorQuantizer

if TYPE_CHECKING:
    import torch

# Biases and levels that suit it come only with learning, which makes 1 dB more of it (docs/learning.md, "Error
# feedback"): so much may be lost in front of it.
_MOST_LOSS_DB = 0.5


def decide_feedback(
    job: Job, reference: ir.Model, model: ir.Model, plan: QuantPlan, log: StageLog, *, threads: int
) -> QuantPlan:
    """Gives all activations whose channels have code books an error feedback, unless the output error rises by much.

    Only where blocks are learned: it needs gradients of the network's outputs, and so torch.

    Args:
        job: What to do.
        reference: The float model whose outputs are the reference.
        model: The float model that the plan is about.
        plan: A decided plan.
        log: Told what was tried.
        threads: Samples that are run at the same time where the result is measured.

    Returns:
        The plan, changed or not.
    """
    wanted = job.config.feedback
    if not job.config.learn or wanted is False:
        return plan
    budget = job.config.budget
    if wanted is None and budget is not None and Budget.read(budget).kind is BudgetKind.SIZE:
        log.note("no errors are fed back: the budget is for bytes of weights (--feedback does it all the same)")
        return plan
    saved = job.checkpoint.load("feedback")
    if saved is not None:
        log.resume("feedback", saved.data())
        return saved.plan()
    import torch

    from postquant.calib.learn.moments import samples_used

    job.progress.stage("error feedback", samples_used(len(job.source)))
    try:
        device = torch.device(job.config.device.value)
        changed, count = with_feedback(
            model,
            plan,
            job.source,
            cells=job.config.feedback_cells,
            seed=job.config.seed,
            device=device,
            progress=job.progress.advance,
        )
    except ModelError as error:
        log.note(f"no errors are fed back: {error}")
        return plan
    if not count:
        if wanted:
            log.note("no errors are fed back: no activation has code books for its channels")
        return plan
    trial = Trial(reference, job.source, threads=threads)
    before, after = trial.measure(model, plan), trial.measure(model, changed)
    gain = 20 * math.log10(max(before.error, 1e-30) / max(after.error, 1e-30))
    kept = bool(wanted) or gain > -_MOST_LOSS_DB
    detail = f"{count} activations, {_coefficients(changed)}, {gain:+.2f} dB to nearest levels, before learning"
    log.add("error feedback", detail, kept=kept, sqnr_db=after.sqnr_db)
    plan = changed if kept else plan
    job.checkpoint.save("feedback", plan=plan, data=log.since_resume())
    return plan


def with_feedback(
    model: ir.Model,
    plan: QuantPlan,
    source: CalibrationSource,
    *,
    cells: bool = True,
    seed: int,
    device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> tuple[QuantPlan, int]:
    """The plan with an error feedback wherever there can be one, and in how many activations.

    Args:
        model: The float model that the plan is about.
        plan: A decided plan.
        source: Calibration data.
        cells: Whether errors of neighbouring places may be told apart.
        seed: Of everything random.
        device: Where gradients are computed.
        progress: Called for every sample that is used.

    Raises:
        ModelError: If torch does not run the network.
    """
    from postquant.calib.learn.moments import feedback_sites, measure_moments

    sites = feedback_sites(model, plan)
    if not sites:
        return plan, 0
    found = measure_moments(
        model, sites, source, range(len(source)), cells=cells, seed=seed, device=device, progress=progress
    )
    known = [site for site in sites if site.value in found]
    every = [found[site.value].candidates(float(site.quantizer.scale)) for site in known]
    chosen = choose(every, _weight_bytes(model, plan))
    for site, feedback in zip(known, chosen, strict=True):
        if feedback is not None:
            plan = site.with_feedback(plan, feedback)
    return plan, sum(feedback is not None for feedback in chosen)


def _coefficients(plan: QuantPlan) -> str:
    """How many activations see across places, and the size of all coefficients."""
    entries = (entry for entry in plan.requants.values() if isinstance(entry, TensorQuantizer) and not entry.copy)
    feedbacks = [entry.feedback for entry in entries if entry.feedback is not None]
    size = sum(feedback.nbytes for feedback in feedbacks)
    across = sum(feedback.cell > 1 for feedback in feedbacks)
    return f"{across} of them across places, {size / 1000:.1f} kB of coefficients"


def _weight_bytes(model: ir.Model, plan: QuantPlan) -> float:
    """Of the codes of all quantized weights."""
    total = 0.0
    for name, entry in plan.weights.items():
        tensor = model.graph.initializers[name].const_value
        spec = entry.spec if isinstance(entry, TensorQuantizer) else entry
        total += 0.0 if tensor is None else math.prod(tensor.shape.numpy()) * spec.bits / 8
    return total
