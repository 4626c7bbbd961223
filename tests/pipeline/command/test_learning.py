"""The command with --learn: what it reports, the same bytes whatever happens on the way, and what it refuses."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import pytest
from typer.testing import CliRunner

from postquant.pipeline.cli import app
from postquant.pipeline.report import Report

NETWORK = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 2, 5, 5] x) => (float[N, 4] y)
    <float[4, 2, 3, 3] w0, float[4] b0, float[4, 4, 3, 3] w1, float[4] b1, float[4, 4, 3, 3] w2, float[4] b2,
     float[4, 4] w3, float[4] b3> {
      [stem] c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
      [relu0] r0 = Relu (c0)
      [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (r0, w1, b1)
      [relu1] r1 = Relu (c1)
      [conv2] c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2, b2)
      [sum] a = Add (c2, r0)
      [relu2] r2 = Relu (a)
      [pool] p = GlobalAveragePool (r2)
      [flat] f = Flatten (p)
      [head] y = Gemm (f, w3, b3)
    }
"""

# Few steps; kills the process right after the named stage was saved.
_QUICK = """
import dataclasses, os, signal
import postquant.pipeline.learning as learning
from postquant.pipeline.checkpoint import Checkpoint
recipes = learning.recipe_for, learning.network_recipe
learning.recipe_for = lambda *arguments: dataclasses.replace(recipes[0](*arguments), iterations=20)
learning.network_recipe = lambda *arguments: dataclasses.replace(recipes[1](*arguments), iterations=20)
real = Checkpoint.save
def save(self, stage, **parts):
    real(self, stage, **parts)
    if stage == os.environ["KILL_AFTER"]:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = save
from postquant.pipeline.cli import main
main()
"""


@pytest.fixture
def torch_installed() -> None:
    """Without torch the test is skipped; with ``CI=true`` it fails."""
    if importlib.util.find_spec("torch") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("torch is not installed")
        pytest.skip("torch is not installed")


def _run(arguments: list[str], kill_after: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KILL_AFTER": kill_after}
    command = [sys.executable, "-c", _QUICK, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _bytes(folder: pathlib.Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("model.onnx", "plan.safetensors", "report.json")]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command for a small residual network, without the output folder."""
    folder = tmp_path_factory.mktemp("net")
    model = onnx.parser.parse_model(NETWORK)
    rng = np.random.default_rng(0)
    for value in model.graph.value_info:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape).astype(np.float32) * np.float32(0.3)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    onnx.save_model(model, folder / "net.onnx")
    np.savez(folder / "calib.npz", x=rng.standard_normal((32, 2, 5, 5)).astype(np.float32))
    options = ["--calib", str(folder / "calib.npz"), "--method", "minmax", "--wbits", "3", "--abits", "3"]
    return ["quantize", str(folder / "net.onnx"), *options, "--border", "off", "--learn", "--effort", "normal", "--out"]


@pytest.mark.usefixtures("torch_installed")
def test_learning_is_reported_and_a_killed_run_goes_on(command: list[str], tmp_path: pathlib.Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = _run([*command, str(whole)])
    assert done.returncode == 0, done.stderr
    stages = {stage.name: stage for stage in Report.load(whole / "report.json").stages}
    blocks = [name for name in stages if name.startswith("learn ")]
    assert len(blocks) == 4  # first layer, residual block, last layer, and all together
    assert blocks[-1] == "learn the whole network"
    assert stages["learning"].sqnr_db is not None
    assert "nothing in it has fewer than 8 bits" in stages[blocks[0]].detail
    assert "dB in 20 iterations" in stages[blocks[1]].detail
    assert _run([*command, str(killed)], "learn-1").returncode < 0
    again = _run([*command, str(killed)])
    assert again.returncode == 0, again.stderr
    assert "2 learned blocks are there already" in again.stderr
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
    result = CliRunner().invoke(app, [*command, str(tmp_path / "out"), "--device", "cuda"])
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
