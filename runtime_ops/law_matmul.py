"""Matrix products from codes: QLinearMatMul, QGemm, MatMulIntegerToFloat.

    sum[i, j] = bias[j] + sum over k of (a[i, k] - z_a) * (b[k, j] - z_b)

requantized like a convolution, or, where the output stays in float, multiplied by ``s_a * s_b``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.integer import (
    FLOAT_SLACK,
    Affine,
    Codes,
    Prediction,
    multiplier,
    requantize,
    rounded_then_shifted,
    wrapped,
)


def matmul_sums(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> npt.NDArray[np.floating]:
    """Exact integer sums of ``a @ b`` (NumPy's broadcasting rules), as floats.

    >>> matmul_sums(np.int32([[1, 2]]), np.int32([[3], [-4]])).tolist()
    [[-5.0]]
    """
    columns = np.abs(b).sum(axis=-2 if b.ndim > 1 else 0).max(initial=0)
    largest = int(np.abs(a).max(initial=0)) * int(columns)
    dtype = np.float32 if largest < 2**24 else np.float64
    return np.asarray(np.matmul(a.astype(dtype), b.astype(dtype)))


def qlinear_matmul(a: Codes, b: Codes, aq: Affine, bq: Affine, yq: Affine) -> Prediction:
    """QLinearMatMul.

    Args:
        a: (..., M, K) codes.
        b: (..., K, N) codes.
        aq: Numbers of ``a``, one scale.
        bq: Numbers of ``b``: one scale, or one per column (last axis).
        yq: Numbers of the output, one scale.
    """
    sums = wrapped(matmul_sums(aq.centered(a), bq.centered(b)), None)
    return requantize(sums, multiplier(aq, bq, yq), yq, axis=sums.ndim - 1)


def qgemm(
    a: Codes, b: Codes, c: Codes | None, aq: Affine, bq: Affine, yq: Affine, attributes: Mapping[str, Any]
) -> Prediction:
    """QGemm with a quantized output.

    Args:
        a: (M, K) codes, or (K, M) with ``transA``; a stack of matrices where a MatMul and an Add were joined.
        b: (K, N) codes, or (N, K) with ``transB``.
        c: int32 codes of the bias, scale ``alpha * s_a * s_b``, broadcastable to (M, N), or None.
        aq: Numbers of ``a``, one scale.
        bq: Numbers of ``b``: one scale, or one per column of the product.
        yq: Numbers of the output.
        attributes: Attributes of the ONNX Gemm; ``beta`` must be 1 for onnxruntime to fuse.
    """
    sums = _gemm_sums(a, b, c, aq, bq, attributes)
    return requantize(sums, multiplier(aq, bq, yq, float(attributes.get("alpha", 1.0))), yq, axis=sums.ndim - 1)


def gemm_to_float(
    a: Codes, b: Codes, c: Codes | None, aq: Affine, bq: Affine, attributes: Mapping[str, Any]
) -> npt.NDArray[np.float32]:
    """QGemm with a float output; the arguments are those of :func:`qgemm`."""
    sums = _gemm_sums(a, b, c, aq, bq, attributes).astype(np.float32)
    return np.asarray(sums * (np.float32(attributes.get("alpha", 1.0)) * aq.scale * bq.scale), np.float32)


def matmul_to_float(a: Codes, b: Codes, aq: Affine, bq: Affine) -> npt.NDArray[np.float32]:
    """MatMulIntegerToFloat without bias; the arguments are those of :func:`qlinear_matmul`."""
    sums = wrapped(matmul_sums(aq.centered(a), bq.centered(b)), None).astype(np.float32)
    return np.asarray(sums * (aq.scale * bq.scale), np.float32)


def float_gemm(
    a: Codes,
    b: Codes,
    c: npt.NDArray[np.floating] | None,
    aq: Affine,
    bq: Affine,
    yq: Affine,
    attributes: Mapping[str, Any],
) -> Prediction:
    """A Gemm or MatMul that onnxruntime runs in float32, or on integers with a float output that is quantized later.

    The value is exact; ``slack`` covers a float32 sum of the K products in any order.

    Args:
        a: Codes of the left operand.
        b: Codes of the right operand.
        c: Bias values (already dequantized) or None.
        aq: Numbers of ``a``, one scale.
        bq: Numbers of ``b``: one scale, or one per column of the product.
        yq: Numbers of the output.
        attributes: Attributes of the ONNX Gemm; empty for MatMul, whose operands may be stacks of matrices.
    """
    left, right = aq.centered(a), bq.centered(b)
    if attributes.get("transA"):
        left = left.T
    if attributes.get("transB"):
        right = right.T
    scale = float(attributes.get("alpha", 1.0)) * aq.scale.astype(np.float64) * bq.scale.astype(np.float64)
    real = matmul_sums(left, right).astype(np.float64) * scale
    size = matmul_sums(np.abs(left), np.abs(right)).astype(np.float64) * scale
    if c is not None:
        bias = float(attributes.get("beta", 1.0)) * c.astype(np.float64)
        real, size = real + bias, size + np.abs(bias)
    step = float(yq.scale)
    return rounded_then_shifted(
        real / step, yq, FLOAT_SLACK + 4 * math.sqrt(left.shape[-1]) * 2.0**-24 * np.abs(size) / step
    )


def _gemm_sums(
    a: Codes, b: Codes, c: Codes | None, aq: Affine, bq: Affine, attributes: Mapping[str, Any]
) -> npt.NDArray[np.int32]:
    left, right = aq.centered(a), bq.centered(b)
    if attributes.get("transA"):
        left = left.T
    if attributes.get("transB"):
        right = right.T
    return wrapped(matmul_sums(left, right), c)
