"""Scales per channel that move from activations into the weights of MatMul: SmoothQuant's migration.

For layers ``y = x W`` that read the same tensor ``x`` and factors ``s_k > 0`` per channel (last axis),

    x W  =  (x / s) (diag(s) W)

With one scale per tensor, the few channels of a transformer's LayerNormalization or Gelu that are ten times as large as
the others take the codes of all; after the migration they do not. The output stays equal up to float rounding.

Who divides ``x`` by ``s``:

1. Where every reader of ``x`` takes part, the nodes that make it, for nothing (:mod:`postquant.passes.absorb`): the
   scale and bias of a LayerNormalization, Gelu's constant 0.5 (which becomes a vector), the columns of a MatMul.
2. Otherwise, a Mul by ``1 / s`` in front of these layers only: a residual Add still reads ``x`` itself.
   Not where ``x`` comes from a convolution: its integer kernel would have to write floats.

A Reshape that keeps the last axis may lie between ``x`` and the layers (exports that turn MatMul into Gemm have it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.absorb import Share, absorbing_shares, last_axis, matrix_depth, reader_count, take
from postquant.passes.rewiring import Initializers, constant_tensor, is_op

Vector = npt.NDArray[np.float64]

# Behind these nothing is known to be an integer any more; a search for convolutions ends here.
_FLOAT_AGAIN = ("MatMul", "Gemm", "LayerNormalization", "Softmax", "Gather")


@dataclasses.dataclass(frozen=True)
class SmoothGroup:
    """Layers that read one tensor.

    Attributes:
        value: Name of the tensor.
        layers: Names of the MatMul and Gemm nodes that read it, directly or reshaped, in topological order.
        channels: Length K of its last axis.
        absorbed: Whether the nodes that make the tensor take the factors; a Mul is inserted otherwise.
    """

    value: str
    layers: tuple[str, ...]
    channels: int
    absorbed: bool


def smooth_groups(model: ir.Model) -> list[SmoothGroup]:
    """All groups of a simplified model's main graph, in topological order of their first layer.

    Args:
        model: Not changed; no weight is read.
    """
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        depth = matrix_depth(node)
        if depth is not None and node.inputs[0] is not None:
            readers.setdefault(_root(node.inputs[0], depth), []).append(node)
    found = []
    for value, nodes in readers.items():
        depths = {matrix_depth(node) for node in nodes}
        depth = depths.pop()
        if depths or depth is None or value.name is None or semantics.is_constant(value):
            continue
        absorbed = _shares_of_group(value, nodes, depth) is not None
        if absorbed or not _from_convolution(value):
            found.append(SmoothGroup(value.name, tuple(node.name or "" for node in nodes), depth, absorbed))
    return found


class SmoothPass(ir.passes.InPlacePass):
    """Applies factors to groups.

    Args:
        factors: Pairs of a group of this model and its (channels,) positive, finite factors ``s``.

    Raises:
        ValueError: If factors have another length, or are not positive and finite.
    """

    def __init__(self, factors: Sequence[tuple[SmoothGroup, Vector]]) -> None:
        super().__init__()
        for group, factor in factors:
            if factor.shape != (group.channels,) or not (np.isfinite(factor).all() and (factor > 0).all()):
                raise ValueError(f"{group.value} needs {group.channels} positive, finite factors")
        self._factors = tuple(factors)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes constants of the main graph; adds a Mul per group that is not absorbed."""
        graph = model.graph
        nodes: Mapping[str | None, ir.Node] = {node.name: node for node in graph}
        initializers = Initializers(graph)
        modified = False
        for group, factor in self._factors:
            if np.all(factor == 1):
                continue
            modified = True
            layers = [nodes[name] for name in group.layers]
            first = layers[0].inputs[0]
            assert first is not None
            value = _root(first, group.channels)
            if group.absorbed:
                shares = _shares_of_group(value, layers, group.channels)
                assert shares is not None
                for share in shares:
                    take(share, factor, initializers)
            else:
                _insert_mul(graph, value, layers, 1.0 / factor, initializers)
            for layer in layers:
                transposed = is_op(layer, "Gemm") and layer.attributes.get_int("transB", 0) != 0
                rows = 1 if transposed else 0
                take(Share(layer, 1, axis=rows, multiply=True), factor, initializers)
        return ir.passes.PassResult(model, modified=modified)


def _root(value: ir.Value, channels: int) -> ir.Value:
    """The value itself, or what a Reshape in front of layers alone reads if the last axis stays as it is."""
    node = value.producer()
    if not is_op(node, "Reshape") or node is None or value.is_graph_output():
        return value
    source = node.inputs[0]
    if (
        source is None
        or last_axis(source) != channels
        or any(use.idx != 0 or not matrix_depth(use.node) for use in value.uses())
    ):
        return value
    return source


def _entries(value: ir.Value, layers: Sequence[ir.Node]) -> list[ir.Node]:
    """The nodes through which layers read a value as their input 0: themselves, or a Reshape."""
    found = []
    for use in value.uses():
        node = use.node
        through = is_op(node, "Reshape") and node.outputs[0].uses() and not node.outputs[0].is_graph_output()
        if use.idx == 0 and (node in layers or (through and all(u.node in layers for u in node.outputs[0].uses()))):
            found.append(node)
    return found


def _shares_of_group(value: ir.Value, layers: Sequence[ir.Node], channels: int) -> list[Share] | None:
    """The constants that divide ``value`` by the factors, or None if that is not possible for nothing."""
    if value.is_graph_output() or len(_entries(value, layers)) < reader_count(value):
        return None
    return absorbing_shares(value, channels)


def _from_convolution(value: ir.Value) -> bool:
    """Whether a value may come out of an integer region: those begin at convolutions."""
    seen: set[ir.Node] = set()
    stack = [value]
    while stack:
        node = stack.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_op(node, "Conv", "ConvTranspose"):
            return True
        if not is_op(node, *_FLOAT_AGAIN):
            stack.extend(v for v in node.inputs if v is not None)
    return False


def _insert_mul(
    graph: ir.Graph, value: ir.Value, layers: Sequence[ir.Node], scale: Vector, initializers: Initializers
) -> None:
    """Puts a Mul between a value and the layers."""
    entries = _entries(value, layers)
    dtype = constant_tensor(layers[0].inputs[1]).dtype
    taken = {node.name for node in graph} | {output.name for node in graph for output in node.outputs}
    name, number = f"{value.name}_smoothed", 0
    while name in taken:
        number += 1
        name = f"{value.name}_smoothed_{number}"
    vector = initializers.add(f"{name}_factor", ir.Tensor(scale.astype(dtype.numpy()), dtype=dtype))
    output = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
    node = ir.Node("", "Mul", [value, vector], outputs=[output], name=name)
    producer = value.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)), node)
    else:
        graph.insert_after(producer, node)
    for entry in entries:
        entry.replace_input_with(0, output)
