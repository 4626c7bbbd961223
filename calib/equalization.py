"""How far to equalize channels: factors from a noise model of the layers that read them.

With one step ``D = 2 max_c(s_c r_c) / (2^a - 1)`` for a tensor whose channels reach ``r_c``, and weight steps
``d_m = max_k |w_km / s_k| / (2^(b-1) - 1)``, the output error of the readers is, to first order,

    activations   D^2 / 12 * sum_c (|w_c| / s_c)^2            rounding of channel c, seen through its weights
    weights       sum_m d_m^2 / 12 * sum_c s_c^2 var(x_c)     what the bias correction leaves of rounding weights

``s_c = (R / r_c)^t`` with ``R = max r_c`` equalizes fully at t = 1 and not at all at t = 0. For depthwise readers the
weight term does not depend on s, so t = 1. Elsewhere the t with the smallest error is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.channel_statistics import ChannelStatistics, collect_channels
from postquant.calib.layers import Layer
from postquant.calib.prefix import spaced
from postquant.calib.source import CalibrationSource
from postquant.passes.equalize import ScaleGroup, scale_groups
from postquant.passes.plan import Entry, QuantPlan
from postquant.passes.session import make_session
from postquant.runtime_ops.quantizer import TensorQuantizer

DoubleArray = npt.NDArray[np.float64]

STRENGTHS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
# A channel that is hardly ever active would get an enormous factor for nothing.
LARGEST_FACTOR = 8.0


def full_factors(magnitude: DoubleArray) -> DoubleArray:
    """``R / r_c``, limited; (C,) factors of at least 1.

    >>> full_factors(np.array([4.0, 1.0, 0.0])).tolist()
    [1.0, 4.0, 8.0]
    """
    top = float(magnitude.max(initial=0.0))
    if top < np.finfo(np.float32).smallest_subnormal:  # nothing that a float32 tensor holds
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


@dataclasses.dataclass(frozen=True)
class Equalization:
    """Factors of one group of values.

    Attributes:
        group: The values, their makers and their readers.
        factors: (channels,) s, at least 1.
    """

    group: ScaleGroup
    factors: DoubleArray


def equalizations(
    model: ir.Model, plan: QuantPlan, source: CalibrationSource, *, samples: int = 128, threads: int = 1
) -> list[Equalization]:
    """Factors for every group of a model that has a quantized value and gains something.

    Args:
        model: The simplified float model.
        plan: Tells which values are quantized, and to how many bits.
        source: Calibration data.
        samples: How many samples, evenly spaced, tell the channels' ranges.
        threads: Threads of onnxruntime.
    """
    nodes = {node.name: node for node in model.graph}
    groups = []
    for group in scale_groups(model):
        stored = [name for name in group.values if name in plan.activations]
        readers = [layer for name in group.consumers if (layer := Layer.of(nodes[name])) is not None]
        if stored and len(readers) == len(group.consumers) and all(layer.weight in plan.weights for layer in readers):
            groups.append((group, stored, readers))
    names = list(dict.fromkeys(name for _, stored, _ in groups for name in stored))
    if not names:
        return []
    session = make_session(model, outputs=names, threads=threads)
    statistics = collect_channels(session.run, source.read(spaced(len(source), samples)), names)
    del session
    result = []
    for group, stored, readers in groups:
        weights = [_by_channel(model, layer) for layer in readers]
        factors = best_factors(
            merged(statistics, stored),
            weights,
            abits=min(_bits(plan.activations[name]) for name in stored),
            wbits=min(_bits(plan.weights[layer.weight]) for layer in readers),
            ceiling=group.ceiling,
            free=group.depthwise,
        )
        if factors.max(initial=1.0) > 1.0:
            result.append(Equalization(group, factors))
    return result


def _by_channel(model: ir.Model, layer: Layer) -> DoubleArray:
    """A layer's weight as (C_in, taps, M / groups)."""
    tensor = model.graph.initializers[layer.weight].const_value
    assert tensor is not None
    matrix = layer.matrix(tensor.numpy()).astype(np.float64)  # (G, K, M)
    taps = layer.depth // (layer.in_channels // layer.groups)
    return matrix.reshape(layer.in_channels, taps, matrix.shape[2])


def _bits(entry: Entry) -> int:
    return entry.spec.bits if isinstance(entry, TensorQuantizer) else entry.bits
