"""What a bundle holds: standard operators, digests of all files, settings that make it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx.reference import ReferenceEvaluator
from typer.testing import CliRunner

import postquant
from postquant.passes.plan import QuantPlan
from postquant.passes.standard import standard_model, without_borders
from postquant.pipeline.bundle.archive import write_archive
from postquant.pipeline.bundle.complete import complete_bundle
from postquant.pipeline.bundle.manifest import Manifest
from postquant.pipeline.bundle.settings_file import settings_toml
from postquant.pipeline.cli import app
from postquant.pipeline.config import Border, ImageConfig, Method, OverrideConfig
from postquant.pipeline.conformance.arrays import read_arrays
from postquant.pipeline.recover import recover_float_model
from postquant.pipeline.verify_folder import verify_folder
from postquant.runtime_ops.errors import OutputError, VerificationError


def test_the_model_in_standard_operators(made: pathlib.Path) -> None:
    packed, standard = onnx.load(made / "model.onnx"), onnx.load(made / "model.qdq.onnx")
    assert "ai.postquant" in {entry.domain for entry in packed.opset_import}
    assert {entry.domain for entry in standard.opset_import} == {""}
    assert not standard.functions
    assert {node.domain for node in standard.graph.node} == {""}
    onnx.checker.check_model(standard, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    feed: dict[str, Any] = read_arrays(made / "conformance" / "0" / "inputs.npz")
    one, two = (
        np.asarray(ort.InferenceSession(made / f"{name}.onnx", options).run(None, feed)[0])
        for name in ("model", "model.qdq")
    )
    np.testing.assert_array_equal(one, two)
    # onnx's own evaluator computes in float: sums may fall on the other side of a tie. It wants a newer opset.
    standard.opset_import[0].version = 21
    reference = np.asarray(ReferenceEvaluator(standard).run(None, feed)).squeeze(0)
    np.testing.assert_allclose(reference, one, atol=0.02 * np.abs(one).max())


def test_the_manifest_speaks_of_every_file(made: pathlib.Path) -> None:
    manifest = Manifest.load(made)
    files = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert set(manifest.files) == files - {"manifest.json", "run.json"}
    for name, entry in manifest.files.items():
        content = (made / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry.sha256, entry.bytes)
    assert manifest.models["model.qdq.onnx"].operators["Conv"] == 4
    assert manifest.models["model.onnx"].operators["ai.postquant::LutQLinearConv"] >= 1
    assert "scales per channel" in manifest.models["model.qdq.onnx"].features
    assert "asymmetric UINT8 activations" in manifest.models["model.qdq.onnx"].features
    report = json.loads((made / "report.json").read_bytes())
    assert manifest.calibration_sha256 == report["data_sha256"]
    assert manifest.notes == ()
    readme = (made / "README.md").read_text()
    for words in ("postquant verify", "postquant conformance", "model.qdq.onnx", "LutQLinearConv"):
        assert words in readme


def test_the_settings_make_it_again(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = postquant.QuantConfig.from_toml(str(made / "quant.toml"))
    again = postquant.quantize(made.parent / "net.onnx", made.parent / "calib.npz", config, out=tmp_path / "again")
    assert (again.folder / "manifest.json").read_bytes() == (made / "manifest.json").read_bytes()


def test_files_that_settings_name(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Target files, with those that they extend, and encodings: by name and digest, and they make the bundle again."""
    (tmp_path / "base.toml").write_text('extends = "onnxruntime"\nname = "base"\n')
    (tmp_path / "mine.toml").write_text('extends = "base.toml"\nname = "mine"\n')
    shutil.copyfile(made / "encodings" / "aimet-2.0.0.encodings", tmp_path / "vendor.encodings")
    config = postquant.QuantConfig(
        method=Method.MINMAX, target=str(tmp_path / "mine.toml"), encodings=str(tmp_path / "vendor.encodings")
    )
    data = made.parent / "calib.npz"
    out = postquant.quantize(made.parent / "net.onnx", data, config, out=tmp_path / "out").folder
    named = Manifest.load(out).setting_files
    assert [(file.setting, file.name) for file in named] == [
        ("target", "mine.toml"),
        ("target", "base.toml"),
        ("encodings", "vendor.encodings"),
    ]
    for file in named:
        assert file.sha256 == hashlib.sha256((tmp_path / file.name).read_bytes()).hexdigest()
        assert file.sha256 in (out / "report.html").read_text(encoding="utf-8")
    shutil.copyfile(out / "quant.toml", tmp_path / "quant.toml")
    config = postquant.QuantConfig.from_toml(str(tmp_path / "quant.toml"))
    again = postquant.quantize(made.parent / "net.onnx", data, config, out=tmp_path / "again").folder
    assert (again / "manifest.json").read_bytes() == (out / "manifest.json").read_bytes()


