"""Verification of a real network: every kind of its kernels, at a cost that everybody can pay."""

from __future__ import annotations

import importlib.util
import pathlib
import time
from typing import Any

import pytest

from postquant.passes.emit import emit
from postquant.passes.normalize import normalize
from postquant.passes.place import PlacementSettings, place
from postquant.passes.target import load_target
from postquant.pipeline.load import load_model
from postquant.pipeline.verify import verify_model


def batches(folder: pathlib.Path, name: str, count: int) -> list[Any]:
    spec = importlib.util.spec_from_file_location("shared_eval", folder / "eval.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stream = iter(module.batches(name, "calib", batch=1))
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("bits", [8, 4])
def test_mobilenet(shared_data: pathlib.Path, cases: Any, bits: int) -> None:
    model = normalize(load_model(shared_data / "imagenet" / "mobilenetv2_1.0.onnx", check=False)).model
    samples = batches(shared_data, "imagenet", 4)
    target = load_target(pathlib.Path(__file__).resolve().parents[2] / "pipeline" / "targets" / "onnxruntime.toml")
    plan = place(model, target, PlacementSettings(wbits=bits, abits=bits))
    plan = cases.ranged(model, plan, samples)
    start = time.process_time()
    result = verify_model(model, emit(model, plan), plan, samples, integer_samples=1, tensor_samples=2)
    assert time.process_time() - start < 20  # about 2 s; the limit is for busy machines
    assert result.passed
    assert len(result.coverage.integer) == 53
    assert sum(t.codes for t in result.tensors) > 6_000_000
    assert sum(t.ties for t in result.tensors) < 100
