"""How much data the measuring of effects gets: the arithmetic of the budget, and windows of large images."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from postquant.calib.cropped_source import cropped
from postquant.calib.effect_budget import affordable_effect, effect_options
from postquant.calib.input_spec import input_specs
from postquant.calib.open_source import open_source
from postquant.calib.work import forward_work


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


def test_work_is_positions_times_outputs_times_depth() -> None:
    model, images = convolution("H,W", side=6)
    assert forward_work(model, open_source(images, input_specs(model))) == 36 * 3 * 27


def test_windows_are_parts_of_the_images_at_different_places() -> None:
    model, images = convolution("H,W", side=40)
    source = open_source(images, input_specs(model))
    windows = cropped(source, 16)
    assert windows is not None
    assert len(windows) == len(source)
    corners = set()
    for image, window in zip(images, windows, strict=True):
        found = np.lib.stride_tricks.sliding_window_view(image, (3, 16, 16))[0]
        places = np.argwhere((found == window["x"][0]).all((2, 3, 4)))
        assert len(places) == 1
        corners.add(tuple(places[0]))
    assert len(corners) == len(images)
    smaller = cropped(source, 64)
    assert smaller is not None
    assert [w["x"].shape for w in smaller.read([0])] == [(1, 3, 40, 40)], "nothing to cut"


def test_only_images_of_any_size_are_cut() -> None:
    model, images = convolution("8,W", side=8)
    assert cropped(open_source(images, input_specs(model)), 4) is None


def test_windows_serve_where_whole_images_cost_too_much() -> None:
    model, images = convolution("H,W", side=256, width=64)
    source = open_source(images, input_specs(model))
    tensors = 2000
    assert effect_options(forward_work(model, source), tensors, len(source)) is None
    effect, note = affordable_effect(model, source, tensors)
    assert effect is not None
    assert note is not None
    assert "windows of" in note
    whole, nothing = affordable_effect(model, source, 2)
    assert whole is not None
    assert nothing is None


def test_no_effect_where_even_the_least_costs_too_much() -> None:
    model, images = convolution("64,64", side=64, width=64)
    effect, note = affordable_effect(model, open_source(images, input_specs(model)), 10**7)
    assert effect is None
    assert note is not None
    assert "tensor error" in note
