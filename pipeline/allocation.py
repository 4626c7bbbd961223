"""The stage that gives every layer its bits within a budget (:func:`decide_bits`), and its basis (:func:`study`)."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from postquant.calib.bit_allocation import Allocation, Choice, Limit, Quick, allocate_bits
from postquant.calib.bit_program import Option
from postquant.calib.code_book import CodeBooks
from postquant.calib.sensitivity import LayerSensitivity, Sensitivity, SensitivityOptions, quantized_layers
from postquant.calib.trial import Outcome
from postquant.passes.biases import fit_biases
from postquant.passes.emit import emit
from postquant.passes.place import Override, PlacementSettings
from postquant.passes.plan import QuantPlan
from postquant.pipeline.budget import Budget, BudgetKind
from postquant.pipeline.config import Method
from postquant.pipeline.job import Job
from postquant.pipeline.methods import code_books
from postquant.pipeline.placement import placement_settings
from postquant.pipeline.save import model_bytes
from postquant.pipeline.stage_log import StageLog
from postquant.pipeline.summary import megabytes
from postquant.runtime_ops.errors import ConfigError
from postquant.runtime_ops.quantizer import TensorQuantizer

_WIDTHS = (2, 3, 4, 5, 6, 7, 8)
# Widths that one container holds: the widest of each, as wide as a file can make use of.
_CONTAINERS = ((2,), (3, 4), (5, 6, 7, 8))

Placed = Callable[[PlacementSettings], QuantPlan]


@dataclasses.dataclass(frozen=True)
class Bits:
    """Bits of one layer's weight and input."""

    wbits: int
    abits: int


def open_settings(job: Job, model: ir.Model, placed: Placed, *, inputs: bool) -> PlacementSettings:
    """Where the choice begins: weights as wide as they may be, no exceptions but those that the user names.

    Args:
        job: What to do.
        model: The float model that is quantized.
        placed: Places quantizers.
        inputs: Whether inputs are chosen too; otherwise they keep the widths that the configuration gives them.
    """
    usual = placement_settings(job.config)
    settings = dataclasses.replace(usual, first_last_bits=None, depthwise_bits=None)
    if inputs:
        return settings
    plan = placed(usual)
    kept = tuple(
        Override(node=_literal(layer.name), abits=_input_bits(plan, layer.node))
        for layer in quantized_layers(model, plan)
    )
    return dataclasses.replace(settings, overrides=(*settings.overrides, *kept))


def study(
    job: Job,
    reference: ir.Model,
    model: ir.Model,
    placed: Placed,
    *,
    inputs: bool,
    threads: int,
    candidates: tuple[int, ...] = _WIDTHS,
) -> Sensitivity:
    """The sensitivities of all layers.

    Args:
        job: What to do.
        reference: The float model whose outputs are right.
        model: The float model that is quantized.
        placed: Places quantizers.
        inputs: Whether the inputs of layers are studied too.
        threads: Samples that are run at the same time.
        candidates: Bits of weights that are of interest.
    """
    config, target = job.config, job.target
    plan = placed(open_settings(job, model, placed, inputs=inputs))
    layers = quantized_layers(model, plan)
    fixed = [_fixed(layer.node, placement_settings(config).overrides) for layer in layers]
    job.progress.stage("sensitivity", 2 * len(layers))
    easyquant = config.method is Method.EASYQUANT
    options = SensitivityOptions(
        weight_widths=_allowed(candidates, target.weights.bits, min(config.wbits, target.weights.max_bits)),
        input_widths=(
            _allowed(_WIDTHS, target.activations.bits, min(config.abits, target.activations.max_bits)) if inputs else ()
        ),
        fixed_weights={layer.name: f[0] for layer, f in zip(layers, fixed, strict=True) if f[0] is not None},
        fixed_inputs={layer.name: f[1] for layer, f in zip(layers, fixed, strict=True) if f[1] is not None},
        books=code_books(config, target) if easyquant else CodeBooks(),
        correct_biases=easyquant if config.bias_correction is None else config.bias_correction,
        threads=threads,
        seed=config.seed,
    )
    return Sensitivity(model, reference, plan, job.source, options, job.progress.advance)


