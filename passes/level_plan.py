"""Which activations can have code books, and how they get there: :func:`level_sites`, :func:`with_levels`.

A code book belongs to what layers read. A tensor that has the layers' own narrow format is stored in 8 bits instead,
over the same range, and every layer looks its codes up in the table: so pass-through nodes in between (MaxPool,
Reshape) and whatever makes the tensor keep their integer kernels. A layer that narrows a wider tensor looks that one's
codes up. Where all of them read one value, whose channels the graph knows, every channel may have levels of its own.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.border_plan import STORED_BITS, weight_name, wide
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.code_book import MOST_LEVEL_BITS
from postquant.runtime_ops.quantizer import TensorQuantizer

_NO_CHANNELS = (None, 1)


@dataclasses.dataclass(frozen=True)
class LevelSite:
    """One code book to decide.

    Attributes:
        value: Name of the value whose levels it has: what the layers read, or, where they read different parts or forms
            of the stored tensor, that.
        keys: Keys ``"<node>:0"`` of the layers that read through it -> names of their weights.
        tensor: Key of the stored tensor that gets 8 bits; "" where the layers narrow one that has them already.
        quantizer: The uniform one that it takes the place of.
        axis: Axis of the value's channels, counted from the last one, -1, or None where the layers do not read the same
            ones.
        channels: How many there are; 1 without an axis.
    """

    value: str
    keys: dict[str, str]
    tensor: str
    quantizer: TensorQuantizer
    axis: int | None = None
    channels: int = 1


def level_sites(model: ir.Model, plan: QuantPlan) -> tuple[list[LevelSite], dict[str, str]]:
    """Every place for a code book.

    Args:
        model: The simplified model.
        plan: A decided plan.

    Returns:
        The places, and for narrow activations that can have none, key -> reason.
    """
    found: list[LevelSite] = []
    refused: dict[str, str] = {}
    values = {value.name: value for value in model.graph.inputs}
    values.update((value.name, value) for node in model.graph for value in node.outputs)
    nodes = {node.name: node for node in model.graph}
    for tensor, entry in plan.activations.items():
        if not _narrow(entry):
            continue
        assert isinstance(entry, TensorQuantizer)
        members = [tensor, *sorted(name for name, root in plan.shared.items() if root == tensor)]
        readers: dict[ir.Node, ir.Value] = {}
        reason = _why_not_levels(entry)
        for member in members:
            reason = reason or _other_readers(values[member], plan, members, readers)
        if reason is None and readers:
            keys = {f"{node.name}:0": weight_name(node) for node in readers}
            read = {value.name or "" for value in readers.values()}
            channels = {_channels(node, value) for node, value in readers.items()}
            alone = len(read) == len(channels) == 1
            name, shape = (read.pop(), channels.pop()) if alone else (tensor, _NO_CHANNELS)
            found.append(LevelSite(name, keys, tensor, entry, *shape))
        elif reason is not None:
            refused[tensor] = reason
    for key, entry in plan.requants.items():
        if not _narrow(entry):
            continue
        assert isinstance(entry, TensorQuantizer)
        node, (name, _, index) = nodes[key.rpartition(":")[0]], key.rpartition(":")
        value = node.inputs[int(index)]
        stored = None if value is None else plan.activation_quantizer(value.name or "")
        reason = _why_not_levels(entry)
        if stored is None or stored.spec.bits != STORED_BITS or stored.spec.signed:
            reason = reason or "the tensor that it narrows has no unsigned codes of 8 bits"
        if index != "0" or not _is_layer(node, plan):
            reason = reason or f"{name} is no layer with a quantized weight"
        if reason is None:
            assert value is not None
            keys = {key: weight_name(node)}
            found.append(LevelSite(value.name or "", keys, "", entry, *_channels(node, value)))
        else:
            refused[key] = reason
    return found, refused


def with_levels(plan: QuantPlan, site: LevelSite, quantizer: TensorQuantizer) -> QuantPlan:
    """The plan in which the layers of a site read through a code book.

    Args:
        plan: A decided plan.
        site: One of its places.
        quantizer: It has a code book of unsigned codes.
    """
    by_weight = {weight: key for key, weight in site.keys.items()}
    if site.tensor:
        plan = plan.with_activation(site.tensor, wide([quantizer]))
    return dataclasses.replace(
        plan,
        requants={**plan.requants, **dict.fromkeys(site.keys, quantizer)},
        int_biases={
            bias: (by_weight.get(weight, source), weight) for bias, (source, weight) in plan.int_biases.items()
        },
    )


def _narrow(entry: object) -> bool:
    return isinstance(entry, TensorQuantizer) and entry.spec.bits <= MOST_LEVEL_BITS


def _why_not_levels(quantizer: TensorQuantizer) -> str | None:
    spec = quantizer.spec
    if spec.signed or spec.symmetric or spec.power_of_two:
        return "it has signed or symmetric codes, or power-of-two scales"
    if any(part is not None for part in (quantizer.border, quantizer.adaptive, quantizer.table)):
        return "it has a rounding border, an adaptive step or a code book already"
    return None


def _other_readers(
    value: ir.Value, plan: QuantPlan, members: list[str], readers: dict[ir.Node, ir.Value]
) -> str | None:
    """Why something reads a value that is no layer; the layers go to ``readers``, with what they read."""
    if value.is_graph_output():
        return "it is an output of the network"
    for use in value.uses():
        key = f"{use.node.name}:{use.idx}"
        if key in plan.requants:
            return "a layer narrows it further"
        if any(output.name in members for output in use.node.outputs):  # it copies codes
            continue
        if use.idx != 0 or not _is_layer(use.node, plan):
            return f"{use.node.name or use.node.op_type} reads it, too"
        readers[use.node] = value
    return None


def _channels(node: ir.Node, value: ir.Value) -> tuple[int | None, int]:
    """The axis of a layer's input along which its weights are multiplied, and its length, if that is known."""
    if value.shape is None or (node.op_type == "Gemm" and semantics.attribute(node, "transA", 0)):
        return _NO_CHANNELS
    rank = len(value.shape)
    axis = rank - 1 if node.op_type == "MatMul" else 1
    length = value.shape[axis] if axis < rank else None
    return (axis - rank, length) if isinstance(length, int) and length > 1 else _NO_CHANNELS


def _is_layer(node: ir.Node, plan: QuantPlan) -> bool:
    weighted = semantics.weight_index(node) == 1 and node.name not in plan.floats
    return weighted and isinstance(plan.weights.get(weight_name(node)), TensorQuantizer)
