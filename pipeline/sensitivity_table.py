"""``postquant sensitivity`` for people: a table of layers and widths (:func:`print_sensitivity`)."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from postquant.pipeline.sensitivity import SensitivityReport, SensitivityRow
from postquant.pipeline.summary import megabytes


def print_sensitivity(report: SensitivityReport, console: Console) -> None:
    """Prints the SQNR of the outputs with one layer alone quantized, at each width, and the chosen bits."""
    widths = sorted({bits for row in report.rows for bits in row.weight_db})
    inputs = sorted({bits for row in report.rows for bits in row.input_db})
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("op")
    for heading in ("weights", *(f"w{bits}" for bits in widths), *(f"a{bits}" for bits in inputs)):
        table.add_column(heading, justify="right")
    table.add_column("best format")
    if report.budget is not None:
        table.add_column("bits", justify="right")
    for row in report.rows:
        cells = [Text(row.node), Text(row.op_type), Text(str(row.weights))]
        cells += [Text(_db(row.weight_db.get(bits))) for bits in widths]
        cells += [Text(_db(row.input_db.get(bits))) for bits in inputs]
        cells.append(Text(_formats(row)))
        if report.budget is not None:
            cells.append(Text(f"W{row.wbits} A{row.abits}"))
        table.add_row(*cells)
    console.print(table)
    _line(console, "dB at the outputs with that weight (w) or input (a) alone quantized; more is better")
    _line(console, f"all activations quantized, float weights: {report.activations_db:.1f} dB")
    if report.budget is not None and report.cost is not None:
        cost = (
            f"{report.cost:.3g} bit operations" if report.budget.startswith("bitops") else megabytes(int(report.cost))
        )
        _line(
            console,
            f"budget {report.budget}: {cost}, {_db(report.sqnr_db)} dB with quick scales, "
            f"{_db(report.predicted_db)} dB predicted{'' if report.kept else '; the budget is not reached'}",
        )


def _formats(row: SensitivityRow) -> str:
    """The best format of every width that has several."""
    return ", ".join(
        f"{bits}: {max(formats, key=lambda name: formats[name])}"
        for bits, formats in sorted(row.formats.items())
        if len(formats) > 1
    )


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
