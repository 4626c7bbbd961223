"""Scales per channel that move from activations into the weights of MatMul: SmoothQuant's migration.

For layers ``y = x W`` that read the same tensor ``x`` and factors ``s_k > 0`` per channel (last axis),

    x W  =  (x / s) (diag(s) W)

With one scale per tensor, the few channels of a transformer's LayerNormalization or Gelu that are ten times as large as
the others take the codes of all; after the migration they do not. The output stays equal up to float rounding.

Who divides ``x`` by ``s``:

1. Where every reader of ``x`` takes part, the nodes that make it, for nothing: the scale and bias of a
   LayerNormalization, the vector of a Mul (Gelu's constant 0.5 becomes a vector), Div or Add, the columns of a MatMul
   or Gemm; reached back through Add, Mul, Div, Relu and LeakyRelu whose inputs nobody else reads.
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
from postquant.passes.rewiring import Initializers, constant_tensor, derive, is_float_constant, is_op, sole_user

Vector = npt.NDArray[np.float64]

# f(x / s) = f(x) / s for every positive factor per channel.
_HOMOGENEOUS = ("Relu", "LeakyRelu")
# Nodes whose result has the shape of their input, or of their two broadcast inputs.
_ONE_TO_ONE = ("Relu", "LeakyRelu", "Erf", "Tanh", "Sigmoid", "Gelu", "Softmax", "LayerNormalization")
_TWO_TO_ONE = ("Add", "Sub", "Mul", "Div")
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


@dataclasses.dataclass(frozen=True)
class _Share:
    """A constant that takes the factors.

    Attributes:
        node: Who reads it.
        index: As which input.
        axis: Its axis that has the channels, -1 or 0. A constant of length 1 there gets K of them.
        multiply: Whether it is multiplied by ``s`` (a divisor) instead of divided.
    """

    node: ir.Node
    index: int
    axis: int = -1
    multiply: bool = False


def smooth_groups(model: ir.Model) -> list[SmoothGroup]:
    """All groups of a simplified model's main graph, in topological order of their first layer.

    Args:
        model: Not changed; no weight is read.
    """
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        depth = _depth(node)
        if depth is not None and node.inputs[0] is not None:
            readers.setdefault(_root(node.inputs[0], depth), []).append(node)
    found = []
    for value, nodes in readers.items():
        depths = {_depth(node) for node in nodes}
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
                    _take(share, factor, initializers)
            else:
                _insert_mul(graph, value, layers, 1.0 / factor, initializers)
            for layer in layers:
                transposed = is_op(layer, "Gemm") and layer.attributes.get_int("transB", 0) != 0
                rows = 1 if transposed else 0
                _take(_Share(layer, 1, axis=rows, multiply=True), factor, initializers)
        return ir.passes.PassResult(model, modified=modified)


def _depth(node: ir.Node) -> int | None:
    """K of a MatMul or Gemm whose input 1 is a constant float matrix; None for other nodes."""
    if not is_op(node, "MatMul", "Gemm") or not is_float_constant(node.inputs[1]):
        return None
    shape = constant_tensor(node.inputs[1]).shape.numpy()
    if len(shape) != 2 or node.attributes.get_int("transA", 0) != 0:
        return None
    return int(shape[1] if node.attributes.get_int("transB", 0) else shape[0])


def _root(value: ir.Value, channels: int) -> ir.Value:
    """The value itself, or what a Reshape in front of layers alone reads if the last axis stays as it is."""
    node = value.producer()
    if not is_op(node, "Reshape") or node is None or value.is_graph_output():
        return value
    source = node.inputs[0]
    if source is None or _width(source) != channels or any(use.idx != 0 or not _depth(use.node) for use in value.uses()):
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


def _shares_of_group(value: ir.Value, layers: Sequence[ir.Node], channels: int) -> list[_Share] | None:
    """The constants that divide ``value`` by the factors, or None if that is not possible for nothing."""
    if value.is_graph_output() or len(_entries(value, layers)) < len(value.uses()):
        return None
    return _shares(value, channels)


def _shares(value: ir.Value, channels: int) -> list[_Share] | None:
    """The same for a value whose readers all want it divided."""
    node = value.producer()
    if node is None or value is not node.outputs[0] or any(output.uses() for output in node.outputs[1:]):
        return None
    if is_op(node, "LayerNormalization"):
        return _layer_normalization(node, channels)
    if is_op(node, "MatMul", "Gemm"):
        return _weighted(node, channels)
    if is_op(node, *_HOMOGENEOUS):
        return _behind(node, 0, channels)
    if is_op(node, "Reshape"):
        source = node.inputs[0]
        return _behind(node, 0, channels) if source is not None and _width(source) == channels else None
    if is_op(node, "Mul"):
        return _first(_constant(node, 1, channels), _constant(node, 0, channels)) or _first(
            _behind(node, 1, channels), _behind(node, 0, channels)
        )
    if is_op(node, "Div"):
        divisor = _constant(node, 1, channels, multiply=True)
        return _first(divisor, _constant(node, 0, channels)) or _behind(node, 0, channels)
    if is_op(node, "Add", "Sub"):
        both = [_first(_constant(node, i, channels), _behind(node, i, channels)) for i in (0, 1)]
        # Two constants would have been folded; a residual sum's inputs have other readers.
        return None if both[0] is None or both[1] is None else [*both[0], *both[1]]
    return None


def _first(*options: list[_Share] | None) -> list[_Share] | None:
    return next((option for option in options if option is not None), None)


def _behind(node: ir.Node, index: int, channels: int) -> list[_Share] | None:
    """The shares of a computed input that only this node reads."""
    value = node.inputs[index]
    graph = node.graph
    if value is None or not isinstance(graph, ir.Graph) or sole_user(value, graph) is not node:
        return None
    return _shares(value, channels) if _width(value) in (None, channels) else None


def _constant(node: ir.Node, index: int, channels: int, *, multiply: bool = False) -> list[_Share] | None:
    """The share of a constant operand of an element-wise node."""
    value = node.inputs[index]
    if not is_float_constant(value):
        return None
    shape = constant_tensor(value).shape.numpy()
    width = shape[-1] if shape else 1
    # A number becomes a vector; that this keeps the result's shape, the result itself must show.
    if width == channels or (width == 1 and _width(node.outputs[0]) == channels):
        return [_Share(node, index, multiply=multiply)]
    return None


def _layer_normalization(node: ir.Node, channels: int) -> list[_Share] | None:
    axis = node.attributes.get_int("axis", -1)
    rank = None if node.inputs[0] is None or node.inputs[0].shape is None else node.inputs[0].shape.rank()
    if axis != -1 and (rank is None or axis != rank - 1):
        return None
    indices = [i for i in (1, 2) if i < len(node.inputs) and node.inputs[i] is not None]
    shares = [_constant(node, index, channels) for index in indices]
    return None if any(share is None for share in shares) else [part for share in shares if share for part in share]


def _weighted(node: ir.Node, channels: int) -> list[_Share] | None:
    """Columns of a matrix; for Gemm its bias too."""
    if _depth(node) is None:
        return None
    transposed = bool(node.attributes.get_int("transB", 0))
    axis = 0 if transposed else -1
    if constant_tensor(node.inputs[1]).shape.numpy()[axis] != channels:
        return None
    shares = [_Share(node, 1, axis=axis)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _constant(node, 2, channels)
        if bias is None:
            return None
        shares += bias
    return shares


def _width(value: ir.Value) -> int | None:
    """Length of the last axis if the value's shape or the nodes that make it tell, else None."""
    if value.shape is not None:
        last = value.shape[-1] if value.shape.rank() else 1
        if isinstance(last, int):
            return last
    if semantics.is_constant(value):
        shape = constant_tensor(value).shape.numpy()
        return int(shape[-1]) if shape else 1
    node = value.producer()
    if is_op(node, "MatMul", "Gemm") and node is not None and _depth(node) is not None:
        shape = constant_tensor(node.inputs[1]).shape.numpy()
        return int(shape[0] if node.attributes.get_int("transB", 0) else shape[1])
    if is_op(node, *_ONE_TO_ONE, *_TWO_TO_ONE) and node is not None:
        widths = [_width(v) for v in node.inputs[: 2 if node.op_type in _TWO_TO_ONE else 1] if v is not None]
        # A known length above 1 is the result's, whatever the other operand has.
        return max((w for w in widths if w is not None and w > 1), default=None)
    return None


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


def _take(share: _Share, factor: Vector, initializers: Initializers) -> None:
    """Multiplies or divides a constant along one axis."""
    tensor = constant_tensor(share.node.inputs[share.index])
    shape = tuple(int(size) for size in tensor.shape.numpy()) or (1,)
    scale = factor if share.multiply else 1.0 / factor
    wide = list(shape)
    wide[share.axis] = len(scale)
    aligned = scale.reshape([-1 if axis == share.axis % len(shape) else 1 for axis in range(len(shape))])
    result = derive(tensor, lambda array: array.reshape(shape) * aligned, tuple(wide))
    initializers.replace(share.node, share.index, result)


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
