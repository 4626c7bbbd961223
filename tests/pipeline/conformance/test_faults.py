"""Receivers that break one rule are found out: the first layer that departs, and the rule."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from postquant.passes.place import PlacementSettings, place
from postquant.passes.target import load_target
from postquant.pipeline.conformance.compare import compare_outputs
from postquant.pipeline.conformance.rules import Rule
from postquant.pipeline.load import load_model
from postquant.pipeline.prepare import prepare

FAULTS = ("HALF_AWAY", "TRUNCATION", "FIXED_POINT", "SATURATION", "PER_TENSOR", "PADDING", "FUSED_SUM")


def _run(bundle: Any, receivers: Any, fault: str | None, folder: pathlib.Path) -> Any:
    kind = None if fault is None else receivers.Fault[fault]
    receivers.dump(bundle.folder / "model.qdq.onnx", kind, bundle.samples, bundle.codes, folder)
    return compare_outputs(bundle.folder, folder)


@pytest.mark.parametrize("kind", ["cnn_bundle", "tie_bundle"])
def test_a_good_receiver_conforms(
    kind: str, receivers: Any, request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> None:
    result = _run(request.getfixturevalue(kind), receivers, None, tmp_path)
    assert result.passed, result.summary
    assert all(tensor.mismatches == tensor.ties == 0 for tensor in result.tensors)
    assert result.rule is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, tie_bundle: Any, receivers: Any, tmp_path: pathlib.Path) -> None:
    result = _run(tie_bundle, receivers, fault, tmp_path)
    assert not result.passed
    assert result.rule is Rule[fault], result.summary
    assert result.first.fits[0].explained > 0.99
    where = {"TRUNCATION": "image_quantized", "FUSED_SUM": "sum_quantized"}.get(fault, "r1_quantized")
    assert result.first.tensor.codes == where
    if fault == "PADDING":  # of the layers with padding, those whose zero point is the code 0 are right
        assert {t.tensor.node for t in result.tensors if t.failed} <= {"conv1", "reduce"}


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "HALF_AWAY"])
def test_other_scales(fault: str, cnn_bundle: Any, receivers: Any, tmp_path: pathlib.Path) -> None:
    assert _run(cnn_bundle, receivers, fault, tmp_path).rule is Rule[fault]


def test_without_ties_half_away_is_right(cnn_bundle: Any, receivers: Any, tmp_path: pathlib.Path) -> None:
    result = _run(cnn_bundle, receivers, "HALF_AWAY", tmp_path)
    assert result.passed, result.summary


def test_one_wrong_layer_is_blamed_alone(cnn_bundle: Any, receivers: Any, tmp_path: pathlib.Path) -> None:
    """The wrong tensor is the last one: those behind it would have read it."""
    last = cnn_bundle.codes[-1]
    receivers.dump(cnn_bundle.folder / "model.qdq.onnx", None, cnn_bundle.samples, cnn_bundle.codes, tmp_path)
    for sample in ("0", "1"):
        file = tmp_path / sample / f"{last}.npy"
        codes = np.load(file)
        np.save(file, np.where(codes > np.median(codes), codes - 3, codes).astype(codes.dtype))
    result = compare_outputs(cnn_bundle.folder, tmp_path)
    assert [t.tensor.codes for t in result.tensors if t.failed] == [last]
    first = result.first
    assert first is not None
    assert first.worst == 3
    assert first.fits == ()
    assert "no rule that was tried explains it" in result.summary


def test_a_float_bias_that_is_not_rounded(cases: Any, make_bundle: Any, receivers: Any, tmp_path: pathlib.Path) -> None:
    """For targets with float biases the expected codes are those of rounded ones, and a receiver may add floats."""
    model = cases.float_model(cases.cnn)
    shape = (1, 3, 16, 16)
    samples = [{"image": (3 * np.random.default_rng(i).normal(size=shape)).astype(np.float32)} for i in range(2)]
    plan = cases.ranged(model, place(model, load_target("tensorrt"), PlacementSettings()), samples)
    bundle = make_bundle(tmp_path, model, plan, samples)
    assert _run(bundle, receivers, None, tmp_path / "good").passed
    result = _run(bundle, receivers, "FLOAT_BIAS", tmp_path / "float")
    assert result.rule is Rule.FLOAT_BIAS, result.summary
    assert result.first.fits[0].explained > 0.99


# Whole networks on small images: the layers are those of the real size.
REAL = {"cifar10/resnet20.onnx": 32, "imagenet/mobilenetv2_1.0.onnx": 64}


@pytest.mark.parametrize("name", REAL)
def test_real_networks(
    name: str,
    shared_data: pathlib.Path,
    cases: Any,
    make_bundle: Any,
    with_powers: Any,
    receivers: Any,
    tmp_path: pathlib.Path,
) -> None:
    model = load_model(shared_data / name, check=False)
    (value,) = model.graph.inputs
    size = REAL[name]
    value.shape = ir.Shape([None, 3, None, None]) if size != 32 else value.shape
    samples = [{value.name or "": np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)}]
    prepared = prepare(model, samples, opset=17, simplify=True, custom_ops=(), folder=tmp_path).model
    plan = cases.ranged(prepared, place(prepared, load_target("onnxruntime"), PlacementSettings()), samples)
    (tmp_path / "plain").mkdir()
    (tmp_path / "powers").mkdir()
    plain = make_bundle(tmp_path / "plain", prepared, plan, samples)
    powers = make_bundle(tmp_path / "powers", prepared, with_powers(plan), samples)
    assert _run(plain, receivers, None, tmp_path / "good").passed
    for fault in FAULTS:
        result = _run(powers if fault == "HALF_AWAY" else plain, receivers, fault, tmp_path / fault)
        assert result.rule is Rule[fault], f"{fault}: {result.summary}"
