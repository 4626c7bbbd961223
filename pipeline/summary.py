"""What a person sees after a run: layers, bits, SQNR, what stayed float and why, sizes, time and memory."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from postquant.pipeline.report import CheckReport, FloatReport, LayerReport, OutputReport, PeerReport, Report, RunStats

_LAYERS_SHOWN = 40
_NAMES_SHOWN = 3


def print_summary(
    report: Report, stats: RunStats | None, console: Console, *, out: pathlib.Path | None = None, verbose: bool = False
) -> None:
    """Prints the table of a run.

    Args:
        report: The report.
        stats: Time and memory; None when it is an earlier run's report.
        console: Where to print.
        out: Folder of the result.
        verbose: List every layer, not only the first of a long network.
    """
    _print_layers(report.layers, console, verbose=verbose)
    _print_floats(report.floats, console)
    _print_totals(report, stats, console, out)
    for note in report.notes:
        _line(console, f"note: {note}")
    print_checks([check for check in report.checks if not check.passed], console)


def print_checks(checks: Sequence[CheckReport], console: Console) -> None:
    """One line per check of a verification."""
    for check in checks:
        _line(console, f"{'ok    ' if check.passed else 'FAILED'} {check.name}{_detail(check.detail)}")


def _detail(text: str) -> str:
    return f": {text}" if text else ""


def _print_layers(layers: Sequence[LayerReport], console: Console, *, verbose: bool) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("op")
    for heading in ("weights", "inputs", "SQNR dB", "cosine"):
        table.add_column(heading, justify="right")
    shown = layers if verbose else layers[:_LAYERS_SHOWN]
    for layer in shown:
        table.add_row(
            Text(layer.node),
            Text(layer.op_type),
            f"{_bits(layer.wbits)} {layer.weights}" if layer.weights in ("post", "lut") else _bits(layer.wbits),
            _bits(layer.abits),
            _decimal(layer.sqnr_db, 1),
            _decimal(layer.cosine, 5),
        )
    if layers:
        console.print(table)
    if len(shown) < len(layers):
        worst = min(layers, key=lambda layer: float("inf") if layer.sqnr_db is None else layer.sqnr_db)
        _line(
            console,
            f"... and {len(layers) - len(shown)} more layers (--verbose lists them); "
            f"lowest SQNR: {_decimal(worst.sqnr_db, 1)} dB at {worst.node}",
        )


def _print_floats(floats: Iterable[FloatReport], console: Console) -> None:
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in floats:
        groups.setdefault((entry.op_type, entry.reason), []).append(entry.node)
    if groups:
        console.print()
        _line(console, "stays in float:")
    for (op_type, reason), nodes in groups.items():
        names = ", ".join(nodes[:_NAMES_SHOWN]) + (", ..." if len(nodes) > _NAMES_SHOWN else "")
        _line(console, f"  {len(nodes)} x {op_type} ({names}): {reason}")


def _print_totals(report: Report, stats: RunStats | None, console: Console, out: pathlib.Path | None) -> None:
    console.print()
    bits = sorted({(layer.wbits, layer.abits) for layer in report.layers}, key=str)
    widths = ", ".join(f"W{_bits(w)}A{_bits(a)}" for w, a in bits)
    count = f"{len(report.layers)} layer{'' if len(report.layers) == 1 else 's'}"
    samples = f"{report.samples} calibration sample{'' if report.samples == 1 else 's'}"
    _line(console, f"{count} quantized{f' ({widths})' if widths else ''} for {report.target}, {samples}")
    if not report.layers:
        _line(console, "no Conv, ConvTranspose, Gemm or MatMul is quantized: the result is hardly smaller or faster")
    for output in report.outputs:
        _line(console, _output(output))
    if report.peer is not None:
        _print_peer(report.peer, console)
    ratio = f" ({100 * report.size_after / report.size_before:.1f} %)" if report.size_before else ""
    _line(console, f"size {megabytes(report.size_before)} -> {megabytes(report.size_after)}{ratio}")
    if stats is not None:
        memory = "" if stats.peak_bytes is None else f", peak memory {megabytes(stats.peak_bytes)}"
        _line(console, f"time {stats.seconds:.1f} s{memory}")
    if out is not None:
        _line(console, f"written to {out}")


def _output(output: OutputReport) -> str:
    agreement = "" if output.agreement is None else f", agreement {100 * output.agreement:.2f} %"
    return f"output {output.name}: SQNR {_decimal(output.sqnr_db, 1)} dB{agreement}"


def _print_peer(peer: PeerReport, console: Console) -> None:
    who = f"{peer.quantizer} (W{peer.wbits}A{peer.abits})"
    if peer.failure:
        _line(console, f"{who} could not quantize this model: {peer.failure}")
    for output in peer.outputs:
        _line(console, f"{who}: {_output(output)}, {megabytes(peer.size)}")


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _bits(bits: int | None) -> str:
    return "-" if bits is None else str(bits)


def _decimal(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def megabytes(size: int) -> str:
    """A number of bytes for people.

    >>> megabytes(1234567)
    '1.23 MB'
    """
    return f"{size / 1e6:.2f} MB" if size >= 1e4 else f"{size / 1e3:.2f} kB"
