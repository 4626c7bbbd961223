"""A result folder is checked with nothing but what is in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import postquant
from postquant.passes.plan import QuantPlan
from postquant.pipeline.cli import app
from postquant.pipeline.recover import recover_float_model
from postquant.pipeline.report import CheckReport, InputReport
from postquant.pipeline.verify import verify_model
from postquant.pipeline.verify_folder import random_samples, verify_folder
from postquant.runtime_ops.errors import CalibrationError, ModelError, VerificationError
from postquant.runtime_ops.quantizer import TensorQuantizer


@pytest.fixture
def result(quick_stages: None, network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    config = postquant.QuantConfig(wbits=4, abits=4, first_last_bits=None, bundle=False)
    return postquant.quantize(network, samples, config, out=tmp_path / "out").folder


def _failed(checks: tuple[CheckReport, ...]) -> list[CheckReport]:
    return [check for check in checks if not check.passed]


def _rewrite(folder: pathlib.Path, change: Any) -> None:
    """Changes the model and makes the report agree with it, as somebody who hides a change would."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save_model(model, path)
    report = json.loads((folder / "report.json").read_bytes())
    report["files"]["model.onnx"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "report.json").write_text(json.dumps(report))


def test_a_good_folder_passes(result: pathlib.Path, samples: pathlib.Path) -> None:
    for data in (None, samples):
        checks = verify_folder(result, data)
        assert _failed(checks) == []
        assert len(checks) > 5
    assert _failed(verify_folder(shutil.copytree(result, result.parent / "moved"))) == []


def test_changed_and_missing_files(result: pathlib.Path) -> None:
    with open(result / "model.onnx", "ab") as file:
        file.write(b"\0")
    (check,) = verify_folder(result)
    assert not check.passed
    assert check.detail == "model.onnx is not the file that the report is about"
    (result / "plan.safetensors").unlink()
    assert "plan.safetensors: No such file or directory" in verify_folder(result)[0].detail
    (result / "report.json").unlink()
    with pytest.raises(ModelError, match=r"there is no result to verify .*give the --out"):
        verify_folder(result)


def test_chosen_codes_are_held_to_the_plan(result: pathlib.Path) -> None:
    plan = QuantPlan.load(result / "plan.safetensors")
    quantizer = plan.weights["w1"]
    assert isinstance(quantizer, TensorQuantizer)
    model = onnx.load(result / "model.onnx")
    (tensor,) = [t for t in model.graph.initializer if t.name == "w1_quantized"]
    codes = onnx.numpy_helper.to_array(tensor)
    chosen = dataclasses.replace(quantizer, codes=codes)
    recovered = recover_float_model(ir.load(result / "model.onnx"), plan)
    samples = list(random_samples(postquant.Report.load(result / "report.json").inputs, 0))
    right = plan.with_weight("w1", chosen)
    assert verify_model(recovered, result / "model.onnx", right, samples, strict=False).passed
    changed = codes.copy()
    changed.flat[5] += 1 if changed.flat[5] < 7 else -1
    wrong = plan.with_weight("w1", dataclasses.replace(quantizer, codes=changed))
    assert not verify_model(recovered, result / "model.onnx", wrong, samples, strict=False).passed


def test_a_wrong_scale_is_found(result: pathlib.Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        (tensor,) = [t for t in model.graph.initializer if t.name == "x_scale"]
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), "x_scale"))

    _rewrite(result, change)
    failed = _failed(verify_folder(result))
    assert "the file holds the plan" in {check.name for check in failed}


def test_the_plan_of_another_model(result: pathlib.Path) -> None:
    plan = QuantPlan.load(result / "plan.safetensors")
    with pytest.raises(VerificationError, match="the plan does not know a quantized tensor"):
        recover_float_model(ir.load(result / "model.onnx"), QuantPlan(plan.target))


def test_the_recovered_model_is_the_simplified_one(result: pathlib.Path, network: pathlib.Path) -> None:
    emitted = ir.load(result / "model.onnx")
    plan = QuantPlan.load(result / "plan.safetensors")
    recovered = recover_float_model(emitted, plan)
    assert [n.op_type for n in recovered.graph] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm", "Softmax"]
    assert "QuantizeLinear" in {n.op_type for n in emitted.graph}
    onnx.checker.check_model(ir.to_proto(recovered), full_check=True)
    original = ir.load(network)
    for name in ("w1", "w2", "b1", "b2"):
        tensor, wanted = recovered.graph.initializers[name].const_value, original.graph.initializers[name].const_value
        assert tensor is not None
        assert wanted is not None
        assert tensor.shape == wanted.shape
        entry = plan.weights.get(name)
        if isinstance(entry, TensorQuantizer):
            np.testing.assert_array_equal(entry.quantize(tensor.numpy()), entry.quantize(wanted.numpy()))


def test_data_that_do_not_fit(result: pathlib.Path, tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "z.npz", z=np.zeros((2, 2, 4, 4), np.float32))
    with pytest.raises(CalibrationError):
        verify_folder(result, tmp_path / "z.npz")


def test_random_samples_are_seeded_and_in_range() -> None:
    inputs = (
        InputReport(name="x", dtype="float32", shape=(None, 3), low=-1.0, high=2.0, sample_shape=(50, 3)),
        InputReport(name="ids", dtype="int64", shape=(None,), low=3.0, high=7.0, sample_shape=(40,)),
    )
    one, two = (list(random_samples(inputs, 5)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])
        assert a["x"].dtype == np.float32
        assert a["ids"].dtype == np.int64
        assert a["x"].min() >= -1
        assert a["x"].max() <= 2
        assert set(np.unique(a["ids"])) == {3, 4, 5, 6, 7}
    with pytest.raises(ModelError, match="no range of an input"):
        list(random_samples((InputReport(name="x", dtype="float32", shape=(1,)),), 0))


def test_the_command(result: pathlib.Path, samples: pathlib.Path, network: pathlib.Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["verify", str(result)])
    assert good.exit_code == 0, good.output
    assert "ok     files are those of the report: model.onnx, plan.safetensors" in good.stdout
    assert json.loads(runner.invoke(app, ["verify", str(result), "--data", str(samples), "--json"]).stdout)["passed"]
    compared = runner.invoke(
        app, ["compare", str(network), str(result / "model.onnx"), "--data", str(samples), "--quiet"]
    )
    assert compared.exit_code == 0, compared.output
    assert "SQNR" in compared.stdout
    for place in (result, result / "model.onnx", network, result / "plan.safetensors"):
        inspected = runner.invoke(app, ["inspect", str(place)])
        assert inspected.exit_code == 0, inspected.output
        assert json.loads(runner.invoke(app, ["inspect", str(place), "--json"]).stdout)
    with open(result / "model.onnx", "ab") as file:
        file.write(b"\0")
    bad = runner.invoke(app, ["verify", str(result)])
    assert bad.exit_code == 3
    assert "FAILED files are those of the report" in bad.stdout
    assert bad.stderr.splitlines()[-1].startswith("error: the verification failed")
    for arguments in (["verify", "absent"], ["inspect", "absent"], ["compare", "a", "b", "--data", "c"]):
        missing = runner.invoke(app, arguments)
        assert missing.exit_code == 2, missing.output
        assert missing.stderr.splitlines()[-1].startswith("error: ")
