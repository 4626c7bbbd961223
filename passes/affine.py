"""Nodes that compute ``scale * x + shift`` per channel (axis 1), and folding them into the layers beside them.

| node                         | scale                     | shift                        |
|------------------------------|---------------------------|------------------------------|
| BatchNormalization           | gamma / sqrt(var + eps)   | beta - mean * scale          |
| Mul(x, c), Div(x, c)         | c, 1 / c                  | 0                            |
| Add(x, c), Sub(x, c), Sub(c, x) | 1, 1, -1               | c, -c, c                     |

How a scale and a shift change a layer's numbers stands in :mod:`postquant.passes.layer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.layer import Layer, as_layer
from postquant.passes.rewiring import (
    Initializers,
    bypass,
    constant_tensor,
    is_constant,
    is_float_constant,
    is_op,
    sole_user,
    take_out,
)

Vector = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Affine:
    """``scale * source + shift``.

    Attributes:
        source: The value that is scaled; its shape is the shape of the result.
        scale: () or (channels,), finite.
        shift: () or (channels,), finite.
    """

    source: ir.Value
    scale: Vector
    shift: Vector


# Reads a node as an affine map of a value with this rank and number of channels, or gives None.
Reader = Callable[[ir.Node, int, int], Affine | None]


def read_batch_norm(node: ir.Node, rank: int, channels: int) -> Affine | None:
    """A BatchNormalization in inference form with constant statistics."""
    del rank  # axis 1 is the channel axis for every rank
    if not is_op(node, "BatchNormalization") or node.attributes.get_int("training_mode", 0) != 0:
        return None
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return None
    if not all(is_float_constant(value) for value in node.inputs[1:5]) or node.inputs[0] is None:
        return None
    gamma, beta, mean, var = (
        constant_tensor(value).numpy().astype(np.float64).reshape(-1) for value in node.inputs[1:5]
    )
    if gamma.size != channels:
        return None
    scale = gamma / np.sqrt(var + node.attributes.get_float("epsilon", 1e-5))
    return _finite(Affine(node.inputs[0], scale, beta - mean * scale))


def read_arithmetic(node: ir.Node, rank: int, channels: int) -> Affine | None:
    """A Mul, Div, Add or Sub of a value and a constant: one number, or one per channel."""
    if not is_op(node, "Mul", "Div", "Add", "Sub"):
        return None
    first, second = node.inputs[0], node.inputs[1]
    if is_float_constant(second) and not is_constant(first):
        source, constant, swapped = first, second, False
    elif is_float_constant(first) and not is_constant(second) and node.op_type != "Div":
        source, constant, swapped = second, first, True
    else:
        return None
    values = _per_channel(constant_tensor(constant), rank, channels)
    if values is None or source is None:
        return None
    one, zero = np.ones(()), np.zeros(())
    if node.op_type == "Mul":
        return _finite(Affine(source, values, zero))
    if node.op_type == "Div":
        with np.errstate(divide="ignore"):
            return _finite(Affine(source, 1.0 / values, zero))
    if node.op_type == "Add":
        return _finite(Affine(source, one, values))
    return _finite(Affine(source, -one if swapped else one, values if swapped else -values))


def _per_channel(tensor: ir.TensorProtocol, rank: int, channels: int) -> Vector | None:
    """A constant as () or (channels,), if it varies along axis 1 only and does not widen the result."""
    shape = tensor.shape.numpy()
    if len(shape) > rank:
        return None
    if tensor.size == 1:
        return np.asarray(tensor.numpy(), np.float64).reshape(())
    aligned = (1,) * (rank - len(shape)) + tuple(shape)
    if rank < 2 or any(size != 1 for axis, size in enumerate(aligned) if axis != 1) or aligned[1] != channels:
        return None
    return np.asarray(tensor.numpy(), np.float64).reshape(-1)


def _finite(affine: Affine) -> Affine | None:
    return affine if np.isfinite(affine.scale).all() and np.isfinite(affine.shift).all() else None


def fold_after(graph: ir.Graph, read: Reader, initializers: Initializers) -> int:
    """Folds every affine node that alone reads a layer's output into the layer; how many there were."""
    count = 0
    for node in list(graph):
        layer = as_layer(node)
        while layer is not None and (user := sole_user(node.outputs[0], graph)) is not None:
            affine = read(user, layer.rank, layer.outputs)
            if affine is None or affine.source is not node.outputs[0]:
                break
            layer.fold_after(affine.scale, affine.shift, initializers)
            take_out(user, node.outputs[0])
            count += 1
    return count


def fold_before(graph: ir.Graph, read: Reader, initializers: Initializers) -> int:
    """Folds every affine node that only layers read into these layers; how many there were."""
    count = 0
    for node in reversed(list(graph)):
        found = _layers_behind(node, graph)
        if not found:
            continue
        affine = read(node, found[0].rank, found[0].inputs)
        if affine is None or not _keeps_shape(node, affine, found):
            continue
        if np.any(affine.shift) and not all(layer.sees_shift() for layer in found):
            continue
        for layer in found:
            layer.fold_before(affine.scale, affine.shift, initializers)
        bypass(node, affine.source)
        count += 1
    return count


def _layers_behind(node: ir.Node, graph: ir.Graph) -> list[Layer]:
    """The layers that read a node's output as data, if nothing else reads it."""
    if not node.outputs or node.outputs[0].is_graph_output():
        return []
    layers: list[Layer] = []
    for use in node.outputs[0].uses():
        layer = as_layer(use.node)
        if layer is None or use.idx != 0 or use.node.graph is not graph:
            return []
        if layer.node.op_type == "Gemm" and layer.node.attributes.get_int("transA", 0) != 0:
            return []
        layers.append(layer)
    same = all((layer.rank, layer.inputs) == (layers[0].rank, layers[0].inputs) for layer in layers)
    return layers if same else []


def _keeps_shape(node: ir.Node, affine: Affine, layers: list[Layer]) -> bool:
    """Whether the affine node's input has all its channels: a constant may also widen one channel to many."""
    if node.op_type == "BatchNormalization" or affine.scale.ndim + affine.shift.ndim == 0:
        return True
    shape = affine.source.shape
    return shape is not None and len(shape) == layers[0].rank and shape[1] == layers[0].inputs
