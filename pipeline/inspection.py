"""What a model, a plan or a result folder holds: :func:`inspect_model`.

Weights are read one at a time. What onnxruntime runs is asked of onnxruntime; a model that it refuses is described
all the same, with its reason.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.plan import QuantPlan
from postquant.pipeline.kernels import WEIGHTED, Coverage, integer_coverage, observed_session
from postquant.pipeline.load import load_model
from postquant.pipeline.measure import jsonable
from postquant.pipeline.output import MODEL_FILE, PLAN_FILE, REPORT_FILE
from postquant.pipeline.qdq_structure import Reading, reading
from postquant.pipeline.report import OutputReport, Report
from postquant.pipeline.verify import file_bytes
from postquant.runtime_ops.errors import ModelError, VerificationError
from postquant.runtime_ops.quantizer import TensorQuantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output: name, element type, dimensions (strings and None are free)."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight of Conv, ConvTranspose, Gemm or MatMul.

    Attributes:
        name: Initializer (the codes, in a quantized model).
        node: Its first reader.
        op_type: Operator of that node.
        dtype: Element type in the file.
        shape: Shape.
        size: Bytes in the file.
        bits: Bits that the codes really use; None for a float weight.
        code_range: Smallest and largest code; None for a float weight.
        scale_range: Smallest and largest scale; None for a float weight.
        scales: Number of scales: 1, or one per channel.
    """

    name: str
    node: str
    op_type: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    bits: int | None = None
    code_range: tuple[int, int] | None = None
    scale_range: tuple[float, float] | None = None
    scales: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
    """A tensor stored as codes between nodes.

    Attributes:
        name: Float value that is quantized.
        dtype: Element type of the codes.
        bits: Bits of the code range.
        code_range: Smallest and largest code that may occur.
        scale: Scale.
        zero_point: Zero point.
        low: Smallest value that can be represented.
        high: Largest value that can be represented.
    """

    name: str
    dtype: str
    bits: int
    code_range: tuple[int, int]
    scale: float
    zero_point: int
    low: float
    high: float


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


def inspect_model(path: str | os.PathLike[str]) -> Inspection:
    """Describes an ``.onnx`` file (float or quantized), a ``plan.safetensors`` file, or a result folder.

    Raises:
        ModelError: If there is nothing that can be read.
    """
    place = pathlib.Path(path)
    if place.suffix == ".safetensors":
        return _of_plan(place, QuantPlan.load(place))
    if not place.is_dir():
        return _of_model(place, place, None, None)
    model = place / MODEL_FILE
    if not model.is_file():
        raise ModelError("the folder holds no result", where=str(place), expected=f"a file {MODEL_FILE}")
    plan = QuantPlan.load(place / PLAN_FILE) if (place / PLAN_FILE).is_file() else None
    report = Report.load(place / REPORT_FILE) if (place / REPORT_FILE).is_file() else None
    return _of_model(place, model, plan, report)


