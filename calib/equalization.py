"""How far to equalize channels: factors from a noise model of the layers that read them.

With one step ``D = 2 max_c(s_c r_c) / (2^a - 1)`` for a tensor whose channels reach ``r_c``, and weight steps
``d_m = max_k |w_km / s_k| / (2^(b-1) - 1)``, the output error of the readers is, to first order,

    activations   D^2 / 12 * sum_c (|w_c| / s_c)^2            rounding of channel c, seen through its weights
    weights       sum_m d_m^2 / 12 * sum_c s_c^2 var(x_c)     what the bias correction leaves of rounding weights

``s_c = (R / r_c)^t`` with ``R = max r_c`` equalizes fully at t = 1 and not at all at t = 0. For depthwise readers the
weight term does not depend on s, so t = 1. Elsewhere the t with the smallest error is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from postquant.calib.channel_statistics import ChannelStatistics

DoubleArray = npt.NDArray[np.float64]

STRENGTHS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
# A channel that is hardly ever active would get an enormous factor for nothing.
LARGEST_FACTOR = 32.0


def full_factors(magnitude: DoubleArray) -> DoubleArray:
    """``R / r_c``, limited; (C,) factors of at least 1.

    >>> full_factors(np.array([4.0, 1.0, 0.0])).tolist()
    [1.0, 4.0, 32.0]
    """
    top = float(magnitude.max(initial=0.0))
    if top <= 0:
        return np.ones_like(magnitude)
    return np.minimum(top / np.maximum(magnitude, top / LARGEST_FACTOR), LARGEST_FACTOR)


def predicted_error(
    factors: DoubleArray,
    magnitude: DoubleArray,
    variance: DoubleArray,
    weights: Sequence[DoubleArray],
    *,
    abits: int,
    wbits: int,
) -> float:
    """The noise model.

    Args:
        factors: (C,) s.
        magnitude: (C,) largest magnitude per channel, before scaling.
        variance: (C,) variance per channel, before scaling.
        weights: Per reader, (C, taps, M) float weights.
        abits: Bits of the activation.
        wbits: Bits of the weights.
    """
    step = float((factors * magnitude).max()) / (2**abits - 1)
    total = 0.0
    for weight in weights:
        total += step**2 / 12 * float(np.sum(np.square(weight).sum((1, 2)) / factors**2))
        scaled = np.abs(weight) / factors[:, np.newaxis, np.newaxis]
        steps = scaled.max((0, 1)) / (2 ** (wbits - 1) - 1)
        # Errors of the weights of one channel add up over its taps.
        total += float(np.sum(steps**2)) / 12 * float(np.sum(factors**2 * variance)) * weight.shape[1]
    return total


def best_factors(
    statistics: ChannelStatistics,
    weights: Sequence[DoubleArray],
    *,
    abits: int,
    wbits: int,
    ceiling: float = np.inf,
    free: bool = False,
) -> DoubleArray:
    """Factors for one group.

    Args:
        statistics: Of the quantized values of the group, merged.
        weights: Per reader, (C, taps, M) float weights.
        abits: Bits of the activation.
        wbits: Bits of the readers' weights.
        ceiling: Upper bound of a Clip in the group.
        free: Whether the readers are depthwise.

    Returns:
        (C,) factors of at least 1; all 1 where nothing is gained.
    """
    magnitude = np.minimum(statistics.magnitude, ceiling)
    full = full_factors(magnitude)
    if free:
        return full
    errors = [
        predicted_error(full**t, magnitude, statistics.variance, weights, abits=abits, wbits=wbits) for t in STRENGTHS
    ]
    return full ** STRENGTHS[int(np.argmin(errors))]


def merged(parts: Mapping[str, ChannelStatistics], names: Sequence[str]) -> ChannelStatistics:
    """Statistics of several tensors as if they were one (a residual stream)."""
    chosen = [parts[name] for name in names]
    return ChannelStatistics(
        np.min([p.low for p in chosen], axis=0),
        np.max([p.high for p in chosen], axis=0),
        np.sum([p.total for p in chosen], axis=0),
        np.sum([p.square for p in chosen], axis=0),
        sum(p.count for p in chosen),
    )
