"""``postquant report`` and ``postquant compare --html``: what is written where, and mistakes in one line."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from postquant.pipeline.cli import app
from postquant.pipeline.html import folder as module
from postquant.pipeline.report import Report
from postquant.pipeline.verify_folder import verify_folder
from postquant.runtime_ops.errors import ConfigError


@pytest.fixture
def copy(result: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A result that a test may change."""
    return pathlib.Path(shutil.copytree(result, tmp_path / "result"))


def _report(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_page_belongs_to_the_result(copy: pathlib.Path) -> None:
    report = Report.load(copy / "report.json")
    assert {"report.html", "statistics.json"} <= set(report.files)
    assert "run.json" not in report.files
    assert verify_folder(copy)[0].passed
    (copy / "report.html").write_bytes(b"another page")
    assert "report.html is not the file" in verify_folder(copy)[0].detail


def test_a_page_that_is_there_stays(copy: pathlib.Path) -> None:
    (copy / "report.html").write_bytes(b"mine")
    done = _report(copy)
    assert done.exit_code == 0
    assert done.output.strip() == str((copy / "report.html").resolve())
    assert (copy / "report.html").read_bytes() == b"mine"


def test_a_missing_page_is_written(copy: pathlib.Path) -> None:
    expected = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    assert _report(copy).exit_code == 0
    assert (copy / "report.html").read_bytes() == expected


def test_a_new_page_shows_time_and_memory(copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "page.html"
    assert _report(copy, "--out", out).exit_code == 0
    assert "Peak memory" in out.read_text(encoding="utf-8")
    (copy / "run.json").unlink()
    assert _report(copy, "--out", out).exit_code == 0
    assert "Peak memory" not in out.read_text(encoding="utf-8")


def test_an_old_result_has_a_page_without_pictures(copy: pathlib.Path) -> None:
    (copy / "statistics.json").unlink()
    (copy / "report.html").unlink()
    assert _report(copy).exit_code == 0
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert "<figure" not in page
    assert "SQNR of the layers" in page


@pytest.mark.parametrize("code", [0, 1])
def test_open(copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    opened: list[str] = []

    def launch(url: str) -> int:
        opened.append(url)
        return code

    monkeypatch.setattr(typer, "launch", launch)
    done = _report(copy, "--open")
    assert opened == [(copy / "report.html").resolve().as_uri()]
    assert done.exit_code == (2 if code else 0)
    assert ("no browser could be started" in done.output) == bool(code)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("report.json", None, "there is no result to report on"),
        ("report.json", "{", "the report is damaged"),
        ("statistics.json", "{", "the statistics are damaged"),
        ("run.json", "{", "the costs of the run cannot be read"),
    ],
)
def test_mistakes(copy: pathlib.Path, tmp_path: pathlib.Path, name: str, content: str | None, sentence: str) -> None:
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_text(content)
    done = _report(copy, "--out", tmp_path / "page.html")
    assert (done.exit_code, sentence in done.output) == (2, True)
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written(copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = _report(copy, "--out", tmp_path / "nowhere" / "page.html")
    assert (done.exit_code, "the page cannot be written" in done.output) == (2, True)


def test_without_the_template_engine(copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pages_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no jinja2.*postquant\[report\]"):
        module.folder_page(copy)


def test_compare_writes_a_page(
    cases: Any, copy: pathlib.Path, tmp_path: pathlib.Path, outline: Any, browser: Any
) -> None:
    from postquant.pipeline.load import save_model

    save_model(cases.float_model(cases.cnn), tmp_path / "float.onnx")
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "data.npz", image=rng.normal(size=(3, 3, 16, 16)).astype(np.float32))
    paths = [tmp_path / "float.onnx", copy / "model.onnx", "--data", tmp_path / "data.npz", "--quiet"]
    done = CliRunner().invoke(app, ["compare", *map(str, paths), "--html", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_bytes()
    outline.feed(page.decode())
    assert (outline.open, outline.problems) == ([], [])
    for words in ("float.onnx", "model.onnx", "on 3 samples", "logits"):
        assert words in page.decode()
    seen, console = browser.look(page, width=360)
    assert (console, seen["overflow"], seen["wide"], seen["pictures"]) == ([], 0, [], 1)
