"""Decides the range of every activation: by one method, or per tensor by its effect on the network's outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from postquant.calib.collect import collect, subsampling_note
from postquant.calib.effect_candidates import candidate_quantizers
from postquant.calib.lp_error import LpError
from postquant.calib.methods import DEFAULT_METHODS
from postquant.calib.observers import MinMax, RangeMethod, SampleMean, candidate_ranges
from postquant.calib.output_effect import Choice, OutputEffect
from postquant.calib.source import CalibrationSource
from postquant.calib.statistics import Bounds, TensorStatistics
from postquant.passes.plan import QuantPlan
from postquant.passes.semantics import activation_bounds
from postquant.passes.session import make_session
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

Progress = Callable[[], None]

# Values of one tensor and sample that enter its histogram: enough for any percentile, and flat in time.
_HISTOGRAM_ELEMENTS = 1 << 15


@dataclasses.dataclass(frozen=True)
class Ranges:
    """What this stage decides.

    Attributes:
        plan: Every activation and requantization is a quantizer.
        choices: Key of the plan -> what was chosen and its effect; empty without effects.
        notes: For the report.
    """

    plan: QuantPlan
    choices: Mapping[str, Choice]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Place:
    """One quantizer to decide: a stored tensor, or a requantization in front of one input of a node."""

    key: str
    value: str
    spec: QuantSpec
    reader: tuple[str, int] | None

    def decided(self, plan: QuantPlan, quantizer: TensorQuantizer) -> QuantPlan:
        if self.reader is None:
            return plan.with_activation(self.key, quantizer)
        return plan.with_requant(self.key, quantizer)


def places_of(model: ir.Model, plan: QuantPlan) -> list[_Place]:
    """Every activation quantizer of a plan that is not decided yet."""
    nodes = {node.name: node for node in model.graph}
    found = [_Place(n, n, e, None) for n, e in plan.activations.items() if isinstance(e, QuantSpec)]
    for key, entry in plan.requants.items():
        name, _, index = key.rpartition(":")
        value = nodes[name].inputs[int(index)]
        assert value is not None
        assert value.name is not None
        if isinstance(entry, QuantSpec):
            found.append(_Place(key, value.name, entry, (name, int(index))))
    return found


def collect_statistics(
    model: ir.Model,
    places: Sequence[_Place],
    source: CalibrationSource,
    *,
    histogram: bool,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, TensorStatistics]:
    """One streaming pass over the float model."""
    names = list(dict.fromkeys(place.value for place in places))
    if not names:
        return {}
    bounds = {name: Bounds(*activation_bounds(model, name)) for name in names}
    session = make_session(model, outputs=names, threads=threads)
    return collect(
        session.run,
        source,
        names,
        histogram=histogram,
        max_elements_per_tensor=_HISTOGRAM_ELEMENTS,
        bounds=bounds,
        progress=None if progress is None else lambda _done, _all: progress(),
    )


def method_ranges(
    model: ir.Model,
    plan: QuantPlan,
    source: CalibrationSource,
    method: RangeMethod,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> Ranges:
    """Every range by one method."""
    places = places_of(model, plan)
    statistics = collect_statistics(
        model, places, source, histogram=method.needs_histogram, threads=threads, progress=progress
    )
    for place in places:
        quantizer = TensorQuantizer.from_range(place.spec, *method.range(statistics[place.value], place.spec))
        plan = place.decided(plan, quantizer)
    note = subsampling_note(statistics.values())
    return Ranges(plan, {}, () if note is None else (note,))


def effect_ranges(
    model: ir.Model,
    plan: QuantPlan,
    source: CalibrationSource,
    statistics: Mapping[str, TensorStatistics],
    effect: OutputEffect | None,
    *,
    methods: Sequence[RangeMethod] = DEFAULT_METHODS,
    progress: Progress | None = None,
) -> Ranges:
    """Every range by its effect on the outputs.

    Args:
        model: The simplified float model.
        plan: Undecided entries are decided.
        source: Calibration data.
        statistics: Of every place's value, with histograms.
        effect: Measures; None where that costs too much: the Lp error decides then, as for tensors that no float
            output depends on.
        methods: Whose ranges are candidates.
        progress: Called after every tensor.
    """
    places = places_of(model, plan)
    choices: dict[str, Choice] = {}
    for place in places:
        ranges = candidate_ranges(statistics[place.value], place.spec, methods)
        if effect is None or not effect.sees(place.value, reader=place.reader):
            plan = place.decided(plan, TensorQuantizer.from_range(place.spec, *ranges["mse"]))
        else:
            candidates = candidate_quantizers(place.spec, ranges)
            choices[place.key] = effect.choose(place.value, candidates, reader=place.reader, ends=True)
            plan = place.decided(plan, choices[place.key].quantizer)
        if progress is not None:
            progress()
    note = subsampling_note(statistics.values())
    return Ranges(plan, choices, () if note is None else (note,))


def alternatives(
    model: ir.Model, plan: QuantPlan, chosen: QuantPlan, statistics: Mapping[str, TensorStatistics]
) -> dict[str, QuantPlan]:
    """Plans to compare with the chosen one on other samples, in case it follows its few samples too closely.

    Args:
        model: The simplified model.
        plan: Before the choice.
        chosen: After it.
        statistics: Of every place's value, with histograms.

    Returns:
        Name -> plan: every chosen range as it is; widened; widened to the sample mean's; half way to the Lp error's;
        and the observers' own.
    """
    result = {"effect": chosen}
    for name, widen in (("effect, wider by 1.2", 1.2), ("effect, wider by 1.5", 1.5)):
        wider = chosen
        for place in places_of(model, plan):
            low, high = _current(chosen, place)
            observed = statistics[place.value]
            low, high = max(low * widen, min(observed.low, low)), min(high * widen, max(observed.high, high))
            wider = place.decided(wider, TensorQuantizer.from_range(place.spec, low, high))
        result[name] = wider
    blends = {"effect and sample mean": chosen, "effect and Lp error, half way": chosen}
    own = dict.fromkeys((SampleMean(), LpError(), MinMax()), plan)
    for place in places_of(model, plan):
        observed = statistics[place.value]
        low, high = _current(chosen, place)
        ranges = {method: method.range(observed, place.spec) for method in own}
        mean, error = ranges[SampleMean()], ranges[LpError()]
        union = (min(low, mean[0]), max(high, mean[1]))
        half_way = ((low + error[0]) / 2, (high + error[1]) / 2)
        for name, ends in zip(blends, (union, half_way), strict=True):
            blends[name] = place.decided(blends[name], TensorQuantizer.from_range(place.spec, *ends))
        for method, so_far in own.items():
            own[method] = place.decided(so_far, TensorQuantizer.from_range(place.spec, *ranges[method]))
    return {**result, **blends, **{method.name: found for method, found in own.items()}}


def _current(plan: QuantPlan, place: _Place) -> tuple[float, float]:
    """The range that a plan has decided for a place."""
    entry = plan.activations[place.key] if place.reader is None else plan.requants[place.key]
    assert isinstance(entry, TensorQuantizer)
    low, high = entry.range()
    return float(low), float(high)


def effect_db(choices: Mapping[str, Choice]) -> float:
    """SQNR of the outputs if the effects of all tensors added up, in dB; infinite without any."""
    noise = sum(10 ** (-choice.effect_db / 10) for choice in choices.values())
    return -10 * math.log10(noise) if noise > 0 else math.inf
