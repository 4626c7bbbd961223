"""What a model, a plan or a result folder holds: :func:`inspect_model`.

Weights are read one at a time. What onnxruntime runs is asked of onnxruntime; a model that it refuses is described
all the same, with its reason.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from postquant.passes.lut_expansion import with_qdq
from postquant.passes.plan import QuantPlan
from postquant.passes.session import custom_operators
from postquant.passes.subgraph import op_types
from postquant.pipeline.inspected_tensors import Activation, Tensor, Weight, described, stored_activations, weights_of
from postquant.pipeline.kernels import Coverage, integer_coverage, observed_session
from postquant.pipeline.load import load_model
from postquant.pipeline.measure import jsonable
from postquant.pipeline.output import MODEL_FILE, PLAN_FILE, REPORT_FILE
from postquant.pipeline.quality import file_bytes
from postquant.pipeline.report import OutputReport, Report
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.quantizer import TensorQuantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatNode:
    """A node that stays in float, and why."""

    node: str
    op_type: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """The result of :func:`inspect_model`.

    Attributes:
        path: What was inspected.
        file_bytes: Size of the model file with its external data; None where only a plan was given.
        producer: Who wrote the model.
        opsets: Domain -> version.
        inputs: Inputs.
        outputs: Outputs.
        ops: Operator type -> number, in the file.
        kernels: Operator type -> number, as onnxruntime runs it; None where it does not load the model.
        coverage: Which weighted nodes run on integers; None likewise.
        weights: Weights, in graph order.
        activations: Stored tensors, in graph order.
        qdq_pairs: Number of activations that pass QuantizeLinear and DequantizeLinear.
        floats: What stays in float, and why.
        target: Target of the plan; None without one.
        quality: Quality of the outputs by the report; empty without one.
        notes: Notes of the plan, and what could not be found out.
    """

    path: str
    file_bytes: int | None = None
    producer: str = ""
    opsets: Mapping[str, int] = dataclasses.field(default_factory=dict)
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    ops: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, int] | None = None
    coverage: Coverage | None = None
    weights: tuple[Weight, ...] = ()
    activations: tuple[Activation, ...] = ()
    qdq_pairs: int = 0
    floats: tuple[FloatNode, ...] = ()
    target: str | None = None
    quality: tuple[OutputReport, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether anything is quantized."""
        return bool(self.activations) or any(weight.bits is not None for weight in self.weights)

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        result = jsonable(self)
        assert isinstance(result, dict)
        return result


def inspect_model(path: str | os.PathLike[str], *, custom_ops: Sequence[str | os.PathLike[str]] = ()) -> Inspection:
    """Describes an ``.onnx`` file (float or quantized), a ``plan.safetensors`` file, or a result folder.

    Args:
        path: The file or folder.
        custom_ops: Libraries of custom operators that the model needs.

    Raises:
        ModelError: If there is nothing that can be read.
    """
    place = pathlib.Path(path)
    if place.suffix == ".safetensors":
        return _of_plan(place, QuantPlan.load(place))
    if not place.is_dir():
        with custom_operators(custom_ops):
            return _of_model(place, place, None, None)
    model = place / MODEL_FILE
    if not model.is_file():
        raise ModelError("the folder holds no result", where=str(place), expected=f"a file {MODEL_FILE}")
    plan = QuantPlan.load(place / PLAN_FILE) if (place / PLAN_FILE).is_file() else None
    report = Report.load(place / REPORT_FILE) if (place / REPORT_FILE).is_file() else None
    with custom_operators(custom_ops):
        return _of_model(place, model, plan, report)


def _of_model(place: pathlib.Path, file: pathlib.Path, plan: QuantPlan | None, report: Report | None) -> Inspection:
    model = load_model(file, check=False)
    notes = list(() if plan is None else plan.notes)
    kernels, coverage = None, None
    try:
        optimized = observed_session(model)[1]
        kernels, coverage = dict(optimized.counts), integer_coverage(model, optimized)
    except ModelError as error:
        hint = f" ({error.hint})" if error.hint else ""
        notes.append(f"onnxruntime does not load the model: {error.found or error}{hint}")
    groups = with_qdq(model)
    activations = stored_activations(groups, notes)
    weights = weights_of(groups, notes)
    quantized = bool(activations) or any(weight.bits is not None for weight in weights)
    return Inspection(
        path=str(place),
        file_bytes=file_bytes(file, model),
        producer=" ".join(part for part in (model.producer_name, model.producer_version) if part),
        opsets=dict(model.graph.opset_imports),
        inputs=tuple(described(v) for v in model.graph.inputs if not v.is_initializer()),
        outputs=tuple(described(v) for v in model.graph.outputs),
        ops=dict(sorted(collections.Counter(node.op_type for node in model.graph).items())),
        kernels=kernels,
        coverage=coverage,
        weights=weights,
        activations=activations,
        qdq_pairs=len(activations),
        floats=_floats(model, plan, coverage) if quantized else (),
        target=None if plan is None else plan.target,
        quality=() if report is None else report.outputs,
        notes=tuple(notes),
    )


def _floats(model: ir.Model, plan: QuantPlan | None, coverage: Coverage | None) -> tuple[FloatNode, ...]:
    """Nodes that compute in float: by the plan with its reasons, else the weighted ones that onnxruntime runs so."""
    kinds = op_types(model.graph)
    result = {
        name: FloatNode(node=name, op_type=kinds.get(name, "?"), reason=reason)
        for name, reason in (plan.floats if plan is not None else {}).items()
    }
    for name, kernel in (coverage.floating if coverage is not None else {}).items():
        if name not in result:
            reason = f"onnxruntime runs it as {kernel}"
            result[name] = FloatNode(node=name, op_type=kinds.get(name, "?"), reason=reason)
    return tuple(result.values())


def _of_plan(place: pathlib.Path, plan: QuantPlan) -> Inspection:
    activations, weights = [], []
    for name, entry in plan.activations.items():
        if isinstance(entry, TensorQuantizer):
            low, high = entry.range()
            activations.append(
                Activation(
                    name=name,
                    dtype=entry.spec.container,
                    bits=entry.spec.bits,
                    code_range=(entry.spec.qmin, entry.spec.qmax),
                    scale=float(entry.scale),
                    zero_point=int(entry.zero_point),
                    low=float(low),
                    high=float(high),
                )
            )
    for name, entry in plan.weights.items():
        spec = entry.spec if isinstance(entry, TensorQuantizer) else entry
        scale = entry.scale if isinstance(entry, TensorQuantizer) else None
        weights.append(
            Weight(
                name=name,
                node="",
                op_type="",
                dtype=spec.container,
                shape=(),
                size=0,
                bits=spec.bits,
                code_range=(spec.qmin, spec.qmax),
                scale_range=None if scale is None else (float(scale.min()), float(scale.max())),
                scales=0 if scale is None else int(scale.size),
            )
        )
    undecided = sum(not isinstance(e, TensorQuantizer) for t in (plan.activations, plan.weights) for e in t.values())
    notes = [*plan.notes, *([f"{undecided} formats have no scale yet"] if undecided else [])]
    return Inspection(
        path=str(place),
        weights=tuple(weights),
        activations=tuple(activations),
        qdq_pairs=len(activations),
        floats=tuple(FloatNode(node=n, op_type="?", reason=r) for n, r in plan.floats.items()),
        target=plan.target,
        notes=tuple(notes),
    )
