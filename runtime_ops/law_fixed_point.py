"""Requantization with an int32 multiplier and a shift, as microcontrollers and DSPs do it (TFLite, CMSIS-NN).

A real factor is written as a 31-bit mantissa and a power of two, and an int32 sum is multiplied in two roundings::

    factor = multiplier * 2^(shift - 31)                                multiplier in [2^30, 2^31)
    high   = floor((sum * 2^max(shift, 0) * multiplier + 2^30) / 2^31)  to nearest, ties upwards
    value  = high / 2^max(-shift, 0)                                    to nearest, ties away from zero
    code   = clip(value + zero_point, low, high_code)

This is the arithmetic of TFLite's ``MultiplyByQuantizedMultiplier`` (``tensorflow/lite/kernels/internal/common.h``,
built without ``TFLITE_SINGLE_ROUNDING``) and of CMSIS-NN's ``arm_nn_requantize`` (``arm_nnsupportfunctions.h``). Two
roundings make a code differ by one from the float32 factor of onnxruntime's kernels now and then, next to ties.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.law import along_axis

Int32Array = npt.NDArray[np.int32]

_INT32 = np.iinfo(np.int32)
# Smaller factors than 2^-32 move no int32 sum: TFLite writes them as zero.
_SMALLEST_SHIFT = -31
_LARGEST_SHIFT = 30


def quantize_multiplier(factor: npt.ArrayLike) -> tuple[Int32Array, Int32Array]:
    """Multiplier and shift of a factor (TFLite's ``QuantizeMultiplier``).

    Args:
        factor: Any shape, >= 0 and below 2^30; output steps per step of the accumulator.

    Returns:
        ``(multiplier, shift)`` of the shape of ``factor``, int32; both 0 for a factor below 2^-32.

    Raises:
        ValueError: If a factor is negative, not finite, or too large.

    >>> [int(number) for number in quantize_multiplier(0.75)]
    [1610612736, 0]
    >>> [int(number) for number in quantize_multiplier(0.01)]
    [1374389535, -6]
    """
    real = np.asarray(factor, np.float64)
    if not np.isfinite(real).all() or (real < 0).any() or (real >= 2.0**_LARGEST_SHIFT).any():
        raise ValueError("a fixed-point factor must be finite, at least 0 and below 2^30")
    mantissa, exponent = np.frexp(real)
    multiplier = np.floor(mantissa * 2.0**31 + 0.5).astype(np.int64)
    exponent = np.where(multiplier == 2**31, exponent + 1, exponent)
    multiplier = np.where(multiplier == 2**31, 2**30, multiplier)
    tiny = exponent < _SMALLEST_SHIFT
    return (
        np.where(tiny, 0, multiplier).astype(np.int32),
        np.where(tiny, 0, exponent).astype(np.int32),
    )


def multiply_by_quantized_multiplier(sums: Int32Array, multiplier: Int32Array, shift: Int32Array) -> Int32Array:
    """``sums * multiplier * 2^(shift - 31)`` in two roundings; see the module.

    A left shift saturates where it leaves int32; in TFLite and CMSIS-NN that would be undefined.

    Args:
        sums: int32, any shape.
        multiplier: int32, broadcasts with ``sums``.
        shift: int32 from -31 to 30, broadcasts with ``sums``.

    Returns:
        int32 of the broadcast shape.

    >>> multiply_by_quantized_multiplier(np.int32([10, -10]), *quantize_multiplier(0.25)).tolist()
    [3, -3]
    """
    left = np.maximum(shift, 0).astype(np.int64)
    right = np.maximum(-shift, 0).astype(np.int64)
    shifted = np.clip(sums.astype(np.int64) << left, _INT32.min, _INT32.max)
    high = (shifted * multiplier.astype(np.int64) + (1 << 30)) >> 31
    mask = (np.int64(1) << right) - 1
    threshold = (mask >> 1) + (high < 0)
    value = (high >> right) + ((high & mask) > threshold)
    products: Int32Array = np.clip(value, _INT32.min, _INT32.max).astype(np.int32)
    return products


def requantize_fixed_point(
    sums: Int32Array, multiplier: Int32Array, shift: Int32Array, zero_point: int, low: int, high: int, *, axis: int
) -> Int32Array:
    """Codes of int32 sums.

    Args:
        sums: int32 accumulators, the bias included.
        multiplier: () or (C,) int32.
        shift: The shape of ``multiplier``.
        zero_point: Of the output.
        low: Smallest code, a Relu or Clip behind the layer included.
        high: Largest code.
        axis: Axis of ``sums`` along which the multiplier varies.

    Returns:
        int32 codes in ``[low, high]``.

    >>> requantize_fixed_point(np.int32([[-400, 3, 5]]), *quantize_multiplier(0.5), 10, 0, 255, axis=1).tolist()
    [[0, 12, 13]]
    """
    channel = axis if np.ndim(multiplier) else None
    value = multiply_by_quantized_multiplier(
        sums, along_axis(multiplier, sums.ndim, channel), along_axis(shift, sums.ndim, channel)
    )
    codes: Int32Array = np.clip(value.astype(np.int64) + zero_point, low, high).astype(np.int32)
    return codes
