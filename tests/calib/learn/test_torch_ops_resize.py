"""Resize and Upsample in torch equal onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from postquant.calib.learn.executor import supported

Same = Callable[..., Any]
MODES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def floats(*items: float) -> Any:
    return np.array(items, np.float32)


def ints(*items: int) -> Any:
    return np.array(items, np.int64)


@pytest.mark.parametrize("coordinates", MODES)
@pytest.mark.parametrize("nearest", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("scales", [(1, 1, 2, 2), (1, 1, 1.5, 3), (1, 1, 0.5, 0.6)])
def test_nearest(same_as_onnxruntime: Same, coordinates: str, nearest: str, scales: tuple[float, ...]) -> None:
    same_as_onnxruntime(
        "Resize",
        [normal(1, 2, 6, 5), None, floats(*scales)],
        fed=1,
        mode="nearest",
        coordinate_transformation_mode=coordinates,
        nearest_mode=nearest,
    )


@pytest.mark.parametrize("coordinates", MODES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("sizes", [(1, 2, 12, 10), (1, 2, 9, 7), (1, 2, 4, 3), (1, 2, 1, 5)])
def test_interpolation(same_as_onnxruntime: Same, coordinates: str, mode: str, sizes: tuple[int, ...]) -> None:
    same_as_onnxruntime(
        "Resize",
        [normal(1, 2, 6, 5), None, None, ints(*sizes)],
        fed=1,
        tolerance=1e-5,
        mode=mode,
        coordinate_transformation_mode=coordinates,
    )


@pytest.mark.parametrize("attributes", [{"exclude_outside": 1}, {"cubic_coeff_a": -0.5}])
def test_cubic_options(same_as_onnxruntime: Same, attributes: dict[str, Any]) -> None:
    scales = floats(1, 1, 1.7, 2)
    same_as_onnxruntime("Resize", [normal(1, 2, 6, 5), None, scales], fed=1, tolerance=1e-5, mode="cubic", **attributes)


def test_symmetric_half_pixels(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime(
        "Resize",
        [normal(1, 2, 6, 5), None, floats(1, 1, 1.3, 0.7)],
        opset=19,
        fed=1,
        tolerance=1e-5,
        mode="linear",
        coordinate_transformation_mode="half_pixel_symmetric",
    )


def test_axes(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime(
        "Resize",
        [normal(1, 2, 6, 5), None, None, ints(9, 4)],
        opset=18,
        fed=1,
        tolerance=1e-5,
        mode="linear",
        axes=[2, 3],
    )


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_old_forms(same_as_onnxruntime: Same, mode: str) -> None:
    arrays = [normal(1, 2, 6, 5), floats(1, 1, 2, 3)]
    same_as_onnxruntime("Upsample", arrays, opset=9, fed=1, tolerance=1e-5, mode=mode)
    same_as_onnxruntime("Resize", arrays, opset=10, fed=1, tolerance=1e-5, mode=mode)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"coordinate_transformation_mode": "tf_crop_and_resize"}, "tf_crop_and_resize"),
        ({"antialias": 1, "mode": "linear", "opset": 18}, "antialias"),
        ({"keep_aspect_ratio_policy": "not_larger", "opset": 18}, "keep_aspect_ratio_policy"),
    ],
)
def test_what_is_left_out_is_said(op_node: Callable[..., ir.Node], settings: dict[str, Any], reason: str) -> None:
    found = supported(op_node("Resize", [normal(1, 2, 6, 5), None, None, ints(1, 2, 4, 4)], **settings))
    assert found is not None
    assert reason in found
