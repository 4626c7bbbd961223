"""Rounding borders for the narrow activations of a network, with their steps: :func:`choose_borders`.

A border follows from the weights of the layer that reads an activation (:mod:`postquant.calib.border_terms`); data only
say how many values have residuals at all, and whether it is worth it. With a border, rounding costs less and clipping
as much as before, so that the best steps move. Those that are best for the outputs of single layers are worse for the
network than those that were there, so one factor for all steps is chosen, by the network's outputs, on samples that the
choice of ranges has not seen. Rounding to nearest gets the same chance.

Corrected biases stay as they are: they make up for the mean error of the weights, which knows no activation codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from postquant.calib.border_terms import BorderTerms, LayerBorder, border_of
from postquant.calib.layers import Layer
from postquant.calib.prefix import spaced
from postquant.calib.source import CalibrationSource
from postquant.calib.trial import Outcome, Trial
from postquant.passes.border_plan import BorderSite, border_sites, with_border
from postquant.passes.free_memory import release_tensor
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.runtime_ops.quantizer import TensorQuantizer

# Widest activation that gets a border: beyond 4 bits other errors hide what rounding costs.
MOST_BITS = 4
# Samples that tell how many values have residuals.
_DENSITY_SAMPLES = 16


@dataclasses.dataclass(frozen=True)
class BorderOptions:
    """What is tried.

    Attributes:
        terms: Parts and strength of the borders; the density is measured.
        bits: Widest activation that gets a border.
        least_gain: Least expected gain of a layer (a share of its rounding error) that is worth a border.
        ratio: Steps are tried at multiples that are powers of it, > 1.
        most_steps: Largest power, of either sign.
        margin_db: How much the output error must fall, in dB, below that of the best steps without borders.
    """

    terms: BorderTerms = dataclasses.field(default_factory=BorderTerms)
    bits: int = MOST_BITS
    least_gain: float = 0.03
    ratio: float = 1.06
    most_steps: int = 3
    margin_db: float = 0.0


@dataclasses.dataclass(frozen=True)
class BorderChoice:
    """What was chosen.

    Attributes:
        plan: The plan, with borders, with other steps, or as it was.
        borders: Node name -> its border; what was tried where none is used.
        kept: Whether the plan has borders.
        factor: Multiple of the steps in the plan.
        start: Output error of the given plan.
        nearest: The least output error without borders.
        bordered: The least output error with borders.
        sites: How many activations could have one.
        refused: Node name -> why it can have no border.
    """

    plan: QuantPlan
    borders: Mapping[str, LayerBorder]
    kept: bool
    factor: float
    start: Outcome
    nearest: Outcome
    bordered: Outcome
    sites: int
    refused: Mapping[str, str]


def choose_borders(
    model: ir.Model,
    plan: QuantPlan,
    source: CalibrationSource,
    trial: Trial,
    options: BorderOptions | None = None,
    *,
    threads: int = 1,
    progress: Callable[[], None] | None = None,
) -> BorderChoice | None:
    """Tries borders and other steps, and keeps what gives the least output error.

    Args:
        model: The float model that the plan is about.
        plan: A decided plan.
        source: Calibration data.
        trial: Measures output errors, on samples of its own.
        options: What is tried.
        threads: Threads of onnxruntime.
        progress: Called after every trial.

    Returns:
        The choice; None where no activation can have a border.
    """
    options = options or BorderOptions()
    sites, refused = border_sites(model, plan, bits=options.bits)
    borders = borders_of(model, plan, sites, source, options, threads=threads)
    if not borders:
        return None

    def climb(used: Mapping[str, LayerBorder]) -> list[tuple[float, Outcome, QuantPlan]]:
        """Steps of factors 1 and on either side, and on to where they get better; the best one is the last one."""
        found: dict[int, tuple[float, Outcome, QuantPlan]] = {}

        def measure(index: int) -> float:
            factor = options.ratio**index
            changed = plan if index == 0 and not used else with_borders(plan, sites, used, factor)
            found[index] = factor, trial.measure(model, changed), changed
            if progress is not None:
                progress()
            return found[index][1].error

        best, least = 0, measure(0)
        for direction in (1, -1):
            while abs(best + direction) <= options.most_steps and best * direction >= 0:
                error = measure(best + direction)
                if error >= least:
                    break
                best, least = best + direction, error
        return [found[0], found[best]]

    plain, edged = climb({}), climb(borders)
    best_plain, best_edged = plain[-1], edged[-1]
    kept = best_edged[1].error < best_plain[1].error * 10 ** (-options.margin_db / 20)
    factor, _, chosen = best_edged if kept else best_plain
    return BorderChoice(chosen, borders, kept, factor, plain[0][1], best_plain[1], best_edged[1], len(sites), refused)


def borders_of(
    model: ir.Model,
    plan: QuantPlan,
    sites: Sequence[BorderSite],
    source: CalibrationSource,
    options: BorderOptions,
    *,
    threads: int = 1,
) -> dict[str, LayerBorder]:
    """Node name -> border, for the sites whose expected gain is worth one."""
    density = densities(model, plan, sites, source, threads=threads)
    result = {}
    for site in sites:
        layer = Layer.of(site.node)
        entry = None if layer is None else plan.weights.get(layer.weight)
        if layer is None or not isinstance(entry, TensorQuantizer):
            continue
        tensor = model.graph.initializers[layer.weight].const_value
        assert tensor is not None
        terms = dataclasses.replace(options.terms, density=density[site.key])
        found = border_of(layer, entry.simulate(tensor.numpy().astype(np.float32, copy=False)), terms)
        release_tensor(tensor)
        if found is not None and found.gain >= options.least_gain:
            result[layer.name] = found
    return result


def with_borders(
    plan: QuantPlan, sites: Sequence[BorderSite], borders: Mapping[str, LayerBorder], factor: float
) -> QuantPlan:
    """The plan with borders, and with all steps of the sites multiplied.

    Args:
        plan: A decided plan.
        sites: Places of borders; one without a border is rounded to nearest.
        borders: Node name -> border.
        factor: Multiple of the steps, > 0.
    """
    # Quantizers of a tensor with several readers are read before the first of them changes it.
    old = {site.key: quantizer_of(plan, site) for site in sites}
    for site in sites:
        found = borders.get(site.node.name or "")
        scale = np.asarray(old[site.key].scale * np.float32(factor), np.float32)
        changed = dataclasses.replace(old[site.key], scale=scale, border=None if found is None else found.border)
        if found is None and not site.readers:
            plan = plan.with_requant(site.key, changed)
        elif found is None and not any(key.rpartition(":")[0] in borders for key, _ in site.readers):
            plan = plan.with_activation(site.tensor, changed)
        else:
            plan = with_border(plan, site, changed)
    return plan


def quantizer_of(plan: QuantPlan, site: BorderSite) -> TensorQuantizer:
    """The narrow quantizer through which a site's layer reads."""
    quantizer = plan.input_quantizer(site.key) or plan.activation_quantizer(site.tensor)
    assert quantizer is not None
    return quantizer


def densities(
    model: ir.Model, plan: QuantPlan, sites: Sequence[BorderSite], source: CalibrationSource, *, threads: int = 1
) -> dict[str, float]:
    """Key -> share of the values, in the float network, that are neither clipped nor exactly 0."""
    names = list(dict.fromkeys(site.tensor for site in sites))
    counts, totals = dict.fromkeys((site.key for site in sites), 0), dict.fromkeys((site.key for site in sites), 0)
    if not names:
        return {}
    ranges = {site.key: quantizer_of(plan, site).range() for site in sites}
    session = make_session(model, outputs=names, threads=threads)
    for sample in source.read(spaced(len(source), _DENSITY_SAMPLES)):
        values = session.run(sample)
        for site in sites:
            x, (low, high) = values[site.tensor], ranges[site.key]
            counts[site.key] += int(np.count_nonzero((x > low) & (x < high) & (x != 0)))
            totals[site.key] += x.size
    return {key: counts[key] / max(totals[key], 1) for key in counts}
