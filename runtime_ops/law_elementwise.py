"""Element-wise kernels from codes: QLinearAdd, QLinearMul, QLinearConcat, QLinearLeakyRelu, QLinearSigmoid.

    QLinearAdd   value = a * (s_a / s_y) + (b * (s_b / s_y) + fixed)      two fused multiply-adds
                 fixed = z_y - (s_a / s_y * z_a + s_b / s_y * z_b)
    QLinearMul   value = (a - z_a) * (b - z_b) * (s_a * s_b / s_y) + z_y
    table ops    code  = table[x],  table = quantize(f(dequantize(0 .. 255)))

onnxruntime has no integer Sub, Div, Relu or HardSwish: these run in float32 (``law_float``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.integer import FLOAT_SLACK, Affine, Codes, Prediction, quantized, rounded

# MLAS approximates the logistic function by a rational polynomial; its error in value, with margin.
_LOGISTIC_ERROR = 1e-6


def qlinear_add(a: Codes, b: Codes, aq: Affine, bq: Affine, yq: Affine) -> Prediction:
    """QLinearAdd of broadcastable codes.

    Args:
        a: Codes, any shape.
        b: Codes of a shape that broadcasts with that of ``a``.
        aq: Numbers of ``a``, one scale.
        bq: Numbers of ``b``, one scale.
        yq: Numbers of the output, one scale.

    >>> q = Affine(np.float32(0.5), np.int32(10), np.dtype(np.uint8))
    >>> qlinear_add(np.uint8([12]), np.uint8([15]), q, q, q).codes.tolist()
    [17]
    """
    ratio_a, ratio_b = aq.scale / yq.scale, bq.scale / yq.scale
    zero_a, zero_b, zero_y = (np.float32(q.zero_point) for q in (aq, bq, yq))
    # The compiler contracts this expression to one fused multiply-add; a scalar input joins it in the kernel, which
    # changes nothing but the place of one rounding.
    fixed = np.float32(zero_y - _fused(ratio_a, zero_a, ratio_b * zero_b))
    value = _fused(a, ratio_a, _fused(b, ratio_b, fixed))
    # SSE2 does not fuse and ARM multiplies in 22-bit fixed point: both move the value by less than this.
    slack = 2 * FLOAT_SLACK * (1.0 + float(ratio_a) + float(ratio_b))
    return rounded(value, yq, slack)


def _fused(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """float32 ``a * b + c`` with one rounding: products of float32 are exact in float64."""
    return np.asarray(np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64), np.float32)


def qlinear_mul(a: Codes, b: Codes, aq: Affine, bq: Affine, yq: Affine) -> Prediction:
    """QLinearMul of broadcastable codes; the arguments are those of :func:`qlinear_add`."""
    factor = np.float32(aq.scale * bq.scale / yq.scale)
    product = (aq.centered(a) * bq.centered(b)).astype(np.float32) * factor
    return rounded(product.astype(np.float32) + np.float32(yq.zero_point), yq)


def qlinear_concat(parts: Sequence[tuple[Codes, Affine]], yq: Affine, axis: int) -> Prediction:
    """QLinearConcat: every input through its table of 256 codes, then joined.

    Args:
        parts: Codes and their numbers, at least one.
        yq: Numbers of the output.
        axis: Axis along which the inputs are joined.
    """
    moved = [quantized(q.real(codes), yq) for codes, q in parts]
    return Prediction(
        np.concatenate([p.codes for p in moved], axis), np.concatenate([p.value for p in moved], axis), FLOAT_SLACK
    )


def qlinear_leaky_relu(x: Codes, xq: Affine, yq: Affine, alpha: float = 0.01) -> Prediction:
    """QLinearLeakyRelu: ``x`` where positive, ``alpha * x`` elsewhere."""
    slope = np.float32(alpha)
    return _through_table(x, xq, yq, lambda v: np.where(v >= 0, v, v * slope), FLOAT_SLACK)


def qlinear_sigmoid(x: Codes, xq: Affine, yq: Affine) -> Prediction:
    """QLinearSigmoid: ``1 / (1 + exp(-x))``."""
    return _through_table(
        x,
        xq,
        yq,
        lambda v: (1.0 / (1.0 + np.exp(-np.clip(v.astype(np.float64), -80, 80)))).astype(np.float32),
        FLOAT_SLACK + _LOGISTIC_ERROR / float(yq.scale),
    )


def _through_table(
    x: Codes,
    xq: Affine,
    yq: Affine,
    function: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]],
    slack: float,
) -> Prediction:
    every = np.arange(xq.low, xq.high + 1, dtype=np.int32)
    table = quantized(function(xq.real(every)), yq)
    index = x.astype(np.int32) - xq.low
    return Prediction(table.codes[index], table.value[index], slack)
