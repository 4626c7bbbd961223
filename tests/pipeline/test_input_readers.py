"""Who reads a quantized graph input: float nodes get the better of the exact and the dequantized value."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import pytest

import postquant
from postquant.passes.plan import QuantPlan

# y = x - strength * (x - mean of the 3 x 3 neighbours): at strength 1 a denoiser, at 0.1 hardly anything.
GRAPH = """<ir_version: 8, opset_import: ["" : 17]>
m (float[N,1,16,16] x) => (float[N,1,16,16] y) {
  [detail] r = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
  [subtract] y = Sub (x, r)
}"""


@pytest.mark.parametrize(("strength", "rounded"), [(1.0, True), (0.1, False)])
def test_a_denoiser_subtracts_from_what_it_has_seen(tmp_path: pathlib.Path, strength: float, rounded: bool) -> None:
    model = onnx.parser.parse_model(GRAPH)
    weight = np.full((1, 1, 3, 3), -strength / 9, np.float32)
    weight[0, 0, 1, 1] += strength
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    rng = np.random.default_rng(0)
    samples = [{"x": rng.normal(0.5, 0.2, (1, 1, 16, 16)).astype(np.float32)} for _ in range(24)]

    result = postquant.quantize(model, samples, postquant.QuantConfig(abits=5, first_last_bits=None), out=tmp_path)

    (subtract,) = (node for node in tuple(result.model.graph) if node.op_type == "Sub")
    assert subtract.inputs[0] is not None
    assert (subtract.inputs[0].name != "x") is rounded
    assert QuantPlan.load(tmp_path / "plan.safetensors").rounded_inputs == (("x",) if rounded else ())
    assert any(stage.name == "readers of inputs" for stage in result.report.stages) is rounded
