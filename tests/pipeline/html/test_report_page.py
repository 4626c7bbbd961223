"""The page about a result: whole, escaped, the same every time, small for large networks, and right in a browser."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest

from postquant.pipeline.html.folder import folder_page
from postquant.pipeline.html.report_page import report_page
from postquant.pipeline.report import CheckReport, FloatReport, LayerReport, Report
from postquant.pipeline.run_costs import RunCosts, StageCost
from postquant.pipeline.tensor_statistics import OutlineNode, Statistics


def _texts(folder: pathlib.Path) -> tuple[Report, Statistics]:
    return Report.load(folder / "report.json"), Statistics.load(folder / "statistics.json")


def test_everything_is_in_it(result: pathlib.Path, outline: Any) -> None:
    report, statistics = _texts(result)
    page = (result / "report.html").read_text(encoding="utf-8")
    outline.feed(page)
    assert (outline.open, outline.problems) == ([], [])
    assert len(outline.ids) == len(set(outline.ids))
    # Nothing is fetched: links lead to places of the page, and the icon is empty.
    assert {link for link in outline.links if not link.startswith("#")} == {"data:,"}
    assert {link.removeprefix("#") for link in outline.links if link.startswith("#")} <= set(outline.ids)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    for layer in report.layers:
        assert layer.node in page
    for node in statistics.nodes:
        assert node.name in page
    for entry in report.floats:
        assert entry.reason in page
    drawn = [tensor for tensor in statistics.tensors if tensor.histogram is not None]
    assert outline.tags["figure"] == len(drawn) > 10
    # One picture per histogram, and the chart; each tells a screen reader what it shows.
    assert page.count('role="img"') == page.count("<desc>") == len(drawn) + 1
    assert "all 7 checks passed" in page


def test_the_folders_page_is_drawn_again_to_the_byte(result: pathlib.Path) -> None:
    assert folder_page(result) == (result / "report.html").read_bytes()
    with_costs = folder_page(result, costs=True).decode()
    assert "Peak memory" in with_costs
    assert "Time of the stages" in with_costs
    assert "Peak memory" not in (result / "report.html").read_text(encoding="utf-8")


def test_names_are_escaped(result: pathlib.Path) -> None:
    report, statistics = _texts(result)
    bad = '<img src=x onerror="alert(1)">&'
    report = dataclasses.replace(
        report,
        model=bad,
        layers=(dataclasses.replace(report.layers[0], node=bad), *report.layers[1:]),
        floats=(FloatReport(node=bad, op_type=bad, reason=bad),),
        notes=(bad,),
        checks=(CheckReport(name=bad, passed=False, detail=bad),),
    )
    tensor = dataclasses.replace(statistics.tensors[0], key=bad)
    statistics = dataclasses.replace(
        statistics, tensors=(tensor,), nodes=(OutlineNode(name=bad, ops=(bad,), reason=bad),)
    )
    page = report_page(report, statistics).decode()
    assert "<img" not in page
    assert page.count("&lt;img") > 8
    assert "1 of 1 checks failed" in page


def test_a_result_without_anything(result: pathlib.Path, outline: Any) -> None:
    report = dataclasses.replace(
        _texts(result)[0], layers=(), outputs=(), floats=(), stages=(), checks=(), notes=(), files={}, inputs=()
    )
    outline.feed(report_page(report, Statistics(samples=0)).decode())
    assert (outline.open, outline.problems) == ([], [])
    assert "svg" not in outline.tags


def test_time_and_memory(result: pathlib.Path) -> None:
    run = RunCosts(seconds=12.5, peak_bytes=250_000_000, resumed=True, stages=(StageCost(name="verify", seconds=3.0),))
    page = report_page(*_texts(result), run).decode()
    for words in ("12.5", "250.00 MB", "the last part of an interrupted run", "3.0"):
        assert words in page


def test_a_large_network_stays_below_three_megabytes(result: pathlib.Path) -> None:
    report, statistics = _texts(result)
    name = "/model/encoder/layers.{}/self_attention/output/dense/MatMul"
    layer = report.layers[0]
    report = dataclasses.replace(
        report, layers=tuple(dataclasses.replace(layer, node=name.format(i)) for i in range(400))
    )
    tensors = [
        dataclasses.replace(tensor, key=f"{name.format(i)} {tensor.key}")
        for i in range(60)
        for tensor in statistics.tensors
    ]
    nodes = [
        OutlineNode(name=name.format(i), ops=("MatMul", "Relu"), inputs=(max(0, i - 7), i - 1), wbits=4, weights="lut")
        for i in range(3000)
    ]
    page = report_page(report, dataclasses.replace(statistics, tensors=tuple(tensors), nodes=tuple(nodes)))
    assert len(page) < 3_000_000
    assert b"1500 more nodes are left out here" in page
    assert b"are left out here; statistics.json has them all" in page


def test_stages_before_the_result(result: pathlib.Path) -> None:
    report, statistics = _texts(result)
    layers = (
        LayerReport(node="a", op_type="Conv", wbits=4, abits=8, sqnr_db=20.0, history={"ranges": 11.125}),
        LayerReport(node="b", op_type="Conv", wbits=4, abits=8, sqnr_db=18.0, history={"ranges": 21.0}),
    )
    page = report_page(dataclasses.replace(report, layers=layers), statistics).decode()
    assert "1. a: ranges 11.1 dB, result 20.0 dB" in page
    assert page.count('class="gain"') == page.count('class="loss"') == 1


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1280, False)])
def test_in_a_browser(result: pathlib.Path, browser: Any, width: int, dark: bool) -> None:
    seen, console = browser.look((result / "report.html").read_bytes(), width=width, dark=dark)
    assert console == []
    assert (seen["overflow"], seen["wide"], seen["empty"]) == (0, [], 0)
    assert seen["pictures"] > 10
    assert seen["background"] == ("rgb(20, 22, 26)" if dark else "rgb(247, 246, 242)")


def test_the_browser_sees_what_is_wrong(browser: Any) -> None:
    page = b'<title>t</title><body><div style="width:500px">wide</div><script>nonsense()</script></body>'
    seen, console = browser.look(page, width=360)
    assert seen["overflow"] > 100
    assert seen["wide"] == ["DIV.null"]
    assert seen["title"] == "t"
    assert len(console) == 1
