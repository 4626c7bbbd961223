"""Progress: a bar on a terminal, one line per stage elsewhere, nothing at all when silent."""

from __future__ import annotations

import io

from rich.console import Console

from postquant.pipeline.progress import BarProgress, NullProgress


def _run(progress: NullProgress) -> None:
    with progress:
        progress.stage("calibrate", 4)
        for _ in range(4):
            progress.advance()
        progress.say("resuming [after] 2 stages")
        progress.stage("search")
        progress.advance(0.5)


def test_redirected_output_has_one_line_per_stage() -> None:
    stream = io.StringIO()
    _run(BarProgress(Console(file=stream)))
    assert stream.getvalue() == "calibrate ...\nresuming [after] 2 stages\nsearch ...\n"


def test_a_terminal_has_a_bar_that_goes_away() -> None:
    for width in (30, 100):
        stream = io.StringIO()
        _run(BarProgress(Console(file=stream, force_terminal=True, width=width)))
        text = stream.getvalue()
        assert "calibrate" in text
        assert "resuming [after]" in text
        assert "\x1b[2K" in text[-20:]  # the line is cleared


def test_silence() -> None:
    _run(NullProgress())
