"""Activations of 16 bits, from end to end; onnxruntime runs them in float between the codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from postquant.pipeline.api import quantize
from postquant.pipeline.config import Method, QuantConfig
from postquant.runtime_ops.errors import ConfigError
from postquant.runtime_ops.quantizer import TensorQuantizer


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    return [{"image": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(4)]


def run(cases: Any, samples: list[dict[str, Any]], **settings: Any) -> Any:
    return quantize(cases.float_model(cases.cnn), samples, QuantConfig(method=Method.MSE, bundle=False, **settings))


def test_qnn(cases: Any, samples: list[dict[str, Any]]) -> None:
    wide = run(cases, samples, target="qnn", abits=16, sums_bits=16)
    entries = [entry for entry in wide.plan.activations.values() if isinstance(entry, TensorQuantizer)]
    assert {entry.spec.container for entry in entries} == {"uint16"}
    assert wide.model.graph.opset_imports[""] >= 21
    zeros = [n.inputs[2] for n in wide.model.graph if n.op_type == "QuantizeLinear"]
    assert {zero.dtype for zero in zeros if zero is not None} == {ir.DataType.UINT16}
    narrow = run(cases, samples, target="qnn")
    # Its weights of 8 bits are all that is left of the error.
    assert wide.report.outputs[0].sqnr_db > narrow.report.outputs[0].sqnr_db + 1


def test_a_target_without_them_says_so(cases: Any, samples: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="no such bit width"):
        run(cases, samples, target="onnxruntime", abits=16)
