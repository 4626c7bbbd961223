"""Killed at any point, the same command goes on, and the result has the bytes of an uninterrupted run."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import types

import pytest

from postquant.pipeline.output import WORK_DIRECTORY

# The manifest holds the digests of everything else that is handed over.
FILES = ("model.onnx", "plan.safetensors", "report.json", "report.html", "statistics.json", "manifest.json")
OTHERS = ("model.qdq.onnx", "quant.toml", "README.md", "encodings", "conformance", "run.json")
STAGES = ("place", "weights", "activations")

# The command with quick stages; {extra} is run before it.
_COMMAND = """
import os, signal, sys
import postquant.pipeline.api as api
sys.path.insert(0, {folder!r})
import small_pipeline
api.run_pipeline = small_pipeline.run_pipeline
{extra}
from postquant.pipeline.cli import main
main()
"""

_KILL_BEFORE_MOVE = """
import postquant.pipeline.output as output
real, count = os.replace, [0]
def replace(*arguments):
    if arguments[0].parent.name == "result":
        count[0] += 1
        if count[0] == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)
output.os = __import__("types").SimpleNamespace(**{{**vars(os), "replace": replace}})
"""


def _run(
    arguments: list[str], *, extra: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    code = _COMMAND.format(folder=str(pathlib.Path(__file__).parent), extra=extra)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def _bytes(folder: pathlib.Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


@pytest.fixture
def arguments(network: pathlib.Path, samples: pathlib.Path) -> list[str]:
    return ["quantize", str(network), "--calib", str(samples), "--out"]


@pytest.fixture
def expected(arguments: list[str], tmp_path: pathlib.Path) -> list[bytes]:
    whole = _run([*arguments, str(tmp_path / "whole")])
    assert whole.returncode == 0, whole.stderr
    return _bytes(tmp_path / "whole")


def test_killed_after_every_stage(arguments: list[str], expected: list[bytes], tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    for number, stage in enumerate(STAGES):
        killed = _run([*arguments, str(out)], environment={"KILL_AFTER": stage})
        assert killed.returncode == -signal.SIGKILL
        assert ("resuming" in killed.stderr) == (number > 0)
        assert not (out / "report.json").exists()
    again = _run([*arguments, str(out)])
    assert again.returncode == 0, again.stderr
    assert "resuming after 3 finished stages" in again.stderr
    assert _bytes(out) == expected
    assert sorted(p.name for p in out.iterdir()) == sorted((*FILES, *OTHERS))


@pytest.mark.parametrize("number", [1, 2, 6, 11])
def test_killed_while_publishing(
    number: int, arguments: list[str], expected: list[bytes], tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    killed = _run([*arguments, str(out)], extra=_KILL_BEFORE_MOVE.format(number=number))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "report.json").exists()
    again = _run([*arguments, str(out)])
    assert again.returncode == 0, again.stderr
    assert _bytes(out) == expected


def test_changed_settings_start_again(arguments: list[str], expected: list[bytes], tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    _run([*arguments, str(out), "--wbits", "4"], environment={"KILL_AFTER": "weights"})
    other = _run([*arguments, str(out), "--threads", "1"])
    assert "settings have changed: starting from the beginning" in other.stderr
    assert _bytes(out) == expected


def test_changed_model_or_data_start_again(
    arguments: list[str],
    expected: list[bytes],
    tmp_path: pathlib.Path,
    network: pathlib.Path,
    samples: pathlib.Path,
    small_pipeline: types.ModuleType,
) -> None:
    out = tmp_path / "out"
    for write, path in ((small_pipeline.write_network, network), (small_pipeline.write_samples, samples)):
        original = path.read_bytes()
        write(path, seed=9)
        _run([*arguments, str(out)], environment={"KILL_AFTER": "activations"})
        assert (out / WORK_DIRECTORY / "activations.done").exists()
        path.write_bytes(original)
        assert "have changed" in _run([*arguments, str(out)]).stderr
        assert _bytes(out) == expected


def test_the_number_of_threads_may_change(arguments: list[str], expected: list[bytes], tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    _run([*arguments, str(out), "--threads", "2"], environment={"KILL_AFTER": "weights"})
    again = _run([*arguments, str(out), "--threads", "1"])
    assert "resuming after 2 finished stages" in again.stderr
    assert _bytes(out) == expected
