"""Where the inputs of a block get rounding borders or adaptive steps: :func:`with_neutral`, :func:`stored_for_readers`.

Either belongs to what one layer reads (:mod:`postquant.passes.border_plan`). A layer behind an adaptive step computes
in float, so that its bias stays float as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from postquant.calib.border import MOST_BITS, quantizer_of
from postquant.calib.layers import Layer
from postquant.calib.learn.adaptive import neutral_module
from postquant.passes.border_plan import border_sites, wide, with_border
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.law_adaptive import Feature
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.rounding_border import RoundingBorder


def with_neutral(
    model: ir.Model,
    plan: QuantPlan,
    nodes: Sequence[ir.Node],
    decided: Collection[str],
    *,
    borders: bool,
    features: Feature | None,
) -> QuantPlan:
    """The plan in which the narrow inputs of a block's layers have borders or adaptive steps that change nothing yet.

    Args:
        model: The simplified float model.
        plan: A decided plan.
        nodes: The block's nodes.
        decided: Keys of quantizers through which nodes outside the block read, and which therefore stay.
        borders: Whether inputs get borders.
        features: Statistics of adaptive steps, for inputs whose zero point is 0; None for no such steps.

    Returns:
        The plan; the same one where no input can have either.
    """
    inside = {node.name for node in nodes}
    sites = []
    for site in border_sites(model, plan, bits=MOST_BITS)[0]:
        readers = {key.rpartition(":")[0] for key, _ in site.readers}
        own = not site.readers or (site.tensor not in decided and readers <= inside)
        if site.node.name in inside and site.key not in decided and own:
            sites.append(site)
    # Quantizers of a tensor with several readers are read before the first of them changes it.
    old = {site.key: quantizer_of(plan, site) for site in sites}
    for site in sites:
        layer, quantizer = Layer.of(site.node), old[site.key]
        if layer is None or quantizer.border is not None or quantizer.adaptive is not None:
            continue
        if features is not None and not quantizer.zero_point:
            module = neutral_module(layer.in_channels, features)
            plan = with_border(plan, site, dataclasses.replace(quantizer, adaptive=module))
            integers = {bias: keys for bias, keys in plan.int_biases.items() if keys[0] != site.key}
            plan = dataclasses.replace(plan, int_biases=integers)
        elif borders:
            plan = with_border(plan, site, dataclasses.replace(quantizer, border=neutral_border(layer.in_channels)))
    return plan


def neutral_border(channels: int) -> RoundingBorder:
    """Rounds to nearest, ties down.

    >>> neutral_border(2).border.tolist()
    [[0.5], [0.5]]
    """
    return RoundingBorder(
        border=np.full((channels, 1), 0.5, np.float32),
        window=np.zeros((channels, 1, 1), np.int8),
        window_scale=np.zeros(channels, np.float32),
        left=np.zeros((0, channels), np.int8),
        left_scale=np.zeros(0, np.float32),
        right=np.zeros((channels, 0), np.int8),
        right_scale=np.zeros(channels, np.float32),
    )


def stored_for_readers(nodes: Sequence[ir.Node], plan: QuantPlan) -> dict[str, tuple[str, ...]]:
    """Tensors that are stored in 8 bits because of how their readers round (:mod:`postquant.passes.border_plan`).

    Args:
        nodes: The block's nodes.
        plan: The plan.

    Returns:
        Name of the tensor -> keys of its readers' quantizers, all in the block: its range follows theirs.
    """
    inside = {node.name for node in nodes}
    found: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        for value in node.inputs:
            name = "" if value is None else value.name or ""
            entry = plan.activations.get(name)
            if value is None or name in found or not isinstance(entry, TensorQuantizer):
                continue
            keys = tuple(f"{use.node.name}:{use.idx}" for use in value.uses())
            readers = [entry for key in keys if isinstance(entry := plan.requants.get(key), TensorQuantizer)]
            if (
                len(readers) != len(keys)
                or value.is_graph_output()
                or not all(u.node.name in inside for u in value.uses())
            ):
                continue
            ours = all(any(p is not None for p in (r.border, r.adaptive, r.table)) for r in readers)
            if ours and _same(entry, wide(readers)):
                found[name] = keys
    return found


def _same(first: TensorQuantizer, second: TensorQuantizer) -> bool:
    numbers = first.scale == second.scale and first.zero_point == second.zero_point
    return first.spec == second.spec and bool(numbers)
