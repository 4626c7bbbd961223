"""How much data the measuring of effects gets: the arithmetic of the budget."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from postquant.calib.effect_budget import affordable_effect, effect_options
from postquant.calib.input_spec import input_specs
from postquant.calib.open_source import open_source


def convolution(size: str, *, side: int, width: int = 3) -> tuple[ir.Model, np.ndarray]:
    """One 3x3 convolution of an image of ``size``, and images for it."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    m (float[N,3,{size}] x) => (float[N,{width},{size}] y) {{ y = Conv <pads = [1, 1, 1, 1]> (x, w, b) }}"""
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((width, 3, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(width, np.float32), "b"))
    images = np.random.default_rng(1).standard_normal((12, 3, side, side)).astype(np.float32)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto)), images


def test_a_budget_decides_how_much_is_tried() -> None:
    plenty = effect_options(1.0, 10, 1000)
    assert plenty is not None
    few = effect_options(1e9, 50, 1000)
    assert few is not None
    assert few.samples < plenty.samples
    assert effect_options(1e12, 100, 1000) is None
    tiny = effect_options(1.0, 10, 4)
    assert tiny is not None
    assert tiny.samples == 4
    assert tiny.screening <= 4


def test_no_effect_where_even_the_least_costs_too_much() -> None:
    model, images = convolution("64,64", side=64, width=64)
    effect, note = affordable_effect(model, open_source(images, input_specs(model)), 10**7)
    assert effect is None
    assert note is not None
    assert "tensor error" in note
