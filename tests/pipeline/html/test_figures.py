"""Figures: positions follow the numbers, nothing overlaps that must not, odd input gives no odd picture."""

from __future__ import annotations

import dataclasses
import math
import re
import xml.etree.ElementTree as ET

import pytest

from postquant.pipeline.html.formats import weight_shares
from postquant.pipeline.html.graph_map import ROW, graph_lanes
from postquant.pipeline.html.histogram import WIDTH, histogram_figure
from postquant.pipeline.html.layer_chart import LayerPoints, layer_chart
from postquant.pipeline.html.svg import element
from postquant.pipeline.tensor_statistics import GridStatistics, OutlineNode, TensorStatistic, ValueHistogram

TENSOR = TensorStatistic(
    kind="activation",
    key="a<b",
    value="a",
    node="n",
    bits=2,
    values="int",
    scales=(1.0, 1.0),
    zero_point=0,
    grid=GridStatistics(
        low=0.0, high=3.0, step=1.0, levels=(0.0, 1.0, 2.0, 3.0), thresholds=((0.5, 0.5), (1.25, 1.75), (2.5, 2.5))
    ),
    histogram=ValueHistogram(low=0.0, high=6.0, width=1.0, zero=0, counts=(9, 4, 1, 1, 0, 1)),
)


def _parts(markup: str, kind: str) -> list[ET.Element]:
    return [part for part in ET.fromstring(markup).iter() if part.get("class") == kind]


def test_text_is_escaped_and_markup_is_not() -> None:
    inner = element("b", "<x>")
    assert str(element("i", inner, "&", title='"')) == '<i title="&#34;"><b>&lt;x&gt;</b>&amp;</i>'


def test_the_grid_is_where_its_values_are() -> None:
    markup = str(histogram_figure(TENSOR))
    inner = WIDTH - 16.0
    (reach,) = _parts(markup, "reach")
    assert (float(reach.get("x", "")), float(reach.get("width", ""))) == (8.0, inner / 2)
    (beyond,) = _parts(markup, "beyond")
    assert float(beyond.get("x", "")) == 8.0 + inner / 2
    lines = [float(line.get("x1", "")) for line in _parts(markup, "threshold")]
    assert lines == [8.0 + inner / 12, pytest.approx(8.0 + inner * 5 / 12, abs=0.05)]
    (band,) = _parts(markup, "border-band")
    assert float(band.get("width", "")) == pytest.approx(inner / 12, abs=0.05)
    (levels,) = _parts(markup, "levels")
    strokes = [float(x) for x in re.findall(r"M([\d.]+)", levels.get("d", ""))]
    assert strokes == pytest.approx([8.0 + inner * level / 6 for level in range(4)], abs=0.05)


def test_heights_are_square_roots() -> None:
    (bars,) = _parts(str(histogram_figure(TENSOR)), "bars")
    foot, *tops = (float(y) for y in re.findall(r" ([\d.]+)", bars.get("d", "")))
    heights = [foot - top for top in tops]
    assert heights[1] / heights[2] == pytest.approx(2.0, abs=0.02)
    assert heights[2] == heights[3] == heights[5]
    assert heights[4] == 0


def test_a_tower_is_cut_and_told() -> None:
    histogram = ValueHistogram(low=0.0, high=4.0, width=1.0, zero=0, counts=(960, 10, 20, 10))
    markup = str(histogram_figure(dataclasses.replace(TENSOR, histogram=histogram)))
    assert len(_parts(markup, "cut")) == 1
    assert "96.0 % here" in markup
    assert _parts(str(histogram_figure(TENSOR)), "cut") == []


