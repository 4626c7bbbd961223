"""Quantization with a rounding border that sees the value and the residuals of its neighbours: BorderQuantize.

    r  = clip(x / scale, qmin - zero_point, qmax - zero_point)         n = floor(r)        f = r - n
    d  = round((round(r) - r) * 128)                                   residuals, integers in [-64, 64]
    W  = sum over i, j of window[c, i, j] * d[c, y + i, x + j]         depthwise, zero padded: integers
    t  = clip(round(left_scale * left d), -127, 127)       V = right t    at one point, across channels: integers
    b  = border[c, n] + W * window_scale[c] + V * right_scale[c]
    q  = n + zero_point + (1 if f > max(b, 0) else 0)

So a value is rounded up if its fraction is above the border; the code is always that of floor or of ceil. A border of
one half without neighbours is rounding to nearest, ties down. All sums are of small integers, which float32 holds
exactly in any order, and the rest is single float32 operations: every implementation gives the same bits.

The border per integer part is a table, made once by :func:`sigmoid_border` or in any other way. How coefficients follow
from a layer's weights is derived in "A border that sees rounding residuals" (docs/operators/BorderQuantize.md).
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.law_adaptive import check_code_range

Real = npt.NDArray[np.float32]
Small = npt.NDArray[np.int8]

# Residuals are counted in units of 1 / 128 code: they fit 7 bits and a sign bit, and 8-bit kernels cannot saturate.
RESIDUAL_UNITS = 128
# With at most this much weight a window's sum fits int16: 511 * 64 < 2^15.
WINDOW_WEIGHT = 511
_COEFFICIENT = 127
# float32 holds sums of integers up to 2^24 exactly: 127 * 64 * 2064 and 127 * 127 * 1040.
LARGEST_CHANNELS = 2064
LARGEST_RANK = 1040


@dataclasses.dataclass(frozen=True, eq=False)
class Border:
    """All numbers of BorderQuantize.

    Attributes:
        scale: () float32, > 0.
        zero_point: () uint8.
        border: (C, 1) float32, or (C, qmax - qmin + 1): one per integer part.
        window: (C, kh, kw) int8 in ``[-127, 127]``, odd sizes, at most 511 in absolute sum per channel.
        window_scale: (C,) float32.
        left: (R, C) int8 in ``[-127, 127]``, R may be 0.
        left_scale: (R,) float32.
        right: (C, R) int8 in ``[-127, 127]``.
        right_scale: (C,) float32.
        qmin: Smallest code, >= 0.
        qmax: Largest code, <= 255.

    Raises:
        ModelError: If the parts do not fit together.
    """

    scale: Real
    zero_point: npt.NDArray[np.uint8]
    border: Real
    window: Small
    window_scale: Real
    left: Small
    left_scale: Real
    right: Small
    right_scale: Real
    qmin: int
    qmax: int

    def __post_init__(self) -> None:
        check_code_range(self.qmin, self.qmax)
        self._check_shapes()
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ModelError("the scale must be finite and positive", where="input scale", found=str(self.scale))
        for name in ("border", "window_scale", "left_scale", "right_scale"):
            if not np.isfinite(getattr(self, name)).all():
                raise ModelError("a coefficient of the border is not finite", where=f"input {name}")
        for name in ("window", "left", "right"):
            if (getattr(self, name) == -128).any():
                raise ModelError("a coefficient of the border is below -127", where=f"input {name}")
        weights = np.abs(self.window.astype(np.int32)).sum(axis=(1, 2))
        if weights.max(initial=0) > WINDOW_WEIGHT:
            raise ModelError(
                "the coefficients of a window are too large",
                where="input window",
                expected=f"an absolute sum of at most {WINDOW_WEIGHT} per channel",
                found=str(int(weights.max())),
            )

    def _check_shapes(self) -> None:
        channels, rank = len(self.window) if self.window.ndim == 3 else 0, len(self.left) if self.left.ndim == 2 else 0
        borders = self.border.shape[1] if self.border.ndim == 2 else 0
        kernel = self.window.shape[1:] if self.window.ndim == 3 else (0, 0)
        shapes = {
            "scale": (),
            "zero_point": (),
            "border": (channels, borders),
            "window": (channels, *kernel),
            "window_scale": (channels,),
            "left": (rank, channels),
            "left_scale": (rank,),
            "right": (channels, rank),
            "right_scale": (channels,),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            integer = {"zero_point": np.uint8, "window": np.int8, "left": np.int8, "right": np.int8}
            dtype = np.dtype(integer.get(name, np.float32))
            if array.dtype != dtype or array.shape != shape:
                raise ModelError(
                    "the parts of a border do not fit together",
                    where=f"input {name}",
                    expected=f"{dtype} of shape {shape}",
                    found=f"{array.dtype} of shape {array.shape}",
                )
        if borders not in (1, self.qmax - self.qmin + 1):
            raise ModelError(
                "there is one border per channel, or one per channel and integer part",
                where="input border",
                expected=f"1 or {self.qmax - self.qmin + 1} columns",
                found=str(borders),
            )
        if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
            raise ModelError("a window has odd sizes", where="input window", found=f"shape {self.window.shape}")
        if not 1 <= channels <= (LARGEST_CHANNELS if rank else channels) or rank > LARGEST_RANK:
            raise ModelError(
                "the coefficients across channels are too many for exact sums",
                where="input left",
                expected=f"at most {LARGEST_CHANNELS} channels and rank {LARGEST_RANK}",
                found=f"{channels} channels and rank {rank}",
            )


def border_quantize(x: Real, settings: Border) -> npt.NDArray[np.uint8]:
    """BorderQuantize.

    Args:
        x: (N, C), (N, C, L) or (N, C, H, W) float32, finite. A window slides along the last two dimensions, where
            those that are missing have size 1 (L is the width).
        settings: All numbers.

    Returns:
        uint8 codes of the shape of ``x``.

    Raises:
        ModelError: If the shape of ``x`` does not fit.

    >>> none = np.zeros((0, 1), np.int8), np.zeros(0, np.float32), np.zeros((1, 0), np.int8), np.float32([0])
    >>> window = np.zeros((1, 1, 1), np.int8), np.float32([0])
    >>> b = Border(np.float32(1), np.uint8(0), np.float32([[0.25]]), *window, *none, 0, 15)
    >>> border_quantize(np.float32([[1.2], [1.3], [99]]), b).tolist()
    [[1], [2], [15]]
    """
    channels = len(settings.window)
    if x.ndim not in (2, 3, 4) or x.shape[1] != channels:
        raise ModelError(
            "BorderQuantize reads (N, C), (N, C, L) or (N, C, H, W)",
            where="input x",
            expected=f"{channels} channels",
            found=f"shape {x.shape}",
        )
    image = x.reshape(*x.shape[:2], *([1] * (4 - x.ndim)), *x.shape[2:])
    zero = np.float32(settings.zero_point)
    low, high = np.float32(settings.qmin) - zero, np.float32(settings.qmax) - zero
    ratio = np.minimum(np.maximum(np.asarray(image / settings.scale, np.float32), low), high)
    below = np.floor(ratio)
    residual = np.rint((np.rint(ratio) - ratio) * np.float32(RESIDUAL_UNITS)).astype(np.int32)
    level = (below - low).astype(np.intp) if settings.border.shape[1] > 1 else np.zeros(image.shape, np.intp)
    border = settings.border[np.arange(channels)[:, None, None], level]
    border = border + _windowed(residual, settings.window).astype(np.float32) * _per_channel(settings.window_scale)
    border = border + _across(residual, settings).astype(np.float32) * _per_channel(settings.right_scale)
    up = ratio - below > np.maximum(border, np.float32(0))
    return (below + zero + up).astype(np.uint8).reshape(x.shape)


def sigmoid_border(coefficients: npt.NDArray[np.floating], qmin: int, qmax: int) -> Real:
    """The table of a border that is a quadratic in a sigmoid (AQuant-style, reconstructed from its abstract).

        border[c, n] = 1 / (1 + exp(-(b0 + b1 u + b2 u^2)))        u = n / (qmax - qmin), n = 0 .. qmax - qmin

    Args:
        coefficients: (C, 3): b0, b1, b2 of each channel. Zeros mean rounding to nearest.
        qmin: Smallest code.
        qmax: Largest code.

    Returns:
        (C, qmax - qmin + 1) float32 in (0, 1).

    >>> sigmoid_border(np.float64([[0, 0, 0], [0, 1, 0]]), 0, 2).round(1).tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.6000000238418579, 0.699999988079071]]
    """
    check_code_range(qmin, qmax)
    u = np.arange(qmax - qmin + 1) / (qmax - qmin)
    b = np.asarray(coefficients, np.float64)
    z = b[:, :1] + b[:, 1:2] * u + b[:, 2:3] * u * u
    return (1.0 / (1.0 + np.exp(-z))).astype(np.float32)


def _windowed(residual: npt.NDArray[np.int32], window: Small) -> npt.NDArray[np.int32]:
    """Depthwise sums of residuals (N, C, H, W), zero padded."""
    total = np.zeros(residual.shape, np.int32)
    kernel = window.shape[1:]
    before = [k // 2 for k in kernel]
    padded = np.pad(residual, ((0, 0), (0, 0), *((b, b) for b in before)))
    height, width = residual.shape[2:]
    for i, j in itertools.product(*(range(k) for k in kernel)):
        factor = window[:, i, j].astype(np.int32)[:, None, None]
        total += padded[:, :, i : i + height, j : j + width] * factor
    return total


def _across(residual: npt.NDArray[np.int32], settings: Border) -> npt.NDArray[np.int32]:
    """Low-rank sums across channels, point by point."""
    samples, channels, *size = residual.shape
    points = residual.reshape(samples, channels, math.prod(size))
    sums = np.matmul(settings.left.astype(np.int32), points)
    rounded = np.rint(sums.astype(np.float32) * settings.left_scale[:, None])
    inner = np.clip(rounded, -_COEFFICIENT, _COEFFICIENT).astype(np.int32)
    result: npt.NDArray[np.int32] = np.matmul(settings.right.astype(np.int32), inner).reshape(residual.shape)
    return result


def _per_channel(values: Real) -> Real:
    return values[:, None, None]
