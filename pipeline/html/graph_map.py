"""The lines beside the map of the graph: which node reads which, drawn like a version history: :func:`graph_lanes`.

A row is a node. The first lane leads from each node to the next; an edge that passes over rows gets a lane of its own
for as long as it lasts, and free lanes are used again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from markupsafe import Markup

from postquant.pipeline.html.svg import coordinate, element
from postquant.pipeline.tensor_statistics import OutlineNode

ROW = 26
_LANE = 11.0
_LEFT = 9.0
_BEND = 9.0
# Edges beyond this many lanes share the last one.
_MOST_LANES = 7


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The drawing.

    Attributes:
        picture: SVG as high as all rows; it says nothing that the rows do not say, and is hidden from screen readers.
        width: Its width, CSS pixels.
    """

    picture: Markup
    width: int


def graph_lanes(nodes: Sequence[OutlineNode]) -> Lanes:
    """Draws the edges of a graph whose nodes are in the order in which they run."""
    edges = _long_edges(nodes)
    lanes = _assign(edges)
    parts = []
    for row, node in enumerate(nodes):
        if row and row - 1 in node.inputs:
            parts.append(element("path", d=f"M{_LEFT:.0f} {_middle(row - 1):.0f}V{_middle(row):.0f}"))
    for (start, ends), lane in zip(edges, lanes, strict=True):
        x = _LEFT + _LANE * lane
        turn, lowest = coordinate(x - _BEND), coordinate(_middle(max(ends)) - _BEND)
        out = f"M{_LEFT:.0f} {_middle(start):.0f}H{turn}q{_BEND:.0f} 0 {_BEND:.0f} {_BEND:.0f}V{lowest}"
        back = "".join(
            f"M{coordinate(x)} {coordinate(_middle(end) - _BEND)}q0 {_BEND:.0f} -{_BEND:.0f} {_BEND:.0f}H{_LEFT:.0f}"
            for end in ends
        )
        parts.append(element("path", d=out + back))
    for row, node in enumerate(nodes):
        kind = "float" if node.reason is not None else "whole" if node.abits is not None or node.wbits else "plain"
        parts.append(element("circle", class_=kind, cx=_LEFT, cy=_middle(row), r=3.6))
    width = int(_LEFT * 2 + _LANE * max(lanes, default=0))
    height = ROW * len(nodes)
    picture = element("svg", *parts, width=width, height=height, aria_hidden="true", class_="lanes")
    return Lanes(picture, width)


def _middle(row: int) -> float:
    return ROW * (row + 0.5)


def _long_edges(nodes: Sequence[OutlineNode]) -> list[tuple[int, list[int]]]:
    """Row -> rows that read it and are not the next one, by the row where they begin."""
    readers: dict[int, list[int]] = {}
    for row, node in enumerate(nodes):
        for source in node.inputs:
            if source < row - 1:
                readers.setdefault(source, []).append(row)
    return sorted(readers.items())


def _assign(edges: Sequence[tuple[int, list[int]]]) -> list[int]:
    """A lane for every edge, counted from 1, such that edges in one lane do not overlap."""
    free_from: list[int] = []
    found = []
    for start, ends in edges:
        lane = next((lane for lane, row in enumerate(free_from) if row <= start), len(free_from))
        if lane == len(free_from) and lane < _MOST_LANES:
            free_from.append(0)
        lane = min(lane, _MOST_LANES - 1)
        free_from[lane] = max(free_from[lane], max(ends))
        found.append(lane + 1)
    return found
