"""Per-channel scales that move between layers: :class:`ScaleGroup`, :func:`scale_groups`, :class:`EqualizePass`.

Where every node that makes a set of values is a Conv, ConvTranspose or Gemm, every node that reads them is one too, and
what lies between commutes with a positive factor per channel (Relu, max and average pooling, residual sums, ...), then

    y_c  ->  s_c y_c        rows of the producers' weights and biases times s_c
                            columns of the consumers' weights divided by s_c

changes no output. It changes what one scale per tensor can represent: channels with a small range get more codes.
For a depthwise consumer it is free, because its weights have a scale per channel anyway.

``Clip(0, h)`` commutes too as long as ``s_c >= 1`` and ``s_c max y_c <= h``: a channel that reaches ``h`` has
``s_c = 1`` and is clipped where it was; the others never reach the bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.layer import Layer, as_layer
from postquant.passes.rewiring import Initializers, is_op

# One input, one output, and f(s * x) = s * f(x) for every positive factor per channel.
_HOMOGENEOUS = frozenset(
    {"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity"}
)


@dataclasses.dataclass(frozen=True)
class ScaleGroup:
    """Values that share one factor per channel.

    Attributes:
        values: Names of all values of the group, in topological order.
        producers: Names of the layers that write into it.
        consumers: Names of the layers that read from it.
        channels: Number of channels.
        depthwise: Whether every consumer is depthwise, so that scaling costs nothing.
        ceiling: Smallest upper bound of a Clip within the group; inf where there is none.
    """

    values: tuple[str, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    channels: int
    depthwise: bool
    ceiling: float


def scale_groups(model: ir.Model) -> list[ScaleGroup]:
    """All groups of a simplified model, in topological order of their first value."""
    graph = model.graph
    parent: dict[ir.Value, ir.Value] = {}

    def find(value: ir.Value) -> ir.Value:
        while parent.setdefault(value, value) is not value:
            value = parent[value]
        return value

    for node in graph:
        links = _linked_inputs(node)
        for value in links:
            parent[find(value)] = find(node.outputs[0])
    members: dict[ir.Value, list[ir.Value]] = {}
    for node in graph:
        for value in node.outputs:
            members.setdefault(find(value), []).append(value)
    groups = (_group(values) for values in members.values())
    return [group for group in groups if group is not None]


def _linked_inputs(node: ir.Node) -> list[ir.Value]:
    """Inputs that must have the same factors as the node's output."""
    first = node.inputs[0] if node.inputs else None
    if first is None or node.domain not in ("", "ai.onnx"):
        return []
    if node.op_type in _HOMOGENEOUS or (is_op(node, "Flatten") and is_op(first.producer(), "GlobalAveragePool")):
        return [first]
    if node.op_type == "Clip":
        bounds = semantics.clip_bounds(node)
        return [first] if bounds is not None and bounds[0] in (0.0, -np.inf) and bounds[1] > 0 else []
    if node.op_type == "Add" and all(v is not None and not semantics.is_constant(v) for v in node.inputs):
        return [v for v in node.inputs if v is not None]
    return []


def _group(values: list[ir.Value]) -> ScaleGroup | None:
    """The group of linked values, or None if something else makes or reads one of them."""
    inside = set(values)
    producers: dict[ir.Node, Layer] = {}
    consumers: dict[ir.Node, Layer] = {}
    ceiling = np.inf
    for value in values:
        node = value.producer()
        if node is None or value.is_graph_output():
            return None
        links = _linked_inputs(node)
        if not links:
            layer = as_layer(node)
            if layer is None or node.outputs[0] is not value:
                return None
            producers[node] = layer
        elif is_op(node, "Clip"):
            bounds = semantics.clip_bounds(node)
            assert bounds is not None
            ceiling = min(ceiling, bounds[1])
        elif len({_rank(link) for link in links}) > 1:  # channels of one are added to columns of the other
            return None
        for use in value.uses():
            if use.node.outputs[0] in inside and value in _linked_inputs(use.node):
                continue
            layer = as_layer(use.node)
            if layer is None or use.idx != 0 or use.node.graph is not node.graph:
                return None
            if use.node.attributes.get_int("transA", 0):  # its columns are no channels
                return None
            consumers[use.node] = layer
    if not producers or not consumers:
        return None
    counts = {layer.outputs for layer in producers.values()} | {layer.inputs for layer in consumers.values()}
    if len(counts) != 1:
        return None
    return ScaleGroup(
        values=tuple(value.name or "" for value in values),
        producers=tuple(node.name or "" for node in producers),
        consumers=tuple(node.name or "" for node in consumers),
        channels=counts.pop(),
        depthwise=all(is_op(n, "Conv") and layer.groups == layer.inputs for n, layer in consumers.items()),
        ceiling=float(ceiling),
    )


def _rank(value: ir.Value) -> int | None:
    """Rank of a value of a group, by the layer that it comes from."""
    node = value.producer()
    while node is not None and (links := _linked_inputs(node)):
        if is_op(node, "Flatten"):
            return 2
        node = links[0].producer()
    layer = as_layer(node)
    return None if layer is None else layer.rank


class EqualizePass(ir.passes.InPlacePass):
    """Applies factors to groups.

    Args:
        factors: Pairs of a group and its (channels,) positive factors ``s``.
    """

    def __init__(self, factors: list[tuple[ScaleGroup, npt.NDArray[np.float64]]]) -> None:
        super().__init__()
        self._factors = factors

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the weights and biases of the main graph."""
        graph = model.graph
        nodes: Mapping[str | None, ir.Node] = {node.name: node for node in graph}
        initializers = Initializers(graph)
        nothing = np.zeros(())
        for group, factor in self._factors:
            for name in group.producers:
                layer = as_layer(nodes[name])
                assert layer is not None
                layer.fold_after(factor, nothing, initializers)
            for name in group.consumers:
                layer = as_layer(nodes[name])
                assert layer is not None
                layer.fold_before(1.0 / factor, nothing, initializers)
        return ir.passes.PassResult(model, modified=bool(self._factors))