def test_what_a_run_reads_is_not_replaced(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """An older bundle's folders are removed: a vendor's file, settings, data or a key in them would be lost."""
    folder = shutil.copytree(made, tmp_path / "out")
    model, samples = str(made.parent / "net.onnx"), str(made.parent / "calib.npz")
    vendor = folder / "encodings" / "aimet-2.0.0.encodings"
    for options in (["--encodings", str(vendor)], ["--config", str(folder / "quant.toml")]):
        done = CliRunner().invoke(app, ["quantize", model, "--calib", samples, "--out", str(folder), *options])
        assert done.exit_code == 2, done.output
        assert "would replace a file that the run reads" in done.output
    inputs = folder / "conformance" / "0" / "inputs.npz"
    for data, key in ((inputs, None), (None, _key(folder / "conformance" / "key.pem"))):
        with pytest.raises(OutputError, match="would replace a file that the run reads"):
            complete_bundle(folder, conformance_inputs=data, sign_with=key)
    (folder / "conformance" / "key.pem").unlink()
    for name in ("model.onnx", "manifest.json"):
        with pytest.raises(OutputError, match="would replace a file of the bundle"):
            write_archive(folder, folder / name)
    assert all(check.passed for check in verify_folder(folder))


def _key(path: pathlib.Path) -> pathlib.Path:
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(*form))
    return path


def test_settings_of_every_kind(tmp_path: pathlib.Path) -> None:
    config = postquant.QuantConfig(
        image=ImageConfig(size=(2, 3), mean=(0.5,)),
        override=(OverrideConfig(node='a"\\b', wbits=4), OverrideConfig(op_type="Gemm", float=True)),
        equalize=False,
        samples=7,
        threads=3,
    )
    (tmp_path / "quant.toml").write_bytes(settings_toml(config.to_json()))
    assert postquant.QuantConfig.from_toml(str(tmp_path / "quant.toml"), threads=3) == config


def test_a_good_bundle_verifies(made: pathlib.Path) -> None:
    checks = verify_folder(made)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert {"files are those of the manifest", "signature", "model.qdq.onnx holds the plan", "conformance"} <= {
        check.name for check in checks
    }


