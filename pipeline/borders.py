"""The stage that gives narrow activations rounding borders: :func:`decide_borders`."""

from __future__ import annotations

import math

import onnx_ir as ir

from postquant.calib.border import MOST_BITS, BorderOptions, choose_borders
from postquant.calib.trial import WORTH_DB, Trial
from postquant.passes.border_plan import border_sites
from postquant.passes.plan import QuantPlan
from postquant.passes.target import WeightStorage
from postquant.pipeline.config import Border
from postquant.pipeline.job import Job
from postquant.pipeline.stage_log import StageLog


def borders_wanted(job: Job) -> bool:
    """Whether borders are tried where an activation can have one.

    Models for other tool chains have no operators of ours, unless they are asked for. Learned borders are decided by
    then.
    """
    packed = job.target.weight_storage is WeightStorage.PACKED
    if job.encodings is not None:  # borders come with other steps, and a vendor's numbers stay
        return False
    return job.config.border is Border.ON or (job.config.border is Border.AUTO and packed)


def decide_borders(
    job: Job, reference: ir.Model, model: ir.Model, plan: QuantPlan, log: StageLog, *, threads: int
) -> QuantPlan:
    """Keeps borders, or other steps alone, where the output error falls.

    Args:
        job: What to do.
        reference: The float model whose outputs are the reference.
        model: The float model that the plan is about.
        plan: A decided plan.
        log: Told what was tried.
        threads: Threads of onnxruntime.

    Returns:
        The plan, changed or not.
    """
    wanted = job.config.border
    if not borders_wanted(job):
        return plan
    if not border_sites(model, plan, bits=MOST_BITS)[0]:
        if wanted is Border.ON:
            log.note(f"no activation of at most {MOST_BITS} bits can have a rounding border")
        return plan
    saved = job.checkpoint.load("borders")
    if saved is not None:
        log.resume("borders", saved.data())
        return saved.plan()
    options = BorderOptions(margin_db=WORTH_DB if wanted is Border.AUTO else 0.0)
    job.progress.stage("rounding borders")
    trial = Trial(reference, job.source, threads=threads)
    choice = choose_borders(model, plan, job.source, trial, options, threads=threads, progress=job.progress.advance)
    if choice is None:
        log.note("rounding borders were expected to gain too little in every layer")
    else:
        steps = f"steps of narrow activations x {choice.factor:.2f}"
        log.add("other steps", steps, kept=choice.factor != 1.0, sqnr_db=choice.nearest.sqnr_db)
        gain = (
            20 * math.log10(choice.nearest.error / max(choice.bordered.error, 1e-30)) if choice.nearest.error else 0.0
        )
        needed = f", {WORTH_DB:g} dB would be worth their run time" if wanted is Border.AUTO and not choice.kept else ""
        detail = f"{len(choice.borders)} of {choice.sites} activations, {gain:.2f} dB better than without{needed}"
        log.add("rounding borders", detail, kept=choice.kept, sqnr_db=choice.bordered.sqnr_db)
        if choice.kept:
            for name, found in choice.borders.items():
                log.layer_gains.setdefault(name, {})["border"] = -10 * math.log10(max(1.0 - found.gain, 1e-3))
            log.note(*(f"{name} has no rounding border: {reason}" for name, reason in choice.refused.items()))
        plan = choice.plan
    job.checkpoint.save("borders", plan=plan, data=log.since_resume())
    return plan
