"""Which law describes which kernel: :func:`predict`.

The operator and its operands come from the graph; the name of the kernel comes from onnxruntime's optimized graph,
because the same group may run as an integer kernel or in float32, and the two round differently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.integer import FLOAT_SLACK, Affine, Codes, Prediction, quantized
from postquant.runtime_ops.law_conv import float_conv, float_conv_transpose, qlinear_conv
from postquant.runtime_ops.law_elementwise import (
    qlinear_add,
    qlinear_concat,
    qlinear_leaky_relu,
    qlinear_mul,
    qlinear_sigmoid,
)
from postquant.runtime_ops.law_float import FLOAT_OPS, MOVING_OPS, float_op
from postquant.runtime_ops.law_matmul import float_gemm, qgemm, qlinear_matmul
from postquant.runtime_ops.law_pool import max_pool, qlinear_average_pool, qlinear_global_average_pool
from postquant.runtime_ops.law_resize import resized

# A linear Resize multiplies four float32 weights; its error in units of 2^-24 of the largest value.
_RESIZE_UNITS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """One input of an operator.

    Attributes:
        codes: Codes of a quantized tensor, else None.
        numbers: Their scale and zero point, else None.
        plain: A constant that is not quantized (float values, shapes, axes), else None.
        rounded_from: The float values of the file, where onnxruntime makes the codes of them by itself.
    """

    codes: Codes | None = None
    numbers: Affine | None = None
    plain: npt.NDArray[Any] | None = None
    rounded_from: npt.NDArray[Any] | None = None

    @property
    def real(self) -> npt.NDArray[Any]:
        """The values that the operator reads."""
        if self.plain is not None:
            return self.plain
        assert self.codes is not None
        assert self.numbers is not None
        return self.numbers.real(self.codes)

    @property
    def pair(self) -> tuple[Codes, Affine]:
        """Codes and numbers of a quantized operand."""
        assert self.codes is not None
        assert self.numbers is not None
        return self.codes, self.numbers


def predict(
    op_type: str,
    attributes: Mapping[str, Any],
    operands: Sequence[Operand | None],
    out: Affine,
    *,
    kernel: str,
    opset: int,
    output: int = 0,
) -> Prediction | None:
    """Output codes of one quantize-dequantize group, or None where no law describes the operator.

    Args:
        op_type: Operator of the standard domain in the float model. A MatMul may have a third operand: the vector that
            an Add behind it adds.
        attributes: Its attributes as Python values.
        operands: Its inputs; None where an optional one is absent.
        out: Numbers of the quantized output.
        kernel: What onnxruntime runs for it ("QLinearConv"), "" if unknown.
        opset: Version of the standard operators.
        output: Index of the operator's output.
    """
    data = [o for o in operands if o is not None]
    if op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return _weighted(op_type, attributes, operands, out, kernel)
    if op_type == "MaxPool" and output == 0 and data[0].codes is not None:
        codes, numbers = data[0].pair
        return quantized(numbers.real(max_pool(codes, attributes)), out)
    if op_type == "Resize":
        return _resize(attributes, operands, out)
    if kernel.startswith("QLinear") and all(o.codes is not None for o in data):
        law = _elementwise(op_type, attributes, [o.pair for o in data], out, kernel)
        if law is not None:
            return law
    if op_type in FLOAT_OPS or op_type in MOVING_OPS:
        reals = [None if o is None else o.real for o in operands]
        return float_op(op_type, attributes, reals, out, opset, output=output)
    return None


def _elementwise(
    op_type: str, attributes: Mapping[str, Any], parts: list[tuple[Codes, Affine]], out: Affine, kernel: str
) -> Prediction | None:
    if kernel == "QLinearAdd" and op_type == "Add":
        return qlinear_add(parts[0][0], parts[1][0], parts[0][1], parts[1][1], out)
    if kernel == "QLinearMul" and op_type == "Mul":
        return qlinear_mul(parts[0][0], parts[1][0], parts[0][1], parts[1][1], out)
    if kernel == "QLinearConcat" and op_type == "Concat":
        return qlinear_concat(parts, out, int(attributes["axis"]))
    if kernel == "QLinearLeakyRelu" and op_type == "LeakyRelu":
        return qlinear_leaky_relu(*parts[0], out, float(attributes.get("alpha", 0.01)))
    if kernel == "QLinearSigmoid" and op_type == "Sigmoid":
        return qlinear_sigmoid(*parts[0], out)
    if kernel == "QLinearGlobalAveragePool" and op_type == "GlobalAveragePool":
        return qlinear_global_average_pool(*parts[0], out)
    if kernel == "QLinearAveragePool" and op_type == "AveragePool":
        return qlinear_average_pool(*parts[0], out, attributes)
    return None


def _weighted(
    op_type: str, attributes: Mapping[str, Any], operands: Sequence[Operand | None], out: Affine, kernel: str
) -> Prediction | None:
    first, second = operands[0], operands[1]
    bias = operands[2] if len(operands) > 2 else None
    if first is None or second is None or first.codes is None or second.codes is None:
        return None
    (x, xq), (w, wq) = first.pair, second.pair
    integer = None if bias is None else bias.codes
    real = None if bias is None else bias.real
    if bias is None or integer is not None:
        if kernel == "QLinearConv" and op_type == "Conv":
            return qlinear_conv(x, w, integer, xq, wq, out, attributes)
        if kernel == "QGemm" and op_type in ("Gemm", "MatMul"):
            return qgemm(x, w, integer, xq, wq, out, attributes)
        if kernel == "QLinearMatMul" and op_type == "MatMul" and integer is None:
            return qlinear_matmul(x, w, xq, wq, out)
    if op_type == "Conv":
        return float_conv(x, w, real, xq, wq, out, attributes)
    if op_type == "ConvTranspose":
        return float_conv_transpose(x, w, real, xq, wq, out, attributes)
    return float_gemm(x, w, real, xq, wq, out, attributes if op_type == "Gemm" else {})


def _resize(attributes: Mapping[str, Any], operands: Sequence[Operand | None], out: Affine) -> Prediction | None:
    source = operands[0]
    if source is None or source.codes is None:
        return None
    rest = [None if o is None else o.plain for o in operands[1:]]
    real = resized(source.real, attributes, rest)
    if real is None:
        return None
    largest = float(np.abs(real).max(initial=0.0)) / float(out.scale)
    moved = str(attributes.get("mode", "nearest")) == "nearest"
    return quantized(real, out, FLOAT_SLACK if moved else FLOAT_SLACK + _RESIZE_UNITS * 2.0**-24 * largest)
