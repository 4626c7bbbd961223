"""Resize with ``nearest`` or ``linear`` interpolation, axis by axis.

    in(i) = (i + 0.5) / scale - 0.5          half_pixel; the other coordinate modes change this line only

``nearest`` moves codes; onnxruntime runs it on codes when input and output share their numbers. ``linear`` runs in
float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
_NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def resized(x: npt.NDArray[Any], attributes: Mapping[str, Any], inputs: Sequence[Any]) -> npt.NDArray[Any] | None:
    """The output of Resize, or None for a form that no law describes (cubic, antialias, cropping, chosen axes).

    Args:
        x: Codes (nearest) or float32 values.
        attributes: Attributes of the ONNX Resize.
        inputs: Inputs 1 to 3: roi (not used), scales, sizes; None or empty where absent.

    >>> resized(np.uint8([[1, 2]]), {}, [None, np.float32([1, 2]), None]).tolist()
    [[1, 1, 2, 2]]
    """
    mode = str(attributes.get("mode", "nearest"))
    coordinate = str(attributes.get("coordinate_transformation_mode", "half_pixel"))
    nearest = str(attributes.get("nearest_mode", "round_prefer_floor"))
    plain = not attributes.get("antialias") and attributes.get("axes") is None
    plain = plain and attributes.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    if mode not in ("nearest", "linear") or coordinate not in _COORDINATES or nearest not in _NEAREST or not plain:
        return None
    given = [a if a is not None and a.size else None for a in (*inputs, None, None, None)[1:3]]
    scales, sizes = given
    result = x
    for axis, size in enumerate(x.shape):
        if sizes is not None:
            target = int(sizes[axis])
            scale = np.float32(target) / np.float32(size)
        elif scales is not None:
            scale = np.float32(scales[axis])
            target = int(np.floor(np.float32(size) * scale))
        else:
            return None
        if target == size and scale == 1:
            continue
        at = _positions(coordinate, target, size, scale)
        result = _nearest(result, axis, at, nearest) if mode == "nearest" else _linear(result, axis, at)
    return result


def _positions(mode: str, target: int, size: int, scale: np.float32) -> npt.NDArray[np.float32]:
    index = np.arange(target, dtype=np.float32)
    if mode == "align_corners":
        return index * np.float32(size - 1) / np.float32(max(target - 1, 1))
    if mode == "asymmetric":
        return index / scale
    if mode == "pytorch_half_pixel" and target == 1:
        return np.zeros(1, np.float32)
    return (index + np.float32(0.5)) / scale - np.float32(0.5)


def _nearest(x: npt.NDArray[Any], axis: int, at: npt.NDArray[np.float32], mode: str) -> npt.NDArray[Any]:
    if mode == "floor":
        chosen = np.floor(at)
    elif mode == "ceil":
        chosen = np.ceil(at)
    elif mode == "round_prefer_ceil":
        chosen = np.floor(at + np.float32(0.5))
    else:
        chosen = np.ceil(at - np.float32(0.5))
    return np.take(x, np.clip(chosen.astype(np.int64), 0, x.shape[axis] - 1), axis=axis)


def _linear(x: npt.NDArray[Any], axis: int, at: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    last = x.shape[axis] - 1
    inside = np.clip(at, 0, last)
    low = np.floor(inside).astype(np.int64)
    shape = [1] * x.ndim
    shape[axis] = -1
    part = (inside - low).astype(np.float32).reshape(shape)
    first, second = np.take(x, low, axis=axis), np.take(x, np.minimum(low + 1, last), axis=axis)
    return np.asarray(first * (1 - part) + second * part, np.float32)
