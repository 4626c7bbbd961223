"""The written result is held to its budget once more."""

from __future__ import annotations

import pytest

from postquant.pipeline.budget_report import with_budget
from postquant.pipeline.report import OutputReport, Report


def report(budget: str | None, size: int, *sqnr: float) -> Report:
    return Report(
        model="net.onnx",
        model_sha256="",
        data_sha256="",
        samples=1,
        target="onnxruntime",
        settings={"budget": budget},
        versions={},
        size_before=10_000,
        size_after=size,
        outputs=tuple(OutputReport(name=f"y{i}", sqnr_db=db) for i, db in enumerate(sqnr)),
    )


@pytest.mark.parametrize(
    ("budget", "size", "kept", "text"),
    [
        ("size=0.14x", 1400, True, "size=0.14x is kept: the file has 1,400 of 1,400 bytes"),
        ("size=0.14x", 1401, False, "the budget size=0.14x is not kept: the file has 1,401 of 1,400 bytes"),
        ("size=2kB", 1999, True, "size=2kB is kept: the file has 1,999 of 2,000 bytes"),
        ("sqnr=30", 1, True, "sqnr=30 is kept: the outputs have 30.50 dB, 30 were asked for"),
        ("sqnr=31", 1, False, "the budget sqnr=31 is not kept: the outputs have 30.50 dB, 31 were asked for"),
    ],
)
def test_verdicts(budget: str, size: int, kept: bool, text: str) -> None:
    found = with_budget(report(budget, size, 40.0, 30.5))
    said = [(stage.name, stage.detail) for stage in found.stages]
    assert (said, found.notes) == (([("budget", text)], ()) if kept else ([], (text,)))


@pytest.mark.parametrize("budget", [None, "bitops=0.5x"])
def test_nothing_to_say(budget: str | None) -> None:
    given = report(budget, 1, 30.0)
    assert with_budget(given) == given
