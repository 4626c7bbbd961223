"""The NumPy law of uniform quantization; every other implementation is tested against it.

    quantize    q = clip(round(x / scale) + zero_point, qmin, qmax)
    dequantize  x = (q - zero_point) * scale
    simulate    dequantize(quantize(x))

ONNX QuantizeLinear and DequantizeLinear (opset 19) with float32 arithmetic and a true division, rounding
half to even. ``scale`` and ``zero_point`` have shape () or, with ``axis``, (C,).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", bound=np.generic)
FloatArray = npt.NDArray[np.floating]


def along_axis(values: npt.NDArray[T], rank: int, axis: int | None) -> npt.NDArray[T]:
    """Reshapes (C,) values so that they broadcast along ``axis`` of a tensor of ``rank`` dimensions."""
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def quantize(
    x: npt.NDArray[np.floating],
    scale: npt.NDArray[np.floating],
    zero_point: npt.NDArray[np.integer],
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    half_away: bool = False,
) -> npt.NDArray[np.int32]:
    """Codes of ``x``.

    Args:
        x: Any shape, float32.
        scale: () or (C,), float32, > 0, units of ``x`` per step.
        zero_point: () or (C,), integer in ``[qmin, qmax]``.
        qmin: Smallest code.
        qmax: Largest code.
        axis: Channel axis of ``x`` along which scale and zero point vary.
        half_away: Round ties away from zero (EasyQuant's engine) instead of to even (ONNX).

    Returns:
        int32 codes of the shape of ``x``.

    >>> quantize(np.float32([-1, 0.5, 1.5, 9]), np.float32(1), np.int32(0), qmin=-2, qmax=7).tolist()
    [-1, 0, 2, 7]
    """
    s = along_axis(np.asarray(scale, np.float32), x.ndim, axis)
    z = along_axis(np.asarray(zero_point, np.int32), x.ndim, axis)
    r = np.asarray(x, np.float32) / s
    r = np.copysign(np.floor(np.abs(r) + np.float32(0.5)), r) if half_away else np.rint(r)
    # Saturate in float first: huge quotients do not fit int32.
    r = np.clip(r, np.float32(qmin) - z, np.float32(qmax) - z)
    codes: npt.NDArray[np.int32] = r.astype(np.int32) + z
    return codes


def simulate(
    x: npt.NDArray[np.floating],
    scale: npt.NDArray[np.floating],
    zero_point: npt.NDArray[np.integer],
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    half_away: bool = False,
) -> npt.NDArray[np.float32]:
    """``dequantize(quantize(x))`` without the detour through integers; the same bits, several times faster.

    The arguments are those of :func:`quantize`.

    >>> simulate(np.float32([-1, 0.6, 9]), np.float32(0.5), np.int32(0), qmin=-2, qmax=7).tolist()
    [-1.0, 0.5, 3.5]
    """
    s = along_axis(np.asarray(scale, np.float32), x.ndim, axis)
    z = along_axis(np.asarray(zero_point, np.int32), x.ndim, axis)
    r: npt.NDArray[np.float32] = np.asarray(np.divide(x, s, dtype=np.float32))
    if half_away:
        r = np.copysign(np.floor(np.abs(r) + np.float32(0.5)), r)
    else:
        np.rint(r, out=r)
    # Differences of codes are small integers: float32 holds them exactly.
    np.clip(r, (qmin - z).astype(np.float32), (qmax - z).astype(np.float32), out=r)
    r += np.float32(0.0)  # -0 becomes 0, as it does on the way through integers
    np.multiply(r, s, out=r)
    return r


def dequantize(
    codes: npt.NDArray[np.integer],
    scale: npt.NDArray[np.floating],
    zero_point: npt.NDArray[np.integer],
    *,
    axis: int | None = None,
) -> npt.NDArray[np.float32]:
    """Real values of ``codes``; the shapes are those of :func:`quantize`.

    >>> dequantize(np.int32([0, 3]), np.float32(0.5), np.int32(1)).tolist()
    [-0.5, 1.0]
    """
    s = along_axis(np.asarray(scale, np.float32), codes.ndim, axis)
    z = along_axis(np.asarray(zero_point, np.int32), codes.ndim, axis)
    return ((codes.astype(np.int32) - z).astype(np.float32) * s).astype(np.float32)
