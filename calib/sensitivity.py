"""What the width of each layer does to the network's outputs: :class:`Sensitivity`.

Two things are known of every layer. From the statistics, the relative error ``e(b)`` of the layer's own output at each
width ``b`` (weights: :mod:`postquant.calib.weight_widths`; inputs: the expected error over the tensor's histogram).
And, at a few widths ``a``, the error ``E(a)`` of the network's outputs with this layer alone quantized, measured end to
end. Their quotient, what a layer's error is worth at the outputs, changes little with the width, so that

    E(b) = e(b) * exp( log(E(a) / e(a)), interpolated over the widths a )

All errors are squared errors over the energy of what is expected (:func:`postquant.calib.output_error.combined_error`
squared).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.bias_correction import correct_biases
from postquant.calib.code_book import CodeBooks
from postquant.calib.layers import Layer, layers_of
from postquant.calib.lp_error import LpError, expected_error
from postquant.calib.observers import Range
from postquant.calib.prefix import spaced
from postquant.calib.ranges import collect_statistics, places_of
from postquant.calib.source import CalibrationSource, SubsetSource
from postquant.calib.statistics import TensorStatistics
from postquant.calib.trial import Outcome, Trial
from postquant.calib.weight_search import SearchOptions
from postquant.calib.weight_widths import WeightWidth, float_moments, weights_at_widths
from postquant.passes.free_memory import release_tensor
from postquant.passes.plan import Entry, QuantPlan
from postquant.passes.session import make_session
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

# Widths at which layers are tried end to end, where they may be chosen.
WEIGHT_ANCHORS, INPUT_ANCHORS = (2, 4), (3, 6)
# Ranges of activations; the exponent fears clipping a little more than rounding.
_RANGE = LpError(2.4)
# Samples whose activations are looked at, and how many are tried end to end: by the work of one of them.
_STATISTICS_SAMPLES = 32
_TRIED_WORK, _LEAST_TRIED, _MOST_TRIED = 2.4e9, 8, 32
_LEAST = 1e-14

Progress = Callable[[], None]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerSensitivity:
    """One layer at every width.

    Attributes:
        layer: Node name.
        op_type: Operator type.
        weight: Name of the weight initializer.
        count: Number of weights.
        work: Multiply-accumulates for the first sample.
        widths: Bits -> weights.
        weight_noise: Bits of the weights -> noise at the outputs.
        input_noise: Bits of the input -> noise at the outputs; empty where inputs were not studied.
        measured: Widths of the weights that were tried end to end.
    """

    layer: str
    op_type: str
    weight: str
    count: int
    work: float
    widths: Mapping[int, WeightWidth]
    weight_noise: Mapping[int, float]
    input_noise: Mapping[int, float]
    measured: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class SensitivityOptions:
    """What is studied.

    Attributes:
        weight_widths: Bits of weights.
        input_widths: Bits of inputs; none of them to leave inputs out.
        fixed_weights: Node name -> the only width that its weight may have.
        fixed_inputs: Node name -> the only width that its input may have.
        books: Formats that weights of 2 and 4 bits may have.
        search: Of the scale search.
        correct_biases: Whether biases make up for the mean error of weights.
        threads: How many samples are run at the same time; never changes the result.
        seed: Of sampled output positions.
    """

    weight_widths: tuple[int, ...]
    input_widths: tuple[int, ...] = ()
    fixed_weights: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fixed_inputs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    books: CodeBooks = dataclasses.field(default_factory=CodeBooks)
    search: SearchOptions = dataclasses.field(default_factory=lambda: SearchOptions(candidates=20))
    correct_biases: bool = True
    threads: int = 1
    seed: int = 0


class Sensitivity:
    """The layers of a network, their sensitivities, and plans that give them widths.

    Args:
        model: The float model that is quantized.
        reference: The float model whose outputs are right; ``model`` or what it was before.
        plan: Formats of all tensors, none of them decided but exact inputs; widths are replaced.
        source: Calibration data.
        options: What is studied.
        progress: Called after every layer, and again after every layer that was tried.

    Attributes:
        layers: In topological order.
        fixed: Noise of the activations at the widths of the plan.
    """

    def __init__(
        self,
        model: ir.Model,
        reference: ir.Model,
        plan: QuantPlan,
        source: CalibrationSource,
        options: SensitivityOptions,
        progress: Progress | None = None,
    ) -> None:
        self._model = model
        self._plan = plan
        self._options = options
        self._step = progress or (lambda: None)
        layers = quantized_layers(model, plan)
        work = _works(model, layers, source)
        tried = int(np.clip(_TRIED_WORK / max(sum(work.values()), 1.0), _LEAST_TRIED, _MOST_TRIED))
        self._trial = Trial(reference, source, samples=tried, threads=options.threads)
        few = SubsetSource(source, spaced(len(source), _STATISTICS_SAMPLES))
        self._statistics = collect_statistics(model, places_of(model, plan), few, histogram=True)
        self._ranges: dict[tuple[str, QuantSpec], Range] = {}
        self._means: dict[str, npt.NDArray[np.float32]] = {}
        found: dict[str, dict[int, WeightWidth]] = {}
        # Mean errors do not count where biases make up for them.
        search = dataclasses.replace(options.search, centred=options.correct_biases)
        for layer, moments in float_moments(model, layers, source, seed=options.seed):
            spec = plan.weights[layer.weight]
            assert isinstance(spec, QuantSpec)
            widths = _allowed(layer.name, options.fixed_weights, options.weight_widths)
            weight = _float_weight(model, layer)
            found[layer.name] = weights_at_widths(layer, weight, moments, spec, widths, search, options.books)
            groups, depth = layer.groups, layer.depth
            self._means[layer.name] = moments.mean.reshape(groups, depth).astype(np.float32)
            _release(model, layer)
            self._step()
        self.fixed = self._noise(self._with_activations(plan))
        self.layers = tuple(self._studied(layer, found[layer.name], work[layer.name]) for layer in layers)

    # -- plans -----------------------------------------------------------------------------------------------------

    def quick_plan(self, wbits: Mapping[str, int], plan: QuantPlan | None = None) -> QuantPlan:
        """A decided plan with quick scales.

        Args:
            wbits: Node name -> bits of its weight; layers that are left out keep float weights.
            plan: Formats of the activations where they differ from those of the study.

        Returns:
            The plan, with corrected biases if the options say so.
        """
        return self._with_weights(self._with_activations(plan or self._plan), wbits)

    def measure(self, plan: QuantPlan) -> Outcome:
        """What a decided plan does to the outputs."""
        return self._trial.measure(self._model, plan)

    def _with_weights(self, plan: QuantPlan, wbits: Mapping[str, int]) -> QuantPlan:
        by_name = {layer.layer: layer for layer in self.layers}
        entries = {by_name[name].weight: by_name[name].widths[bits].quantizer for name, bits in wbits.items()}
        return self._biased(dataclasses.replace(plan, weights={**plan.weights, **entries}))

    def _biased(self, plan: QuantPlan) -> QuantPlan:
        return correct_biases(self._model, plan, self._means) if self._options.correct_biases else plan

    def _with_activations(self, plan: QuantPlan) -> QuantPlan:
        values = {place.key: place.value for place in places_of(self._model, plan)}

        def decided(key: str, entry: Entry) -> Entry:
            return entry if isinstance(entry, TensorQuantizer) else self._quantizer(values[key], entry)

        return dataclasses.replace(
            plan,
            activations={name: decided(name, entry) for name, entry in plan.activations.items()},
            requants={key: decided(key, entry) for key, entry in plan.requants.items()},
        )

    def _quantizer(self, value: str, spec: QuantSpec) -> TensorQuantizer:
        statistics = self._of(value)
        if (value, spec) not in self._ranges:
            self._ranges[value, spec] = _RANGE.range(statistics, spec)
        return TensorQuantizer.from_range(spec, *self._ranges[value, spec])

    def _of(self, value: str) -> TensorStatistics:
        return self._statistics[value if value in self._statistics else self._plan.shared.get(value, value)]

    # -- one layer -------------------------------------------------------------------------------------------------

    def _studied(self, layer: Layer, widths: Mapping[int, WeightWidth], work: float) -> LayerSensitivity:
        own = {bits: 10 ** (-width.db / 10) for bits, width in widths.items()}
        anchors = _anchors(WEIGHT_ANCHORS, widths)
        tried = {}
        for bits in anchors:
            plan = dataclasses.replace(self._plan, activations={}, shared={}, requants={}, int_biases={})
            weights = {layer.weight: widths[bits].quantizer}
            tried[bits] = self._noise(self._biased(dataclasses.replace(plan, weights=weights)))
        result = LayerSensitivity(
            layer.name,
            layer.node.op_type,
            layer.weight,
            int(np.prod(layer.shape)),
            work,
            widths,
            _extended(own, tried),
            self._input_noise(layer),
            anchors,
        )
        self._step()
        return result

    def _input_noise(self, layer: Layer) -> dict[int, float]:
        entry = self._plan.requants.get(f"{layer.name}:0") or self._plan.activation_entry(layer.input)
        allowed = _allowed(layer.name, self._options.fixed_inputs, self._options.input_widths)
        if not self._options.input_widths or not isinstance(entry, QuantSpec):
            return {}
        statistics = self._of(layer.input)
        if statistics.is_empty:
            return {}
        specs = {bits: dataclasses.replace(entry, bits=bits) for bits in allowed}
        density = statistics.density()
        middles = (density.edges[1:] + density.edges[:-1]) / 2
        energy = float((density.counts * middles**2).sum() / max(float(density.counts.sum()), 1.0))
        own = {}
        for bits, spec in specs.items():
            low, high = self._quantizer(layer.input, spec).range()
            error = expected_error(density, spec, np.array([low], float), np.array([high], float), 2.0)
            own[bits] = max(float(error[0]) / max(energy, 1e-300), _LEAST)
        tried = {}
        for bits in _anchors(INPUT_ANCHORS, specs):
            requants = {f"{layer.name}:0": self._quantizer(layer.input, specs[bits])}
            plan = dataclasses.replace(
                self._plan, activations={}, shared={}, requants=requants, weights={}, int_biases={}
            )
            tried[bits] = self._noise(plan)
        return _extended(own, tried)

    def _noise(self, plan: QuantPlan) -> float:
        return self._trial.measure(self._model, plan).error ** 2


def quantized_layers(model: ir.Model, plan: QuantPlan) -> list[Layer]:
    """Layers whose weight has a signed format that is not decided yet, in topological order."""
    found = []
    for layer in layers_of(model):
        entry = plan.weights.get(layer.weight)
        if isinstance(entry, QuantSpec) and entry.signed:
            found.append(layer)
    return found


def _extended(own: Mapping[int, float], tried: Mapping[int, float]) -> dict[int, float]:
    """Noise at every width, from the layer's own error everywhere and the network's at some widths.

    >>> round(_extended({2: 0.4, 3: 0.1, 4: 0.02}, {2: 0.8, 4: 0.01})[3], 6)
    0.1
    """
    places = sorted(tried)
    worth = [np.log(max(tried[bits], _LEAST) / max(own[bits], _LEAST)) for bits in places]
    noises = {bits: float(error * np.exp(np.interp(bits, places, worth))) for bits, error in own.items()}
    # More bits are never worse: what says otherwise is the chance of few samples.
    for bits in sorted(noises)[::-1]:
        wider = [noises[other] for other in noises if other > bits]
        noises[bits] = max([noises[bits], *wider])
    return noises


def _anchors(wanted: Sequence[int], widths: Iterable[int]) -> tuple[int, ...]:
    """The wanted widths among those that there are; the narrowest and the widest where there is none."""
    known = sorted(widths)
    return tuple(bits for bits in wanted if bits in known) or tuple(sorted({known[0], known[-1]}))


def _allowed(name: str, fixed: Mapping[str, int], widths: tuple[int, ...]) -> tuple[int, ...]:
    return (fixed[name],) if name in fixed else widths


def _works(model: ir.Model, layers: Sequence[Layer], source: CalibrationSource) -> dict[str, float]:
    """Multiply-accumulates of each layer for the first sample."""
    if not layers:
        return {}
    session = make_session(model, outputs=list(dict.fromkeys(layer.output for layer in layers)))
    values = session.run(next(iter(source.read([0]))))
    return {layer.name: float(values[layer.output].size * layer.depth) for layer in layers}


def _float_weight(model: ir.Model, layer: Layer) -> npt.NDArray[np.float32]:
    tensor = model.graph.initializers[layer.weight].const_value
    assert tensor is not None
    return tensor.numpy().astype(np.float32, copy=False)


def _release(model: ir.Model, layer: Layer) -> None:
    tensor = model.graph.initializers[layer.weight].const_value
    release_tensor(tensor)
