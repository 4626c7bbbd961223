"""Finds the groups of nodes that one operator with packed weights replaces: :func:`find_group`.

    DequantizeLinear -> Conv -> QuantizeLinear              (weight and int32 bias behind DequantizeLinear too)
    DequantizeLinear -> Gemm, MatMul or MatMul + Add -> QuantizeLinear
    DequantizeLinear -> Gemm, MatMul or MatMul + Add        read as float by anything

The first two go from codes to codes; the third to float, with a float bias. An int32 bias in front of it becomes the
float values that DequantizeLinear gives; only codes that these values tell exactly are taken, so that the group can be
read back.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes import semantics

_ACTIVATIONS = (ir.DataType.UINT8, ir.DataType.INT8)


@dataclasses.dataclass(frozen=True)
class Group:
    """A weighted node with what is around it.

    Attributes:
        node: The node.
        add: The Add of a MatMul's bias, else None.
        quantize: The QuantizeLinear behind it; None where the output is float.
        source: The DequantizeLinear of its input.
        weight: That of its weight.
        bias: The initializer of its bias: int32 codes, or float; None without a bias.
        bias_node: The DequantizeLinear of an int32 bias, else None.
    """

    node: ir.Node
    add: ir.Node | None
    quantize: ir.Node | None
    source: ir.Node
    weight: ir.Node
    bias: ir.Value | None
    bias_node: ir.Node | None

    @property
    def output(self) -> ir.Value:
        """What the operator writes."""
        return (self.quantize or self.add or self.node).outputs[0]


def find_group(node: ir.Node) -> Group | None:
    """The group of a weighted node, or None where no operator with packed weights computes it.

    Args:
        node: Conv, Gemm or MatMul of an emitted graph.
    """
    source, weight = _dequantizer(node.inputs[0]), _dequantizer(node.inputs[1])
    if source is None or weight is None or not _fits(node):
        return None
    scale, zero = weight.inputs[1], source.inputs[2]
    if scale is None or scale.const_value is None or scale.const_value.shape.rank() != 1:
        return None
    if zero is None or zero.dtype not in _ACTIVATIONS:
        return None
    bias: ir.Value | None = None
    add = _bias_add(node, scale.const_value.size)
    if add is not None:
        bias = add.inputs[1 if add.inputs[0] is node.outputs[0] else 0]
    elif len(node.inputs) > 2:
        bias = node.inputs[2]
    bias_node = _dequantizer(bias)
    if bias_node is not None:
        bias = bias_node.inputs[0]
    group = Group(node, add, None, source, weight, bias, bias_node)
    quantize = _quantizer(group)
    if quantize is not None:
        return dataclasses.replace(group, quantize=quantize)
    return as_float_output(group)


def as_float_output(group: Group) -> Group | None:
    """The group without its QuantizeLinear, or None where no operator with a float output computes that."""
    fits = group.node.op_type != "Conv" and (group.bias is None or float_bias(group) is not None)
    return dataclasses.replace(group, quantize=None) if fits else None


def float_bias(group: Group) -> npt.NDArray[np.float32] | None:
    """The bias of a group with a float output, (N,) float32.

    Returns:
        None where the codes of an int32 bias do not follow from it, or it is not one constant number per output.
    """
    a_scale, w_scale, bias = (_constant(v) for v in (group.source.inputs[1], group.weight.inputs[1], group.bias))
    if a_scale is None or w_scale is None or bias is None or bias.size != w_scale.size:
        return None
    values = bias.reshape(-1)
    if group.bias_node is None:
        return values if values.dtype == np.float32 and np.isfinite(values).all() else None
    if values.dtype != np.int32:
        return None
    real: npt.NDArray[np.float32] = values.astype(np.float32) * np.asarray(a_scale * w_scale, np.float32)
    return real if np.array_equal(bias_codes(real, a_scale, w_scale), values) else None


def bias_codes(
    bias: npt.NDArray[np.float32], a_scale: npt.NDArray[np.float32], w_scale: npt.NDArray[np.float32]
) -> npt.NDArray[np.int32]:
    """The int32 codes that :func:`float_bias` made float values of.

    Args:
        bias: (N,) float32.
        a_scale: () float32, > 0.
        w_scale: (N,) float32, > 0.
    """
    scale = np.asarray(a_scale * w_scale, np.float32).astype(np.float64)
    codes = np.rint(bias.astype(np.float64) / scale)
    limits = np.iinfo(np.int32)
    return np.clip(codes, limits.min, limits.max).astype(np.int32)


def _constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    tensor = None if value is None or value.is_graph_input() else value.const_value
    return None if tensor is None else np.asarray(tensor.numpy())


def _bias_add(node: ir.Node, channels: int) -> ir.Node | None:
    """The Add of a constant vector over the outputs behind a MatMul."""
    add = _only_reader(node)
    if node.op_type != "MatMul" or add is None or add.op_type != "Add" or add.domain:
        return None
    other = add.inputs[1 if add.inputs[0] is node.outputs[0] else 0]
    dequantizer = _dequantizer(other)
    constant = other if dequantizer is None else dequantizer.inputs[0]
    tensor = None if constant is None or constant.is_graph_input() else constant.const_value
    return add if tensor is not None and tuple(tensor.shape.numpy()) == (channels,) else None


def _quantizer(group: Group) -> ir.Node | None:
    """The QuantizeLinear behind a group whose operator writes codes."""
    last = _only_reader(group.add or group.node)
    if last is None or last.op_type != "QuantizeLinear" or last.domain or len(last.inputs) < 3:
        return None
    tensor = None if group.bias is None else group.bias.const_value
    if group.bias is not None and (tensor is None or tensor.dtype != ir.DataType.INT32):
        return None
    zero, own = last.inputs[2], group.source.inputs[2]
    return last if zero is not None and own is not None and zero.dtype == own.dtype else None


def _fits(node: ir.Node) -> bool:
    """Whether an operator with packed codes exists for a weighted node."""
    weight = node.inputs[1]
    rank = None if weight is None or weight.shape is None else weight.shape.rank()
    if node.op_type == "Conv":
        return rank in (3, 4) and semantics.attribute(node, "auto_pad", "NOTSET") == "NOTSET"
    if node.op_type == "Gemm":
        plain = semantics.attribute(node, "alpha", 1.0) == 1.0 and semantics.attribute(node, "beta", 1.0) == 1.0
        return rank == 2 and plain and not semantics.attribute(node, "transA", 0)
    return node.op_type == "MatMul" and rank == 2


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear" or producer.domain or len(producer.inputs) < 3:
        return None
    return producer


def _only_reader(node: ir.Node) -> ir.Node | None:
    value = node.outputs[0]
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
