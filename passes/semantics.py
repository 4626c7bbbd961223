"""What placement and emission need to know about ONNX operators, independent of any target.

* which input is a weight, and along which axis of it output channels lie;
* which nodes only move values about, so that their output can keep its input's scale;
* which nodes clip (``Relu``, ``Clip``), so that a quantizer's saturation can stand for them;
* within which bounds a value lies by construction.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from postquant.passes.rewiring import constant_array
from postquant.passes.rewiring import is_constant as is_constant
from postquant.runtime_ops.law_float import MOVING_OPS

INFINITY = math.inf

# Weighted operators: activations times weights. Input 0 is the activation, 1 the weight, 2 the bias.
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Their float output costs an integer kernel nothing: it dequantizes its accumulator itself.
FLOAT_OUTPUT_IS_FREE = frozenset({"Gemm", "MatMul"})
# Every output element is an input element or, for Pad, zero (see :func:`preserves_values`).
MOVES_VALUES = (MOVING_OPS - {"Concat"}) | {"MaxPool", "Pad", "Resize"}
_CLIPS = frozenset({"Relu", "Clip"})
# Functions into a fixed interval. HardSwish has its minimum at -1.5: -1.5 * (1.5 / 6).
_BOUNDED = {
    "Sigmoid": (0.0, 1.0),
    "HardSigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "HardSwish": (-0.375, INFINITY),
    "Tanh": (-1.0, 1.0),
    "Abs": (0.0, INFINITY),
    "Exp": (0.0, INFINITY),
    "Softplus": (0.0, INFINITY),
    "Sqrt": (0.0, INFINITY),
}


def attribute(node: ir.Node, name: str, default: float | str) -> int | float | str:
    """An attribute's value, or the operator's default."""
    attr = node.attributes.get(name)
    return default if attr is None else attr.value


def weight_index(node: ir.Node) -> int | None:
    """Index of the input that is a constant weight: 1, or 0 where only the left operand is constant."""
    if node.op_type not in WEIGHTED:
        return None
    for index in (1, 0):
        if index < len(node.inputs) and is_constant(node.inputs[index]):
            return index
    return None


def channel_axis(node: ir.Node) -> int | None:
    """Axis of a weighted node's weight along which each output channel has its own scale.

    ``Conv`` (M, C/group, ...): 0. ``ConvTranspose`` (C, M/group, ...): 1, and None with groups, where one index
    of axis 1 stands for several output channels. ``Gemm``: by ``transB``. ``MatMul``: the last axis of a matrix.
    A constant left operand, MatMul's vectors and stacks of matrices have one scale.
    """
    index = weight_index(node)
    if index is None:
        return None
    weight = node.inputs[index]
    assert weight is not None
    assert weight.const_value is not None
    rank = len(weight.const_value.shape)
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if int(attribute(node, "group", 1)) == 1 else None
    if index == 0 or rank != 2:
        return None
    if node.op_type == "Gemm":
        return 0 if int(attribute(node, "transB", 0)) else 1
    return 1


def channel_counts(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, int]:
    """``(inputs, outputs)``: channels of a weighted node whose weight, of that shape, is input 1."""
    groups = int(attribute(node, "group", 1))
    if node.op_type == "Conv":
        return shape[1] * groups, shape[0]
    if node.op_type == "ConvTranspose":
        return shape[0], shape[1] * groups
    if node.op_type == "Gemm" and int(attribute(node, "transB", 0)):
        return shape[1], shape[0]
    return shape[0], shape[1]


def is_depthwise(node: ir.Node) -> bool:
    """Whether a node is a convolution with a constant weight in which every group has one input channel."""
    groups = int(attribute(node, "group", 1))
    if node.op_type not in ("Conv", "ConvTranspose") or groups == 1 or weight_index(node) != 1:
        return False
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    return channel_counts(node, tuple(weight.const_value.shape.numpy()))[0] == groups


def bias_of(node: ir.Node) -> ir.Value | None:
    """The constant bias of a weighted node whose weight is input 1, or None.

    Input 2 (for ``Gemm`` if it holds one number per column); for ``MatMul`` with a matrix, the constant vector of an
    Add that alone reads its output (onnxruntime joins the two into a Gemm, and runs it on integers only if the vector
    is quantized like a bias).
    """
    if weight_index(node) != 1:
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return bias if is_constant(bias) else None
    axis = channel_axis(node)
    weight = node.inputs[1]
    if axis is None or weight is None or weight.const_value is None:
        return None
    width = int(weight.const_value.shape.numpy()[axis])
    if node.op_type == "Gemm":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        shape = () if bias is None or bias.const_value is None else tuple(bias.const_value.shape)
        return bias if is_constant(bias) and shape in ((width,), (1, width)) else None
    uses = node.outputs[0].uses()
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    ((add, index),) = uses
    if add.op_type != "Add" or add.domain != "" or add.graph is not node.graph:
        return None
    bias = add.inputs[1 - index]
    if bias is None or bias.const_value is None or not is_constant(bias) or len(bias.uses()) != 1:
        return None
    return bias if tuple(bias.const_value.shape) == (width,) else None


def preserves_values(node: ir.Node) -> bool:
    """Whether every float output element is an element of input 0, or zero.

    Zero is always a code, so such a node can run on codes, with its input's scale and zero point.
    """
    if node.domain != "" or node.op_type not in MOVES_VALUES:
        return False
    if node.op_type == "Resize":
        return attribute(node, "mode", "nearest") == "nearest" and (
            attribute(node, "coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
        )
    if node.op_type == "MaxPool":
        return len(node.outputs) == 1 or not node.outputs[1].uses()
    if node.op_type == "Pad" and attribute(node, "mode", "constant") == "constant":
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        value = constant_array(fill)
        return fill is None or (value is not None and not np.any(value))
    return True


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """``(low, high)`` of a node that clips to constants, else None. ``Relu`` is ``(0, inf)``."""
    if node.domain != "" or node.op_type not in _CLIPS:
        return None
    if node.op_type == "Relu":
        return 0.0, INFINITY
    low, high = -INFINITY, INFINITY
    for index in (1, 2):
        bound = node.inputs[index] if index < len(node.inputs) else None
        if bound is None:
            continue
        array = constant_array(bound)
        if array is None or array.size != 1:
            return None
        if index == 1:
            low = float(array.reshape(-1)[0])
        else:
            high = float(array.reshape(-1)[0])
    return (low, high) if low <= high else (high, high)


def value_bounds(value: ir.Value) -> tuple[float, float]:
    """``(low, high)`` that a value cannot leave, whatever the input: (-inf, inf) when nothing is known."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.domain == "" and node.inputs else None
    if node is None or source is None:
        return -INFINITY, INFINITY
    if node.op_type in _BOUNDED:
        return _BOUNDED[node.op_type]
    if node.op_type == "Concat":
        parts = [value_bounds(part) for part in node.inputs if part is not None]
        return min(low for low, _ in parts), max(high for _, high in parts)
    clip = clip_bounds(node)
    if clip is not None:
        low, high = value_bounds(source)
        return min(max(low, clip[0]), clip[1]), max(min(high, clip[1]), clip[0])
    if node.op_type in ("GlobalAveragePool", "AveragePool") or preserves_values(node):
        low, high = value_bounds(source)
        # Padding mixes zeros in.
        return (min(low, 0.0), max(high, 0.0)) if node.op_type in ("Pad", "AveragePool") else (low, high)
    return -INFINITY, INFINITY


def activation_bounds(model: ir.Model, value: str) -> tuple[float, float]:
    """:func:`value_bounds` by name: the interval that calibration must not let a scale exceed needlessly.

    Args:
        model: The simplified model.
        value: Name of a value of the main graph.

    Returns:
        ``(low, high)``; infinite where the graph does not bound the value.

    Raises:
        KeyError: If the main graph has no such value.
    """
    for node in model.graph:
        for output in node.outputs:
            if output.name == value:
                return value_bounds(output)
    for graph_input in model.graph.inputs:
        if graph_input.name == value:
            return -INFINITY, INFINITY
    raise KeyError(value)
