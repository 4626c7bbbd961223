"""The stage that gives narrow activations code books: :func:`decide_activations`, :func:`with_code_books`.

Every activation of at most 4 bits that can have one gets the ``2**bits`` levels of the least squared error
(:mod:`postquant.calib.activation_levels`) within :data:`_WIDER` times the range ``[low, high]`` of its even codes, in
the tensor's units, for all layers that read it; every channel has its own where the graph tells the channels of what
they read. All of them together are kept where the network's outputs gain

    20 log10(error with even codes / error with code books)  >  0, 1 or 2 dB (:func:`least_gain_db`)

with :class:`postquant.calib.trial.Trial`'s error, on calibration samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import onnx_ir as ir

from postquant.calib.activation_levels import fit_levels
from postquant.calib.channel_histogram import ChannelHistogram
from postquant.calib.source import CalibrationSource
from postquant.calib.statistics import Bounds
from postquant.calib.trial import WORTH_DB, Trial
from postquant.passes import semantics
from postquant.passes.level_plan import LevelSite, level_sites, with_levels
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.passes.target import WeightStorage
from postquant.pipeline.config import Activations, Border, Method, QuantConfig
from postquant.pipeline.job import Job
from postquant.pipeline.stage_log import StageLog

# Levels lie within the even quantizer's range times this; larger values count as if they were its ends. The range was
# chosen by the outputs of the layers that read it, which need no large values as exactly as squared errors ask for
# (docs/learning.md, "Even codes of activations").
_WIDER = 2.0
# Channels that are counted at a time, in 4 KiB each: 256 MiB.
_MOST_CHANNELS = 1 << 16
# Learning makes up for about half of what even codes lose (docs/learning.md, "Even codes of activations"): so much must
# be gained in front of it.
_WORTH_BEFORE_LEARNING_DB = 2 * WORTH_DB


def code_books_wanted(job: Job) -> bool:
    """Whether code books are tried where an activation can have one.

    Where nobody asked for them, only as a part of EasyQuant, and for onnxruntime: other tool chains want even steps. An
    activation has nothing else that was asked for, and a vendor's numbers stay.
    """
    config = job.config
    if config.activations is not Activations.AUTO:
        return config.activations is Activations.LUT
    taken = config.adaptive_step or config.border not in (Border.AUTO, Border.OFF) or job.encodings is not None
    packed = job.target.weight_storage is WeightStorage.PACKED
    return config.method is Method.EASYQUANT and packed and not taken


def least_gain_db(config: QuantConfig) -> float:
    """By how much the network's outputs must get better."""
    if config.activations is Activations.LUT or config.feedback:
        return 0.0
    return _WORTH_BEFORE_LEARNING_DB if config.learn else WORTH_DB


def decide_activations(
    job: Job, reference: ir.Model, model: ir.Model, plan: QuantPlan, log: StageLog, *, threads: int
) -> QuantPlan:
    """Gives all narrow activations code books where the output error falls by enough (:func:`least_gain_db`).

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
    if not code_books_wanted(job):
        return plan
    asked = job.config.activations is Activations.LUT
    saved = job.checkpoint.load("activations")
    if saved is not None:
        log.resume("activations", saved.data())
        return saved.plan()
    sites, refused = level_sites(model, plan)
    if not sites:
        if asked:
            log.note(*_reasons(refused), "no activation of at most 4 bits can have a code book")
        return plan
    job.progress.stage("code books of activations", len(_passes(sites)) * len(job.source))
    books = with_code_books(model, plan, sites, job.source, job.progress.advance)
    trial = Trial(reference, job.source, threads=threads)
    before, after = trial.measure(model, plan), trial.measure(model, books)
    gain = 20 * math.log10(max(before.error, 1e-30) / max(after.error, 1e-30))
    least = least_gain_db(job.config)
    kept = gain > least
    needed = "" if asked or kept else f", {least:g} dB would be worth their run time"
    detail = f"{len(sites)} activations, {gain:.2f} dB better than equal gaps{needed}"
    if asked or kept:
        log.note(*_reasons(refused))
    log.add("code books of activations", detail, kept=kept, sqnr_db=after.sqnr_db)
    plan = books if kept else plan
    job.checkpoint.save("activations", plan=plan, data=log.since_resume())
    return plan


def _reasons(refused: dict[str, str]) -> list[str]:
    return [f"{key} has no code book: {reason}" for key, reason in refused.items()]


def with_code_books(
    model: ir.Model,
    plan: QuantPlan,
    sites: Sequence[LevelSite],
    source: CalibrationSource,
    progress: Callable[[], None] = lambda: None,
) -> QuantPlan:
    """The plan with code books of the least squared error over all samples.

    Args:
        model: The float model that the plan is about.
        plan: A decided plan.
        sites: Its places (:func:`postquant.passes.level_plan.level_sites`).
        source: Calibration data.
        progress: Called after every sample of every pass.
    """
    for part in _passes(sites):
        histograms = [_histogram(model, site) for site in part]
        session = make_session(model, outputs=list(dict.fromkeys(site.value for site in part)))
        for sample in source:
            found = session.run(sample)
            for site, histogram in zip(part, histograms, strict=True):
                histogram.update(found[site.value])
            progress()
        for site, histogram in zip(part, histograms, strict=True):
            plan = with_levels(plan, site, fit_levels(site.quantizer.spec, histogram, site.axis))
    return plan


def _passes(sites: Sequence[LevelSite]) -> list[list[LevelSite]]:
    """Sites that are counted in one pass over the samples: as many as have the most channels together."""
    passes: list[list[LevelSite]] = [[]]
    channels = 0
    for site in sites:
        channels += site.channels
        if channels > _MOST_CHANNELS and passes[-1]:
            passes.append([])
            channels = site.channels
        passes[-1].append(site)
    return passes


def _histogram(model: ir.Model, site: LevelSite) -> ChannelHistogram:
    bounds = Bounds(*semantics.activation_bounds(model, site.value))
    low, high = (bounds.clip(_WIDER * float(end)) for end in site.quantizer.range())
    return ChannelHistogram(min(low, 0.0), max(high, 0.0), site.channels, site.axis)
