"""Resize and Upsample in torch: along each axis a matrix of weights, or for ``nearest`` a choice of elements.

    x_in = coordinate(x_out)                       half_pixel: (x_out + 1/2) / scale - 1/2, and the other five
    y[x_out] = sum_i weight(x_in - i) * x[i]       linear: 2 neighbours, cubic: 4 (Keys, coefficient a)

Neighbours outside the data stand for the element at the edge, unless ``exclude_outside`` removes their weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from postquant.calib.learn.op import (
    Check,
    Inputs,
    Op,
    as_integers,
    given,
    integer,
    integers,
    needed,
    number,
    opset,
    text,
)

_Floats = npt.NDArray[np.floating[Any]]
_COORDINATES = frozenset({"half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"})
_MODES = frozenset({"nearest", "linear", "bilinear", "cubic"})


def _resize(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x = needed(inputs)
    axes, sizes, scales = _sizes(node, inputs, x)
    mode = text(node, "mode", "nearest")
    for axis, size, scale in zip(axes, sizes, scales, strict=True):
        if size == x.shape[axis] and scale == 1.0:
            continue
        source = _coordinates(node, x.shape[axis], size, scale)
        if mode == "nearest":
            index = torch.from_numpy(_nearest(node, source, x.shape[axis]))
            x = x.index_select(axis, index.to(x.device))
        else:
            weights = torch.from_numpy(_weights(node, source, x.shape[axis], mode)).to(x)
            x = torch.movedim(torch.movedim(x, axis, -1) @ weights.mT, -1, axis)
    return (x,)


def _sizes(node: ir.Node, inputs: Inputs, x: torch.Tensor) -> tuple[list[int], list[int], list[float]]:
    """Axes, sizes and scales, out of whatever the node gives."""
    axes = [axis % x.dim() for axis in integers(node, "axes") or range(x.dim())]
    old = [x.shape[axis] for axis in axes]
    # Upsample and Resize of opset 10 have (X, scales), later ones (X, roi, scales, sizes).
    tensor = given(inputs, 1) if opset(node) < 11 else given(inputs, 2)
    if tensor is None or tensor.numel() == 0:
        sizes = as_integers(needed(inputs, 3))
        assert sizes is not None
        return axes, sizes, [new / n for new, n in zip(sizes, old, strict=True)]
    scales = [float(scale) for scale in tensor.reshape(-1).tolist()]
    return axes, [int(np.floor(n * scale)) for n, scale in zip(old, scales, strict=True)], scales


def _coordinates(node: ir.Node, size: int, new: int, scale: float) -> _Floats:
    """Positions in the input of the elements of the output, along one axis.

    In single precision, as onnxruntime does: a position may fall just before or behind a whole number.
    """
    position = np.arange(new, dtype=np.float32)
    factor = np.float32(scale)
    # Upsample and Resize of opset 10 know one mode only.
    mode = text(node, "coordinate_transformation_mode", "half_pixel") if opset(node) >= 11 else "asymmetric"
    if mode == "asymmetric":
        return position / factor
    if mode == "align_corners":
        return position * np.float32(size - 1) / np.float32(new - 1) if new > 1 else np.zeros_like(position)
    if mode == "pytorch_half_pixel" and new <= 1:
        return np.zeros_like(position)
    half = np.float32(0.5)
    source = (position + half) / factor - half
    if mode == "half_pixel_symmetric":
        # What the rounding of the size took away is taken from both sides.
        centre = size / 2
        source += np.float32(centre - centre * (new / (scale * size)))
    return source


def _nearest(node: ir.Node, source: _Floats, size: int) -> npt.NDArray[np.int64]:
    mode = text(node, "nearest_mode", "round_prefer_floor") if opset(node) >= 11 else "floor"
    if mode == "floor":
        index = np.floor(source)
    elif mode == "ceil":
        index = np.ceil(source)
    elif mode == "round_prefer_ceil":
        index = np.floor(source + 0.5)
    else:
        index = np.ceil(source - 0.5)
    return np.clip(index, 0, size - 1).astype(np.int64)


def _weights(node: ir.Node, source: _Floats, size: int, mode: str) -> _Floats:
    """(new, size) matrix."""
    taps = (-1, 0, 1, 2) if mode == "cubic" else (0, 1)
    if mode != "cubic":
        source = np.clip(source, 0, size - 1)
    first = np.floor(source).astype(np.int64)
    matrix = np.zeros((len(source), size), np.float32)
    outside = mode == "cubic" and bool(integer(node, "exclude_outside", 0))
    for tap in taps:
        index = first + tap
        distance = np.abs(source - index)
        weight = _keys(distance, number(node, "cubic_coeff_a", -0.75)) if mode == "cubic" else 1 - distance
        if outside:
            weight = np.where((index >= 0) & (index < size), weight, 0.0)
        np.add.at(
            matrix,
            (np.arange(len(source)), np.clip(index, 0, size - 1)),
            np.maximum(weight, 0) if mode != "cubic" else weight,
        )
    return matrix / matrix.sum(axis=1, keepdims=True) if outside else matrix


def _keys(distance: _Floats, a: float) -> _Floats:
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def check_resize(node: ir.Node) -> str | None:
    """Anti-aliasing, regions of interest, sizes that keep an aspect ratio."""
    if text(node, "mode", "nearest") not in _MODES:
        return f"mode {text(node, 'mode', 'nearest')}"
    if text(node, "coordinate_transformation_mode", "half_pixel") not in _COORDINATES:
        return f"coordinates {text(node, 'coordinate_transformation_mode', 'half_pixel')}"
    if integer(node, "antialias", 0):
        return "antialias"
    if text(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return "keep_aspect_ratio_policy"
    return None


RESIZES: dict[str, Op] = {"Resize": _resize, "Upsample": _resize}
RESIZE_CHECKS: dict[str, Check] = {"Resize": check_resize, "Upsample": check_resize}
