"""Convolutions and matrix products whose weights are packed codes and a table: the Lut operators.

    w[m, k] = table[code[m, k]]                                 int8, one scale per output channel, zero point 0
    sum     = bias[m] + sum over k of (x[k] - z_x) * w[m, k]    int32
    y       = saturate(round_half_even(float32(sum) * multiplier[m]) + z_y)

LutMatMulIntegerToFloat has no integer bias, and its output is

    y       = float32(float32(sum) * float32(s_x * s_w[m])) + bias[m]       float32

The arithmetic behind the table is that of :mod:`postquant.runtime_ops.law_conv` and
:mod:`postquant.runtime_ops.law_matmul`: what onnxruntime's QLinearConv, QGemm and MatMulIntegerToFloat compute with the
decoded weights.

Codes have 4 or 2 bits. Each row (output channel) starts at a byte; element 0 is in the lowest bits of byte 0, and the
unused high bits of a row's last byte are 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.code_book import CODE_BITS
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.integer import Affine, Codes, Prediction
from postquant.runtime_ops.law_conv import qlinear_conv
from postquant.runtime_ops.law_matmul import matmul_to_float, qgemm


def row_bytes(terms: int, bits: int) -> int:
    """Bytes of one row of ``terms`` codes.

    >>> row_bytes(27, 4), row_bytes(27, 2), row_bytes(0, 4)
    (14, 7, 0)
    """
    return -(-terms * bits // 8)


def pack_codes(codes: npt.NDArray[np.integer], bits: int) -> npt.NDArray[np.uint8]:
    """Packs codes into bytes, the first of each row in the lowest bits.

    Args:
        codes: (M, K) integers in ``[0, 2**bits)``.
        bits: 2 or 4.

    Returns:
        (M, ceil(K * bits / 8)) uint8.

    Raises:
        ValueError: If the codes are not a matrix, or one does not fit ``bits``.

    >>> pack_codes(np.uint8([[1, 2, 3]]), 4).tolist(), pack_codes(np.uint8([[1, 2, 3]]), 2).tolist()
    ([[33, 3]], [[57]])
    """
    if bits not in CODE_BITS or codes.ndim != 2:
        raise ValueError(f"a matrix of 2-bit or 4-bit codes is packed, not {bits} bits of shape {codes.shape}")
    if codes.size and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes of {bits} bits are in [0, {(1 << bits) - 1}]")
    per_byte = 8 // bits
    rows, terms = codes.shape
    padded = np.zeros((rows, row_bytes(terms, bits), per_byte), np.uint8)
    padded.reshape(rows, padded.shape[1] * per_byte)[:, :terms] = codes
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(padded << shifts, axis=2)
    return packed


def unpack_codes(packed: npt.NDArray[np.uint8], terms: int, bits: int) -> npt.NDArray[np.uint8]:
    """The inverse of :func:`pack_codes`.

    Args:
        packed: (M, ceil(terms * bits / 8)) uint8.
        terms: K, codes of a row.
        bits: 2 or 4.

    Returns:
        (M, terms) uint8 codes in ``[0, 2**bits)``.

    >>> unpack_codes(np.uint8([[33, 3]]), 3, 4).tolist()
    [[1, 2, 3]]
    """
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    codes = (packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.ascontiguousarray(codes.reshape(packed.shape[0], packed.shape[1] * len(shifts))[:, :terms], np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class LutWeight:
    """A weight as the operators take it.

    Attributes:
        codes: (M, ceil(K * bits / 8)) uint8, packed.
        table: (2**bits,) int8.
        scale: (M,) float32, > 0.
        bits: Bits of a code, 2 or 4.
        shape: Shape of the decoded weight: (M, C / group, *kernel) or (N, K).

    Raises:
        ModelError: If the parts do not fit together.
    """

    codes: npt.NDArray[np.uint8]
    table: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    bits: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(d) for d in self.shape))
        if self.bits not in CODE_BITS:
            raise ModelError("a look-up table has codes of 2 or 4 bits", where="attribute bits", found=str(self.bits))
        if len(self.shape) < 2 or min(self.shape) < 1:
            raise ModelError("the shape of a weight is wrong", where="attribute w_shape", found=str(self.shape))
        rows, terms = self.shape[0], math.prod(self.shape[1:])
        for what, array, dtype, shape in (
            ("codes", self.codes, np.uint8, (rows, row_bytes(terms, self.bits))),
            ("table", self.table, np.int8, (1 << self.bits,)),
            ("w_scale", self.scale, np.float32, (rows,)),
        ):
            if array.dtype != dtype or array.shape != shape:
                raise ModelError(
                    f"{what} of a weight of shape {self.shape} in {self.bits} bits do not fit",
                    where=f"input {what}",
                    expected=f"{np.dtype(dtype)} of shape {shape}",
                    found=f"{array.dtype} of shape {array.shape}",
                )
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ModelError("scales must be finite and positive", where="input w_scale")

    def decoded(self) -> npt.NDArray[np.int8]:
        """The int8 weight, of shape ``shape``.

        >>> w = LutWeight(np.uint8([[33]]), np.arange(16, dtype=np.int8), np.float32([1]), 4, (1, 2))
        >>> w.decoded().tolist()
        [[1, 2]]
        """
        codes = unpack_codes(self.codes, math.prod(self.shape[1:]), self.bits)
        return self.table[codes].reshape(self.shape)

    @property
    def numbers(self) -> Affine:
        """Scale per output channel, zero point 0."""
        return Affine(self.scale, np.zeros(len(self.scale), np.int32), np.dtype(np.int8), axis=0)


def scalar_numbers(scale: npt.NDArray[np.float32], zero_point: npt.NDArray[Any], what: str) -> Affine:
    """The numbers of an activation, checked.

    Args:
        scale: () float32, > 0.
        zero_point: () uint8 or int8, whose type is that of the codes.
        what: "x", "a" or "y", for the message.

    Raises:
        ModelError: If they are not scalars of these types, or the scale is not finite and positive.
    """
    scale, zero_point = np.asarray(scale), np.asarray(zero_point)
    if scale.shape != () or scale.dtype != np.float32 or not (np.isfinite(scale) and scale > 0):
        raise ModelError(
            "the scale of an activation is one finite positive float32",
            where=f"input {what}_scale",
            found=f"{scale.dtype} of shape {scale.shape}" if scale.shape else f"{scale.dtype} {scale}",
        )
    if zero_point.shape != () or zero_point.dtype not in (np.uint8, np.int8):
        raise ModelError(
            "the zero point of an activation is one uint8 or int8",
            where=f"input {what}_zero_point",
            found=f"{zero_point.dtype} of shape {zero_point.shape}",
        )
    return Affine(scale, zero_point.astype(np.int32), zero_point.dtype)


def lut_qlinear_conv(
    x: Codes,
    xq: Affine,
    weight: LutWeight,
    bias: npt.NDArray[np.int32],
    yq: Affine,
    *,
    group: int,
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
) -> Prediction:
    """LutQLinearConv.

    Args:
        x: (N, C, *spatial) codes, one or two spatial axes.
        xq: Numbers of ``x``, one scale.
        weight: The weight, of shape (M, C / group, *kernel).
        bias: (M,) int32 at scale ``s_x * s_w[m]``.
        yq: Numbers of the output, one scale, the container of ``x``.
        group: Number of groups.
        strides: One per spatial axis.
        dilations: One per spatial axis.
        pads: Begin of each spatial axis, then end of each.

    Raises:
        ModelError: If shapes and attributes do not fit together.

    >>> w = LutWeight(np.uint8([[3]]), np.int8([0, 0, 0, 2] + [0] * 12), np.float32([1]), 4, (1, 1, 1))
    >>> q = Affine(np.float32(1), np.int32(0), np.dtype(np.uint8))
    >>> one = {"group": 1, "strides": [1], "dilations": [1], "pads": [0, 0]}
    >>> lut_qlinear_conv(np.uint8([[[7, 8]]]), q, w, np.int32([1]), q, **one).codes.tolist()
    [[[15, 17]]]
    """
    rank = len(weight.shape) - 2
    if rank not in (1, 2) or x.ndim != rank + 2:
        raise ModelError(
            "LutQLinearConv is 1-D or 2-D, and its weight has the rank of its input",
            found=f"an input of {x.ndim} and a weight of {rank + 2} dimensions",
        )
    for name, values, count in (("strides", strides, rank), ("dilations", dilations, rank), ("pads", pads, 2 * rank)):
        if len(values) != count or min(values) < (0 if name == "pads" else 1):
            raise ModelError("an attribute is wrong", where=name, expected=f"{count} numbers", found=str(list(values)))
    if group < 1 or weight.shape[0] % group or x.shape[1] != group * weight.shape[1]:
        raise ModelError(
            "channels and groups do not fit",
            found=f"{x.shape[1]} channels, {group} groups and a weight of shape {weight.shape}",
        )
    _check_rest(x, xq, bias, weight, yq)
    attributes = {"group": group, "strides": strides, "dilations": dilations, "pads": pads}
    return qlinear_conv(x, weight.decoded(), bias, xq, weight.numbers, yq, attributes)


def lut_qlinear_matmul(a: Codes, aq: Affine, weight: LutWeight, bias: npt.NDArray[np.int32], yq: Affine) -> Prediction:
    """LutQLinearMatMul: ``y[..., n] = sum over k of a[..., k] * w[n, k]``, plus the bias.

    Args:
        a: (..., K) codes, at least one dimension.
        aq: Numbers of ``a``, one scale.
        weight: The weight, of shape (N, K).
        bias: (N,) int32 at scale ``s_a * s_w[n]``.
        yq: Numbers of the output, one scale, the container of ``a``.

    Raises:
        ModelError: If the shapes do not fit together.
    """
    _check_matmul(a, weight)
    _check_rest(a, aq, bias, weight, yq)
    return qgemm(a, weight.decoded(), bias, aq, weight.numbers, yq, {"transB": 1})


def lut_matmul_integer_to_float(
    a: Codes, aq: Affine, weight: LutWeight, bias: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """LutMatMulIntegerToFloat.

    Args:
        a: (..., K) codes, at least one dimension.
        aq: Numbers of ``a``, one scale.
        weight: The weight, of shape (N, K).
        bias: (N,) float32, finite.

    Returns:
        (..., N) float32.

    Raises:
        ModelError: If the shapes do not fit together.

    >>> w = LutWeight(np.uint8([[3]]), np.int8([0, 0, 0, 2] + [0] * 12), np.float32([0.5]), 4, (1, 1))
    >>> q = Affine(np.float32(0.25), np.int32(1), np.dtype(np.uint8))
    >>> lut_matmul_integer_to_float(np.uint8([[7]]), q, w, np.float32([10])).tolist()
    [[11.5]]
    """
    _check_matmul(a, weight)
    _check_rest(a, aq, bias, weight, None)
    if not np.isfinite(bias).all():
        raise ModelError("the bias must be finite", where="input bias")
    columns = dataclasses.replace(weight.numbers, axis=1)
    return matmul_to_float(a, np.ascontiguousarray(weight.decoded().T), aq, columns) + bias


def _check_matmul(a: Codes, weight: LutWeight) -> None:
    if len(weight.shape) != 2 or a.ndim < 1 or a.shape[-1] != weight.shape[1]:
        raise ModelError(
            "the last dimension of the input is the second one of the weight",
            found=f"an input of shape {a.shape} and a weight of shape {weight.shape}",
        )


def _check_rest(x: Codes, xq: Affine, bias: npt.NDArray[Any], weight: LutWeight, yq: Affine | None) -> None:
    """Types and the bias; ``yq`` is None for a float output, whose bias is float."""
    if x.dtype != xq.dtype or (yq is not None and yq.dtype != xq.dtype):
        raise ModelError(
            "input, output and their zero points have one type",
            found=f"{x.dtype}, {xq.dtype} and {None if yq is None else yq.dtype}",
        )
    dtype = np.dtype(np.float32 if yq is None else np.int32)
    if bias.dtype != dtype or bias.shape != weight.shape[:1]:
        raise ModelError(
            f"the bias is one {dtype} per output channel",
            where="input bias",
            expected=f"{dtype} of shape {weight.shape[:1]}",
            found=f"{bias.dtype} of shape {bias.shape}",
        )
