"""Histograms and grids of a plan's tensors for the report: :func:`describe_tensors`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.histogram import Density, Histogram
from postquant.calib.prefix import spaced
from postquant.calib.source import CalibrationSource, SubsetSource
from postquant.calib.statistics import Bounds, TensorStatistics
from postquant.passes import semantics
from postquant.passes.free_memory import release_tensor
from postquant.passes.plan import QuantPlan
from postquant.pipeline.quality import FloatChunks
from postquant.pipeline.tensor_statistics import GridStatistics, TensorStatistic, ValueHistogram
from postquant.runtime_ops.law import along_axis
from postquant.runtime_ops.law_border import RESIDUAL_UNITS
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.rounding_border import RoundingBorder

# Samples behind a picture; more would not change it.
SAMPLES = 8
# Values of a tensor and sample that enter its histogram.
_ELEMENTS = 1 << 15
# Tensors of a large model that are looked at in one go: neither all activations nor all weights are in memory then.
_CHUNK = 64
# Bins of a picture.
_BINS = 128
# Key of an activation's quantizer -> its bits, and SQNR in dB of the outputs with it alone.
Effects = Mapping[str, tuple[int, float]]

# Grids with at most so many levels are drawn line by line.
_DRAWN_LEVELS = 32


def describe_tensors(
    model: ir.Model,
    plan: QuantPlan,
    source: CalibrationSource,
    effects: Effects | None = None,
    *,
    threads: int = 1,
) -> tuple[int, tuple[TensorStatistic, ...]]:
    """Every decided quantizer of a plan with the values that it meets in the float model.

    Args:
        model: The simplified float model.
        plan: The final plan.
        source: Calibration data, of which a few samples are read.
        effects: What quantizers do alone, where that was measured.
        threads: Threads within one operator.

    Returns:
        The number of samples read, and one entry per quantizer: activations, requantizations, weights.
    """
    samples = SubsetSource(source, spaced(len(source), SAMPLES))
    return len(samples), (*_activations(model, plan, samples, effects or {}, threads), *_weights(model, plan))


def _activations(
    model: ir.Model, plan: QuantPlan, samples: CalibrationSource, effects: Effects, threads: int
) -> list[TensorStatistic]:
    producers = {value.name or "": node for node in model.graph for value in node.outputs}
    known = {value.name or "" for value in model.graph.inputs} | set(producers)
    nodes = {node.name or "": node for node in model.graph}
    places = [
        (name, name, "" if name not in producers else producers[name].name or "", entry)
        for name, entry in plan.activations.items()
    ]
    for key, entry in plan.requants.items():
        name, _, index = key.rpartition(":")
        read = nodes[name].inputs[int(index)]
        assert read is not None
        places.append((key, read.name or "", name, entry))
    names = list(dict.fromkeys(value for _, value, _, _ in places if value in known))
    statistics = _observe(model, names, samples, threads)
    order = {"": -1, **{name: position for position, name in enumerate(nodes)}}
    places.sort(key=lambda place: order[place[2]])
    found = []
    for key, value, node, entry in places:
        if not isinstance(entry, TensorQuantizer):
            continue
        seen = statistics.get(value)
        if seen is not None and seen.is_empty:
            seen = None
        found.append(
            TensorStatistic(
                kind="activation",
                key=key,
                value=value,
                node=node,
                bits=entry.spec.bits,
                values=_values(entry),
                scales=(float(entry.scale), float(entry.scale)),
                zero_point=int(entry.zero_point),
                grid=_with_clipping(_activation_grid(entry), None if seen is None else seen.density()),
                histogram=None if seen is None else ValueHistogram.of(seen.density(max_bins=_BINS)),
                effect_db=_effect(effects, (key, value), entry),
            )
        )
    return found


def _values(quantizer: TensorQuantizer) -> str:
    if quantizer.adaptive is not None:
        return "adaptive"
    if quantizer.feedback is not None:
        return "feedback"
    if quantizer.table is not None:
        return quantizer.spec.code_book.value
    return "int" if quantizer.border is None else "border"


def _effect(effects: Effects, keys: Sequence[str], quantizer: TensorQuantizer) -> float | None:
    """What was measured under the first of the keys with the quantizer's bits.

    A tensor's narrow format may have moved from the tensor to its readers, and the tensor got a wider one.
    """
    for key in keys:
        bits, effect = effects.get(key, (None, None))
        if bits == quantizer.spec.bits:
            return effect
    return None


def _observe(
    model: ir.Model, names: list[str], samples: CalibrationSource, threads: int
) -> Mapping[str, TensorStatistics]:
    if not names or not len(samples):
        return {}
    statistics = {
        name: TensorStatistics(name, bounds=Bounds(*semantics.activation_bounds(model, name)), max_elements=_ELEMENTS)
        for name in names
    }
    floats = FloatChunks(model, samples, threads)
    size = _CHUNK if floats.large else max(len(names), 1)
    for begin in range(0, len(names), size):
        chunk, later = names[begin : begin + size], names[begin + size :]
        for values in floats.run(chunk, later):
            for name in chunk:
                statistics[name].update(values[name])
    return statistics


def _activation_grid(quantizer: TensorQuantizer) -> GridStatistics:
    spec, scale, zero = quantizer.spec, float(quantizer.scale), int(quantizer.zero_point)
    codes = np.arange(spec.qmin, spec.qmax + 1) - zero
    if quantizer.table is not None:
        codes = np.unique(quantizer.table).astype(np.int64) - zero
    gap = int(np.diff(codes).min()) if len(codes) > 1 else 1
    grid = GridStatistics(low=float(codes[0] * scale), high=float(codes[-1] * scale), step=gap * scale)
    if len(codes) > _DRAWN_LEVELS:
        return grid
    border = quantizer.border
    low = high = np.full(len(codes), 0.5)
    if border is not None:
        own = np.broadcast_to(border.border, (border.channels, len(codes))).astype(np.float64)
        moved = _neighbours(border)[:, None]
        low, high = (np.clip(part, 0.0, 1.0) for part in ((own - moved).min(0), (own + moved).max(0)))
    thresholds = [
        (float((code + first * gap) * scale), float((code + last * gap) * scale))
        for code, first, last, gap in zip(codes[:-1], low, high, np.diff(codes), strict=False)
    ]
    return dataclasses.replace(
        grid,
        levels=tuple(float(code * scale) for code in codes),
        thresholds=tuple(thresholds),
        neighbours=border is not None and (border.has_window or border.rank > 0),
    )


def _neighbours(border: RoundingBorder) -> npt.NDArray[np.float64]:
    """How far neighbours move a channel's border: one standard deviation, (C,), in steps.

    Rounding errors are taken as independent and uniform over half a step to either side.
    """
    error = RESIDUAL_UNITS / math.sqrt(12)
    window = np.sqrt((border.window.astype(np.float64) ** 2).sum(axis=(1, 2))) * border.window_scale
    terms = np.sqrt((border.left.astype(np.float64) ** 2).sum(axis=1)) * border.left_scale
    across = np.sqrt(((border.right.astype(np.float64) * terms) ** 2).sum(axis=1)) * border.right_scale
    result: npt.NDArray[np.float64] = error * np.hypot(window, across)
    return result


def _weights(model: ir.Model, plan: QuantPlan) -> list[TensorStatistic]:
    found = []
    for node in model.graph:
        index = semantics.weight_index(node)
        value = None if index is None else node.inputs[index]
        entry = None if value is None else plan.weights.get(value.name or "")
        if value is None or value.const_value is None or not isinstance(entry, TensorQuantizer):
            continue
        weight = np.asarray(value.const_value.numpy(), np.float32)
        histogram = Histogram()
        ratio = weight / along_axis(entry.scale, weight.ndim, entry.spec.axis)
        histogram.update(ratio)
        grid = _weight_grid(entry)
        moved = None
        if weight.size:
            nearest = dataclasses.replace(entry, codes=None).quantize(weight)
            moved = 0.0 if entry.codes is None else float(np.mean(nearest != entry.codes))
        found.append(
            TensorStatistic(
                kind="weight",
                key=value.name or "",
                value=value.name or "",
                node=node.name or "",
                bits=entry.spec.bits,
                values=entry.spec.code_book.value,
                scales=(float(entry.scale.min()), float(entry.scale.max())),
                zero_point=0,
                grid=_with_clipping(grid, histogram.density() if weight.size else None),
                histogram=ValueHistogram.of(histogram.density(max_bins=_BINS)) if weight.size else None,
                moved=moved,
            )
        )
        del weight  # a view of what is let go
        release_tensor(value.const_value)
    return found


def _weight_grid(quantizer: TensorQuantizer) -> GridStatistics:
    """The grid in units of a channel's scale."""
    spec = quantizer.spec
    levels: npt.NDArray[np.float64] = np.arange(spec.qmin, spec.qmax + 1, dtype=np.float64)
    if quantizer.table is not None:
        levels = np.unique(quantizer.table).astype(np.float64)
    gaps = np.diff(levels)
    grid = GridStatistics(low=float(levels[0]), high=float(levels[-1]), step=float(gaps.min()) if len(gaps) else 1.0)
    if len(levels) > _DRAWN_LEVELS:
        return grid
    middles = (levels[:-1] + levels[1:]) / 2
    return dataclasses.replace(
        grid,
        levels=tuple(float(level) for level in levels),
        thresholds=tuple((float(middle), float(middle)) for middle in middles),
    )


def _with_clipping(grid: GridStatistics, density: Density | None) -> GridStatistics:
    """The grid with the shares of values that it does not reach, by half a step and more."""
    total = 0 if density is None else int(density.counts.sum())
    if density is None or not total:
        return grid
    first, last = grid.step, grid.step
    if len(grid.levels) > 1:
        first, last = grid.levels[1] - grid.levels[0], grid.levels[-1] - grid.levels[-2]
    ends = np.asarray([grid.low - first / 2, grid.high + last / 2])
    below, within = density.mass_below(ends, inclusive=True) / total
    return dataclasses.replace(grid, below=float(below), above=float(max(0.0, 1.0 - within)))
