"""A tensor's histogram with the grid of its quantizer drawn in: :func:`histogram_figure`.

Heights are square roots of the counts per width, so that tails are seen. The band in the background is what the grid
reaches, hatched parts lie beyond it. A narrow grid shows its values as strokes at the foot and the thresholds between
them as lines; a threshold that differs between channels is a band.
"""

from __future__ import annotations

import math

from markupsafe import Markup

from postquant.pipeline.html.svg import coordinate, element, figure, percent, short
from postquant.pipeline.tensor_statistics import TensorStatistic, ValueHistogram

WIDTH, HEIGHT = 340, 148
_TOP, _FOOT, _SIDE = 10.0, 118.0, 8.0
_TEXT_Y = 140.0
# A bin so many times as tall as the next one is cut.
_TOWER = 1.6


def histogram_figure(tensor: TensorStatistic) -> Markup:
    """The picture; an empty string for a tensor without values."""
    histogram, grid = tensor.histogram, tensor.grid
    if histogram is None:
        return Markup("")
    place = _Axis(min(histogram.low, grid.low), max(histogram.high, grid.high))
    bars, told = _area(histogram, place)
    parts = [_range_band(tensor, histogram, place), bars]
    for low, high in grid.thresholds:
        left, right = place(low), place(high)
        if right - left > 0.8:
            size = {"width": right - left, "height": _FOOT - _TOP}
            parts.append(element("rect", class_="border-band", x=left, y=_TOP, **size))
        else:
            middle = (left + right) / 2
            parts.append(element("line", class_="threshold", x1=middle, x2=middle, y1=_TOP, y2=_FOOT))
    parts.append(element("line", class_="axis", x1=_SIDE, x2=WIDTH - _SIDE, y1=_FOOT, y2=_FOOT))
    parts.append(_levels(tensor, place))
    parts.extend((told, *_labels(tensor, place)))
    return figure(_name(tensor), _words(tensor, histogram), *parts, width=WIDTH, height=HEIGHT, scale=True)


class _Axis:
    """Values to horizontal positions."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _SIDE + min(max(share, 0.0), 1.0) * (WIDTH - 2 * _SIDE)


def _range_band(tensor: TensorStatistic, histogram: ValueHistogram, place: _Axis) -> Markup:
    left, right = place(tensor.grid.low), place(tensor.grid.high)
    parts = [
        element("rect", class_="reach", x=left, y=_TOP, width=max(right - left, 0.5), height=_FOOT - _TOP),
    ]
    ends = ((place(histogram.low), left), (right, place(histogram.high)))
    for start, end in ends:
        if end - start > 0.5:
            size = {"width": end - start, "height": _FOOT - _TOP}
            parts.append(element("rect", class_="beyond", x=start, y=_TOP, **size))
    return Markup("").join(parts)


def _area(histogram: ValueHistogram, place: _Axis) -> tuple[Markup, Markup]:
    """All bins as one outline, a bin's height the root of its density; and what is written beside one that is cut."""
    edges = histogram.edges()
    bars: list[tuple[float, float, float]] = []
    for start, end, count in zip(edges[:-1], edges[1:], histogram.counts, strict=True):
        # The values of a bin without width (of a Relu, those at 0) are drawn as wide as half a bin.
        width = max(end - start, histogram.width / 2)
        bars.append((start, start + width if end == start else end, math.sqrt(count / width)))
    peak = max(range(len(bars)), key=lambda i: bars[i][2])
    tallest = max((height for i, (_, _, height) in enumerate(bars) if i != peak), default=0.0) or bars[peak][2]
    if tallest <= 0.0:
        return Markup(""), Markup("")
    # One bin that towers over all others, the zeros behind a Relu, is cut: its share is written beside it.
    cut = bars[peak][2] > _TOWER * tallest
    if not cut:
        tallest = bars[peak][2]
    head = 1.34 if cut else 1.04
    points = [f"M{coordinate(place(bars[0][0]))} {coordinate(_FOOT)}"]
    for start, end, height in bars:
        y = coordinate(_FOOT - min(height / tallest, head) * (_FOOT - _TOP) / head)
        points.append(f"L{coordinate(place(start))} {y}H{coordinate(place(end))}")
    points.append(f"V{coordinate(_FOOT)}Z")
    drawn = element("path", class_="bars", d="".join(points))
    if not cut:
        return drawn, Markup("")
    left, right = (place(end) for end in bars[peak][:2])
    gap = element("path", class_="cut", d=f"M{coordinate(left - 2)} {_TOP + 9:.0f}l{coordinate(right - left + 4)} -5")
    text = f"{percent(histogram.counts[peak] / sum(histogram.counts))} here"
    before = left + right > WIDTH
    x, anchor = (left - 6, "end") if before else (right + 6, "start")
    return drawn + gap, element("text", text, class_="told", x=x, y=_TOP + 12, text_anchor=anchor)


def _levels(tensor: TensorStatistic, place: _Axis) -> Markup:
    grid = tensor.grid
    if grid.levels:
        strokes = "".join(f"M{coordinate(place(level))} {coordinate(_FOOT - 5)}v10" for level in grid.levels)
        return element("path", class_="levels", d=strokes)
    left, right = place(grid.low), place(grid.high)
    comb = f"M{coordinate(left)} {coordinate(_FOOT - 5)}v10H{coordinate(right)}v-10"
    return element("path", class_="levels", d=comb)


def _labels(tensor: TensorStatistic, place: _Axis) -> list[Markup]:
    """The ends of the grid and zero, as far as they do not touch each other."""
    left, right, zero = place(tensor.grid.low), place(tensor.grid.high), place(0.0)
    found = [
        element("text", short(tensor.grid.low), x=left, y=_TEXT_Y, text_anchor="start" if left < 40 else "middle"),
        element(
            "text",
            short(tensor.grid.high),
            x=right,
            y=_TEXT_Y,
            text_anchor="end" if right > WIDTH - 40 else "middle",
        ),
    ]
    if tensor.grid.low < 0 < tensor.grid.high and zero - left > 70 and right - zero > 70:
        found.append(element("text", "0", x=zero, y=_TEXT_Y, text_anchor="middle"))
    return found


def _name(tensor: TensorStatistic) -> str:
    return f"Values of {tensor.key}"


def _words(tensor: TensorStatistic, histogram: ValueHistogram) -> str:
    unit = " in units of the channel's scale" if tensor.kind == "weight" else ""
    clipped = tensor.grid.below + tensor.grid.above
    return (
        f"They lie between {short(histogram.low)} and {short(histogram.high)}{unit}; {tensor.bits} bits reach from "
        f"{short(tensor.grid.low)} to {short(tensor.grid.high)}, {percent(clipped)} are clipped."
    )
