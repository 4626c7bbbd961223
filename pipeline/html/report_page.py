"""The page about one quantization: :func:`report_page`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from markupsafe import Markup

from postquant.pipeline.html.formats import book_label, format_label, weight_shares
from postquant.pipeline.html.graph_map import ROW, graph_lanes
from postquant.pipeline.html.histogram import histogram_figure
from postquant.pipeline.html.layer_chart import LayerPoints, layer_chart
from postquant.pipeline.html.page import fill
from postquant.pipeline.report import FloatReport, LayerReport, Report
from postquant.pipeline.run_costs import RunCosts
from postquant.pipeline.tensor_statistics import OutlineNode, Statistics, TensorStatistic

# Pictures that are open from the start, and the most that a page holds of each kind.
_SHOWN = 12
_MOST_PICTURES = 150
# Rows of the map; a longer network is cut, and the page says so.
_MOST_ROWS = 1500
_MOST_SENSITIVE = 20
_RESULT = "result"


@dataclasses.dataclass(frozen=True)
class _Picture:
    """A tensor with its histogram."""

    tensor: TensorStatistic
    figure: Markup
    label: str


@dataclasses.dataclass(frozen=True)
class _Gallery:
    """Pictures of one kind: those that are open, the others, and how many are left out."""

    title: str
    lead: str
    shown: tuple[_Picture, ...]
    others: tuple[_Picture, ...]
    left_out: int


@dataclasses.dataclass(frozen=True)
class _MapRow:
    """A node of the map with what was measured behind it."""

    node: OutlineNode
    sqnr_db: float | None
    book: str


@dataclasses.dataclass(frozen=True)
class _FloatGroup:
    """Nodes that stayed in float for the same reason."""

    op_type: str
    reason: str
    names: tuple[str, ...]


def report_page(report: Report, statistics: Statistics, run: RunCosts | None = None) -> bytes:
    """The page; the same bytes for the same values.

    Args:
        report: Numbers.
        statistics: What the figures are drawn from.
        run: Time and memory, which differ between equal runs; None leaves them out.

    Returns:
        HTML in UTF-8.
    """
    stages = _measured_stages(report.layers)
    nodes = statistics.nodes[:_MOST_ROWS]
    return fill(
        "report",
        report=report,
        statistics=statistics,
        run=run,
        measured=min(report.samples, int(report.settings.get("verify_samples", report.samples))),
        widths=_widths(report.layers),
        shares=weight_shares(statistics.nodes),
        stages=stages,
        chart=layer_chart([_points(layer, stages) for layer in report.layers], [*stages, _RESULT]),
        gain_names=list(dict.fromkeys(name for layer in report.layers for name in layer.gains)),
        lowest=sorted((y for y in report.layers if y.sqnr_db is not None), key=lambda y: y.sqnr_db or 0.0)[:3],
        book_names=list(dict.fromkeys(name for layer in report.layers for name in layer.code_books)),
        lanes=graph_lanes(nodes),
        rows=_map_rows(nodes, report.layers),
        row_height=ROW,
        rows_left_out=len(statistics.nodes) - len(nodes),
        galleries=_galleries(statistics.tensors, statistics.samples),
        sensitive=_sensitive(statistics.tensors),
        float_groups=_float_groups(report.floats),
        settings={name: json.dumps(value, ensure_ascii=False) for name, value in sorted(report.settings.items())},
        best_stage=max((s.sqnr_db for s in report.stages if s.sqnr_db is not None), default=0.0),
    )


def _measured_stages(layers: Sequence[LayerReport]) -> list[str]:
    return list(dict.fromkeys(stage for layer in layers for stage in layer.history))


def _points(layer: LayerReport, stages: Sequence[str]) -> LayerPoints:
    return LayerPoints(layer.node, (*(layer.history.get(stage) for stage in stages), layer.sqnr_db))


def _widths(layers: Sequence[LayerReport]) -> list[tuple[str, int]]:
    """Such as W4A8, with the number of layers, the most frequent first."""
    counts: dict[str, int] = {}
    for layer in layers:
        weights = "" if layer.wbits is None else f"W{layer.wbits}"
        inputs = "" if layer.abits is None else f"A{layer.abits}"
        label = weights + inputs or "float"
        counts[label] = counts.get(label, 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _map_rows(nodes: Sequence[OutlineNode], layers: Sequence[LayerReport]) -> list[_MapRow]:
    measured = {layer.node: layer.sqnr_db for layer in layers}
    return [_MapRow(node, measured.get(node.name), book_label(node.weights)) for node in nodes]


def _galleries(tensors: Sequence[TensorStatistic], samples: int) -> list[_Gallery]:
    found = []
    for kind, title, lead in (
        ("activation", "Activations", f"Values between layers in the float model, on {samples} calibration samples."),
        ("weight", "Weights", "In units of their channel's scale, so that all channels share one grid."),
    ):
        mine = [tensor for tensor in tensors if tensor.kind == kind and tensor.histogram is not None]
        pictures = [
            _Picture(tensor, histogram_figure(tensor), format_label(tensor.bits, tensor.values))
            for tensor in sorted(mine, key=lambda tensor: tensor.bits)[:_MOST_PICTURES]
        ]
        if pictures:
            shown, others = tuple(pictures[:_SHOWN]), tuple(pictures[_SHOWN:])
            found.append(_Gallery(title, lead, shown, others, len(mine) - len(pictures)))
    return found


def _sensitive(tensors: Sequence[TensorStatistic]) -> list[tuple[TensorStatistic, float]]:
    """The tensors whose quantization alone costs the outputs most, with that SQNR; the worst first."""
    measured = [(tensor, tensor.effect_db) for tensor in tensors if tensor.effect_db is not None]
    return sorted(measured, key=lambda item: item[1])[:_MOST_SENSITIVE]


def _float_groups(floats: Sequence[FloatReport]) -> list[_FloatGroup]:
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in floats:
        groups.setdefault((entry.op_type, entry.reason), []).append(entry.node)
    return [_FloatGroup(op_type, reason, tuple(names)) for (op_type, reason), names in groups.items()]
