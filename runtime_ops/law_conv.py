"""Convolutions from codes to codes: QLinearConv, and the float Conv and ConvTranspose between Q and DQ.

    sum[n, o, p] = bias[o] + sum over c, k of (x[n, c, p * stride + k * dilation - pad] - z_x) * (w[o, c, k] - z_w)

Padding contributes nothing (onnxruntime pads with the zero point). Sums are exact: they are collected tap by tap
with float matrix products whose every partial sum is an integer below 2^24 (float32) or 2^53 (float64). Any
number of spatial axes, groups, strides and dilations; memory is that of one input and one output.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
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

_UNIT = 2.0**-24  # Relative error of one float32 operation.


@dataclasses.dataclass(frozen=True)
class ConvAttributes:
    """Attributes of Conv with their defaults filled in.

    Attributes:
        kernel: Kernel sizes of the spatial axes.
        strides: Strides.
        dilations: Dilations.
        pads: (before, after) of each spatial axis.
        group: Number of groups.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    group: int = 1

    @classmethod
    def of(cls, attributes: Mapping[str, Any], kernel: Sequence[int], spatial: Sequence[int]) -> ConvAttributes:
        """Reads ONNX attributes; ``auto_pad`` is resolved for an input of the given spatial size.

        >>> ConvAttributes.of({"auto_pad": "SAME_UPPER", "strides": [2]}, [3], [7]).pads
        ((1, 1),)
        """
        rank = len(kernel)
        strides = tuple(int(v) for v in attributes.get("strides") or [1] * rank)
        dilations = tuple(int(v) for v in attributes.get("dilations") or [1] * rank)
        flat = [int(v) for v in attributes.get("pads") or [0] * (2 * rank)]
        pads = tuple(zip(flat[:rank], flat[rank:], strict=True))
        auto = str(attributes.get("auto_pad", "NOTSET"))
        if auto.startswith("SAME"):
            totals = [
                max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
                for size, s, k, d in zip(spatial, strides, kernel, dilations, strict=True)
            ]
            pads = tuple((t - t // 2, t // 2) if auto == "SAME_LOWER" else (t // 2, t - t // 2) for t in totals)
        elif auto == "VALID":
            pads = ((0, 0),) * rank
        return cls(tuple(int(k) for k in kernel), strides, dilations, pads, int(attributes.get("group", 1)))

    def output_size(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output of Conv."""
        return tuple(
            (size + sum(pad) - (k - 1) * d - 1) // s + 1
            for size, pad, k, d, s in zip(spatial, self.pads, self.kernel, self.dilations, self.strides, strict=True)
        )


def exact_float(x: npt.NDArray[np.int32], w: npt.NDArray[np.int32]) -> np.dtype[np.floating]:
    """The narrowest float type in which sums of ``x * w`` over all axes but the first of ``w`` are exact."""
    largest = int(np.abs(x).max(initial=0)) * int(np.abs(w).reshape(w.shape[0], -1).sum(axis=1).max(initial=0))
    return np.dtype(np.float32 if largest < 2**24 else np.float64)


def conv_sums(
    x: npt.NDArray[Any], w: npt.NDArray[Any], attributes: ConvAttributes, dtype: np.dtype[np.floating] | None = None
) -> npt.NDArray[np.floating]:
    """Sums of a convolution.

    Args:
        x: (N, C, *spatial), zero point subtracted.
        w: (O, C / group, *kernel), zero point subtracted.
        attributes: Strides, dilations, pads, groups.
        dtype: Type of the sums; None for the narrowest exact one, for which both arrays must be integers.

    Returns:
        (N, O, *output spatial).
    """
    dtype = dtype or exact_float(x, w)
    batch, channels, *spatial = x.shape
    group, inner, outer = attributes.group, w.shape[1], w.shape[0] // attributes.group
    size = attributes.output_size(spatial)
    points = math.prod(size)
    padded = np.zeros((batch, channels, *(n + sum(p) for n, p in zip(spatial, attributes.pads, strict=True))), dtype)
    inside = _spatial(slice(p[0], p[0] + n) for n, p in zip(spatial, attributes.pads, strict=True))
    padded[inside] = x
    weight = w.astype(dtype).reshape(group, outer, inner, *attributes.kernel)
    total = np.zeros((batch, group, outer, points), dtype)
    for tap in itertools.product(*(range(k) for k in attributes.kernel)):
        window = _spatial(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, attributes.dilations, size, attributes.strides, strict=True)
        )
        seen = padded[window].reshape(batch, group, inner, points)
        factor = weight[_tap(tap)]
        # A matrix product with one inner channel (depthwise) is an outer product: broadcasting is faster.
        total += seen * factor if inner == 1 else np.matmul(factor, seen)
    return total.reshape(batch, group * outer, *size)


def qlinear_conv(
    x: Codes, w: Codes, bias: Codes | None, xq: Affine, wq: Affine, yq: Affine, attributes: Mapping[str, Any]
) -> Prediction:
    """QLinearConv.

    Args:
        x: (N, C, *spatial) codes.
        w: (O, C / group, *kernel) codes.
        bias: (O,) int32 codes of scale ``s_x * s_w`` or None.
        xq: Numbers of ``x``, one scale.
        wq: Numbers of ``w``: one scale, or one per output channel (axis 0).
        yq: Numbers of the output, one scale.
        attributes: Attributes of the ONNX node.
    """
    settings = ConvAttributes.of(attributes, w.shape[2:], x.shape[2:])
    sums = wrapped(conv_sums(xq.centered(x), wq.centered(w), settings), _per_channel(bias, x.ndim))
    return requantize(sums, multiplier(xq, wq, yq), yq, axis=1)


def float_conv(
    x: Codes,
    w: Codes,
    bias: npt.NDArray[np.floating] | None,
    xq: Affine,
    wq: Affine,
    yq: Affine,
    attributes: Mapping[str, Any],
) -> Prediction:
    """A Conv that onnxruntime runs in float32 between DequantizeLinear and QuantizeLinear.

    The value is exact; ``slack`` covers a float32 sum in any order: ``4 * sqrt(K) * 2^-24 * sum |x w|`` over the K
    terms of a sum.
    """
    settings = ConvAttributes.of(attributes, w.shape[2:], x.shape[2:])
    xi, wi = xq.centered(x), wq.centered(w)
    scale = xq.scale.astype(np.float64) * wq.scale.astype(np.float64)
    return _float_law(
        conv_sums(xi, wi, settings).astype(np.float64),
        conv_sums(np.abs(xi), np.abs(wi), settings).astype(np.float64),
        _per_channel(scale if scale.ndim else None, x.ndim, scale),
        _per_channel(bias, x.ndim),
        yq,
        math.prod(w.shape[1:]),
    )


def float_conv_transpose(
    x: Codes,
    w: Codes,
    bias: npt.NDArray[np.floating] | None,
    xq: Affine,
    wq: Affine,
    yq: Affine,
    attributes: Mapping[str, Any],
) -> Prediction:
    """ConvTranspose, which onnxruntime runs in float32 between DequantizeLinear and QuantizeLinear.

    Args:
        x: (N, C, *spatial) codes.
        w: (C, O / group, *kernel) codes.
        bias: (O,) float32 or None.
        xq: Numbers of ``x``.
        wq: Numbers of ``w``: one scale, or one per output channel (axis 1; with one group only).
        yq: Numbers of the output.
        attributes: Attributes of the ONNX node.
    """
    xi, wi = xq.centered(x), wq.centered(w)
    scale = xq.scale.astype(np.float64) * wq.scale.astype(np.float64)
    return _float_law(
        conv_transpose_sums(xi, wi, attributes),
        conv_transpose_sums(np.abs(xi), np.abs(wi), attributes),
        _per_channel(scale if scale.ndim else None, x.ndim, scale),
        _per_channel(bias, x.ndim),
        yq,
        w.shape[0] * math.prod(w.shape[2:]),
    )


def conv_transpose_sums(
    x: npt.NDArray[Any], w: npt.NDArray[Any], attributes: Mapping[str, Any]
) -> npt.NDArray[np.float64]:
    """Sums of a transposed convolution, float64: each input point adds its kernel to the output."""
    batch, channels, *spatial = x.shape
    kernel, group = w.shape[2:], int(attributes.get("group", 1))
    base = ConvAttributes.of({**attributes, "auto_pad": "NOTSET"}, kernel, spatial)
    extra = [int(v) for v in attributes.get("output_padding") or [0] * len(kernel)]
    full = [
        (n - 1) * s + (k - 1) * d + 1 + e
        for n, s, k, d, e in zip(spatial, base.strides, kernel, base.dilations, extra, strict=True)
    ]
    kept = _kept(attributes, base, spatial, full)
    inner, outer = channels // group, w.shape[1]
    flat = x.astype(np.float64).reshape(batch, group, inner, -1)
    weight = w.astype(np.float64).reshape(group, inner, outer, *kernel)
    reach = [max(size, begin + count) for size, (begin, count) in zip(full, kept, strict=True)]
    total = np.zeros((batch, group * outer, *reach))
    for tap in itertools.product(*(range(k) for k in kernel)):
        window = _spatial(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, base.dilations, spatial, base.strides, strict=True)
        )
        factor = weight[_tap(tap)].transpose(0, 2, 1)
        total[window] += np.matmul(factor, flat).reshape(batch, -1, *spatial)
    return total[_spatial(slice(begin, begin + size) for begin, size in kept)]


def _kept(
    attributes: Mapping[str, Any], base: ConvAttributes, spatial: Sequence[int], full: Sequence[int]
) -> list[tuple[int, int]]:
    """(first kept index, kept size) of each spatial axis of the untrimmed output; beyond it, there is the bias only."""
    wanted = attributes.get("output_shape")
    auto = str(attributes.get("auto_pad", "NOTSET"))
    if wanted is None and auto.startswith("SAME"):
        wanted = [n * s for n, s in zip(spatial, base.strides, strict=True)]
    if wanted is None:
        pads = ((0, 0),) * len(full) if auto == "VALID" else base.pads
        return [(p[0], size - sum(p)) for p, size in zip(pads, full, strict=True)]
    result = []
    for size, target in zip(full, list(wanted)[-len(full) :], strict=True):
        cut = max(0, size - int(target))
        # ONNX: the odd element is cut at the end for SAME_UPPER, at the begin otherwise.
        result.append((cut // 2 if auto == "SAME_UPPER" else cut - cut // 2, int(target)))
    return result


def _spatial(slices: Iterable[slice]) -> tuple[slice, ...]:
    """An index of all samples and channels and of the given spatial positions."""
    return (slice(None), slice(None), *slices)


def _tap(tap: tuple[int, ...]) -> Any:
    """An index of one kernel position: (group, outer, inner)."""
    return (..., *tap)


def _per_channel(values: npt.NDArray[Any] | None, rank: int, otherwise: Any = None) -> Any:
    """(O,) values shaped to broadcast along axis 1 of ``rank`` dimensions."""
    return otherwise if values is None else values.reshape(1, -1, *([1] * (rank - 2)))


def _float_law(
    sums: npt.NDArray[np.float64],
    magnitudes: npt.NDArray[np.float64],
    scale: Any,
    bias: Any,
    out: Affine,
    terms: int,
) -> Prediction:
    real, size = sums * scale, magnitudes * scale
    if bias is not None:
        real, size = real + bias, size + np.abs(bias)
    step = out.scale.astype(np.float64)
    return rounded_then_shifted(real / step, out, FLOAT_SLACK + 4 * math.sqrt(terms) * _UNIT * size / step)
