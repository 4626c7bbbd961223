"""For every built-in target, the demo's trained network: onnxruntime computes what the plan says, on many images."""

from __future__ import annotations

import pathlib
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from postquant.passes.emit import emit
from postquant.passes.place import PlacementSettings, place
from postquant.passes.target import builtin_targets, load_target
from postquant.pipeline.demo import load_digits
from postquant.pipeline.prepare import prepare
from postquant.pipeline.verify import verify_model


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[ir.Model, list[dict[str, Any]]]:
    """The network as a run simplifies it, and images."""
    demo = load_digits()
    samples = [{"image": image[None]} for image in demo.calibration[:32]]
    model = ir.serde.deserialize_model(onnx.load_model_from_string(demo.model))
    folder = pathlib.Path(tmp_path_factory.mktemp("digits"))
    return prepare(model, samples[:1], opset=17, simplify=True, custom_ops=(), folder=folder).model, samples


@pytest.mark.parametrize("name", builtin_targets())
def test_integers(name: str, digits: tuple[ir.Model, list[dict[str, Any]]], cases: Any) -> None:
    model, samples = digits
    target = load_target(name)
    plan = cases.ranged(model, place(model, target, PlacementSettings()), samples)
    emitted = emit(model, plan, integer_clips=target.integer_clips)
    found = verify_model(model, emitted, plan, samples, integer_samples=len(samples), tensor_samples=1)
    assert found.outputs[0].sqnr_db > 10
