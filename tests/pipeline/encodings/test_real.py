"""MobileNetV2 in all formats, at a cost that everybody can pay."""

from __future__ import annotations

import importlib.util
import pathlib
import time
from typing import Any

import numpy as np
import pytest

from postquant.passes.normalize import normalize
from postquant.passes.place import PlacementSettings, place
from postquant.pipeline.encodings.apply import apply_encodings
from postquant.pipeline.encodings.formats import MODEL_FILE, write_encodings
from postquant.pipeline.encodings.read import read_encodings
from postquant.pipeline.load import load_model
from postquant.runtime_ops.quantizer import TensorQuantizer


def first_batch(folder: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location("shared_eval", folder / "eval.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(iter(module.batches("imagenet", "calib", batch=1)))


@pytest.mark.parametrize("wbits", [8, 4])
def test_mobilenet(shared_data: pathlib.Path, cases: Any, target: Any, tmp_path: pathlib.Path, wbits: int) -> None:
    model = normalize(load_model(shared_data / "imagenet" / "mobilenetv2_1.0.onnx", check=False)).model
    settings = PlacementSettings(wbits=wbits)
    plan = cases.ranged(model, place(model, target, settings), [first_batch(shared_data)])
    start = time.process_time()
    written = {form.name: form for form in write_encodings(tmp_path, model, plan, target)}
    assert time.process_time() - start < 20  # about 3 s; the limit is for busy machines
    assert written["aimet-1.0.0"].notes == ()
    assert written["ncnn"].tensors == len(plan.weights) == 53
    # The last layer writes float.
    assert written["fixed-point"].tensors == 52
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 40e6
    for name in ("aimet-0.6.1", "aimet-1.0.0", "aimet-2.0.0"):
        file = written[name].file
        assert file is not None
        received = load_model(tmp_path / MODEL_FILE, check=False)
        vendor = read_encodings(tmp_path / file)
        applied = apply_encodings(received, place(received, target, settings), vendor, target)
        assert applied.names == {*plan.activations, *plan.weights}
        for key, entry in {**plan.activations, **plan.weights}.items():
            found = {**applied.plan.activations, **applied.plan.weights}[key]
            assert isinstance(found, TensorQuantizer)
            assert isinstance(entry, TensorQuantizer)
            np.testing.assert_array_equal(found.scale, entry.scale)
            np.testing.assert_array_equal(found.zero_point, entry.zero_point)
        weight = received.graph.initializers[next(iter(plan.weights))]
        assert weight.const_value is not None
        quantizer = plan.weights[weight.name or ""]
        assert isinstance(quantizer, TensorQuantizer)
        original = model.graph.initializers[weight.name or ""].const_value
        assert original is not None
        np.testing.assert_array_equal(
            quantizer.quantize(weight.const_value.numpy()), quantizer.quantize(original.numpy())
        )
