"""Changes of the graph that leave the float outputs equal, in front of placement: :func:`align_and_smooth`."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import onnx_ir as ir

from postquant.calib.input_grid import find_grids
from postquant.calib.smoothing import kept_factors, measure_smoothing
from postquant.passes.align_input import AlignInputPass, with_exact_inputs
from postquant.passes.input_levels import InputGrid
from postquant.passes.place import PlacementSettings, place
from postquant.passes.plan import QuantPlan
from postquant.passes.smooth import SmoothPass, smooth_groups
from postquant.passes.spill import settle_lazy_tensors
from postquant.pipeline.config import Method, QuantConfig
from postquant.pipeline.job import Job
from postquant.pipeline.stage_log import StageLog


def align_and_smooth(
    job: Job, reference: ir.Model, log: StageLog, folder: pathlib.Path
) -> tuple[ir.Model, Callable[[PlacementSettings], QuantPlan]]:
    """Puts image inputs on the grid of their originals, and moves factors from activations into MatMul weights.

    Args:
        job: What to do.
        reference: The simplified model; not changed.
        log: Told what was done.
        folder: Existing folder for temporary files.

    Returns:
        The changed model, and what places quantizers in it.
    """
    config, source = job.config, job.source
    model = reference.clone()
    grids: dict[str, InputGrid] = {}
    if job.encodings is None and _wanted(config, config.align_input):
        job.progress.stage("align inputs")
        names = [value.name for value in model.graph.inputs if value.name and value.dtype == ir.DataType.FLOAT]
        grids = find_grids(source, names)
        aligned = AlignInputPass(grids)
        aligned(model)
        log.note(*aligned.notes)
    if job.encodings is None and _wanted(config, config.smooth):
        groups = smooth_groups(model)
        if groups:
            job.progress.stage("smooth")
            choices = measure_smoothing(
                model,
                source,
                groups,
                abits=config.abits,
                wbits=config.wbits,
                symmetric=job.target.activations.symmetric,
            )
            factors = kept_factors(choices)
            SmoothPass(factors)(model)
            settle_lazy_tensors(model, folder)
            log.add("smooth", f"{len(factors)} of {len(groups)} groups of MatMul inputs", kept=bool(factors))

    def placed(settings: PlacementSettings) -> QuantPlan:
        return with_exact_inputs(place(model, job.target, settings), model, grids)

    return model, placed


def _wanted(config: QuantConfig, switch: bool | None) -> bool:
    return config.method is Method.EASYQUANT if switch is None else switch
