"""Targets with float biases: onnxruntime makes int32 biases of them by itself, and the law does the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from postquant.passes.barriers import rounds_bias
from postquant.passes.emit import emit
from postquant.passes.place import PlacementSettings, place
from postquant.passes.target import load_target
from postquant.pipeline.kernels import observed_session
from postquant.pipeline.verify import verify_model
from postquant.runtime_ops.errors import VerificationError

# Steps of the bias are large beside those of the outputs: few channels, large inputs.
NETWORKS = {
    "conv": """<ir_version: 8, opset_import: ["" : 17]>
net (float[1,3,16,16] x) => (float[1,8,16,16] y)
<float[16,3,1,1] w1, float[16] b1, float[16,1,3,3] w2, float[16] b2, float[8,16,1,1] w3, float[8] b3>
{
   low = Constant <value_float = 0.0> ()
   high = Constant <value_float = 6.0> ()
   [expand] c1 = Conv (x, w1, b1)
   [six] r1 = Clip (c1, low, high)
   [depthwise] c2 = Conv <pads = [1, 1, 1, 1], group = 16> (r1, w2, b2)
   [relu] r2 = Relu (c2)
   [project] y = Conv (r2, w3, b3)
}
""",
    "gemm": """<ir_version: 8, opset_import: ["" : 17]>
net (float[64,8] x) => (float[64,8] y)
<float[8,32] w1, float[32] b1, float[32,32] w2, float[32] b2, float[32,8] w3, float[8] b3>
{
   [first] g1 = Gemm (x, w1, b1)
   [relu] r1 = Relu (g1)
   [second] m2 = MatMul (r1, w2)
   [add] a2 = Add (m2, b2)
   [relu2] r2 = Relu (a2)
   [third] y = Gemm (r2, w3, b3)
}
""",
    "matmul": """<ir_version: 8, opset_import: ["" : 17]>
net (float[4,16,8] x) => (float[4,16,8] y)
<float[8,32] w1, float[32] b1, float[32,8] w2, float[8] b2>
{
   [first] m1 = MatMul (x, w1)
   [add] a1 = Add (m1, b1)
   [second] m2 = MatMul (a1, w2)
   [add2] y = Add (m2, b2)
}
""",
}


def made(cases: Any, network: str, name: str) -> tuple[Any, ...]:
    """A network for a target: float model, emitted model, plan, samples."""
    model = cases.float_model(NETWORKS[network])
    rng = np.random.default_rng(3)
    shape = [int(size) for size in model.graph.inputs[0].shape]
    samples = [{"x": (3 * rng.normal(size=shape)).astype(np.float32)} for _ in range(4)]
    target = load_target(name)
    plan = cases.ranged(model, place(model, target, PlacementSettings()), samples)
    return model, emit(model, plan, integer_clips=target.integer_clips), plan, samples


@pytest.mark.parametrize("name", ["tensorrt", "ncnn"])
def test_convolutions(name: str, cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, emitted, plan, samples = made(cases, "conv", name)
    assert verify_model(model, emitted, plan, samples, integer_samples=4).passed
    monkeypatch.setattr("postquant.pipeline.simulate.rounds_bias", lambda node: False)
    with pytest.raises(VerificationError, match="integers equal the simulation"):
        verify_model(model, emitted, plan, samples, integer_samples=4)


def test_products_in_three_dimensions(cases: Any) -> None:
    assert verify_model(*made(cases, "matmul", "tensorrt"), integer_samples=4).passed


def test_products_in_float(cases: Any) -> None:
    """A Relu that stays keeps them in float; what the law says of biases stands in onnxruntime's optimized graph."""
    model, emitted, plan, samples = made(cases, "gemm", "tensorrt")
    assert verify_model(model, emitted, plan, samples, integer_samples=4).passed
    _, optimized = observed_session(emitted, [])
    for node in emitted.graph:
        if node.op_type in ("Gemm", "MatMul"):
            names = (f"{node.name}_bias_dq", f"{node.name}/MatMulAddFusion_bias_dq")
            assert rounds_bias(node) == any(n in optimized.by_value for n in names), (node.name, optimized.by_value)
