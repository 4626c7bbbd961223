"""``statistics.json``: what the pictures of a report are drawn from, as plain frozen values.

Histograms of activations and weights, the grids that were laid over them, the outline of the graph. A few hundred
numbers per tensor, whatever the model and the data. Like ``report.json``, the content depends on the model, the data,
the settings and the versions only.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, Self

from postquant.calib.histogram import Density
from postquant.pipeline.report import encode_json, read_document

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueHistogram:
    """Counts of values in bins of equal width, but for the bin around zero, which is twice as wide.

    Attributes:
        low: Smallest value.
        high: Largest value.
        width: Width of a bin, a power of two.
        zero: Index of the bin around zero.
        counts: Values in each bin.
    """

    low: float
    high: float
    width: float
    zero: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, density: Density) -> Self:
        """A histogram that was made for reading."""
        counts = tuple(int(count) for count in density.counts)
        return cls(low=density.low, high=density.high, width=density.width, zero=density.zero, counts=counts)

    def edges(self) -> tuple[float, ...]:
        """Edges of the bins, one more than there are bins, cut at the smallest and the largest value.

        >>> ValueHistogram(low=-0.5, high=2.5, width=1.0, zero=0, counts=(3, 1, 1)).edges()
        (-0.5, 1.0, 2.0, 2.5)
        """
        places = (k if k > 0 else k - 1 for k in range(-self.zero, len(self.counts) - self.zero + 1))
        return tuple(min(max(k * self.width, self.low), self.high) for k in places)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridStatistics:
    """The values that a quantizer can produce, and what it does to a tensor.

    Attributes:
        low: Smallest value.
        high: Largest value.
        step: Distance of neighbours; the smallest one where distances differ.
        levels: All values, for at most 32 of them; empty otherwise.
        thresholds: Where rounding changes from one level to the next, one pair per gap between ``levels``: smallest and
            largest over the channels, equal for rounding to nearest.
        neighbours: Whether thresholds move with the rounding errors of neighbouring values; by one standard deviation
            of that ``thresholds`` are wider.
        below: Share of the values that lie more than half a step below ``low``, 0 to 1.
        above: Share of the values that lie more than half a step above ``high``, 0 to 1.
    """

    low: float
    high: float
    step: float
    levels: tuple[float, ...] = ()
    thresholds: tuple[tuple[float, ...], ...] = ()
    neighbours: bool = False
    below: float = 0.0
    above: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorStatistic:
    """One quantizer with the values that it met.

    Attributes:
        kind: "activation", or "weight": its values are in units of their channel's scale.
        key: Value, initializer, or "node:input" where one input of a node has a quantizer of its own.
        value: Name of the value.
        node: The layer that a weight or an input belongs to; the node that computes an activation; "" for an input.
        bits: Bits of a code.
        values: "int", "post", "lut" (code books), "feedback" (one whose channels make up for each other's errors),
            "border" or "adaptive" (an activation with a rounding border, or with a step per sample).
        scales: Smallest and largest scale.
        zero_point: Zero point.
        grid: The quantizer's values.
        histogram: The tensor's values, None where it has none.
        effect_db: SQNR in dB of the outputs with this quantizer alone, as estimated when its range was chosen; None
            where that was not measured.
        moved: Share of a weight's codes that are not the nearest, 0 to 1; None for activations.
    """

    kind: str
    key: str
    value: str
    node: str
    bits: int
    values: str
    scales: tuple[float, ...]
    zero_point: int
    grid: GridStatistics
    histogram: ValueHistogram | None = None
    effect_db: float | None = None
    moved: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutlineNode:
    """A node of the simplified model for the map; a Relu or Clip that needs no kernel is part of its producer.

    Attributes:
        name: Node name; the value's name for a graph input.
        ops: Operator types: one, and those of the nodes that are part of it; "input" for a graph input.
        inputs: Positions of the nodes that it reads, in the outline.
        wbits: Bits of its weight.
        weights: "int", "post" or "lut"; None without a quantized weight.
        abits: Bits of its output where that is stored as codes.
        reads: Fewest bits among the codes that it reads; None where it reads float values.
        border: Whether an input is rounded with a border.
        parameters: Elements of its constant inputs.
        reason: Why it stays in float; None where it does not, or needs no reason.
    """

    name: str
    ops: tuple[str, ...]
    inputs: tuple[int, ...] = ()
    wbits: int | None = None
    weights: str | None = None
    abits: int | None = None
    reads: int | None = None
    border: bool = False
    parameters: int = 0
    reason: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Everything that a report shows beside the numbers of ``report.json``.

    Attributes:
        samples: Calibration samples behind the histograms of activations.
        tensors: One entry per quantizer, activations first.
        nodes: The graph, in the order in which it runs.
    """

    samples: int
    tensors: tuple[TensorStatistic, ...] = ()
    nodes: tuple[OutlineNode, ...] = ()

    def to_bytes(self) -> bytes:
        """The content of ``statistics.json``: one tensor or node a line."""
        data: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **encode_json(self)}
        lines = []
        for key, value in data.items():
            if isinstance(value, list):
                rows = ",\n".join(f"  {_compact(item)}" for item in value)
                lines.append(f' "{key}": [\n{rows}\n ]' if rows else f' "{key}": []')
            else:
                lines.append(f' "{key}": {_compact(value)}')
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    @classmethod
    def load(cls, path: pathlib.Path) -> Statistics:
        """Reads ``statistics.json``.

        Raises:
            ModelError: If it is missing, damaged, or of another schema version.
        """
        return read_document(cls, path, "the statistics", SCHEMA_VERSION, plural=True)


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
