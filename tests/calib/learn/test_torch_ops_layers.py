"""Weighted operators and normalizations in torch equal onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Same = Callable[..., Any]


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("x", "weight", "attributes"),
    [
        ((2, 3, 7, 8), (4, 3, 3, 3), {}),
        ((2, 3, 7, 8), (4, 3, 3, 2), {"pads": [1, 1, 1, 1]}),
        ((2, 3, 7, 8), (4, 3, 3, 3), {"pads": [1, 0, 2, 3], "strides": [2, 1]}),
        ((1, 3, 9, 9), (4, 3, 3, 3), {"dilations": [2, 3], "pads": [2, 3, 2, 3]}),
        ((1, 4, 6, 6), (8, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
        ((1, 4, 7, 6), (4, 1, 3, 3), {"group": 4, "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        ((1, 4, 7, 6), (4, 1, 3, 4), {"group": 4, "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
        ((1, 3, 8, 8), (2, 3, 5, 5), {"auto_pad": "SAME_UPPER", "strides": [3, 3]}),
        ((1, 3, 8, 8), (2, 3, 3, 3), {"auto_pad": "VALID", "strides": [2, 2]}),
        ((2, 3, 10), (4, 3, 3), {"pads": [1, 2]}),
        ((1, 2, 5, 6, 7), (3, 2, 2, 3, 3), {"pads": [0, 1, 1, 1, 1, 1]}),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_conv(
    same_as_onnxruntime: Same, x: tuple[int, ...], weight: tuple[int, ...], attributes: dict[str, Any], bias: bool
) -> None:
    arrays = [normal(*x), normal(*weight, seed=1), *([normal(weight[0], seed=2)] if bias else [])]
    same_as_onnxruntime("Conv", arrays, fed=1, **attributes)


@pytest.mark.parametrize(
    ("x", "weight", "attributes"),
    [
        ((2, 3, 5, 6), (3, 4, 3, 3), {}),
        ((2, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((1, 3, 5, 6), (3, 4, 3, 2), {"strides": [2, 3], "pads": [1, 0, 0, 1]}),
        ((1, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
        ((1, 3, 5, 6), (3, 4, 2, 2), {"strides": [3, 3], "output_padding": [2, 1]}),
        ((1, 4, 5, 6), (4, 3, 3, 3), {"group": 2, "dilations": [2, 1]}),
        ((1, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "output_shape": [10, 12]}),
        ((1, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        ((1, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
        ((1, 3, 7), (3, 2, 4), {"strides": [2], "pads": [1, 1]}),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_conv_transpose(
    same_as_onnxruntime: Same, x: tuple[int, ...], weight: tuple[int, ...], attributes: dict[str, Any], bias: bool
) -> None:
    outputs = weight[1] * attributes.get("group", 1)
    arrays = [normal(*x), normal(*weight, seed=1), *([normal(outputs, seed=2)] if bias else [])]
    same_as_onnxruntime("ConvTranspose", arrays, fed=1, **attributes)


@pytest.mark.parametrize("bias", [(), (4,), (1, 4), (5, 4), (5, 1), (1,), None])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (2.0, 0.0)])
def test_gemm(
    same_as_onnxruntime: Same, bias: tuple[int, ...] | None, left: int, right: int, alpha: float, beta: float
) -> None:
    a, b = normal(5, 6), normal(6, 4, seed=1)
    arrays = [a.T.copy() if left else a, b.T.copy() if right else b]
    arrays += [] if bias is None else [np.asarray(normal(*bias, seed=2), np.float32)]
    same_as_onnxruntime("Gemm", arrays, fed=1, transA=left, transB=right, alpha=alpha, beta=beta)


@pytest.mark.parametrize(
    ("a", "b"), [((5, 6), (6, 4)), ((2, 5, 6), (6, 4)), ((2, 3, 5, 6), (3, 6, 4)), ((6,), (6, 4)), ((5, 6), (6,))]
)
def test_matmul(same_as_onnxruntime: Same, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    same_as_onnxruntime("MatMul", [normal(*a), normal(*b, seed=1)])


@pytest.mark.parametrize("opset", [9, 14, 15])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (4, 3), (2, 3, 7)])
def test_batch_normalization(same_as_onnxruntime: Same, opset: int, shape: tuple[int, ...]) -> None:
    variance = np.abs(normal(3, seed=4)) + np.float32(0.1)
    arrays = [normal(*shape), normal(3, seed=1), normal(3, seed=2), normal(3, seed=3), variance]
    same_as_onnxruntime("BatchNormalization", arrays, opset=opset, fed=1, epsilon=1e-3)


@pytest.mark.parametrize("axis", [-1, 1, 2, -2])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_normalization(same_as_onnxruntime: Same, axis: int, bias: bool) -> None:
    shape = (2, 3, 4, 5)
    part = shape[axis:]
    arrays = [normal(*shape), normal(*part, seed=1), *([normal(*part, seed=2)] if bias else [])]
    same_as_onnxruntime("LayerNormalization", arrays, fed=1, axis=axis, epsilon=1e-5, tolerance=5e-6)


def test_layer_normalization_with_a_scale_that_broadcasts(same_as_onnxruntime: Same) -> None:
    arrays = [normal(2, 3, 4), normal(4, seed=1), normal(4, seed=2)]
    same_as_onnxruntime("LayerNormalization", arrays, fed=1, axis=1, tolerance=5e-6)


def test_instance_normalization(same_as_onnxruntime: Same) -> None:
    arrays = [normal(2, 3, 4, 5), normal(3, seed=1), normal(3, seed=2)]
    same_as_onnxruntime("InstanceNormalization", arrays, fed=1, epsilon=1e-3, tolerance=5e-6)


def test_group_normalization(same_as_onnxruntime: Same) -> None:
    arrays = [normal(2, 6, 4, 5), normal(6, seed=1), normal(6, seed=2)]
    same_as_onnxruntime("GroupNormalization", arrays, opset=21, fed=1, num_groups=3, tolerance=5e-6)
