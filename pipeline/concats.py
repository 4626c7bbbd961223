"""Tries for every Concat whether its inputs share the output's scale: :func:`decide_concats`."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from postquant.calib.source import CalibrationSource
from postquant.calib.trial import Trial, keep_better
from postquant.passes.concat import share_concat
from postquant.passes.plan import QuantPlan
from postquant.pipeline.stage_log import StageLog

SAMPLES = 8


def decide_concats(
    model: ir.Model,
    plan: QuantPlan,
    source: CalibrationSource,
    log: StageLog,
    *,
    fixed: frozenset[str] = frozenset(),
    threads: int = 1,
) -> QuantPlan:
    """Lets a Concat copy codes where that loses less than requantizing its inputs.

    Only the Concat's own tensors are quantized for the comparison, so that nothing else blurs it.

    Args:
        model: The simplified model.
        plan: All activations are decided.
        source: Calibration data.
        log: Told how many share.
        fixed: Stored tensors that keep their own numbers.
        threads: Threads of onnxruntime.
    """
    concats = [node for node in model.graph if node.op_type == "Concat" and node.name not in plan.floats]
    # Those of shapes and indices are none of ours, and a comparison of a large model is not free.
    concats = [node for node in concats if share_concat(plan, node) is not plan and not _stored(plan, node) & fixed]
    if not concats:
        return plan
    trial = Trial(model, source, samples=SAMPLES, threads=threads)
    shared = 0
    for node in concats:
        together = share_concat(plan, node)
        if together is plan:
            continue
        names = [v.name or "" for v in (*node.inputs, node.outputs[0]) if v is not None]
        outcomes = [trial.measure(model, only(candidate, names)) for candidate in (plan, together)]
        if keep_better(outcomes) == 1:
            plan, shared = together, shared + 1
    log.add("concatenations", f"{shared} of {len(concats)} copy codes, the others requantize their inputs")
    return plan


def _stored(plan: QuantPlan, node: ir.Node) -> set[str]:
    """The stored tensors that a node reads and writes."""
    names = [value.name or "" for value in (*node.inputs, *node.outputs) if value is not None]
    return {plan.shared.get(name, name) for name in names}


def only(plan: QuantPlan, names: list[str]) -> QuantPlan:
    """A plan that quantizes these values only, with everything that shares their codes."""
    keys = {plan.shared.get(name, name) for name in names}
    return dataclasses.replace(
        plan,
        activations={key: entry for key, entry in plan.activations.items() if key in keys},
        shared={name: key for name, key in plan.shared.items() if key in keys},
        requants={},
        weights={},
        int_biases={},
    )