def decide_bits(
    job: Job, reference: ir.Model, model: ir.Model, placed: Placed, log: StageLog, *, threads: int
) -> PlacementSettings:
    """The settings for placement: the configuration's, or the widths that suit its budget best.

    Args:
        job: What to do.
        reference: The float model whose outputs are right.
        model: The float model that is quantized.
        placed: Places quantizers.
        log: Told what was chosen.
        threads: Samples that are run at the same time.

    Raises:
        ConfigError: If no choice of widths keeps the budget.
    """
    if job.config.budget is None:
        return placement_settings(job.config)
    budget = Budget.read(job.config.budget)
    inputs = budget.kind is BudgetKind.BITOPS
    settings = open_settings(job, model, placed, inputs=inputs)
    saved = job.checkpoint.load("bits")
    if saved is not None:
        data = saved.data()
        log.resume("bits", data["log"])
        return with_bits(settings, {name: Bits(*bits) for name, bits in data["bits"].items()})
    # A file holds codes of 2, 4 or 8 bits; other widths would take as much and be worse.
    candidates = _WIDTHS if inputs else tuple(max(widths) for widths in _CONTAINERS)
    sensitivity = study(job, reference, model, placed, inputs=inputs, threads=threads, candidates=candidates)
    chosen = choose_bits(job, model, placed, sensitivity, budget)
    report_choice(log, job, chosen, sensitivity)
    bits = chosen.bits
    record = {name: [item.wbits, item.abits] for name, item in bits.items()}
    job.checkpoint.save("bits", data={"bits": record, "log": log.since_resume()})
    return with_bits(settings, bits)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Widths within a budget.

    Attributes:
        allocation: What was solved and measured.
        budget: The budget.
        limit: Its value in bytes, bit operations or dB.
    """

    allocation: Allocation
    budget: Budget
    limit: float

    @property
    def bits(self) -> dict[str, Bits]:
        """Node name -> bits."""
        return {name: Bits(o.wbits, o.abits) for name, o in self.allocation.choice.items()}

    @property
    def cost(self) -> str:
        """What the quickly quantized network costs, in words."""
        cost = self.allocation.quick.cost
        return f"{cost:.3g} bit operations" if self.budget.kind is BudgetKind.BITOPS else megabytes(int(cost))


def choose_bits(job: Job, model: ir.Model, placed: Placed, sensitivity: Sensitivity, budget: Budget) -> Chosen:
    """The best widths within a budget; arguments as for :func:`decide_bits`.

    Raises:
        ConfigError: If no choice of widths keeps the budget.
    """
    settings = open_settings(job, model, placed, inputs=budget.kind is BudgetKind.BITOPS)
    layers = {layer.layer: layer for layer in sensitivity.layers}
    opened = placed(settings)
    given = {node.name or "": _input_bits(opened, node) for node in model.graph if node.name in layers}
    whole = sum(layer.work for layer in layers.values()) * 64
    fixed_cost = 0.0
    if budget.kind is BudgetKind.BITOPS:
        limit = budget.limit(whole)
        options = {name: _operation_options(layer, given[name]) for name, layer in layers.items()}
    else:
        limit = budget.limit(job.report.size_before)
        fixed_cost, options = _size_options(job, model, sensitivity, given)

    def plan_of(choice: Choice, left_out: str | None = None) -> QuantPlan:
        bits = {name: Bits(option.wbits, option.abits) for name, option in choice.items()}
        if left_out is not None:
            bits[left_out] = Bits(bits[left_out].wbits, given[left_out])
        wbits = {name: item.wbits for name, item in bits.items() if name != left_out}
        return sensitivity.quick_plan(wbits, placed(with_bits(settings, bits)))

    def measure(choice: Choice) -> Quick:
        plan = plan_of(choice)
        cost = sum(option.cost for option in choice.values())
        return Quick(sensitivity.measure(plan), _file_bytes(job, model, plan) if fixed_cost else cost)

    def without(choice: Choice, name: str) -> Outcome:
        return sensitivity.measure(plan_of(choice, name))

    by_quality = budget.kind is BudgetKind.SQNR
    job.progress.stage("allocate bits")
    found = allocate_bits(
        options,
        Limit(sqnr_db=limit) if by_quality else Limit(cost=limit),
        measure,
        without,
        fixed_noise=0.0 if budget.kind is BudgetKind.BITOPS else sensitivity.fixed,
        fixed_cost=fixed_cost,
    )
    if not (found.kept or by_quality):
        narrowest = {name: min(table, key=lambda option: option.cost) for name, table in options.items()}
        least = measure(narrowest).cost
        unit = "bit operations" if budget.kind is BudgetKind.BITOPS else "bytes"
        raise ConfigError(
            "no choice of bits keeps the budget",
            where="budget",
            expected=f"at least {least:,.0f} {unit}, which every layer at its narrowest takes",
            found=f"{limit:,.0f} {unit}",
            hint=_why_so_large(sensitivity, options) if fixed_cost else "allow more",
        )
    return Chosen(found, budget, limit)


def _why_so_large(sensitivity: Sensitivity, options: Mapping[str, list[Option]]) -> str:
    """Which layers keep one byte per weight however few bits they have."""
    whole = [s.layer for s in sensitivity.layers if min(o.cost for o in options[s.layer]) >= s.count]
    if not whole:
        return "allow more"
    shown = ", ".join(whole[:3]) + (", ..." if len(whole) > 3 else "")
    return (
        f"allow more, or another weight_storage: {len(whole)} layers keep a byte per weight, because no operator with "
        f"packed codes computes them or their output stays in float ({shown})"
    )


def report_choice(log: StageLog, job: Job, chosen: Chosen, sensitivity: Sensitivity) -> None:
    """Stages, notes and rows of the report."""
    found = chosen.allocation
    counts = collections.Counter((bits.wbits, bits.abits) for bits in chosen.bits.values())
    widths = ", ".join(f"{count} x W{w}A{a}" for (w, a), count in sorted(counts.items()))
    repairs = f", noises measured again {found.repaired} x" if found.repaired else ""
    log.add(
        "bit allocation",
        f"{job.config.budget}: {widths}; {chosen.cost}, {found.predicted_db:.1f} dB predicted{repairs}",
        sqnr_db=found.quick.outcome.sqnr_db,
    )
    if not found.kept:
        log.note(
            f"the budget {job.config.budget} is not reached: with every layer as wide as allowed, quick scales give "
            f"{found.quick.outcome.sqnr_db:.1f} dB"
        )
    for layer in sensitivity.layers:
        log.layer_noise[layer.layer] = {
            **{f"w{bits}": decibel(noise) for bits, noise in layer.weight_noise.items()},
            **{f"a{bits}": decibel(noise) for bits, noise in layer.input_noise.items()},
        }


def decibel(noise: float) -> float:
    """SQNR of a noise, in dB."""
    return -10 * math.log10(max(noise, 1e-20))


def with_bits(settings: PlacementSettings, bits: Mapping[str, Bits]) -> PlacementSettings:
    """The settings with the chosen bits of every layer."""
    chosen = tuple(Override(node=_literal(name), wbits=item.wbits, abits=item.abits) for name, item in bits.items())
    return dataclasses.replace(settings, overrides=(*settings.overrides, *chosen))


def _literal(name: str) -> str:
    """A pattern that fits this name only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _fixed(node: ir.Node, overrides: tuple[Override, ...]) -> tuple[int | None, int | None]:
    """Bits of weight and input that the user has chosen for a node; the last override wins."""
    wbits = abits = None
    for override in overrides:
        if override.selects(node):
            wbits = wbits if override.wbits is None else override.wbits
            abits = abits if override.abits is None else override.abits
    return wbits, abits


