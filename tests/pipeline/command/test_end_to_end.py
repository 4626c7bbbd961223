"""The command with the real stages: files, verification, the same bytes whatever happens on the way."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

import postquant
from postquant.pipeline.cli import app
from postquant.pipeline.demo import load_digits

# The manifest holds the digests of everything else that is handed over.
FILES = ("model.onnx", "plan.safetensors", "report.json", "report.html", "statistics.json", "manifest.json")
OTHERS = ("model.qdq.onnx", "quant.toml", "README.md", "encodings", "conformance", "run.json")

# Kills the process right after the given number of stages was saved.
_KILL_AFTER = """
import os, signal, sys
from postquant.pipeline.checkpoint import Checkpoint
real, count = Checkpoint.save, [0]
def save(*arguments, **parts):
    real(*arguments, **parts)
    count[0] += 1
    if count[0] == int(os.environ["KILL_AFTER"]):
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = save
from postquant.pipeline.cli import main
main()
"""


def _run(arguments: list[str], kill_after: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KILL_AFTER": str(kill_after)}
    command = [sys.executable, "-c", _KILL_AFTER, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _bytes(folder: pathlib.Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command for the demo's network and a few of its scans, without the output folder."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    model = folder / "digits.onnx"
    model.write_bytes(data.model)
    np.savez(folder / "calib.npz", image=data.calibration[:32])
    return ["quantize", str(model), "--calib", str(folder / "calib.npz"), "--wbits", "6", "--out"]


@pytest.fixture(scope="module")
def whole(digits: list[str], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The result of an uninterrupted run with one thread."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = _run([*digits, str(out), "--threads", "1"])
    assert done.returncode == 0, done.stderr
    for words in ("SQNR", "layers quantized", "size ", "peak memory"):
        assert words in done.stdout
    return out


def test_the_result_is_sound(whole: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sorted(path.name for path in whole.iterdir()) == sorted((*FILES, *OTHERS))
    report = postquant.Report.load(whole / "report.json")
    assert report.passed
    assert report.checks
    assert report.layers
    assert report.outputs[0].sqnr_db > 15
    assert {layer.wbits for layer in report.layers} == {6, 8}  # the first and the last keep 8
    ort.InferenceSession(whole / "model.onnx")
    assert capfd.readouterr() == ("", ""), "onnxruntime has nothing to warn of"


def test_verify_inspect_and_compare_take_it(whole: pathlib.Path, digits: list[str]) -> None:
    runner = CliRunner()
    model, data = digits[1], digits[3]
    for arguments in (
        ["verify", str(whole)],
        ["verify", str(whole), "--data", data],
        ["inspect", str(whole)],
        ["compare", model, str(whole / "model.onnx"), "--data", data],
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output


def test_two_threads_give_the_same_bytes(whole: pathlib.Path, digits: list[str], tmp_path: pathlib.Path) -> None:
    done = _run([*digits, str(tmp_path / "out"), "--threads", "2"])
    assert done.returncode == 0, done.stderr
    assert _bytes(tmp_path / "out") == _bytes(whole)


def test_killed_after_every_stage(whole: pathlib.Path, digits: list[str], tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    for stages in range(30):
        run = _run([*digits, str(out)], kill_after=1)  # one more stage each time
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert ("resuming" in run.stderr) == (stages > 0)
        assert not (out / "report.json").exists()
    else:
        pytest.fail("the run does not end")
    assert stages >= 2, "a long run must be resumable in the middle"
    assert _bytes(out) == _bytes(whole)


@pytest.mark.parametrize("method", ["minmax", "mse", "entropy", "percentile"])
def test_every_method(method: str, digits: list[str], tmp_path: pathlib.Path) -> None:
    result = CliRunner().invoke(app, [*digits, str(tmp_path / "out"), "--method", method, "--quiet"])
    assert result.exit_code == 0, result.output
    assert postquant.Report.load(tmp_path / "out" / "report.json").settings["method"] == method


def test_the_drop_in(digits: list[str], tmp_path: pathlib.Path) -> None:
    data = dict(np.load(digits[3]))
    (name,) = data
    feeds = iter([{name: data[name][i : i + 1]} for i in range(16)])

    class Reader:
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feeds, None)

    postquant.quantize_static(digits[1], tmp_path / "q.onnx", Reader(), per_channel=True)
    session = ort.InferenceSession(tmp_path / "q.onnx")
    wanted = ort.InferenceSession(digits[1]).run(None, data)[0]
    got = session.run(None, data)[0]
    assert (got.argmax(1) == wanted.argmax(1)).mean() > 0.9


def test_a_network_that_returns_labels_only(digits: list[str], tmp_path: pathlib.Path) -> None:
    model = onnx.load(digits[1])
    (logits,) = model.graph.output
    model.graph.node.append(onnx.helper.make_node("ArgMax", [logits.name], ["label"], axis=1, name="argmax"))
    label = onnx.helper.make_tensor_value_info("label", onnx.TensorProto.INT64, ["N", 1])
    model.graph.output.remove(logits)
    model.graph.output.append(label)
    onnx.save(model, tmp_path / "labels.onnx")
    arguments = ["quantize", str(tmp_path / "labels.onnx"), *digits[2:-1], "--samples", "8", "--out"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, result.output
    images = {model.graph.input[0].name: load_digits().test[:200]}
    wanted, got = (
        ort.InferenceSession(file).run(None, images)[0]
        for file in (tmp_path / "labels.onnx", tmp_path / "out" / "model.onnx")
    )
    assert (wanted == got).mean() > 0.95