def _of_model(place: pathlib.Path, file: pathlib.Path, plan: QuantPlan | None, report: Report | None) -> Inspection:
    model = load_model(file, check=False)
    notes = list(() if plan is None else plan.notes)
    kernels, coverage = None, None
    try:
        optimized = observed_session(model)[1]
        kernels, coverage = dict(optimized.counts), integer_coverage(model, optimized)
    except ModelError as error:
        notes.append(f"onnxruntime does not load the model: {error.found or error}")
    activations = _activations(model, notes)
    weights = _weights(model, notes)
    quantized = bool(activations) or any(weight.bits is not None for weight in weights)
    return Inspection(
        path=str(place),
        file_bytes=file_bytes(file, model),
        producer=" ".join(part for part in (model.producer_name, model.producer_version) if part),
        opsets=dict(model.graph.opset_imports),
        inputs=tuple(_tensor(v) for v in model.graph.inputs if not v.is_initializer()),
        outputs=tuple(_tensor(v) for v in model.graph.outputs),
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


def _tensor(value: ir.Value) -> Tensor:
    shape: tuple[int | str | None, ...] | None = None
    if value.shape is not None:
        shape = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return Tensor(
        name=value.name or "", dtype="?" if value.dtype is None else value.dtype.name.lower(), shape=shape
    )


def _readings(model: ir.Model, notes: list[str]) -> list[Reading]:
    found = []
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or node.domain:
            continue
        try:
            seen = reading(node.outputs[0])
        except VerificationError as error:
            notes.append(f"not shown: {error}")
            continue
        if seen is not None:
            found.append(seen)
    return found


def _activations(model: ir.Model, notes: list[str]) -> tuple[Activation, ...]:
    found: dict[str, Activation] = {}
    for seen in _readings(model, notes):
        if seen.quantize is None or seen.numbers.scale.ndim or (seen.codes.name or "") in found:
            continue
        low, high = seen.saturation or (seen.numbers.low, seen.numbers.high)
        limits = np.asarray([low, high])
        real = seen.numbers.real(limits)
        found[seen.codes.name or ""] = Activation(
            name="" if seen.source is None else seen.source.name or "",
            dtype="?" if seen.codes.dtype is None else seen.codes.dtype.name.lower(),
            bits=used_bits(low, high),
            code_range=(low, high),
            scale=float(seen.numbers.scale),
            zero_point=int(seen.numbers.zero_point),
            low=float(real[0]),
            high=float(real[1]),
        )
    return tuple(found.values())


def used_bits(low: int, high: int) -> int:
    """Bits that codes from ``low`` to ``high`` need: signed if ``low`` is negative.

    >>> used_bits(0, 255), used_bits(-7, 7), used_bits(-127, 127), used_bits(0, 1)
    (8, 4, 8, 1)
    """
    if low >= 0:
        return max(1, int(high).bit_length())
    return max((-low - 1).bit_length(), max(high, 0).bit_length()) + 1


def _weights(model: ir.Model, notes: list[str]) -> tuple[Weight, ...]:
    found: dict[str, Weight] = {}
    for node in model.graph:
        if node.op_type not in WEIGHTED or node.domain:
            continue
        for value in node.inputs[:2]:
            if value is None:
                continue
            try:
                seen = reading(value)
            except VerificationError as error:
                notes.append(f"not shown: {error}")
                continue
            source = value if seen is None else seen.codes
            tensor = None if source.is_graph_input() else source.const_value
            name = source.name or ""
            if tensor is None or name in found:
                continue
            found[name] = _weight(name, node, tensor, seen)
    return tuple(found.values())


def _weight(name: str, node: ir.Node, tensor: ir.TensorProtocol, seen: Reading | None) -> Weight:
    shape = tuple(int(d) for d in tensor.shape.numpy())
    known = {"name": name, "node": node.name or "", "op_type": node.op_type, "shape": shape}
    dtype = tensor.dtype.name.lower()
    if seen is None:
        return Weight(**known, dtype=dtype, size=tensor.nbytes)  # type: ignore[arg-type]
    codes: npt.NDArray[Any] = np.asarray(tensor.numpy())
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    scale = seen.numbers.scale
    return Weight(
        **known,  # type: ignore[arg-type]
        dtype=dtype,
        size=tensor.nbytes,
        bits=used_bits(low, high),
        code_range=(low, high),
        scale_range=(float(scale.min()), float(scale.max())),
        scales=int(scale.size),
    )


def _floats(model: ir.Model, plan: QuantPlan | None, coverage: Coverage | None) -> tuple[FloatNode, ...]:
    """Nodes that compute in float: by the plan with its reasons, else the weighted ones that onnxruntime runs so."""
    nodes = {node.name: node for node in model.graph if node.name}
    result = {
        name: FloatNode(node=name, op_type=nodes[name].op_type if name in nodes else "?", reason=reason)
        for name, reason in (plan.floats if plan is not None else {}).items()
    }
    for name, kernel in (coverage.floating if coverage is not None else {}).items():
        if name not in result:
            op_type = nodes[name].op_type if name in nodes else "?"
            result[name] = FloatNode(node=name, op_type=op_type, reason=f"onnxruntime runs it as {kernel}")
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
