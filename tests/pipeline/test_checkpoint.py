"""Finished stages come back as they were; anything else never."""

from __future__ import annotations

import contextlib
import pathlib

import numpy as np
import onnx
import pytest

from postquant.passes.plan import QuantPlan
from postquant.pipeline.checkpoint import Checkpoint, NullCheckpoint
from postquant.pipeline.load import load_model
from postquant.pipeline.output import WORK_DIRECTORY
from postquant.runtime_ops.errors import OutputError
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

MODEL = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 2] x) => (float[N, 2] y) <float[2] w = {1.0, 2.0}> { [add] y = Add (x, w) }
"""


class Stopped(Exception):  # noqa: N818, an interruption is no error
    """Ends a run."""


def _plan() -> QuantPlan:
    spec = QuantSpec(8, signed=False, symmetric=False)
    return QuantPlan("onnxruntime", activations={"x": TensorQuantizer.from_range(spec, -1.0, 2.0), "y": spec})


def _stopped_run(out: pathlib.Path, key: str = "key") -> None:
    with contextlib.suppress(Stopped), Checkpoint(out, key, lambda line: None) as checkpoint:
        onnx.save_model(onnx.parser.parse_model(MODEL), out / "net.onnx")
        checkpoint.save(
            "one",
            plan=_plan(),
            model=load_model(out / "net.onnx"),
            data={"b": [1, 2], "a": None},
            arrays={"z": np.arange(6).reshape(2, 3).T, "a": np.array(3, np.float32)},
        )
        checkpoint.save("two", data=7)
        raise Stopped


def test_a_stage_comes_back_whole(tmp_path: pathlib.Path) -> None:
    _stopped_run(tmp_path)
    lines: list[str] = []
    with Checkpoint(tmp_path, "key", lines.append) as checkpoint:
        saved = checkpoint.load("one")
        assert saved is not None
        assert saved.parts == {"plan", "model", "data", "arrays"}
        plan, expected = saved.plan(), _plan()
        assert plan.activations["y"] == expected.activations["y"]
        quantizer = plan.activation_quantizer("x")
        assert quantizer is not None
        assert quantizer.scale == expected.activation_quantizer("x").scale  # type: ignore[union-attr]
        assert [node.name for node in saved.model().graph] == ["add"]
        assert saved.data() == {"a": None, "b": [1, 2]}
        arrays = saved.arrays()
        np.testing.assert_array_equal(arrays["z"], np.arange(6).reshape(2, 3).T)
        assert arrays["a"].shape == ()
        assert checkpoint.load("two") is not None
        assert checkpoint.load("three") is None
    assert lines == ["resuming after 2 finished stages"]
    assert not (tmp_path / WORK_DIRECTORY).exists()


def test_stages_of_another_run_are_thrown_away_with_a_word(tmp_path: pathlib.Path) -> None:
    _stopped_run(tmp_path, "old")
    lines: list[str] = []
    with Checkpoint(tmp_path, "new", lines.append) as checkpoint:
        assert checkpoint.load("one") is None
        assert sorted(p.name for p in (tmp_path / WORK_DIRECTORY).iterdir()) == ["fingerprint", "lock"]
    assert lines == ["the model, the data or the settings have changed: starting from the beginning"]


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(Stopped), Checkpoint(tmp_path, "key", lambda line: None):
        raise Stopped
    assert list(tmp_path.iterdir()) == []


def test_half_written_files_are_never_read(tmp_path: pathlib.Path) -> None:
    _stopped_run(tmp_path)
    work = tmp_path / WORK_DIRECTORY
    (work / ".one.json.abc").write_text("half")
    (work / "result").mkdir()
    (work / "result" / "model.onnx").write_text("half")
    (work / "three.json").write_text("{}")  # a part without its marker
    (work / "two.json").write_text("")  # shorter than the marker says
    lines: list[str] = []
    with Checkpoint(tmp_path, "key", lines.append) as checkpoint:
        assert checkpoint.load("three") is None
        assert checkpoint.load("two") is None
        assert checkpoint.load("one") is not None
        assert not (work / ".one.json.abc").exists()
        assert list(checkpoint.staging().iterdir()) == []
        checkpoint.save("two", data=8)
        saved = checkpoint.load("two")
        assert saved is not None
        assert saved.data() == 8
    assert lines[1] == "the saved stage 'two' is damaged and is done again"


def test_saving_again_replaces(tmp_path: pathlib.Path) -> None:
    with Checkpoint(tmp_path, "key", lambda line: None) as checkpoint:
        checkpoint.save("one", data=1, arrays={"a": np.zeros(3)})
        checkpoint.save("one", data=2)
        saved = checkpoint.load("one")
        assert saved is not None
        assert saved.data() == 2
        assert saved.parts == {"data"}


def test_two_runs_into_one_folder(tmp_path: pathlib.Path) -> None:
    with (
        Checkpoint(tmp_path, "key", lambda line: None),
        pytest.raises(OutputError, match="another run is writing"),
        Checkpoint(tmp_path, "key", lambda line: None),
    ):
        pass


def test_the_null_checkpoint_keeps_nothing() -> None:
    checkpoint = NullCheckpoint()
    checkpoint.save("one", data=1)
    assert checkpoint.load("one") is None