@pytest.mark.parametrize(
    "histogram",
    [
        ValueHistogram(low=0.0, high=0.0, width=2.0**-120, zero=0, counts=(5,)),
        ValueHistogram(low=3.0, high=3.0, width=0.001, zero=0, counts=(*[0] * 30, 5)),
        ValueHistogram(low=-1e30, high=1e30, width=2.0**98, zero=1, counts=(1, 2, 1)),
    ],
)
def test_odd_histograms(histogram: ValueHistogram) -> None:
    tiny = GridStatistics(low=-1e-30, high=1e-30, step=1e-30)
    for grid in (TENSOR.grid, tiny, GridStatistics(low=0.0, high=0.0, step=1.0)):
        markup = str(histogram_figure(dataclasses.replace(TENSOR, histogram=histogram, grid=grid)))
        ET.fromstring(markup)
        assert not re.search(r"nan|inf", markup)


def test_no_histogram_no_picture() -> None:
    assert str(histogram_figure(dataclasses.replace(TENSOR, histogram=None))) == ""


def test_layers_are_drawn_from_first_to_last() -> None:
    layers = [LayerPoints("a", (10.0, 15.0, 20.0)), LayerPoints("b", (None, None, 5.0)), LayerPoints("c", (None,) * 3)]
    markup = str(layer_chart(layers, ["x", "y", "z"]))
    assert [len(_parts(markup, kind)) for kind in ("before", "between", "after", "gain")] == [1, 1, 2, 1]
    (gain,) = _parts(markup, "gain")
    assert float(gain.get("y2", "")) < float(gain.get("y1", ""))
    assert "1. a: x 10.0 dB, y 15.0 dB, z 20.0 dB" in markup
    assert str(layer_chart([LayerPoints("c", (None,))], ["z"])) == ""


@pytest.mark.parametrize("value", [200.0, -200.0, 0.0])
def test_extreme_layers_stay_inside(value: float) -> None:
    markup = str(layer_chart([LayerPoints("a", (value,)), LayerPoints("b", (30.0,))], ["z"]))
    height = float((ET.fromstring(markup).get("viewBox") or "").split()[3])
    for dot in _parts(markup, "after"):
        assert 0 <= float(dot.get("cy", "")) <= height


def _nodes(*inputs: tuple[int, ...]) -> list[OutlineNode]:
    return [OutlineNode(name=str(i), ops=("Conv",), inputs=read) for i, read in enumerate(inputs)]


def test_lanes_of_edges_that_last_at_the_same_time_differ() -> None:
    #                  0   1     2     3       4       5
    nodes = _nodes((), (0,), (1,), (2, 0), (3, 1), (4,), (5, 4), (6,))
    lanes = graph_lanes(nodes)
    paths = [part.get("d", "") for part in ET.fromstring(str(lanes.picture)) if part.tag == "path"]
    straight = [path for path in paths if "q" not in path]
    assert len(straight) == 7
    turns = [float(path.split("H")[1].split("q")[0]) for path in paths if "q" in path]
    assert len(turns) == 3
    # 0 -> 3 and 1 -> 4 run beside each other, 4 -> 6 takes the first lane again.
    assert turns[0] == turns[2] < turns[1]
    assert f'height="{ROW * 8}"' in str(lanes.picture)


def test_a_chain_needs_one_lane_and_many_lanes_are_shared() -> None:
    chain = graph_lanes(_nodes((), (0,), (1,)))
    crowd = graph_lanes(_nodes(*[()] * 40, tuple(range(40))))
    assert chain.width < crowd.width < 120


def test_shares_add_up() -> None:
    nodes = [
        OutlineNode(name="a", ops=("Conv",), wbits=4, weights="post", parameters=60),
        OutlineNode(name="b", ops=("Conv",), wbits=4, weights="post", parameters=20),
        OutlineNode(name="c", ops=("Conv",), wbits=8, weights="int", parameters=15),
        OutlineNode(name="d", ops=("Add",), parameters=5),
        OutlineNode(name="e", ops=("Relu",)),
    ]
    found = weight_shares(nodes)
    assert [(share.label, share.elements, share.layers) for share in found] == [
        ("4 bit POST", 80, 2),
        ("8 bit", 15, 1),
        ("float", 5, 1),
    ]
    assert math.isclose(sum(share.share for share in found), 1.0)
    assert weight_shares([]) == ()
