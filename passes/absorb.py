"""Who can divide a tensor by a factor per channel for nothing: :func:`absorbing_shares`.

``x / s`` along the last axis is exact (up to float rounding) and free where constants that make ``x`` take the factors:

    LayerNormalization(z) * g + b       g / s,  b / s
    z * c,  c / z,  z + c               c / s                (a number c becomes a vector)
    z / c                               c * s
    z W,  z W + b                       columns of W / s,  b / s

reached back through Add, Sub, Mul, Div, Relu, LeakyRelu and Reshape (which keeps the last axis), as long as nobody else
reads what lies in between.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.rewiring import Initializers, constant_tensor, derive, is_float_constant, is_op

Vector = npt.NDArray[np.float64]

# f(x / s) = f(x) / s for every positive factor per channel.
_HOMOGENEOUS = ("Relu", "LeakyRelu")
_SAME_SHAPE = ("Relu", "LeakyRelu", "Erf", "Tanh", "Sigmoid", "Gelu", "Softmax", "LayerNormalization")
_BROADCAST = ("Add", "Sub", "Mul", "Div")
# How far the length of an axis is looked for where shapes are unknown.
_STEPS = 8
# They read no element.
_SHAPE_ONLY = ("Shape", "Size")


@dataclasses.dataclass(frozen=True)
class Share:
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


def matrix_depth(node: ir.Node) -> int | None:
    """K of a MatMul or Gemm whose input 1 is a constant float matrix; None for other nodes."""
    if not is_op(node, "MatMul", "Gemm") or not is_float_constant(node.inputs[1]):
        return None
    shape = constant_tensor(node.inputs[1]).shape.numpy()
    if len(shape) != 2 or node.attributes.get_int("transA", 0) != 0:
        return None
    return int(shape[1] if node.attributes.get_int("transB", 0) else shape[0])


def reader_count(value: ir.Value) -> int:
    """How often elements of a value are read, not only its shape."""
    return sum(not is_op(use.node, *_SHAPE_ONLY) for use in value.uses())


def absorbing_shares(value: ir.Value, channels: int) -> list[Share] | None:
    """The constants that divide a value by factors.

    Args:
        value: Everybody who reads it wants it divided.
        channels: Length of its last axis.

    Returns:
        Their shares, or None if it cannot be divided for nothing.
    """
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
        return _behind(node, 0, channels) if source is not None and last_axis(source) == channels else None
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


def _first(*options: list[Share] | None) -> list[Share] | None:
    return next((option for option in options if option is not None), None)


def _behind(node: ir.Node, index: int, channels: int) -> list[Share] | None:
    """The shares of a computed input that only this node reads."""
    value = node.inputs[index]
    if value is None or value.is_graph_output() or reader_count(value) != 1:
        return None
    return absorbing_shares(value, channels) if last_axis(value) in (None, channels) else None


def _constant(node: ir.Node, index: int, channels: int, *, multiply: bool = False) -> list[Share] | None:
    """The share of a constant operand of an element-wise node."""
    value = node.inputs[index]
    if not is_float_constant(value):
        return None
    shape = constant_tensor(value).shape.numpy()
    width = shape[-1] if shape else 1
    # A number becomes a vector; that this keeps the result's shape, the result itself must show.
    if width == channels or (width == 1 and last_axis(node.outputs[0]) == channels):
        return [Share(node, index, multiply=multiply)]
    return None


def _layer_normalization(node: ir.Node, channels: int) -> list[Share] | None:
    axis = node.attributes.get_int("axis", -1)
    rank = None if node.inputs[0] is None or node.inputs[0].shape is None else node.inputs[0].shape.rank()
    if axis != -1 and (rank is None or axis != rank - 1):
        return None
    indices = [i for i in (1, 2) if i < len(node.inputs) and node.inputs[i] is not None]
    shares = [_constant(node, index, channels) for index in indices]
    return None if any(share is None for share in shares) else [part for share in shares if share for part in share]


def _weighted(node: ir.Node, channels: int) -> list[Share] | None:
    """Columns of a matrix; for Gemm its bias too."""
    if matrix_depth(node) is None:
        return None
    transposed = bool(node.attributes.get_int("transB", 0))
    axis = 0 if transposed else -1
    if constant_tensor(node.inputs[1]).shape.numpy()[axis] != channels:
        return None
    shares = [Share(node, 1, axis=axis)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _constant(node, 2, channels)
        if bias is None:
            return None
        shares += bias
    return shares


def last_axis(value: ir.Value, steps: int = _STEPS) -> int | None:
    """Length of the last axis if the value's shape, or one of the ``steps`` nodes before it, tells; else None."""
    if value.shape is not None:
        last = value.shape[-1] if value.shape.rank() else 1
        if isinstance(last, int):
            return last
    if semantics.is_constant(value):
        shape = constant_tensor(value).shape.numpy()
        return int(shape[-1]) if shape else 1
    node = value.producer()
    if node is None or steps == 0:
        return None
    if matrix_depth(node) is not None:
        shape = constant_tensor(node.inputs[1]).shape.numpy()
        return int(shape[0] if node.attributes.get_int("transB", 0) else shape[1])
    if is_op(node, *_SAME_SHAPE) and node.inputs[0] is not None:
        return last_axis(node.inputs[0], steps - 1)
    if is_op(node, *_BROADCAST):
        widths = [last_axis(operand, steps - 1) for operand in node.inputs if operand is not None]
        # A known length above 1 is the result's, whatever the other operand has.
        return max((width for width in widths if width is not None and width > 1), default=None)
    return None


def take(share: Share, factor: Vector, initializers: Initializers) -> None:
    """Multiplies or divides a constant along one axis.

    Args:
        share: Which constant, and how.
        factor: (K,) float64 ``s`` > 0.
        initializers: Of the graph; other readers of the constant keep it as it was.
    """
    tensor = constant_tensor(share.node.inputs[share.index])
    shape = tuple(int(size) for size in tensor.shape.numpy()) or (1,)
    scale = factor if share.multiply else 1.0 / factor
    wide = list(shape)
    wide[share.axis] = len(scale)
    aligned = scale.reshape([-1 if axis == share.axis % len(shape) else 1 for axis in range(len(shape))])
    result = derive(tensor, lambda array: array.reshape(shape) * aligned, tuple(wide))
    initializers.replace(share.node, share.index, result)
