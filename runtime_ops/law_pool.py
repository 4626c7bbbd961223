"""Pooling from codes: QLinearGlobalAveragePool, QLinearAveragePool and MaxPool.

global   value = (sum of x - n * z_x) * (s_x / (s_y * n)) + z_y       exact integer sum, one float32 factor
average  value = mean of dequantize(x) / s_y + z_y                    float32 sums in window order
max      the largest code: the scale does not change
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.integer import FLOAT_SLACK, Affine, Codes, Prediction, requantize, rounded
from postquant.runtime_ops.law_conv import ConvAttributes


def qlinear_global_average_pool(x: Codes, xq: Affine, yq: Affine) -> Prediction:
    """QLinearGlobalAveragePool of (N, C, *spatial) codes."""
    axes = tuple(range(2, x.ndim))
    points = math.prod(x.shape[2:])
    sums = xq.centered(x).sum(axis=axes, keepdims=True, dtype=np.int32)
    return requantize(sums, np.asarray(xq.scale / (yq.scale * np.float32(points)), np.float32), yq, axis=1)


def qlinear_average_pool(x: Codes, xq: Affine, yq: Affine, attributes: Mapping[str, Any]) -> Prediction:
    """QLinearAveragePool of (N, C, *spatial) codes.

    Args:
        x: Codes.
        xq: Numbers of the input, one scale.
        yq: Numbers of the output, one scale.
        attributes: Attributes of the ONNX AveragePool.
    """
    real = xq.real(x)
    settings, size = _window(attributes, x.shape[2:])
    total = np.zeros((*x.shape[:2], *size), np.float32)
    inside = np.zeros(size, np.float32)
    for target, source in _taps(settings, x.shape[2:], size):
        total[target] += real[source]
        inside[target[1:]] += 1
    if attributes.get("count_include_pad"):
        inside[...] = math.prod(settings.kernel)
    value = (total / inside) / yq.scale + np.float32(yq.zero_point)
    return rounded(value.astype(np.float32), yq, 4 * FLOAT_SLACK)


def max_pool(x: Codes, attributes: Mapping[str, Any]) -> npt.NDArray[np.integer]:
    """MaxPool of (N, C, *spatial) codes; padding never wins."""
    settings, size = _window(attributes, x.shape[2:])
    best = np.full((*x.shape[:2], *size), np.iinfo(x.dtype).min, x.dtype)
    for target, source in _taps(settings, x.shape[2:], size):
        np.maximum(best[target], x[source], out=best[target])
    return best


def _window(attributes: Mapping[str, Any], spatial: Sequence[int]) -> tuple[ConvAttributes, tuple[int, ...]]:
    """The pooling window and its output size, ``ceil_mode`` included."""
    settings = ConvAttributes.of(attributes, list(attributes["kernel_shape"]), spatial)
    size = list(settings.output_size(spatial))
    if attributes.get("ceil_mode") and not str(attributes.get("auto_pad", "NOTSET")).startswith("SAME"):
        for axis, n in enumerate(spatial):
            reach = (settings.kernel[axis] - 1) * settings.dilations[axis] + 1
            before, after = settings.pads[axis]
            stride = settings.strides[axis]
            size[axis] = -(-(n + before + after - reach) // stride) + 1
            # A last window that would start in the padding after the input does not exist.
            if (size[axis] - 1) * stride >= n + before:
                size[axis] -= 1
    return settings, tuple(size)


def _taps(settings: ConvAttributes, spatial: Sequence[int], size: Sequence[int]) -> Iterator[tuple[Any, Any]]:
    """For each kernel position: indices of the outputs that it reaches, and of the inputs that they read."""
    for tap in itertools.product(*(range(k) for k in settings.kernel)):
        target, source = [], []
        for axis, t in enumerate(tap):
            stride = settings.strides[axis]
            offset = t * settings.dilations[axis] - settings.pads[axis][0]
            first = max(0, -(offset // stride))
            last = min(size[axis] - 1, (spatial[axis] - 1 - offset) // stride)
            if last < first:
                break
            target.append(slice(first, last + 1))
            source.append(slice(first * stride + offset, last * stride + offset + 1, stride))
        else:
            yield (..., *target), (..., *source)