def _allowed(wanted: tuple[int, ...], known: tuple[int, ...], most: int) -> tuple[int, ...]:
    return tuple(bits for bits in wanted if bits in known and bits <= most) or (most,)


def _input_bits(plan: QuantPlan, node: ir.Node) -> int:
    entry = plan.requants.get(f"{node.name}:0")
    if entry is None:
        value = node.inputs[0]
        entry = None if value is None else plan.activation_entry(value.name or "")
    spec = entry.spec if isinstance(entry, TensorQuantizer) else entry
    return _WIDTHS[-1] if spec is None else spec.bits


def _operation_options(layer: LayerSensitivity, abits: int) -> list[Option]:
    """Widths of weight and input together: their product is what they cost."""
    inputs = layer.input_noise or {abits: 0.0}
    return [
        Option(w, a, layer.work * w * a, weight_noise + input_noise)
        for w, weight_noise in layer.weight_noise.items()
        for a, input_noise in inputs.items()
    ]


def _size_options(
    job: Job, model: ir.Model, sensitivity: Sensitivity, abits: Mapping[str, int]
) -> tuple[float, dict[str, list[Option]]]:
    """Bytes that no choice changes, and the options of every layer with the bytes that each adds.

    The network is emitted once for every kind of container: which layers can be packed, and what an operator with
    packed codes takes besides them, is then known instead of guessed.
    """
    options: dict[str, list[Option]] = {layer.layer: [] for layer in sensitivity.layers}
    fixed: float | None = None
    for container in reversed(_CONTAINERS):
        wbits = {}
        for layer in sensitivity.layers:
            inside = [bits for bits in layer.widths if bits in container]
            wbits[layer.layer] = max(inside, default=max(layer.widths))
        held = [layer for layer in sensitivity.layers if wbits[layer.layer] in container]
        if not held and fixed is not None:
            continue
        emitted = _emitted(job, model, sensitivity.quick_plan(wbits))
        codes = {layer.layer: _code_bytes(emitted, layer) for layer in sensitivity.layers}
        rest = model_bytes(emitted) - sum(codes.values())
        fixed = rest if fixed is None else fixed
        share = (rest - fixed) / max(len(held), 1)
        for layer in held:
            bits = wbits[layer.layer]
            noise = layer.weight_noise[bits]
            options[layer.layer].append(Option(bits, abits[layer.layer], codes[layer.layer] + share, noise))
    return fixed or 0.0, options


def _code_bytes(emitted: ir.Model, layer: LayerSensitivity) -> int:
    """Bytes of a weight's codes in an emitted model."""
    for name in (f"{layer.weight}_codes", f"{layer.weight}_quantized"):
        value = emitted.graph.initializers.get(name)
        if value is not None and value.const_value is not None:
            return int(value.const_value.nbytes)
    return layer.count


def _emitted(job: Job, model: ir.Model, plan: QuantPlan) -> ir.Model:
    storage = job.config.weight_storage or job.target.weight_storage
    return emit(model, fit_biases(model, plan), weight_storage=storage)


def _file_bytes(job: Job, model: ir.Model, plan: QuantPlan) -> float:
    return float(model_bytes(_emitted(job, model, plan)))
