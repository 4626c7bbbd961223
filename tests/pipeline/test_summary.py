"""The table after a run: everything in it, in any width, without markup accidents."""

from __future__ import annotations

import io
import pathlib

from rich.console import Console

from postquant.pipeline.report import CheckReport, FloatReport, LayerReport, OutputReport, Report, RunStats
from postquant.pipeline.summary import megabytes, print_checks, print_summary


def _report(layers: int = 2) -> Report:
    return Report(
        model="net.onnx",
        model_sha256="",
        data_sha256="",
        samples=1,
        target="onnxruntime",
        settings={},
        versions={},
        size_before=4_000_000,
        size_after=1_000_000,
        layers=tuple(
            LayerReport(node=f"conv{i}", op_type="Conv", wbits=4, abits=8, sqnr_db=30.0 - i, cosine=0.999)
            for i in range(layers)
        ),
        outputs=(OutputReport(name="y", sqnr_db=25.04, agreement=0.9876),),
        floats=tuple(FloatReport(node=f"soft{i}", op_type="Softmax", reason="it is [small]") for i in range(5)),
        checks=(CheckReport(name="checker", passed=True), CheckReport(name="integers", passed=False, detail="1 wrong")),
        notes=("one bias was clipped",),
    )


def _printed(report: Report, *, width: int = 120, verbose: bool = False) -> str:
    stream = io.StringIO()
    stats = RunStats(seconds=12.34, peak_bytes=250_000_000)
    print_summary(report, stats, Console(file=stream, width=width), out=pathlib.Path("some") / "out", verbose=verbose)
    return stream.getvalue()


def test_everything_is_in_it() -> None:
    text = _printed(_report())
    for words in (
        "conv0  Conv        4       8     30.0  0.99900",
        "  5 x Softmax (soft0, soft1, soft2, ...): it is [small]",
        "2 layers quantized (W4A8) for onnxruntime",
        "output y: SQNR 25.0 dB, agreement 98.76 %",
        "size 4.00 MB -> 1.00 MB (25.0 %)",
        "time 12.3 s, peak memory 250.00 MB",
        "note: one bias was clipped",
        "FAILED integers: 1 wrong",
        str(pathlib.Path("written to some") / "out"),
    ):
        assert words in text
    assert "checker" not in text
    assert "\x1b" not in text


def test_a_long_network_is_cut_unless_asked_for() -> None:
    text = _printed(_report(100))
    assert "conv39" in text
    assert "conv40" not in text
    assert "... and 60 more layers (--verbose lists them); lowest SQNR: -69.0 dB at conv99" in text
    assert "conv98" in _printed(_report(100), verbose=True)


def test_a_narrow_terminal_keeps_the_numbers() -> None:
    text = _printed(_report(), width=40)
    assert "30.0" in text
    assert "size 4.00 MB -> 1.00 MB (25.0 %)" in text


def test_nothing_quantized() -> None:
    text = _printed(_report(0))
    assert "0 layers quantized for onnxruntime" in text
    assert "the result is hardly smaller or faster" in text
    assert "1 layer quantized" in _printed(_report(1))


def test_checks_and_sizes() -> None:
    stream = io.StringIO()
    print_checks([CheckReport(name="a", passed=True), CheckReport(name="b", passed=False)], Console(file=stream))
    assert stream.getvalue() == "ok     a\nFAILED b\n"
    assert (megabytes(0), megabytes(999), megabytes(123_456_789)) == ("0.00 kB", "1.00 kB", "123.46 MB")
