"""The commands with a budget: what they choose, write and refuse."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from postquant.pipeline.bits_picture import SUFFIXES, draw_bits
from postquant.pipeline.checkpoint import Checkpoint
from postquant.pipeline.cli import app
from postquant.pipeline.report import Report
from postquant.pipeline.sensitivity import SensitivityReport, SensitivityRow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, residual_network: Callable[..., pathlib.Path]) -> pathlib.Path:
    return residual_network(tmp_path_factory.mktemp("net"), inputs=4, channels=16, samples=8, size=0.1)


def _run(folder: pathlib.Path, command: str, *arguments: str) -> tuple[int, str]:
    given = [command, str(folder / "net.onnx"), "--calib", str(folder / "calib.npz"), *arguments]
    result = CliRunner().invoke(app, given)
    return result.exit_code, result.output


def _quantize(folder: pathlib.Path, name: str, *arguments: str) -> Report:
    code, output = _run(folder, "quantize", "--out", str(folder / name), "--quiet", *arguments)
    assert code == 0, output
    return Report.load(folder / name / "report.json")


def test_size(folder: pathlib.Path) -> None:
    report = _quantize(folder, "size", "--budget", "size=0.4x")
    size = (folder / "size" / "model.onnx").stat().st_size
    assert size <= 0.4 * (folder / "net.onnx").stat().st_size
    widths = {layer.node: layer.wbits for layer in report.layers}
    assert min(bits for bits in widths.values() if bits) < 8
    (stage,) = (stage for stage in report.stages if stage.name == "bit allocation")
    assert stage.detail.startswith("size=0.4x")
    limit = int(0.4 * report.size_before)
    assert report.stages[-1].detail == f"size=0.4x is kept: the file has {size:,} of {limit:,} bytes"
    assert report.layers[0].sensitivity["w2"] < report.layers[0].sensitivity["w8"]
    assert {layer.abits for layer in report.layers} == {8}


def test_bit_operations_choose_inputs_too_and_an_override_wins(folder: pathlib.Path) -> None:
    config = folder / "quant.toml"
    config.write_text('method = "mse"\n[[override]]\nnode = "conv1"\nwbits = 6\n', encoding="utf-8")
    report = _quantize(folder, "bitops", "--budget", "bitops=0.3x", "--config", str(config))
    work = {"stem": 25 * 36 * 16, "conv1": 25 * 144 * 16, "conv2": 25 * 144 * 16, "head": 16 * 4}
    total = sum(work[layer.node] * (layer.wbits or 0) * (layer.abits or 0) for layer in report.layers)
    assert 0.2 * 64 * sum(work.values()) < total <= 0.3 * 64 * sum(work.values())
    assert min(layer.abits or 8 for layer in report.layers) < 8
    assert {layer.node: layer.wbits for layer in report.layers}["conv1"] == 6


def test_sqnr_and_the_same_bytes_after_an_interruption(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("--budget", "sqnr=20", "--method", "mse")
    report = _quantize(folder, "sqnr", *settings)
    (stage,) = (stage for stage in report.stages if stage.name == "bit allocation")
    assert stage.sqnr_db is not None
    assert stage.sqnr_db >= 20
    assert min(layer.wbits or 8 for layer in report.layers) < 8
    save = Checkpoint.save

    def interrupted(self: Checkpoint, stage: str, **parts: Any) -> None:
        save(self, stage, **parts)
        if stage == "bits":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", interrupted)
        code, _ = _run(folder, "quantize", "--out", str(folder / "again"), "--quiet", *settings)
    assert code == 130
    _quantize(folder, "again", *settings)
    for name in ("model.onnx", "plan.safetensors", "report.json"):
        assert (folder / "again" / name).read_bytes() == (folder / "sqnr" / name).read_bytes()


def test_budget_out_of_reach(folder: pathlib.Path) -> None:
    code, output = _run(folder, "quantize", "--out", str(folder / "none"), "--budget", "size=0.01x", "--method", "mse")
    assert code == 2
    assert "no choice of bits keeps the budget" in output
    assert not (folder / "none" / "model.onnx").exists()


def test_sensitivity_as_json(folder: pathlib.Path) -> None:
    code, output = _run(folder, "sensitivity", "--json")
    assert code == 0, output
    rows = json.loads(output)["rows"]
    assert [row["node"] for row in rows] == ["stem", "conv1", "conv2", "head"]
    assert set(rows[1]["weight_db"]) == set(rows[1]["input_db"]) == {str(bits) for bits in range(2, 9)}
    assert set(rows[1]["formats"]["4"]) == {"int", "post", "lut"}
    assert rows[0]["wbits"] is None


def test_table_and_picture_of_a_budget(folder: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    code, output = _run(folder, "sensitivity", "--budget", "size=0.4x", "--picture", str(folder / "bits.png"))
    assert code == 0, output
    assert "budget size=0.4x" in output
    assert "conv2" in output
    assert (folder / "bits.png").read_bytes()[:4] == b"\x89PNG"


def test_equal_numbers_give_equal_pictures(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    rows = tuple(
        SensitivityRow(f"layer{n}", "Conv", 10 + n, 1.0, {2: 5.0 + n, 8: 40.0}, {}, {}, {}, (2,), wbits=2, abits=8)
        for n in range(3)
    )
    report = SensitivityReport("net.onnx", 4, rows, 30.0, "size=0.3x", True, 20.0, 19.0, 1e5)
    for name in ("a", "b"):
        for suffix in SUFFIXES:
            draw_bits(report, tmp_path / f"{name}{suffix}")
    assert all((tmp_path / f"a{s}").read_bytes() == (tmp_path / f"b{s}").read_bytes() for s in (".png", ".pdf"))


@pytest.mark.parametrize("name", ["a.txt", "missing/a.png"])
def test_picture_that_cannot_be_written(folder: pathlib.Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    code, output = _run(folder, "sensitivity", "--picture", str(folder / name))
    assert code == 2
    assert "picture" in output