def test_a_standard_model_of_another_plan(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Somebody who makes new digests is found out by the plan."""
    folder = shutil.copytree(made, tmp_path / "out")
    model = onnx.load(folder / "model.qdq.onnx")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "image_scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.5), "image_scale"))
    onnx.save_model(model, folder / "model.qdq.onnx")
    (folder / "manifest.json").unlink()
    (folder / "README.md").unlink()
    old = Manifest.load(made)
    content = (folder / "model.qdq.onnx").read_bytes()
    files = {
        **old.files,
        "model.qdq.onnx": type(old.files["README.md"])(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content)),
    }
    shutil.copyfile(made / "README.md", folder / "README.md")
    (folder / "manifest.json").write_bytes(dataclasses.replace(old, files=files).to_bytes())
    failed = [check.name for check in verify_folder(folder) if not check.passed]
    assert "model.qdq.onnx holds the plan" in failed


def test_completing_a_result(quantized: pathlib.Path) -> None:
    manifest = complete_bundle(quantized, licence="Apache-2.0", origin="a test")
    assert (manifest.licence, manifest.origin) == ("Apache-2.0", "a test")
    assert json.loads((quantized / "conformance" / "index.json").read_bytes())["source"] == "seeded random"
    assert all(check.passed for check in verify_folder(quantized))
    complete_bundle(quantized, conformance_inputs=quantized.parent / "calib.npz")
    assert Manifest.load(quantized).licence == "Apache-2.0", "what was said before stays"
    given = read_arrays(quantized / "conformance" / "0" / "inputs.npz")
    np.testing.assert_array_equal(given["image"], np.load(quantized.parent / "calib.npz")["image"][:1])
    assert all(check.passed for check in verify_folder(quantized))
    with open(quantized / "model.onnx", "ab") as file:
        file.write(b"\0")
    for inputs in (None, quantized.parent / "calib.npz"):
        with pytest.raises(VerificationError, match=r"files of the result have changed .*model\.onnx"):
            complete_bundle(quantized, conformance_inputs=inputs)


@pytest.fixture
def quantized(made: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A result without a bundle."""
    shutil.copyfile(made.parent / "calib.npz", tmp_path / "calib.npz")
    config = postquant.QuantConfig(method=Method.MINMAX, bundle=False)
    out = postquant.quantize(made.parent / "net.onnx", tmp_path / "calib.npz", config, out=tmp_path / "out").folder
    assert not (out / "manifest.json").exists()
    return out


def test_files_of_others_stay(quantized: pathlib.Path, made: pathlib.Path) -> None:
    (quantized / "README.md").write_text("mine")
    data = made.parent / "calib.npz"
    with pytest.raises(OutputError, match=r"would replace a file that is not of an older bundle .*README\.md"):
        complete_bundle(quantized)
    with pytest.raises(OutputError, match=r"README\.md.*--no-bundle"):
        postquant.quantize(made.parent / "net.onnx", data, postquant.QuantConfig(method=Method.MINMAX), out=quantized)
    assert (quantized / "README.md").read_text() == "mine"
    without = postquant.QuantConfig(method=Method.MINMAX, bundle=False)
    postquant.quantize(made.parent / "net.onnx", data, without, out=quantized)
    assert (quantized / "README.md").read_text() == "mine"


def test_an_old_bundle_goes(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = shutil.copytree(made, tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    config = postquant.QuantConfig(method=Method.MINMAX, bundle=False)
    postquant.quantize(made.parent / "net.onnx", made.parent / "calib.npz", config, out=folder)
    left = {path.name for path in folder.iterdir()}
    assert not left & {"manifest.json", "README.md", "encodings", "conformance", "model.qdq.onnx", "quant.toml"}
    assert {"model.onnx", "notes.txt"} <= left
    assert all(check.passed for check in verify_folder(folder))


def test_saving_elsewhere(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = postquant.QuantConfig.from_toml(str(made / "quant.toml"))
    data = made.parent / "calib.npz"
    result = postquant.quantize(made.parent / "net.onnx", data, config, out=tmp_path / "one")
    result.save(tmp_path / "two")
    assert all(check.passed for check in verify_folder(tmp_path / "two"))


def test_rounding_borders_become_rounding_to_nearest(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = postquant.QuantConfig(method=Method.MINMAX, wbits=8, abits=4, border=Border.ON, first_last_bits=8)
    data = made.parent / "calib.npz"
    out = postquant.quantize(made.parent / "net.onnx", data, config, out=tmp_path / "out").folder
    plan = QuantPlan.load(out / "plan.safetensors")
    bordered = [key for key, entry in plan.requants.items() if getattr(entry, "border", None) is not None]
    assert bordered
    assert not [k for k, entry in without_borders(plan).requants.items() if getattr(entry, "border", None) is not None]
    manifest = Manifest.load(out)
    assert len(manifest.notes) == len(bordered)
    assert "model.qdq.onnx differs from model.onnx" in manifest.notes[0]
    assert "ai.postquant::BorderQuantize" in manifest.models["model.onnx"].operators
    assert not [op for op in manifest.models["model.qdq.onnx"].operators if "::" in op]
    assert all(check.passed for check in verify_folder(out))


def test_other_operators_become_their_bodies(cases: Any) -> None:
    case = cases.build()
    standard = standard_model(case.emitted)
    assert standard.changes == ()
    assert len(standard.model.graph) == len(case.emitted.graph)
    assert standard.model is not case.emitted


def test_large_weights_are_decoded_in_parts(cnn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part by part or at once: the same bits, for scales along the first axis and along the last one."""
    whole = recover_float_model(cnn.emitted, cnn.plan).graph.initializers
    monkeypatch.setattr("postquant.pipeline.recover._PART", 20)
    parts = recover_float_model(cnn.emitted, cnn.plan).graph.initializers
    names = [name for name in cnn.plan.weights if whole[name].const_value is not None]
    assert len(names) == 5
    for name in names:
        one, two = (table[name].const_value for table in (whole, parts))
        assert one is not None
        assert two is not None
        np.testing.assert_array_equal(one.numpy(), two.numpy())
