"""SQNR of every layer before and after the stages, in graph order: :func:`layer_chart`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from postquant.pipeline.html.svg import coordinate, element, figure

_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 14.0, 14.0, 30.0
_HEIGHT = 250.0
_PITCH = 18.0
# Fills a desktop's page; on a phone the box scrolls.
_LEAST_WIDTH = 1060.0
# Beyond these decibels nothing is gained by telling how many.
_LEAST_DB, _MOST_DB = -30.0, 90.0


@dataclasses.dataclass(frozen=True)
class LayerPoints:
    """One layer.

    Attributes:
        name: For the reader who points at it.
        values: SQNR in dB after each stage, None where it was not measured; the last one is the result.
    """

    name: str
    values: tuple[float | None, ...]


def layer_chart(layers: Sequence[LayerPoints], stages: Sequence[str]) -> Markup:
    """A stroke per layer from the first measured stage to the result.

    Args:
        layers: In graph order.
        stages: Names of the stages, as many as each layer has values.

    Returns:
        The picture, or an empty string when nothing was measured.
    """
    measured = [_within(value) for layer in layers for value in layer.values if value is not None]
    if not measured:
        return Markup("")
    low = min(0.0, 10 * math.floor(min(measured) / 10))
    high = 10 * math.ceil((max(measured) + 1) / 10)
    width = max(_LEAST_WIDTH, _LEFT + _RIGHT + _PITCH * len(layers))
    pitch = (width - _LEFT - _RIGHT) / len(layers)
    foot = _HEIGHT - _BOTTOM

    def y(value: float) -> float:
        return foot - (_within(value) - low) / (high - low) * (foot - _TOP)

    parts = _frame(low, high, width, y)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if s * pitch >= 30)
    for index, layer in enumerate(layers):
        x = _LEFT + pitch * (index + 0.5)
        if (index + 1) % step == 0 or (index == 0 and step > 2):
            parts.append(element("text", str(index + 1), x=x, y=foot + 18, text_anchor="middle"))
        parts.append(_layer(index, layer, stages, x, y))
    result = [layer.values[-1] for layer in layers if layer.values[-1] is not None]
    words = f"{len(layers)} layers"
    if result:
        words += f", the result between {min(result):.1f} and {min(max(result), 200):.1f} dB."
    return figure("SQNR of the layers", words, *parts, width=width, height=_HEIGHT)


def _within(value: float) -> float:
    return min(max(value, _LEAST_DB), _MOST_DB)


def _frame(low: float, high: float, width: float, y: Callable[[float], float]) -> list[Markup]:
    parts = []
    step = 10 if high - low <= 70 else 20
    for value in range(step * math.ceil(low / step), int(high) + 1, step):
        kind = "axis" if value == 0 else "rule"
        parts.append(element("line", class_=kind, x1=_LEFT, x2=width - _RIGHT, y1=y(value), y2=y(value)))
        label = f"{value} dB" if value + step > high else str(value)
        parts.append(element("text", label, x=_LEFT - 8, y=y(value) + 4, text_anchor="end"))
    return parts


def _layer(index: int, layer: LayerPoints, stages: Sequence[str], x: float, y: Callable[[float], float]) -> Markup:
    known = [(stage, value) for stage, value in zip(stages, layer.values, strict=True) if value is not None]
    if not known:
        return Markup("")
    told = ", ".join(f"{stage} {value:.1f} dB" for stage, value in known)
    parts = [element("title", f"{index + 1}. {layer.name}: {told}")]
    first, last = known[0][1], known[-1][1]
    # A white strip would be hard to hit: the whole column answers the pointer.
    parts.append(element("rect", class_="hit", x=x - 6, y=_TOP, width=12.0, height=_HEIGHT - _TOP - _BOTTOM))
    if len(known) > 1:
        kind = "gain" if last >= first else "loss"
        parts.append(element("line", class_=kind, x1=x, x2=x, y1=y(first), y2=y(last)))
        parts.append(element("circle", class_="before", cx=x, cy=y(first), r=3.2))
        for _, value in known[1:-1]:
            parts.append(element("path", class_="between", d=f"M{coordinate(x - 3.5)} {coordinate(y(value))}h7"))
    parts.append(element("circle", class_="after", cx=x, cy=y(last), r=3.6))
    return element("g", *parts)
