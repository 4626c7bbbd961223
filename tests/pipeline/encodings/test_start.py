"""``postquant quantize --encodings``: the whole way from a vendor's file to a verified model."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from postquant.pipeline.api import quantize
from postquant.pipeline.cli import app
from postquant.pipeline.config import Method, QuantConfig
from postquant.pipeline.encodings.formats import write_encodings
from postquant.pipeline.fingerprint import fingerprint
from postquant.runtime_ops.errors import ConfigError
from postquant.runtime_ops.quantizer import TensorQuantizer


@pytest.fixture(scope="module")
def handed_over(
    tmp_path_factory: pytest.TempPathFactory, asymmetric: tuple[Any, Any], target: Any
) -> tuple[pathlib.Path, pathlib.Path]:
    """A folder of encodings, and calibration data."""
    folder = tmp_path_factory.mktemp("encodings")
    write_encodings(folder, *asymmetric, target)
    data = folder / "calib.npz"
    np.savez(data, image=np.random.default_rng(0).normal(size=(6, 3, 16, 16)).astype(np.float32))
    return folder, data


@pytest.mark.parametrize("method", [Method.MINMAX, Method.EASYQUANT])
def test_named_numbers_survive_every_stage(
    method: Method, handed_over: tuple[pathlib.Path, pathlib.Path], asymmetric: tuple[Any, Any], tmp_path: pathlib.Path
) -> None:
    folder, data = handed_over
    content = json.loads((folder / "aimet-2.0.0.encodings").read_text())
    left_to_us = {"sum", "w3", "m1"}  # m1 shares the numbers of sum
    content["encodings"] = [entry for entry in content["encodings"] if entry["name"] not in left_to_us]
    content["encodings"].append({"name": "elsewhere", "output_dtype": "uint8", "y_scale": 0.5})
    vendor = tmp_path / "vendor.encodings"
    vendor.write_text(json.dumps(content))
    config = QuantConfig(method=method, encodings=str(vendor), rounds=1, candidates=10, bundle=False)
    result = quantize(folder / "model.float.onnx", data, config, out=tmp_path / "out")
    model, plan = asymmetric
    for name, entry in {**plan.activations, **plan.weights}.items():
        found = {**result.plan.activations, **result.plan.weights}[name]
        assert isinstance(found, TensorQuantizer)
        if name in left_to_us:
            assert name == "w3" or found.scale != entry.scale  # the search may end where the file's weights came from
            continue
        np.testing.assert_array_equal(found.scale, entry.scale)
        np.testing.assert_array_equal(found.zero_point, entry.zero_point)
        if name in plan.weights:
            float_weight = model.graph.initializers[name].const_value.numpy()
            np.testing.assert_array_equal(found.quantize(float_weight), entry.quantize(float_weight))
            assert found.codes is None
    notes = "\n".join(result.report.notes)
    assert "AIMET encodings 2.0.0: the numbers of" in notes
    assert re.search("not applied to elsewhere: the simplified model has no tensor of this name", notes)
    assert result.report.settings["encodings"] == "vendor.encodings"
    assert result.report.passed


def test_the_command_takes_a_tensorrt_cache(
    handed_over: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    folder, data = handed_over
    out = tmp_path / "out"
    command = [
        "quantize",
        folder / "model.float.onnx",
        "--calib",
        data,
        "--out",
        out,
        "--method",
        "minmax",
        "--quiet",
        "--no-bundle",
    ]
    done = CliRunner().invoke(app, [str(word) for word in [*command, "--encodings", folder / "tensorrt.cache"]])
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    (line,) = [note for note in report["notes"] if "TensorRT calibration cache: the numbers of" in note]
    assert "12 tensors" in line
    (stage,) = [stage for stage in report["stages"] if stage["name"] == "encodings"]
    assert stage["kept"]


def test_a_missing_file_is_a_mistake_of_the_user(
    handed_over: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    folder, data = handed_over
    out = tmp_path / "out"
    command = ["quantize", folder / "model.float.onnx", "--calib", data, "--out", out, "--encodings", tmp_path / "no"]
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 2
    assert "the encodings cannot be read" in done.output
    assert not out.exists()


@pytest.mark.parametrize("setting", [{"smooth": True}, {"equalize": True}, {"cross_layer": True}, {"border": "on"}])
def test_what_changes_the_tensors_does_not_go_with_encodings(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="do not go with a vendor's numbers"):
        QuantConfig(encodings="a.encodings", **setting)


def test_a_resumed_run_wants_the_same_encodings(tmp_path: pathlib.Path, target: Any) -> None:
    path = tmp_path / "ncnn.table"
    keys = set()
    for content in ("conv1 2\n", "conv1 3\n"):
        path.write_text(content)
        keys.add(fingerprint("m", "d", QuantConfig(encodings=str(path)), target))
    assert len(keys) == 2


def test_files_in_a_configuration_are_relative_to_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "quant.toml").write_text('encodings = "a.table"\n')
    assert QuantConfig.from_toml(tmp_path / "quant.toml").encodings == str(tmp_path / "a.table")
