"""The way of the data, once, from top to bottom: :func:`run_pipeline`.

    simplify -> align inputs -> smooth -> bits -> place -> equalize -> ranges -> scale search -> biases
    -> code books of activations -> error feedback -> learn -> borders -> emit -> verify

A graph change is a pass on the model, a decision a function from plan to plan; the plan reaches the graph at *emit* and
nowhere earlier. Techniques that may help or harm are kept only where the output error, measured on calibration samples
against the float model, falls. Finished stages are saved, so that an interrupted run goes on behind the last of them.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping

import onnx_ir as ir
import threadpoolctl

from postquant.calib.bias_correction import correct_biases
from postquant.calib.easyquant import EasyQuant, sites_of
from postquant.calib.effect_budget import affordable_effect
from postquant.calib.equalization import equalizations
from postquant.calib.input_means import input_means
from postquant.calib.prefix import Prefix, spaced
from postquant.calib.ranges import (
    alternatives,
    collect_statistics,
    effect_ranges,
    method_ranges,
    places_of,
)
from postquant.calib.sensitivity import Sensitivity
from postquant.calib.site_data import WorkLimits
from postquant.calib.source import CalibrationSource, SubsetSource
from postquant.calib.trial import Trial, keep_better
from postquant.calib.weight_search import Objective as SearchObjective
from postquant.calib.weight_search import SearchOptions
from postquant.calib.weight_start import start_weights
from postquant.passes.biases import fit_biases
from postquant.passes.emit import emit
from postquant.passes.equalize import EqualizePass
from postquant.passes.free_memory import give_back_memory, release_weights
from postquant.passes.plan import QuantPlan
from postquant.passes.session import native_operators
from postquant.pipeline.activation_books import decide_activations
from postquant.pipeline.alignment import align_and_smooth
from postquant.pipeline.allocation import Chosen, choose_bits, decide_bits, study
from postquant.pipeline.borders import decide_borders
from postquant.pipeline.budget import Budget, BudgetKind
from postquant.pipeline.concats import decide_concats
from postquant.pipeline.config import Method, QuantConfig
from postquant.pipeline.containers import check_containers, least_opset, weight_storage
from postquant.pipeline.describe import describe
from postquant.pipeline.encodings.apply import apply_encodings
from postquant.pipeline.feedback import decide_feedback
from postquant.pipeline.input_readers import decide_input_readers
from postquant.pipeline.job import Job, Outcome
from postquant.pipeline.layer_reports import exact_post_note, float_reports, layer_reports, packing_note
from postquant.pipeline.learning import learn
from postquant.pipeline.methods import code_books, range_method
from postquant.pipeline.parts import keep_parts
from postquant.pipeline.prepare import Prepared, prepare
from postquant.pipeline.stage_log import StageLog
from postquant.pipeline.stage_quality import (
    TENSOR_SAMPLES,
    measure_before_borders,
    measure_before_learning,
    measure_before_search,
)
from postquant.pipeline.verify import verify_model
from postquant.runtime_ops.quantizer import TensorQuantizer

# Samples on which the simplified model is compared with the original.
_PREPARE_SAMPLES = 4
# Samples on which a moved activation scale proves itself.
_JUDGE_SAMPLES = 8
# Threads unless asked for more: each holds a sample's activations.
_MOST_THREADS = 8
# A model whose weights are larger is simplified again when a run is resumed, instead of being stored twice.
_LARGEST_SAVED_MODEL = 256 << 20


def run_pipeline(job: Job) -> Outcome:
    """Quantizes a model.

    Args:
        job: What to do.

    Returns:
        The quantized model, its plan and the report; ``failure`` says whether the verification failed.

    Raises:
        PostquantError: If the model or the data do not allow it; nothing has been written then but saved stages.
    """
    # BLAS and onnxruntime split sums by their number of threads and then round differently: threads are over samples
    # (docs/design-notes.md).
    with threadpoolctl.threadpool_limits(1, user_api="blas"), tempfile.TemporaryDirectory(prefix="postquant.") as temp:
        folder = pathlib.Path(temp)
        threads = job.config.threads or min(os.cpu_count() or 1, _MOST_THREADS)
        log = StageLog(job.progress)
        prepared = _simplify(job, log, folder)
        reference = prepared.model
        model, plan = _change_graph(job, reference, log, folder, threads)
        fixed = _decided(plan)
        plan = _decide_ranges(job, model, plan, log, threads, fixed=fixed)
        measure_before_search(job, model, plan, log)
        plan = _search_scales(job, reference, model, plan, log, folder, threads, fixed=fixed)
        plan = decide_activations(job, reference, model, plan, log, threads=threads)
        with native_operators():
            plan = decide_feedback(job, reference, model, plan, log, threads=threads)
            measure_before_learning(job, model, plan, log)
            plan = learn(job, reference, model, plan, log, folder, threads=threads)
        measure_before_borders(job, model, plan, log)
        plan = decide_borders(job, reference, model, plan, log, threads=threads)
        job.progress.stage("emit")
        plan = fit_biases(model, plan)
        emitted = emit(
            model,
            plan,
            weight_storage=weight_storage(job),
            exact_post=job.config.post_exact,
            integer_clips=job.target.integer_clips,
        )
        notes = (packing_note(model, plan, emitted), exact_post_note(model, plan, emitted, job.config))
        log.note(*(note for note in notes if note is not None))
        return _verify(job, prepared, model, plan, emitted, log)


def study_bits(job: Job) -> tuple[Sensitivity, Chosen | None]:
    """What the bits of each layer do to the outputs, and what would be chosen within the budget, if there is one."""
    with threadpoolctl.threadpool_limits(1, user_api="blas"), tempfile.TemporaryDirectory(prefix="postquant.") as temp:
        folder, log = pathlib.Path(temp), StageLog(job.progress)
        threads = job.config.threads or min(os.cpu_count() or 1, _MOST_THREADS)
        reference = _simplify(job, log, folder).model
        model, placed = align_and_smooth(job, reference, log, folder)
        budget = None if job.config.budget is None else Budget.read(job.config.budget)
        inputs = budget is None or budget.kind is BudgetKind.BITOPS
        found = study(job, reference, model, placed, inputs=inputs, threads=threads)
        return found, None if budget is None else choose_bits(job, model, placed, found, budget)


def _simplify(job: Job, log: StageLog, folder: pathlib.Path) -> Prepared:
    """Opset, onnxsim, folds, normal form; equal to the original on samples."""
    job.progress.stage("simplify")
    prepared = prepare(
        job.model,
        list(job.source.read(spaced(len(job.source), _PREPARE_SAMPLES))),
        opset=least_opset(job),
        simplify=job.config.simplify,
        custom_ops=job.config.custom_ops,
        folder=folder,
    )
    check_containers(job, prepared.model)
    log.add("simplify", f"largest difference of an output from the original: {prepared.max_abs_error:.3g}")
    log.note(*prepared.notes)
    return prepared


def _change_graph(
    job: Job, reference: ir.Model, log: StageLog, folder: pathlib.Path, threads: int
) -> tuple[ir.Model, QuantPlan]:
    """Changes that leave the float outputs equal and make the tensors easier to quantize; bits and placement."""
    model, placed = align_and_smooth(job, reference, log, folder)
    plan = placed(decide_bits(job, reference, model, placed, log, threads=threads))
    log.note(*plan.notes)
    exact = _decided(plan)
    if exact:
        log.add("align inputs", f"quantized without loss: {', '.join(sorted(exact))}")
    if job.encodings is not None:
        applied = apply_encodings(model, plan, job.encodings, job.target)
        plan = applied.plan
        log.add("encodings", f"{len(applied.names)} of {job.encodings.size} tensors", kept=bool(applied.names))
        log.note(*applied.notes(job.encodings))
    model = _equalize(job, reference, model, plan, log, threads)
    # What reading and changing the weights of a large model has mapped: of the file, and of the changed ones.
    release_weights(reference)
    release_weights(model)
    return model, plan


def _equalize(job: Job, reference: ir.Model, model: ir.Model, plan: QuantPlan, log: StageLog, threads: int) -> ir.Model:
    """Per-channel scales between layers: those that are free, and the others, each kept only where it helps."""
    config = job.config
    free, cross = _changes(job, config.equalize), _changes(job, config.cross_layer)
    if config.cross_layer is None and config.budget is None and min(config.wbits, config.abits) == 8:
        # Channels that calibration saw little of get large factors and clip on new data: at 8 bits that costs more than
        # it gains, and calibration samples do not show it (docs/easyquant.md).
        cross = False
    if not (free or cross):
        return model
    job.progress.stage("equalize")
    found = equalizations(model, plan, job.source)
    if not found:
        return model
    trial = Trial(reference, job.source, threads=threads)
    before = trial.quick(model, plan)
    for name, wanted, chosen in (
        ("equalize depthwise inputs", free, [e for e in found if e.group.depthwise]),
        ("equalize across layers", cross, [e for e in found if not e.group.depthwise]),
    ):
        if not (wanted and chosen):
            continue
        changed = model.clone()
        EqualizePass([(e.group, e.factors) for e in chosen])(changed)
        after = trial.quick(changed, plan)
        kept = all(new.error < old.error for new, old in zip(after, before, strict=True))
        log.add(name, f"{len(chosen)} groups", kept=kept, sqnr_db=max(outcome.sqnr_db for outcome in after))
        if kept:
            model, before = changed, after
    return model


def _decide_ranges(
    job: Job, model: ir.Model, plan: QuantPlan, log: StageLog, threads: int, *, fixed: frozenset[str]
) -> QuantPlan:
    """The range of every activation, and the starting scales of the weights."""
    saved = job.checkpoint.load("ranges")
    if saved is not None:
        log.resume("ranges", saved.data())
        return saved.plan()
    config, source = job.config, job.source
    method = range_method(config)
    job.progress.stage("calibrate", len(source))
    if method is not None:
        decided = method_ranges(model, plan, source, method, progress=job.progress.advance)
    else:
        places = places_of(model, plan)
        statistics = collect_statistics(model, places, source, histogram=True, progress=job.progress.advance)
        effect, note = affordable_effect(model, source, len(places), floats=plan.floats, threads=threads)
        if note is not None:
            log.note(note)
        job.progress.stage("choose ranges", len(places))
        decided = effect_ranges(model, plan, source, statistics, effect, progress=job.progress.advance)
        name, kept = _generalizing(model, source, alternatives(model, plan, decided.plan, statistics), threads)
        decided = dataclasses.replace(decided, plan=kept)
        log.add("choice of ranges", name)
    log.note(*decided.notes)
    log.effects(decided.choices)
    plan = start_weights(model, decided.plan, p=config.lp if config.method is Method.MSE else None)
    if method is None:
        plan = decide_concats(model, plan, source, log, fixed=fixed, threads=threads)
        plan = decide_input_readers(model, plan, source, log, threads=threads)
    log.add("ranges", config.method.value)
    job.checkpoint.save("ranges", plan=plan, data=log.since_resume())
    return plan


def _generalizing(
    model: ir.Model, source: CalibrationSource, plans: Mapping[str, QuantPlan], threads: int
) -> tuple[str, QuantPlan]:
    """The plan with the smallest output error on samples that the choice of ranges has not seen."""
    trial = Trial(model, source, threads=threads)
    first = start_weights(model, next(iter(plans.values())))
    corrected = correct_biases(model, first, input_means(model, first, source, samples=16))
    outcomes = []
    for plan in plans.values():
        candidate = dataclasses.replace(corrected, activations=plan.activations, requants=plan.requants)
        outcomes.append(trial.measure(model, candidate))
    return list(plans.items())[keep_better(outcomes)]


def _search_scales(
    job: Job,
    reference: ir.Model,
    model: ir.Model,
    plan: QuantPlan,
    log: StageLog,
    folder: pathlib.Path,
    threads: int,
    *,
    fixed: frozenset[str],
) -> QuantPlan:
    """EasyQuant and bias correction, each kept only where the output error falls."""
    saved = job.checkpoint.load("search")
    if saved is not None:
        log.resume("search", saved.data())
        return saved.plan()
    config, source = job.config, job.source
    searching, correcting = config.method is Method.EASYQUANT, _wanted(config, config.bias_correction)
    if not (searching or correcting):
        return plan
    trial = Trial(reference, source, threads=threads)
    start = trial.measure(model, plan)
    log.add("start of the search", "ranges, largest weights", sqnr_db=start.sqnr_db)
    means = None
    if searching:
        job.progress.stage("scale search", len(sites_of(model, plan)))
        search = EasyQuant(
            model,
            Prefix(model, source, folder),
            _search_options(config),
            WorkLimits(search_rows=config.max_positions, search_work=config.search_work, seed=config.seed),
            code_books=code_books(config, job.target),
            fixed=fixed,
            judge=_judge(model, plan, source, threads),
        )
        result = search.run(plan, job.progress.advance)
        means = result.means
        log.changes(result.changes)
        log.note(*result.notes)
        searched = result.plan
    else:
        searched = plan
    if correcting and means is None:
        means = input_means(model, plan, source)
    plan = keep_parts(model, plan, searched, trial, start, means if correcting else None, log)
    job.checkpoint.save("search", plan=plan, data=log.since_resume())
    return plan


def _verify(
    job: Job, prepared: Prepared, model: ir.Model, plan: QuantPlan, emitted: ir.Model, log: StageLog
) -> Outcome:
    """Compares the emitted model on onnxruntime with the plan and with the float model."""
    job.progress.stage("verify")
    release_weights(prepared.model)
    samples = verification_samples(job.source, job.config)
    verification = verify_model(
        model, emitted, plan, samples, strict=False, reference=prepared.model, tensor_samples=TENSOR_SAMPLES
    )
    for output in verification.outputs[:1]:
        log.add("verify", "onnxruntime against the plan", sqnr_db=output.sqnr_db)
    report = dataclasses.replace(
        job.report,
        layers=layer_reports(
            model,
            plan,
            verification.quality,
            log.layer_gains,
            log.layer_books,
            sensitivity=log.layer_noise,
            history=log.tensor_sqnr,
        ),
        outputs=verification.outputs,
        floats=float_reports(model, plan),
        stages=tuple(log.stages),
        checks=verification.checks,
        notes=(*job.report.notes, *dict.fromkeys(log.notes), *verification.notes),
    )
    give_back_memory()
    statistics = describe(job, model, plan, log.tensor_effects)
    # Writing the files takes memory of its own.
    release_weights(model)
    release_weights(prepared.model)
    give_back_memory()
    return Outcome(emitted, plan, report, statistics, verification.failure)


def verification_samples(source: CalibrationSource, config: QuantConfig) -> CalibrationSource:
    """The calibration samples that a result is verified and measured on."""
    return SubsetSource(source, spaced(len(source), config.verify_samples))


def _search_options(config: QuantConfig) -> SearchOptions:
    return SearchOptions(
        objective=SearchObjective(config.objective.value),
        alpha=config.alpha,
        beta=config.beta,
        candidates=config.candidates,
        rounds=config.rounds,
        centred=_wanted(config, config.bias_correction),
    )


def _judge(
    model: ir.Model, plan: QuantPlan, source: CalibrationSource, threads: int
) -> Callable[[str, tuple[str, int] | None, Mapping[str, TensorQuantizer]], TensorQuantizer] | None:
    """Refuses scales that are better for the next layer but worse for the network; None where asking costs too much."""
    # Two candidates only: nothing to screen.
    effect, _ = affordable_effect(
        model,
        source,
        len(plan.activations),
        floats=plan.floats,
        rounded=plan.rounded_inputs,
        samples=_JUDGE_SAMPLES,
        threads=threads,
    )
    if effect is None:
        return None
    return lambda tensor, reader, quantizers: effect.choose(tensor, quantizers, reader=reader).quantizer


def _wanted(config: QuantConfig, switch: bool | None) -> bool:
    """Whether a technique is on: as the switch says or, where it is left open, with EasyQuant only."""
    return config.method is Method.EASYQUANT if switch is None else switch


def _changes(job: Job, switch: bool | None) -> bool:
    """Whether a technique that changes tensors is on; never with a vendor's numbers, which are about those tensors."""
    return job.encodings is None and _wanted(job.config, switch)


def _decided(plan: QuantPlan) -> frozenset[str]:
    """Activations and weights that have their numbers already."""
    tables = (plan.activations, plan.weights)
    return frozenset(name for table in tables for name, e in table.items() if isinstance(e, TensorQuantizer))
