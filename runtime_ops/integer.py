"""Integer results of onnxruntime's kernels: what is common to all laws.

A kernel reads codes and writes codes. Each law (``law_conv``, ``law_matmul``, ``law_elementwise``, ``law_pool``,
``law_float``) returns a :class:`Prediction`: the codes that onnxruntime writes, and the real value, in units of one
output code, that was rounded to get them::

    value = zero_point + y / scale          codes = clip(round_half_even(value), low, high)

The laws repeat onnxruntime's float32 arithmetic operation by operation, so that on x86-64 with AVX2 the codes are equal
to the bit. Other instruction sets round intermediate results elsewhere (ARM adds in fixed point), and float kernels
sum in their own order. Only a value within ``slack`` of a rounding tie can then fall on the other side; such a
mismatch is a *tie*. Every other mismatch is an error of the file, of the plan or of the law.

Integer kernels requantize an int32 sum with one float32 factor (MLAS ``MlasRequantizeOutput``)::

    multiplier = (s_x * s_w) / s_y          value = float32(sum) * multiplier + zero_point
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.law import along_axis
from postquant.runtime_ops.quantizer import TensorQuantizer

Codes = npt.NDArray[np.integer]

# One unit in the last place of a float32 near 255: the least by which two float32 implementations may differ.
FLOAT_SLACK = 2.0**-15


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """The numbers of one quantized tensor: ``x = (code - zero_point) * scale``.

    Attributes:
        scale: () or (C,) float32, > 0.
        zero_point: () or (C,) int32.
        dtype: Container of the codes: int8, uint8, int16, uint16 or int32 (biases).
        axis: Channel axis of scale and zero point, or None.
    """

    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int32]
    dtype: np.dtype[np.integer]
    axis: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", np.asarray(self.scale, np.float32))
        object.__setattr__(self, "zero_point", np.asarray(self.zero_point, np.int32))
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    @classmethod
    def of(cls, quantizer: TensorQuantizer) -> Affine:
        """The numbers of a quantizer; its container saturates, not its narrower code range."""
        spec = quantizer.spec
        return cls(quantizer.scale, quantizer.zero_point, np.dtype(spec.container), spec.axis)

    @property
    def low(self) -> int:
        """Smallest code of the container."""
        return int(np.iinfo(self.dtype).min)

    @property
    def high(self) -> int:
        """Largest code of the container."""
        return int(np.iinfo(self.dtype).max)

    def centered(self, codes: Codes) -> npt.NDArray[np.int32]:
        """``codes - zero_point`` as int32."""
        return codes.astype(np.int32) - along_axis(self.zero_point, codes.ndim, self.axis).astype(np.int32)

    def real(self, codes: Codes) -> npt.NDArray[np.float32]:
        """The float32 values that DequantizeLinear gives."""
        scale = along_axis(self.scale, codes.ndim, self.axis)
        return (self.centered(codes).astype(np.float32) * scale).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What a kernel writes.

    Attributes:
        codes: Predicted codes, int32.
        value: The same shape: what was rounded, in units of one code, before saturation.
        slack: () or the same shape: distance to a rounding tie, in codes, within which another implementation of
            the same arithmetic may round the other way.
    """

    codes: npt.NDArray[np.int32]
    value: npt.NDArray[np.floating]
    slack: npt.NDArray[np.floating] | float = FLOAT_SLACK

    def clipped(self, low: float, high: float) -> Prediction:
        """The prediction behind a Clip of codes to ``[low, high]`` (both may be between codes: a float Clip)."""
        value = np.clip(self.value, low, high)
        codes = np.clip(self.codes, np.ceil(low - 0.5), np.floor(high + 0.5)).astype(np.int32)
        return Prediction(codes, value, self.slack)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How observed codes agree with predicted ones.

    Attributes:
        codes: Number of codes compared.
        ties: Codes that differ by one, next to a documented rounding tie.
        mismatches: All other codes that differ.
        worst: Largest difference of any code.
        first: Index of the first mismatch, with the predicted and the observed code, or None.
    """

    codes: int = 0
    ties: int = 0
    mismatches: int = 0
    worst: int = 0
    first: tuple[tuple[int, ...], int, int] | None = None

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.codes + other.codes,
            self.ties + other.ties,
            self.mismatches + other.mismatches,
            max(self.worst, other.worst),
            self.first if self.first is not None else other.first,
        )


def rounded(
    value: npt.NDArray[np.floating], out: Affine, slack: npt.NDArray[np.floating] | float = FLOAT_SLACK
) -> Prediction:
    """Codes of values that already contain the zero point: QLinearAdd, QLinearMul, QLinearAveragePool.

    The tie goes to the even *code*; QuantizeLinear and requantization round before they add the zero point, so that
    there the tie goes to the even distance from the zero point.
    """
    codes = np.clip(np.rint(value), out.low, out.high).astype(np.int32)
    return Prediction(codes, value, slack)


def rounded_then_shifted(
    distance: npt.NDArray[np.floating], out: Affine, slack: npt.NDArray[np.floating] | float = FLOAT_SLACK
) -> Prediction:
    """Codes of distances from the zero point, in codes: requantization, QuantizeLinear."""
    zero = along_axis(out.zero_point, distance.ndim, out.axis)
    codes = np.clip(np.rint(distance), out.low - zero, out.high - zero).astype(np.int32) + zero
    return Prediction(codes.astype(np.int32), distance + zero.astype(distance.dtype), slack)


def quantized(
    real: npt.NDArray[np.floating], out: Affine, slack: npt.NDArray[np.floating] | float = FLOAT_SLACK
) -> Prediction:
    """QuantizeLinear of float values: ``round(real / scale) + zero_point`` with a true float32 division."""
    scale = along_axis(out.scale, real.ndim, out.axis)
    return rounded_then_shifted(np.asarray(np.asarray(real, np.float32) / scale, np.float32), out, slack)


def multiplier(x: Affine, w: Affine, y: Affine, alpha: float = 1.0) -> npt.NDArray[np.float32]:
    """The factor of a requantization, () or (C,) float32, with onnxruntime's order of roundings."""
    product = np.float32(alpha) * x.scale * w.scale if alpha != 1.0 else x.scale * w.scale
    return np.asarray(product / y.scale, np.float32)


