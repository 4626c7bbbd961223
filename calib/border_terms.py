"""The rounding border that follows from a layer's weights: :func:`border_of`.

Let the layer compute ``W q``, and let ``H = W'W`` over its quantized weights; for a convolution, H is the
autocorrelation of its kernel, the terms of input channel c at offset d being

    H[c, c', d] = sum over outputs m and taps k of W[m, c, k] * W[m, c', k + d]

With the residuals ``delta = round(r) - r`` of nearest rounding, one damped Jacobi step from nearest rounding towards
the least error of the output rounds ``r_i - a * sum over j != i of (H_ij / H_ii) delta_j`` to nearest. That is a border

    b_i = 1/2 + a * sum over j != i of (H_ij / H_ii) * delta_j

BorderQuantize takes two parts of the sum: the same channel (``window``: d != 0, c' = c) and the same place (``left``
and ``right``: d = 0, c' != c), the latter as the matrix of some rank nearest to it. A wrong coefficient of row i costs
``H_ii`` times its square, so the truncated singular value decomposition is that of ``H_ij / sqrt(H_ii)``. What the
low rank puts onto the diagonal is taken out again by the centre of the window.

*Strength.* All values are rounded at once, so that two neighbours may both answer the residual of the other. With
residuals that are spread evenly and independently, a value changes its direction with probability ``|u|``, u being its
shift; the sum of squares of its shift's coefficients is ``a^2 S``, ``S = rho * sum (H_ij / H_ii)^2``, with rho the
share of values that have residuals at all. To first order the expected error of the output, in units of nearest
rounding's, is

    1 - 2 a S + a^2 (S + 2 sqrt(6 / pi) S^1.5)      least, 1 - a S, for      a = 1 / (1 + 2 sqrt(6 / pi) sqrt(S))

where the last term is what simultaneous answers cost. So every channel has its own strength, and a layer its expected
gain. Real residuals are neither independent nor even: ``strength`` is somewhat less than 1 (docs/border.md).

*Strides.* An input position sees only the taps of its own phase. BorderQuantize knows no phases, and the constant
coefficient with the least expected cost is ``(sum over phases of H_ij) / (sum over phases of H_ii)``: the sums of all
phases run over all taps, so the formula is that of stride 1. *Groups*: W is zero between them. *Dilations* spread the
window.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import numpy.typing as npt

from postquant.calib.layers import Layer
from postquant.runtime_ops.border_coefficients import across_codes, window_codes
from postquant.runtime_ops.law_border import LARGEST_CHANNELS, LARGEST_RANK
from postquant.runtime_ops.rounding_border import RoundingBorder

Double = npt.NDArray[np.float64]

# See the module: 12 E|u| = 12 sqrt(2 / pi) sqrt(S / 12) for a Gaussian shift of variance a^2 S / 12.
_COUPLING = 2.0 * math.sqrt(6.0 / math.pi)
# Larger windows cost more than they bring: a 3x3 kernel with dilation 2 has a window of 9x9.
_LARGEST_WINDOW = 9


@dataclasses.dataclass(frozen=True)
class BorderTerms:
    """Which parts of the border are used, and how strongly.

    Attributes:
        near: Whether neighbours in the same channel count.
        across: Whether other channels at the same place count.
        strength: Multiple of the strength that follows from the terms themselves.
        density: Share of values that are neither clipped nor exact zeros, 0..1: the others have no residuals.
        energy: Share of the squared terms across channels that the low rank must keep, 0..1.
        largest_rank: Share of the channels that the rank never exceeds, 0..1; 1 for no limit.
    """

    near: bool = True
    across: bool = True
    strength: float = 0.7
    density: float = 0.5
    energy: float = 0.9
    largest_rank: float = 0.125


@dataclasses.dataclass(frozen=True, eq=False)
class LayerBorder:
    """The border of one layer's input.

    Attributes:
        border: It.
        gain: Expected fall of the output error that rounding this input causes, as a share of it, 0..1.
    """

    border: RoundingBorder
    gain: float


def border_of(layer: Layer, weight: npt.NDArray[np.floating], terms: BorderTerms) -> LayerBorder | None:
    """The border of a layer's input.

    Args:
        layer: A Conv with one or two spatial axes, a Gemm or a MatMul.
        weight: Its quantized weights, dequantized, in the tensor's own layout.
        terms: What is used.

    Returns:
        The border, or None where nothing is left of it: the layer has no such terms (a depthwise 1x1 convolution), or
        too many channels for exact sums.
    """
    taps = kernel_taps(layer, np.asarray(weight, np.float64))
    window = _window(layer, taps) if terms.near else np.zeros((layer.in_channels, 1, 1))
    left, right = np.zeros((0, layer.in_channels)), np.zeros((layer.in_channels, 0))
    if terms.across and not layer.depthwise and layer.in_channels <= LARGEST_CHANNELS:
        left, right = _across(taps, terms)
    diagonal = np.einsum("cr,rc->c", right, left)
    squares = np.square(window).sum(axis=(1, 2)) + np.square(right @ left).sum(axis=1) - np.square(diagonal)
    squares = terms.density * np.maximum(squares, 0.0)
    best = 1.0 / (1.0 + _COUPLING * np.sqrt(squares))
    own = np.einsum("gmcij,gmcij->gc", taps, taps).reshape(-1)
    gain = float(_ratio(np.sum(own * best * squares), np.sum(own)))
    strength = terms.strength * best
    window[:, window.shape[1] // 2, window.shape[2] // 2] -= diagonal
    window, right = strength[:, np.newaxis, np.newaxis] * window, strength[:, np.newaxis] * right
    if not window.any() and not len(left):
        return None
    window_integers, window_scale = window_codes(window)
    (left_codes, left_scale), (right_codes, right_scale) = across_codes(left, right)
    half = np.full((layer.in_channels, 1), 0.5, np.float32)
    parts = (window_integers, window_scale, left_codes, left_scale, right_codes, right_scale)
    return LayerBorder(RoundingBorder(half, *parts), gain)


def kernel_taps(layer: Layer, weight: Double) -> Double:
    """(G, M, C, kh, kw): the weights of each group; one tap for a Gemm or MatMul, one row for a 1-D convolution."""
    if layer.node.op_type != "Conv":
        return layer.matrix(weight).transpose(0, 2, 1)[..., np.newaxis, np.newaxis]
    kernel = (1,) * (4 - weight.ndim) + weight.shape[2:]
    return weight.reshape(layer.groups, weight.shape[0] // layer.groups, weight.shape[1], *kernel)


def _window(layer: Layer, taps: Double) -> Double:
    """(C, wh, ww): ``H_ij / H_ii`` of the same channel, 0 in the centre."""
    groups, _, channels, height, width = taps.shape
    dilation = _dilations(layer)
    reach = [min((k - 1) * d, _LARGEST_WINDOW // 2) for k, d in zip((height, width), dilation, strict=True)]
    result = np.zeros((groups * channels, 2 * reach[0] + 1, 2 * reach[1] + 1))
    own = np.einsum("gmcij,gmcij->gc", taps, taps).reshape(-1)
    for y, x in itertools.product(range(1 - height, height), range(1 - width, width)):
        place = reach[0] + y * dilation[0], reach[1] + x * dilation[1]
        inside = all(0 <= at < size for at, size in zip(place, result.shape[1:], strict=True))
        if (y, x) == (0, 0) or not inside:
            continue
        here = taps[..., max(-y, 0) : height - max(y, 0), max(-x, 0) : width - max(x, 0)]
        there = taps[..., max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)]
        result[:, *place] = _ratio(np.einsum("gmcij,gmcij->gc", here, there).reshape(-1), own)
    return result


def _across(taps: Double, terms: BorderTerms) -> tuple[Double, Double]:
    """(R, C) and (C, R), whose product is nearly ``H_ij / H_ii`` between the channels of one place."""
    groups, _, channels = taps.shape[:3]
    total = groups * channels
    matrix = np.zeros((total, total))
    for group in range(groups):
        flat = taps[group].transpose(1, 0, 2, 3).reshape(channels, -1)
        block = slice(group * channels, (group + 1) * channels)
        matrix[block, block] = flat @ flat.T
    own = np.sqrt(np.diag(matrix))
    np.fill_diagonal(matrix, 0.0)
    u, s, v = np.linalg.svd(_ratio(matrix, own[:, np.newaxis]))
    energy = np.cumsum(np.square(s))
    if energy[-1] <= 0:
        return np.zeros((0, total)), np.zeros((total, 0))
    rank = int(np.searchsorted(energy, terms.energy * energy[-1] * (1 - 1e-12))) + 1
    rank = min(rank, max(int(terms.largest_rank * total), 1), LARGEST_RANK)
    right = _ratio(u[:, :rank] * s[:rank], own[:, np.newaxis])
    return _signed(v[:rank], right)


def _signed(left: Double, right: Double) -> tuple[Double, Double]:
    """Singular vectors have no sign of their own: the largest entry of each is positive, on every machine."""
    rows = np.arange(len(left))
    sign = np.where(left[rows, np.argmax(np.abs(left), axis=1)] < 0, -1.0, 1.0) if len(left) else np.ones(0)
    return left * sign[:, np.newaxis], right * sign


def _dilations(layer: Layer) -> tuple[int, int]:
    given = layer.node.attributes.get("dilations")
    values = (1,) * 2 if given is None else tuple(given.as_ints())
    return values if len(values) == 2 else (1, values[0])


def _ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Double:
    """The quotient; 0 for a channel whose weights are all 0."""
    divisor = np.asarray(denominator, np.float64)
    return np.where(divisor > 0, np.asarray(numerator, np.float64) / np.where(divisor > 0, divisor, 1.0), 0.0)
