"""Tables for people: inspections, comparisons and verifications as :class:`rich.table.Table`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from postquant.pipeline.compare import Comparison, worst_layers
from postquant.pipeline.inspection import Inspection
from postquant.pipeline.report import OutputReport
from postquant.pipeline.summary import megabytes
from postquant.pipeline.verify import Verification

_ROWS = 60
_NAMES = 3


def _table(*columns: str, numbers: int = 0) -> Table:
    """A borderless table; the last ``numbers`` columns are aligned to the right."""
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        right = index >= len(columns) - numbers
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def output_table(outputs: Iterable[OutputReport]) -> Table:
    """Quality of outputs."""
    table = _table("output", "SQNR dB", "cosine", "max error", "agreement", numbers=4)
    for output in outputs:
        agreement = "-" if output.agreement is None else f"{100 * output.agreement:.2f} %"
        error = "-" if output.max_abs_error is None else f"{output.max_abs_error:.4g}"
        cosine = "-" if output.cosine is None else f"{output.cosine:.5f}"
        table.add_row(Text(output.name), f"{output.sqnr_db:.1f}", cosine, error, agreement)
    return table


def comparison_table(comparison: Comparison, *, limit: int | None = None) -> Table:
    """Similarity of the layers: all in graph order, or the ``limit`` worst ones, worst first."""
    table = _table("value", "op", "stored as", "SQNR dB", "cosine", "max error", numbers=3)
    layers = comparison.layers if limit is None else worst_layers(comparison, limit)
    for layer in layers:
        table.add_row(
            Text(layer.name),
            layer.op_type,
            "codes" if layer.quantized else "float",
            f"{layer.sqnr_db:.1f}",
            f"{layer.cosine:.5f}",
            f"{layer.max_abs_error:.4g}",
        )
    return table


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints a comparison: layers, outputs, sizes and what could not be compared."""
    cut = len(comparison.layers) > _ROWS
    if comparison.layers:
        console.print(comparison_table(comparison, limit=_ROWS if cut else None))
        if cut:
            _line(console, f"the {_ROWS} layers with the lowest SQNR of {len(comparison.layers)}")
        console.print()
    console.print(output_table(comparison.outputs))
    sizes = f"{megabytes(comparison.float_bytes)} -> {megabytes(comparison.quantized_bytes)}"
    _line(console, f"{comparison.samples} samples, size {sizes}")
    if comparison.unmatched:
        _line(
            console,
            f"{len(comparison.unmatched)} stored tensors match no value of the float model: "
            f"{_some(comparison.unmatched)}",
        )
    for note in comparison.notes:
        _line(console, f"note: {note}")


def quality_table(verification: Verification) -> Table:
    """SQNR and cosine of every stored tensor."""
    table = _table("tensor", "node", "bits", "scale", "zero", "SQNR dB", "cosine", numbers=5)
    for entry in verification.quality:
        table.add_row(
            Text(entry.name),
            Text(entry.node),
            str(entry.bits),
            f"{entry.scale:.4g}",
            str(entry.zero_point),
            f"{entry.sqnr_db:.1f}",
            f"{entry.cosine:.5f}",
        )
    return table


def integer_table(verification: Verification) -> Table:
    """Agreement of onnxruntime's codes with the simulation, one row per kind of kernel."""
    table = _table("operator", "kernel", "law", "tensors", "codes", "ties", "mismatches", numbers=4)
    groups: dict[tuple[str, str, str], list[int]] = {}
    for entry in verification.tensors:
        row = groups.setdefault((entry.op_type, entry.kernel, entry.law), [0, 0, 0, 0])
        for index, amount in enumerate((1, entry.codes, entry.ties, entry.mismatches)):
            row[index] += amount
    for (op_type, kernel, law), row in groups.items():
        table.add_row(op_type, kernel or "-", law, *(str(amount) for amount in row))
    return table


def count_table(ops: Mapping[str, int], kernels: Mapping[str, int] | None) -> Table:
    """Operators of the file beside the kernels that onnxruntime runs."""
    table = _table("operator", "in the file", "onnxruntime runs", numbers=2)
    for op_type in sorted({*ops, *(kernels or {})}):
        ran = "?" if kernels is None else str(kernels.get(op_type, "-"))
        table.add_row(op_type, str(ops.get(op_type, "-")), ran)
    return table


def weight_table(inspection: Inspection) -> Table:
    """Weights with the code range that they really use."""
    table = _table("weight", "node", "op", "type", "shape", "bits", "codes", "scales", "size", numbers=4)
    for weight in inspection.weights[:_ROWS]:
        codes = "-" if weight.code_range is None else f"{weight.code_range[0]}..{weight.code_range[1]}"
        scales = "-"
        if weight.scale_range is not None:
            low, high = weight.scale_range
            scales = f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}"
        table.add_row(
            Text(weight.name),
            Text(weight.node or "-"),
            weight.op_type or "-",
            weight.dtype,
            "x".join(map(str, weight.shape)) or "-",
            "-" if weight.bits is None else str(weight.bits),
            codes,
            scales,
            megabytes(weight.size) if weight.size else "-",
        )
    return table


def activation_table(inspection: Inspection) -> Table:
    """Stored tensors with their ranges."""
    table = _table("tensor", "type", "bits", "scale", "zero", "low", "high", numbers=5)
    for entry in inspection.activations[:_ROWS]:
        table.add_row(
            Text(entry.name),
            entry.dtype,
            str(entry.bits),
            f"{entry.scale:.4g}",
            str(entry.zero_point),
            f"{entry.low:.4g}",
            f"{entry.high:.4g}",
        )
    return table


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Prints an inspection."""
    _line(console, inspection.path)
    if inspection.file_bytes is not None:
        opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in inspection.opsets.items())
        made = f", by {inspection.producer}" if inspection.producer else ""
        _line(console, f"{megabytes(inspection.file_bytes)}, opset {opsets}{made}")
    if inspection.target is not None:
        _line(console, f"quantized for {inspection.target}")
    for kind, tensors in (("input", inspection.inputs), ("output", inspection.outputs)):
        for tensor in tensors:
            shape = "?" if tensor.shape is None else ", ".join("?" if d is None else str(d) for d in tensor.shape)
            _line(console, f"{kind} {tensor.name}: {tensor.dtype} [{shape}]")
    if inspection.ops:
        console.print()
        console.print(count_table(inspection.ops, inspection.kernels))
    if inspection.weights:
        console.print()
        console.print(weight_table(inspection))
        _more(console, len(inspection.weights), "weights")
    if inspection.activations:
        console.print()
        console.print(activation_table(inspection))
        _more(console, len(inspection.activations), "stored tensors")
    console.print()
    if inspection.coverage is not None and inspection.quantized:
        total = len(inspection.coverage.integer) + len(inspection.coverage.floating)
        _line(console, f"{len(inspection.coverage.integer)} of {total} weighted nodes run as integer kernels")
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in inspection.floats:
        groups.setdefault((entry.op_type, entry.reason), []).append(entry.node)
    for (op_type, reason), names in groups.items():
        _line(console, f"float: {len(names)} x {op_type} ({_some(names)}): {reason}")
    if inspection.quality:
        console.print(output_table(inspection.quality))
    for note in inspection.notes:
        _line(console, f"note: {note}")


def _more(console: Console, count: int, what: str) -> None:
    if count > _ROWS:
        _line(console, f"... and {count - _ROWS} more {what} (--json lists them)")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_NAMES]) + (", ..." if len(listed) > _NAMES else "")
