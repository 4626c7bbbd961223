"""Tries for graph inputs whether float nodes should read what the integer ones read: :func:`decide_input_readers`."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from postquant.calib.source import CalibrationSource
from postquant.calib.trial import Trial, keep_better
from postquant.passes.plan import QuantPlan
from postquant.pipeline.concats import SAMPLES, only
from postquant.pipeline.stage_log import StageLog
from postquant.runtime_ops.quantizer import TensorQuantizer


def decide_input_readers(
    model: ir.Model, plan: QuantPlan, source: CalibrationSource, log: StageLog, *, threads: int = 1
) -> QuantPlan:
    """Lets the float readers of a quantized graph input read it dequantized where that is better for the outputs.

    They read the exact input by default. A network that estimates what is to be subtracted from its input (a denoiser)
    estimates the quantization error too, as far as it looks like noise: subtracted from the quantized input it cancels,
    subtracted from the exact one it stays. Only graph inputs are tried: elsewhere the error of a skip connection is
    what the quantized branch beside it cannot know.

    Args:
        model: The simplified model.
        plan: All activations are decided.
        source: Calibration data.
        log: Told which inputs are read dequantized.
        threads: How many samples are run at the same time; never changes the result.
    """
    names = [
        value.name or ""
        for value in model.graph.inputs
        if isinstance(plan.activations.get(value.name or ""), TensorQuantizer)
        and any(use.node.name in plan.floats for use in value.uses())
    ]
    if not names:
        return plan
    trial = Trial(model, source, samples=SAMPLES, threads=threads)
    for name in names:
        rounded = dataclasses.replace(plan, rounded_inputs=(*plan.rounded_inputs, name))
        outcomes = [trial.measure(model, only(candidate, [name])) for candidate in (plan, rounded)]
        if keep_better(outcomes) == 1:
            plan = rounded
            log.add("readers of inputs", f"float nodes read {name} as quantized", sqnr_db=outcomes[1].sqnr_db)
    return plan
