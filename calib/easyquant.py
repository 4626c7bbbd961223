"""EasyQuant: alternating scale optimization through the network (Wu et al. 2020, algorithm 1).

Tensors are visited from the network's inputs to its outputs. For the layers that read a tensor,

    repeat (``rounds`` times, or until nothing changes):
        weights:     every channel's scale, by second moments or sampled rows of the layer's inputs
        activation:  the tensor's scale, by sampled rows
    weights once more, by the second moments of all samples

Targets are the outputs of the untouched float network; inputs come from the already quantized prefix, which here
carries the decisions for weights *and* activations of all layers before (the paper goes through the network twice,
weights first). The paper's single round is ``rounds=1``.

Second moments are exact over all samples, and over all output positions where a layer has at most
``positions_per_sample`` of them; elsewhere over a seeded sample of positions, and a note says so. A layer too deep for
K x K moments keeps them in blocks, and a model too large for the whole search is searched with less effort
(:mod:`postquant.calib.search_effort`); notes say so as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.activation_search import Reader, search_activation
from postquant.calib.code_book import FEW_BITS, Candidate, CodeBooks, choose_code_book
from postquant.calib.compensated_rounding import compensate
from postquant.calib.layers import Layer, layers_of
from postquant.calib.moments import Moments
from postquant.calib.prefix import Prefix
from postquant.calib.search_effort import choose_effort
from postquant.calib.site_data import SiteData, WorkLimits, sampled_positions
from postquant.calib.weight_search import SearchOptions, WeightProblem, problem_of, search_problem
from postquant.passes import semantics
from postquant.passes.free_memory import give_back_memory, release_weights
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.code_book import CodeBook
from postquant.runtime_ops.quantizer import TensorQuantizer

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[], None]
# Decides between quantizers of a tensor (or of one reader of it) by what they do to the network's outputs.
Judge = Callable[[str, tuple[str, int] | None, Mapping[str, TensorQuantizer]], TensorQuantizer]

# Alternations beyond this have not been seen; the bound makes the loop finite.
_MOST_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """What the search did to one layer, for the report.

    Attributes:
        layer: Node name.
        activation: Quotient of the new activation scale by the old.
        score_before: Mean cosine (or minus relative error) of the outputs at the start.
        score_after: The same at the end.
        weight_gain_db: How much the weights' part of the output error fell, in dB.
        exact: Whether moments covered every output position of every sample.
        rounds: Alternations until nothing changed.
        code_books: Of a weight of few bits: code book -> what it would give.
    """

    layer: str
    activation: float
    score_before: float
    score_after: float
    weight_gain_db: float
    exact: bool
    rounds: int
    code_books: Mapping[CodeBook, Candidate] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EasyQuantResult:
    """What the search leaves.

    Attributes:
        plan: The plan with searched scales.
        means: Layer -> (G, K) mean of its float input rows, for bias correction.
        changes: Per layer.
        notes: What was left out, for the report.
    """

    plan: QuantPlan
    means: Mapping[str, FloatArray]
    changes: tuple[LayerChange, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Site:
    """One quantizer that layers read through: a stored tensor, or a requantization in front of one input.

    Attributes:
        tensor: Key in ``plan.activations``.
        key: Key in ``plan.requants``, or None for the stored tensor itself.
        layers: Who reads through it.
    """

    tensor: str
    key: str | None
    layers: tuple[Layer, ...]


def sites_of(model: ir.Model, plan: QuantPlan) -> list[_Site]:
    """All quantizers that layers with a quantized weight read through, in topological order of the layers."""
    found: dict[tuple[str, str | None], list[Layer]] = {}
    for layer in layers_of(model):
        if layer.weight not in plan.weights:
            continue
        tensor = plan.shared.get(layer.input, layer.input)
        if tensor not in plan.activations:
            continue
        key = f"{layer.name}:0"
        found.setdefault((tensor, key if key in plan.requants else None), []).append(layer)
    return [_Site(tensor, key, tuple(layers)) for (tensor, key), layers in found.items()]


class EasyQuant:
    """The search over one model.

    Args:
        model: The simplified float model.
        prefix: Streams inputs of layers.
        options: Of the scale search.
        limits: How much data it sees.
        search_activations: Whether activation scales may move; weights only otherwise.
        compensate: Whether weights are rounded with error compensation where that lowers the output error.
        fixed: Stored tensors and weights whose numbers stay.
        code_books: Which values weights of few bits may have; uniform ones by default.
        judge: Asked before an activation's scale moves; a scale that is better for the next layer only is refused.
    """

    def __init__(
        self,
        model: ir.Model,
        prefix: Prefix,
        options: SearchOptions,
        limits: WorkLimits,
        *,
        search_activations: bool = True,
        compensate: bool = True,
        code_books: CodeBooks | None = None,
        fixed: frozenset[str] = frozenset(),
        judge: Judge | None = None,
    ) -> None:
        self._model = model
        self._prefix = prefix
        self._options = options
        self._limits = limits
        self._search_activations = search_activations
        self._compensate = compensate
        self._code_books = code_books or CodeBooks()
        self._fixed = fixed
        self._judge = judge

    def run(self, plan: QuantPlan, progress: Progress | None = None) -> EasyQuantResult:
        """Searches every layer.

        Args:
            plan: A plan whose entries are all quantizers: the starts ``S0``.
            progress: Called after every site.

        Returns:
            The plan with searched scales, the float means of the layers' input rows, and what changed.
        """
        order = _topological(self._model, plan)
        place = {name: index for index, name in enumerate(order)}
        sites = sorted(sites_of(self._model, plan), key=lambda site: place[site.tensor])
        layers = [layer for site in sites for layer in site.layers]
        effort, notes = choose_effort(layers, self._options, self._limits, self._prefix.samples)
        self._options = effort.options(self._options)
        self._limits = dataclasses.replace(self._limits, block=effort.block)
        decided: set[str] = set()
        means: dict[str, FloatArray] = {}
        changes: list[LayerChange] = []
        for index, site in enumerate(sites):
            later = [layer.input for other in sites[index + 1 :] for layer in other.layers]
            # Everything stored before this site keeps its quantizer; what comes later is still float.
            before = order[: place[site.tensor]]
            done = _up_to(plan, before, decided, site)
            plan, site_changes = self._visit(plan, done, site, before, later, means)
            changes.extend(site_changes)
            release_weights(self._model, [layer.weight for layer in site.layers])
            decided.update(layer.weight for layer in site.layers)
            if progress is not None:
                progress()
        give_back_memory()
        return EasyQuantResult(plan, means, tuple(changes), notes)

    def _visit(
        self,
        plan: QuantPlan,
        done: QuantPlan,
        site: _Site,
        before: Sequence[str],
        later: Sequence[str],
        means: dict[str, FloatArray],
    ) -> tuple[QuantPlan, list[LayerChange]]:
        start = _quantizer(plan, site)
        weights = {layer.name: _float_weight(self._model, layer) for layer in site.layers}
        data = self._collect(plan, done, site, before, later)
        starts = {layer.name: _weight_quantizer(plan, layer) for layer in site.layers}
        problems: dict[str, tuple[Moments, WeightProblem]] = {}

        def problem_at(layer: Layer, quantizer: TensorQuantizer) -> WeightProblem:
            """The weights' problem behind a quantizer; the last one again while the moments stay."""
            moments = data.moments(layer, quantizer)
            if layer.name not in problems or problems[layer.name][0] is not moments:
                problem = problem_of(layer, weights[layer.name], moments, self._options)
                problems[layer.name] = (moments, problem)
            return problems[layer.name][1]

        def searched(layer: Layer, quantizer: TensorQuantizer) -> TensorQuantizer:
            """The weight's best scales behind a quantizer of its input; its own where they stay."""
            if layer.weight in self._fixed:
                return starts[layer.name]
            return search_problem(problem_at(layer, quantizer), starts[layer.name], self._options)

        limit = self._options.rounds if self._options.rounds is not None else _MOST_ROUNDS
        quantizer, rounds, before_score, after_score = start, 0, 0.0, 0.0
        current = dict(starts)
        while rounds < limit:
            rounds += 1
            for layer in site.layers:
                current[layer.name] = searched(layer, quantizer)
            if not self._search_activations or (site.key is None and site.tensor in self._fixed):
                break
            readers = [self._reader(layer, data, current[layer.name], weights[layer.name]) for layer in site.layers]
            near = rounds > 1
            found, after_score, at_start = search_activation(quantizer, readers, self._options, near=near)
            before_score = at_start if rounds == 1 else before_score
            if found is quantizer:
                break
            quantizer = found
        if quantizer is not start and self._judge is not None:
            reader = None if site.key is None else (site.layers[0].name, 0)
            chosen_quantizer = self._judge(site.tensor, reader, {"start": start, "search": quantizer})
            if chosen_quantizer is start:
                quantizer, after_score = start, before_score
                for layer in site.layers:
                    current[layer.name] = searched(layer, start)
        plan = _with_quantizer(plan, site, quantizer)
        ratio = float(quantizer.scale / start.scale)
        changes = []
        for layer in site.layers:
            means[layer.name] = data.float_mean(layer)
            problem = problem_at(layer, quantizer)
            chosen = current[layer.name]
            books: Mapping[CodeBook, Candidate] = {}
            # A table is learned against whole moments; where they are kept in blocks, the effort's note says so.
            whole = len(problem.moments.square) == len(problem.matrix)
            if layer.weight in self._fixed:
                pass
            elif self._compensate and whole and chosen.spec.bits <= FEW_BITS and chosen.spec.axis is not None:
                choice = choose_code_book(layer, problem, chosen, self._code_books)
                chosen, books = choice.quantizer, choice.candidates
            elif self._compensate:
                chosen = compensate(layer, problem, chosen)
            plan = plan.with_weight(layer.weight, chosen)
            gain = _gain_db(layer, problem, weights[layer.name], starts[layer.name], chosen)
            changes.append(
                LayerChange(layer.name, ratio, before_score, after_score, gain, data.exact[layer.name], rounds, books)
            )
        return plan, changes

    def _collect(
        self, plan: QuantPlan, done: QuantPlan, site: _Site, before: Sequence[str], later: Sequence[str]
    ) -> SiteData:
        """One pass over all samples: moments at the start's scale, and rows of a part of the samples."""
        limits = self._limits
        entry = plan.activations[site.tensor] if site.key is not None else None
        stored = entry if isinstance(entry, TensorQuantizer) else None
        data = SiteData(site.layers, _quantizer(plan, site), limits)
        inputs = list(dict.fromkeys(layer.input for layer in site.layers))
        stride = max(self._prefix.samples // limits.sampled_samples, 1)
        whole: set[str] = set()  # layers of whose rows all samples count

        def wanted(index: int) -> bool:
            return index % stride == 0 or bool(whole)

        streams = self._prefix.stream(done, inputs, decided=before, kept=later, wanted=wanted)
        for index, (exact, quantized) in enumerate(streams):
            for layer in site.layers if quantized else ():
                x = quantized[layer.input]
                positions = sampled_positions(layer, x.shape, limits.positions_per_sample, limits.seed, index)
                if positions is None:
                    whole.add(layer.name)
                elif exact is None and index % stride:
                    continue
                rows = layer.rows(x, positions)
                if stored is not None:
                    rows = stored.simulate(rows)
                float_rows = None if exact is None else layer.rows(exact[layer.input], positions)
                data.add(layer, rows, float_rows, complete=positions is None)
        return data

    def _reader(self, layer: Layer, data: SiteData, quantizer: TensorQuantizer, weight: FloatArray) -> Reader:
        matrix = layer.matrix(quantizer.simulate(weight)).astype(np.float32)
        exact, quantized, starts = data.search_rows(layer)
        target = np.matmul(exact.transpose(1, 0, 2), layer.matrix(weight)).transpose(1, 0, 2)
        bounds = _following_bounds(layer)
        bias = None
        if bounds is not None and layer.bias is not None:
            value = layer.node.inputs[2]
            assert value is not None
            assert value.const_value is not None
            bias = value.const_value.numpy().astype(np.float32).reshape(layer.groups, -1)
            target = np.clip(target + bias, *bounds)
        return Reader(layer, target, quantized, starts, matrix, bounds if bias is not None else None, bias)


def _gain_db(
    layer: Layer, problem: WeightProblem, weight: FloatArray, before: TensorQuantizer, after: TensorQuantizer
) -> float:
    """How much smaller the output error of one weight quantizer is than another's, in dB."""
    old = problem.error(layer.matrix(before.simulate(weight)).astype(np.float32)).sum()
    new = problem.error(layer.matrix(after.simulate(weight)).astype(np.float32)).sum()
    if new <= 0 or old <= 0:
        return 0.0
    return float(10 * np.log10(old / new))


def _following_bounds(layer: Layer) -> tuple[float, float] | None:
    """Bounds of the Relu or Clip that alone reads the layer's output."""
    output = layer.node.outputs[0]
    uses = output.uses()
    if len(uses) != 1 or output.is_graph_output():
        return None
    (use,) = uses
    return semantics.clip_bounds(use.node)


def _topological(model: ir.Model, plan: QuantPlan) -> list[str]:
    """Stored tensors in the order in which the network makes them."""
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    return [v.name for v in values if v.name is not None and v.name in plan.activations]


def _up_to(plan: QuantPlan, before: Sequence[str], decided: set[str], site: _Site) -> QuantPlan:
    """The plan of the quantized prefix: tensors, weights and requantizations that lie before a site."""
    layers = {layer.name for layer in site.layers}
    return dataclasses.replace(
        plan,
        activations={name: plan.activations[name] for name in before},
        shared={name: root for name, root in plan.shared.items() if root in set(before)},
        weights={name: entry for name, entry in plan.weights.items() if name in decided},
        requants={key: entry for key, entry in plan.requants.items() if key.rpartition(":")[0] not in layers},
        int_biases={bias: keys for bias, keys in plan.int_biases.items() if keys[1] in decided},
    )


def _quantizer(plan: QuantPlan, site: _Site) -> TensorQuantizer:
    entry = plan.activations[site.tensor] if site.key is None else plan.requants[site.key]
    assert isinstance(entry, TensorQuantizer)
    return entry


def _with_quantizer(plan: QuantPlan, site: _Site, quantizer: TensorQuantizer) -> QuantPlan:
    if site.key is None:
        return plan.with_activation(site.tensor, quantizer)
    for layer in site.layers:
        plan = plan.with_requant(f"{layer.name}:0", quantizer)
    return plan


def _weight_quantizer(plan: QuantPlan, layer: Layer) -> TensorQuantizer:
    entry = plan.weights[layer.weight]
    assert isinstance(entry, TensorQuantizer)
    return entry


def _float_weight(model: ir.Model, layer: Layer) -> FloatArray:
    tensor = model.graph.initializers[layer.weight].const_value
    assert tensor is not None
    return tensor.numpy().astype(np.float32, copy=False)
