"""The command with --learn: what it reports, the same bytes whatever happens on the way, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from postquant.pipeline import learning_run
from postquant.pipeline.cli import app
from postquant.pipeline.report import Report

STEPS = 10
# With few steps; killed right after the named stage was saved.
_KILLED = f"""
import dataclasses, os, signal
import postquant.pipeline.learning_run as learning
from postquant.pipeline.checkpoint import Checkpoint
recipes = learning.recipe_for, learning.network_recipe
learning.recipe_for = lambda *arguments: dataclasses.replace(recipes[0](*arguments), iterations={STEPS})
learning.network_recipe = lambda *arguments: dataclasses.replace(recipes[1](*arguments), iterations={STEPS})
real = Checkpoint.save
def save(self, stage, **parts):
    real(self, stage, **parts)
    if stage == os.environ["KILL_AFTER"]:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = save
from postquant.pipeline.cli import main
main()
"""


def _killed(arguments: list[str], stage: str) -> int:
    command = [sys.executable, "-c", _KILLED, *arguments]
    environment = {**os.environ, "KILL_AFTER": stage}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning takes a moment."""
    for name in ("recipe_for", "network_recipe"):
        recipe = getattr(learning_run, name)
        monkeypatch.setattr(
            learning_run, name, lambda *a, recipe=recipe: dataclasses.replace(recipe(*a), iterations=STEPS)
        )


def _bytes(folder: pathlib.Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("model.onnx", "plan.safetensors", "report.json")]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, residual_network: Callable[..., pathlib.Path]) -> list[str]:
    """The command for a small residual network, without the output folder."""
    folder = residual_network(tmp_path_factory.mktemp("net"), inputs=2, channels=4, samples=32, size=0.3)
    options = ["--calib", str(folder / "calib.npz"), "--method", "minmax", "--wbits", "3", "--abits", "3"]
    return ["quantize", str(folder / "net.onnx"), *options, "--border", "off", "--learn", "--max-layers", "1", "--out"]


@pytest.mark.usefixtures("torch_installed", "few_steps")
def test_learning_is_reported_and_a_killed_run_goes_on(command: list[str], tmp_path: pathlib.Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = CliRunner().invoke(app, [*command, str(whole)])
    assert done.exit_code == 0, done.output
    stages = {stage.name: stage for stage in Report.load(whole / "report.json").stages}
    blocks = [name for name in stages if name.startswith("learn ")]
    assert len(blocks) == 5  # single layers, and all together
    assert blocks[-1] == "learn the whole network"
    assert stages["learning"].sqnr_db is not None
    assert "nothing in it has fewer than 8 bits" in stages[blocks[0]].detail
    assert f"dB in {STEPS} iterations" in stages[blocks[1]].detail
    assert _killed([*command, str(killed)], "learn-1") == -signal.SIGKILL
    again = CliRunner().invoke(app, [*command, str(killed)])
    assert again.exit_code == 0, again.output
    assert "2 learned blocks are there already" in again.output
    assert _bytes(whole) == _bytes(killed)


def test_missing_torch_is_told_in_one_sentence(
    command: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postquant.calib.learn.available.importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, [*command, str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "learning needs torch, which is not installed" in result.output
    assert "pip install" in result.output


@pytest.mark.usefixtures("torch_installed")
def test_missing_device_is_told_before_any_work(command: list[str], tmp_path: pathlib.Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    missing = [str(tmp_path / "missing.npz") if part.endswith("calib.npz") else part for part in command]
    result = CliRunner().invoke(app, [*missing, str(tmp_path / "out"), "--device", "cuda"])
    assert result.exit_code == 2
    assert "torch finds no CUDA device" in result.output


@pytest.mark.parametrize("text", ["2 GiBs", "-1", "0", "much"])
def test_memory_is_a_number_of_bytes(command: list[str], tmp_path: pathlib.Path, text: str) -> None:
    result = CliRunner().invoke(app, [*command, str(tmp_path / "out"), "--memory", text])
    assert result.exit_code == 2
    assert "--memory" in result.output


def test_nothing_imports_torch_unless_blocks_are_learned() -> None:
    code = "import sys, postquant.pipeline.cli, postquant.pipeline.stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
