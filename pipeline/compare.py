"""Compares a quantized model with its float model, layer by layer and end to end: :func:`compare_models`.

Layers are matched by value names. A quantized tensor of the value ``x`` is one whose dequantized value is called
``x_dequantized`` (postquant), ``x_DequantizeLinear_Output`` (onnxruntime), ``x_dq`` ..., or whose QuantizeLinear reads
``x``. Values that both models compute in float under one name are compared too. What cannot be matched is said.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.lut_expansion import with_qdq
from postquant.passes.session import custom_operators, make_session
from postquant.pipeline import output
from postquant.pipeline.chunks import chunked, element_counts
from postquant.pipeline.encodings.formats import MODEL_FILE
from postquant.pipeline.load import load_model
from postquant.pipeline.measure import SimilarityMeter, jsonable
from postquant.pipeline.progress import NullProgress
from postquant.pipeline.qdq_structure import Reading, reading
from postquant.pipeline.quality import file_bytes, float_session
from postquant.pipeline.report import OutputReport, Report
from postquant.pipeline.verify import output_report
from postquant.runtime_ops.errors import CalibrationError, ModelError, VerificationError

# What quantizers append to a value's name for its dequantized copy.
_SUFFIXES = (
    "_dequantized",
    "_DequantizeLinear_Output",
    "_DequantizeLinear",
    "_QuantizeLinear_Input",
    "_float",
    "_dequant",
    "_dq",
)
_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
# Stages of a result that multiply channels of inner values by factors, which the layers behind undo.
_RESCALING = ("equalize", "smooth")

Feed = Mapping[str, npt.NDArray[Any]]


class Samples(Sized, Protocol):
    """Feeds that can be iterated more than once: a CalibrationSource or a list."""

    def __iter__(self) -> Iterator[Feed]:
        """All feeds, in the same order each time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSimilarity:
    """One value of the float model against the quantized model.

    Attributes:
        name: Value in the float model.
        node: Node that computes it in the float model; "" for an input.
        op_type: Its operator; "input" for an input.
        quantized: Whether the quantized model stores it as codes.
        sqnr_db: SQNR in dB, accumulated error of everything before it included.
        cosine: Cosine similarity.
        max_abs_error: Largest absolute difference.
    """

    name: str
    node: str
    op_type: str
    quantized: bool
    sqnr_db: float
    cosine: float
    max_abs_error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of :func:`compare_models`.

    Attributes:
        layers: Matched values, in the order of the float model.
        outputs: The outputs.
        unmatched: Tensors that the quantized model stores as codes and that match no value of the float model.
        samples: Number of samples.
        float_bytes: Size of the float model's file with external data.
        quantized_bytes: Size of the quantized model's file with external data.
        notes: What could not be compared, and why.
    """

    layers: tuple[LayerSimilarity, ...]
    outputs: tuple[OutputReport, ...]
    unmatched: tuple[str, ...]
    samples: int
    float_bytes: int
    quantized_bytes: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        result = jsonable(self)
        assert isinstance(result, dict)
        return result


def compare_models(
    fp32_path: str | os.PathLike[str],
    quant_path: str | os.PathLike[str],
    source: Samples,
    *,
    progress: NullProgress | None = None,
    threads: int = 1,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
) -> Comparison:
    """Runs both models on the same samples and compares what they compute.

    Args:
        fp32_path: The float model.
        quant_path: The quantized model: any ONNX file with the same inputs, and the same outputs by name or by order.
        source: Samples; iterated once per 48 MB of inner values.
        progress: Who is told.
        threads: Threads within one operator.
        custom_ops: Libraries of custom operators that the models need.

    Raises:
        ModelError: If a file cannot be read or run, or if the models do not belong together.
        CalibrationError: If there is no sample.
    """
    with custom_operators(custom_ops):
        return _compare(pathlib.Path(fp32_path), pathlib.Path(quant_path), source, progress or NullProgress(), threads)


def _compare(
    fp32_path: pathlib.Path, quant_path: pathlib.Path, source: Samples, progress: NullProgress, threads: int
) -> Comparison:
    paths = fp32_path, quant_path
    float_model, quantized = (load_model(path, check=False) for path in paths)
    outputs = _paired_outputs(float_model, quantized)
    first = next(iter(source), None)
    if first is None:
        raise CalibrationError("there is no sample to compare the models on", expected="at least one")
    matches, unmatched = _match(float_model, with_qdq(quantized), outputs)
    counts = element_counts(float_model, list(matches), first, threads=threads)
    chunks = list(chunked(list(matches), counts, 9)) or [[]]
    progress.stage("compare", total=len(chunks) * len(source))

    meters = {name: SimilarityMeter() for name in matches}
    ends = {name: SimilarityMeter() for name in outputs}
    notes = _rescaled(*paths)
    for number, chunk in enumerate(chunks):
        own = outputs if number == 0 else {}
        reference = float_session(float_model, [*dict.fromkeys([*own, *chunk])], threads=threads)
        wanted_names = dict.fromkeys([*own.values(), *(matches[name].fetched for name in chunk)])
        other = make_session(quantized, outputs=list(wanted_names), threads=threads)
        for feed in source:
            wanted, got = reference.run(feed), other.run(feed)
            for name, theirs in own.items():
                _add(ends[name], name, wanted[name], got[theirs], notes)
            for name in chunk:
                _add(meters[name], name, wanted[name], matches[name].real(got), notes)
            progress.advance()
    return Comparison(
        layers=tuple(_layer(name, matches[name], meter) for name, meter in meters.items() if meter.result().elements),
        outputs=tuple(output_report(name, meter.result()) for name, meter in ends.items()),
        unmatched=tuple(unmatched),
        samples=len(source),
        float_bytes=file_bytes(paths[0], float_model),
        quantized_bytes=file_bytes(paths[1], quantized),
        notes=tuple(notes),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Match:
    """A value of the float model and what to fetch from the quantized one."""

    value: ir.Value
    fetched: str
    reading: Reading | None

    def real(self, arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        array = arrays[self.fetched]
        return array if self.reading is None else self.reading.numbers.real(array)


def _add(meter: SimilarityMeter, name: str, wanted: npt.NDArray[Any], got: npt.NDArray[Any], notes: list[str]) -> None:
    if wanted.shape == got.shape:
        meter.add(wanted, got)
        return
    note = f"{name} has shape {list(wanted.shape)} in one model and {list(got.shape)} in the other: not compared"
    if note not in notes:
        notes.append(note)


def _rescaled(fp32_path: pathlib.Path, quant_path: pathlib.Path) -> list[str]:
    """What a reader must know where channels of a result have other factors than those of the float model."""
    folder, scaled = quant_path.parent, quant_path.parent / "encodings" / MODEL_FILE
    if quant_path.name not in (output.MODEL_FILE, output.QDQ_FILE) or fp32_path.resolve() == scaled.resolve():
        return []
    try:
        report = Report.load(folder / output.REPORT_FILE)
    except ModelError:
        return []  # a file on its own
    stages = [stage.name for stage in report.stages if stage.kept and stage.name.startswith(_RESCALING)]
    if not stages:
        return []
    other = f"; compare with {scaled} to leave them out" if scaled.is_file() else ""
    note = f"low values inside may be factors and not errors: {', '.join(stages)} multiplied channels"
    return [f"{note}, which later layers undo, so that outputs are not touched{other}"]


def _layer(name: str, match: _Match, meter: SimilarityMeter) -> LayerSimilarity:
    node, similarity = match.value.producer(), meter.result()
    return LayerSimilarity(
        name=name,
        node="" if node is None else node.name or "",
        op_type="input" if node is None else node.op_type,
        quantized=match.reading is not None,
        sqnr_db=similarity.sqnr_db,
        cosine=similarity.cosine,
        max_abs_error=similarity.max_abs_error,
    )


def _paired_outputs(float_model: ir.Model, quantized: ir.Model) -> dict[str, str]:
    """Float output -> quantized output: by name, else by order."""
    ours = [value.name or "" for value in float_model.graph.outputs]
    theirs = [value.name or "" for value in quantized.graph.outputs]
    missing = sorted(
        {v.name or "" for v in quantized.graph.inputs if not v.is_initializer()}
        - {v.name or "" for v in float_model.graph.inputs}
    )
    if missing:
        raise ModelError(
            "the two models have different inputs",
            expected=", ".join(v.name or "" for v in float_model.graph.inputs),
            found=f"also {', '.join(missing)}",
        )
    if set(ours) == set(theirs):
        return {name: name for name in ours}
    if len(ours) != len(theirs):
        raise ModelError(
            "the two models have different outputs", expected=", ".join(ours), found=", ".join(theirs) or "none"
        )
    return dict(zip(ours, theirs, strict=True))


def _match(
    float_model: ir.Model, quantized: ir.Model, outputs: Mapping[str, str]
) -> tuple[dict[str, _Match], list[str]]:
    """Values of the float model that the quantized one has too, in order, and stored tensors that match none."""
    values: dict[str, ir.Value] = {v.name or "": v for v in float_model.graph.inputs if not v.is_initializer()}
    for node in float_model.graph:
        values.update({v.name: v for v in node.outputs if v.name})
    found: dict[str, _Match] = {}
    unmatched: dict[str, None] = {}
    for node in quantized.graph:
        if node.op_type != "DequantizeLinear" or node.domain:
            continue
        try:
            seen = reading(node.outputs[0])
        except VerificationError:
            continue  # scales computed at run time: this value is compared only as an output
        if seen is None or seen.constant is not None or seen.quantize is None:
            continue
        name = _float_name(seen, values)
        if name is None:
            unmatched[seen.codes.name or ""] = None
        elif name not in found:
            found[name] = _Match(values[name], seen.codes.name or "", seen)
    for node in quantized.graph:
        for value in node.outputs:
            name = value.name or ""
            if name in values and name not in found and name not in outputs and _is_plain_float(node, value):
                found[name] = _Match(values[name], name, None)
    return {name: found[name] for name in values if name in found}, list(unmatched)


def _float_name(seen: Reading, values: Mapping[str, ir.Value]) -> str | None:
    names = [seen.dequantize.outputs[0].name or "", "" if seen.source is None else seen.source.name or ""]
    for name in names:
        for suffix in _SUFFIXES:
            if name.endswith(suffix) and name.removesuffix(suffix) in values:
                return name.removesuffix(suffix)
    # A graph output keeps its name; a QuantizeLinear may read the value itself.
    return next((name for name in names if name in values), None)


def _is_plain_float(node: ir.Node, value: ir.Value) -> bool:
    """Whether looking at a value keeps every integer kernel: it lies between float nodes."""
    if node.op_type in _QDQ or (value.dtype is not None and value.dtype != ir.DataType.FLOAT):
        return False
    if any(use.node.op_type == "QuantizeLinear" for use in value.uses()):
        return False
    producers = [v.producer() for v in node.inputs if v is not None]
    return not any(p is not None and p.op_type == "DequantizeLinear" for p in producers)


def worst_layers(comparison: Comparison, count: int) -> Sequence[LayerSimilarity]:
    """The layers with the lowest SQNR, lowest first."""
    order = np.argsort([layer.sqnr_db for layer in comparison.layers], kind="stable")
    return [comparison.layers[i] for i in order[:count]]
