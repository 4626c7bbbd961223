"""From real coefficients of a rounding border to the integers that BorderQuantize reads.

With residuals ``delta = round(r) - r``, a real border is

    b[c] = border + sum over i, j of coefficient[c, i, j] * delta[c, y + i, x + j] + sum over k of right[c, k] * t[k]
    t[k] = sum over c of left[k, c] * delta[c]

The operator counts residuals in units of 1 / 128 and coefficients in int8; the error of a coefficient is at most half a
unit of its channel's scale.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.law_border import RESIDUAL_UNITS, WINDOW_WEIGHT

Floats = npt.NDArray[np.floating]
Codes = tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]

_LARGEST = 127
# Residuals are spread evenly over [-1/2, 1/2]: their root mean square. Sums beyond six of it are clipped.
_RESIDUAL_RMS = 1 / math.sqrt(12)
_SPREAD = 6.0


def window_codes(coefficients: Floats) -> Codes:
    """Window and scale of a depthwise neighbourhood.

    Args:
        coefficients: (C, kh, kw), odd sizes, border per unit of a neighbour's residual.

    Returns:
        (C, kh, kw) int8 within the operator's limits, and (C,) float32.

    >>> window, scale = window_codes(np.float64([[[0.05, 0, -0.2]]]))
    >>> window.tolist(), round(float(scale[0]) * 128 * 127, 6)
    ([[[32, 0, -127]]], 0.2)
    """
    size = np.abs(np.asarray(coefficients, np.float64))
    taps = math.prod(size.shape[1:])
    # Each coefficient may be rounded up by one half.
    unit = np.maximum(size.max(axis=(1, 2)) / _LARGEST, size.sum(axis=(1, 2)) / (WINDOW_WEIGHT - taps / 2))
    return _codes(np.asarray(coefficients, np.float64), unit, RESIDUAL_UNITS)


def across_codes(left: Floats, right: Floats) -> tuple[Codes, Codes]:
    """Both factors of a low-rank matrix across channels.

    Args:
        left: (R, C).
        right: (C, R).

    Returns:
        ``left`` and ``left_scale``, ``right`` and ``right_scale`` of the operator.
    """
    first, second = np.asarray(left, np.float64), np.asarray(right, np.float64)
    unit = np.abs(first).max(axis=1, initial=0.0) / _LARGEST
    codes, _ = _codes(first, unit, RESIDUAL_UNITS)
    # What one step of the int8 value between the two products stands for.
    reach = np.minimum(_SPREAD * _RESIDUAL_RMS * np.linalg.norm(first, axis=1), np.abs(first).sum(axis=1) / 2)
    step = _positive(reach) / _LARGEST
    left_scale = (_positive(unit) / RESIDUAL_UNITS / step).astype(np.float32)
    absorbed = second * step
    return (codes, left_scale), _codes(absorbed, np.abs(absorbed).max(axis=1, initial=0.0) / _LARGEST, 1)


def _codes(values: npt.NDArray[np.float64], unit: npt.NDArray[np.float64], divisor: int) -> Codes:
    unit = _positive(unit)
    codes = np.rint(values / unit.reshape(-1, *([1] * (values.ndim - 1))))
    return np.clip(codes, -_LARGEST, _LARGEST).astype(np.int8), (unit / divisor).astype(np.float32)


def _positive(unit: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Coefficients that are all 0 keep a harmless unit."""
    return np.where(unit > 0, unit, 1.0)
