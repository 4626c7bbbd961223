"""Activations with code books in an emitted graph: :func:`lookup_dequantize`.

A requantization whose quantizer has a code book becomes

    codes of the stored tensor -> Cast (int32) -> Gather (from 256 uint8 levels) -> DequantizeLinear -> the reader

in standard operators: every stored code has its level. Whatever makes the stored codes keeps its integer kernel, and
so does the reader. Names are those of an ordinary requantization; the table is named after it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.qdq import Builder
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.integer import Affine
from postquant.runtime_ops.quantizer import TensorQuantizer

_CODES = 256


def is_lookup(node: ir.Node | None) -> bool:
    """Whether a node is a Gather that gives every 8-bit code its level."""
    if node is None or node.op_type != "Gather" or node.domain or len(node.inputs) != 2:
        return False
    table, index = node.inputs
    if table is None or table.is_graph_input() or table.const_value is None or index is None:
        return False
    uint8 = table.const_value.dtype is ir.DataType.UINT8
    return uint8 and tuple(table.const_value.shape.numpy()) == (_CODES,) and is_lookup_index(index.producer())


def is_lookup_index(node: ir.Node | None) -> bool:
    """Whether a node makes indices of 8-bit codes."""
    if node is None or node.op_type != "Cast" or node.domain:
        return False
    to, codes = node.attributes.get("to"), node.inputs[0]
    return to is not None and to.as_int() == ir.DataType.INT32 and codes is not None and _has_codes(codes)


def looked_up_codes(node: ir.Node) -> ir.Value:
    """The codes that a lookup reads.

    Args:
        node: A lookup (:func:`is_lookup`).
    """
    index = node.inputs[1]
    assert index is not None
    cast = index.producer()
    assert cast is not None
    codes = cast.inputs[0]
    assert codes is not None
    return codes


def lookup_table(quantizer: TensorQuantizer, stored: Affine) -> npt.NDArray[np.uint8]:
    """The level of every stored code.

    Args:
        quantizer: It has a code book of unsigned codes.
        stored: The numbers of the codes of 8 bits that it reads, one scale.

    Returns:
        (256,) uint8.
    """
    return np.ascontiguousarray(quantizer.quantize(stored.real(np.arange(_CODES))), np.uint8)


def lookup_dequantize(
    graph: ir.Graph, build: Builder, source: ir.Value, quantizer: TensorQuantizer, name: str
) -> ir.Value:
    """Appends the nodes of the module docstring behind the stored tensor's codes.

    Args:
        graph: Changed in place.
        build: Makes names and initializers of that graph.
        source: The stored tensor, dequantized from codes of 8 bits.
        quantizer: It has a code book of unsigned codes.
        name: Prefix of names.

    Returns:
        The dequantized value.

    Raises:
        ModelError: If the tensor is not stored in unsigned codes of 8 bits.
    """
    dequantize = source.producer()
    codes = None if dequantize is None or dequantize.op_type != "DequantizeLinear" else dequantize.inputs[0]
    if dequantize is None or codes is None or codes.dtype is not ir.DataType.UINT8:
        raise ModelError(
            "an activation with a code book is read from codes of 8 bits",
            where=name,
            expected="uint8 codes",
            found="a float value" if codes is None else str(codes.dtype),
        )
    table = build.initializer(f"{name}_levels", ir.Tensor(lookup_table(quantizer, _numbers(dequantize))))
    scale = build.initializer(f"{name}_scale", quantizer.scale)
    zero_point = build.initializer(f"{name}_zero_point", ir.Tensor(quantizer.zero_point.astype(np.uint8)))
    index, levels, result = (
        ir.Value(name=build.unique(f"{name}_{part}"), type=ir.TensorType(dtype), shape=source.shape)
        for part, dtype in (
            ("index", ir.DataType.INT32),
            ("quantized", ir.DataType.UINT8),
            ("dequantized", ir.DataType.FLOAT),
        )
    )
    to = ir.AttrInt64("to", int(ir.DataType.INT32))
    nodes = [
        ir.Node("", "Cast", [codes], [to], outputs=[index], name=index.name),
        ir.Node("", "Gather", [table, index], [ir.AttrInt64("axis", 0)], outputs=[levels], name=levels.name),
        ir.Node("", "DequantizeLinear", [levels, scale, zero_point], outputs=[result], name=result.name),
    ]
    graph.insert_after(dequantize, nodes)
    return result


def _has_codes(value: ir.Value) -> bool:
    """Whether a value holds codes: a QuantizeLinear makes them, perhaps with Clips behind it."""
    producer = value.producer()
    while producer is not None and producer.op_type == "Clip" and not producer.domain:
        inner = producer.inputs[0]
        producer = None if inner is None else inner.producer()
    return producer is not None and producer.op_type == "QuantizeLinear" and not producer.domain


def _numbers(dequantize: ir.Node) -> Affine:
    scale, zero_point = dequantize.inputs[1], dequantize.inputs[2]
    assert scale is not None
    assert scale.const_value is not None
    assert zero_point is not None
    assert zero_point.const_value is not None
    return Affine(scale.const_value.numpy(), zero_point.const_value.numpy().astype(np.int32), np.dtype(np.uint8))