def requantize(sums: npt.NDArray[np.int32], factor: npt.NDArray[np.float32], out: Affine, axis: int) -> Prediction:
    """Codes of int32 sums.

    Args:
        sums: int32 accumulators, the bias included.
        factor: () or (C,) float32, from :func:`multiplier`.
        out: Numbers of the output, one scale.
        axis: Axis of ``sums`` along which ``factor`` varies.

    >>> y = Affine(np.float32(1), np.int32(10), np.dtype(np.uint8))
    >>> requantize(np.int32([[-400, 3, 5]]), np.float32(0.5), y, 1).codes.tolist()
    [[0, 12, 12]]
    """
    product = sums.astype(np.float32) * along_axis(factor, sums.ndim, axis if factor.ndim else None)
    return rounded_then_shifted(product.astype(np.float32), out)


def wrapped(sums: npt.NDArray[np.floating] | Codes, bias: Codes | None) -> npt.NDArray[np.int32]:
    """Exact integer sums plus a broadcastable bias as int32, wrapped around like the machine's addition."""
    total = sums.astype(np.int64)
    if bias is not None:
        total += bias.astype(np.int64)
    return total.astype(np.int32)


def compare_codes(predicted: Prediction, observed: Codes) -> Agreement:
    """Compares observed codes with a prediction; see the module for what a tie is.

    Raises:
        ValueError: If the shapes differ.
    """
    if predicted.codes.shape != observed.shape:
        raise ValueError(f"predicted shape {predicted.codes.shape}, observed shape {observed.shape}")
    difference = observed.astype(np.int32) - predicted.codes
    where = np.nonzero(difference)
    if where[0].size == 0:
        return Agreement(codes=observed.size)
    delta = difference[where]
    boundary = np.minimum(predicted.codes[where], observed[where].astype(np.int32)) + 0.5
    slack = np.broadcast_to(np.asarray(predicted.slack), observed.shape)[where]
    tie = (np.abs(delta) == 1) & (np.abs(predicted.value[where].astype(np.float64) - boundary) <= slack)
    first = None
    if not tie.all():
        at = int(np.argmin(tie))
        index = tuple(int(axis[at]) for axis in where)
        first = (index, int(predicted.codes[index]), int(observed[index]))
    return Agreement(
        codes=observed.size,
        ties=int(tie.sum()),
        mismatches=int((~tie).sum()),
        worst=int(np.abs(delta).max()),
        first=first,
    )
