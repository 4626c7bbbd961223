"""SQNR of the stored tensors with the plan of an unfinished run, for the report: :func:`tensor_sqnr`.

Whether a stage is measured depends on the settings and the model only, not on what the stage found: a resumed run
writes the same report.
"""

from __future__ import annotations

import onnx_ir as ir

from postquant.calib.border import MOST_BITS
from postquant.calib.prefix import spaced
from postquant.calib.source import SubsetSource
from postquant.passes.biases import fit_biases
from postquant.passes.border_plan import border_sites
from postquant.passes.emit import emit
from postquant.passes.free_memory import give_back_memory, release_weights
from postquant.passes.lut_expansion import with_qdq
from postquant.passes.plan import QuantPlan
from postquant.passes.target import WeightStorage
from postquant.pipeline.borders import borders_wanted
from postquant.pipeline.config import Method
from postquant.pipeline.job import Job
from postquant.pipeline.quality import stored_tensor_quality
from postquant.pipeline.stage_log import StageLog
from postquant.pipeline.stored import find_stored

# Samples that measure the tensors, here and in the verification.
TENSOR_SAMPLES = 8


def measure_before_search(job: Job, model: ir.Model, plan: QuantPlan, log: StageLog) -> None:
    """Records what the ranges alone give, where the scale search or the bias correction comes next."""
    searching = job.config.method is Method.EASYQUANT
    if searching or job.config.bias_correction:
        log.tensor_sqnr["ranges"] = tensor_sqnr(job, model, plan)


def measure_before_learning(job: Job, model: ir.Model, plan: QuantPlan, log: StageLog) -> None:
    """Records what the scale search gives, where learning comes next."""
    if job.config.learn:
        log.tensor_sqnr["scale search"] = tensor_sqnr(job, model, plan)


def measure_before_borders(job: Job, model: ir.Model, plan: QuantPlan, log: StageLog) -> None:
    """Records what the scale search or learning gives, where the stage of the borders comes next."""
    if borders_wanted(job) and border_sites(model, plan, bits=MOST_BITS)[0]:
        log.tensor_sqnr["learn" if job.config.learn else "scale search"] = tensor_sqnr(job, model, plan)


def tensor_sqnr(job: Job, model: ir.Model, plan: QuantPlan) -> dict[str, float]:
    """Measures a plan as the verification measures the final one, on the same samples.

    Args:
        job: For its calibration data.
        model: The simplified model.
        plan: A plan whose entries are all decided.

    Returns:
        Value name -> SQNR in dB of the stored tensor in the whole quantized model against the float model.
    """
    job.progress.stage("measure layers")
    source = job.source
    taken = SubsetSource(source, spaced(len(source), job.config.verify_samples)[:TENSOR_SAMPLES])
    emitted = emit(
        model,
        fit_biases(model, plan),
        weight_storage=WeightStorage.INT8,
        integer_clips=job.target.integer_clips,
    )
    stored = find_stored(model, with_qdq(emitted), plan)
    # Of a large model, the pages of the float weights that were read, and then the codes.
    release_weights(model)
    quality = stored_tensor_quality(model, emitted, stored, list(taken))
    del emitted, stored
    give_back_memory()
    return {item.name: item.sqnr_db for item in quality}
