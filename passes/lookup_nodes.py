"""Activations with code books in an emitted graph: :func:`lookup_dequantize`.

A requantization whose quantizer has a code book becomes

    codes of the stored tensor -> Reshape (flat) -> Cast (int32) -> GatherElements (of 256 uint8 levels)
        -> Reshape (the codes' Shape) -> DequantizeLinear -> the reader

in standard operators: every stored code has its level. A Gather would need no flat tensor, but onnxruntime's takes
four times as long. (onnx's own evaluator knows no GatherElements of more than 64 elements.) Whatever makes the stored
codes keeps its integer kernel, and so does the reader. Names are those of an ordinary requantization; the table is
named after it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.qdq import Builder
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.integer import Affine
from postquant.runtime_ops.quantizer import TensorQuantizer

_CODES = 256


@dataclasses.dataclass(frozen=True)
class Lookup:
    """The nodes that give every 8-bit code its level.

    Attributes:
        codes: The codes that it reads.
        table: (256,) uint8 levels, a constant.
        nodes: All its nodes, the one that makes the levels last.
    """

    codes: ir.Value
    table: ir.Value
    nodes: tuple[ir.Node, ...]


def lookup_of(node: ir.Node | None) -> Lookup | None:
    """The lookup whose last node this is, or None."""
    if not _is(node, "Reshape") or node is None:
        return None
    gather, shape = (None if value is None else value.producer() for value in node.inputs)
    if not (_is(gather, "GatherElements") and _is(shape, "Shape")) or gather is None or shape is None:
        return None
    table, index = gather.inputs
    cast = None if index is None else index.producer()
    flat = None if cast is None or not _is(cast, "Cast") or cast.inputs[0] is None else cast.inputs[0].producer()
    codes = shape.inputs[0]
    if cast is None or flat is None or not _is(flat, "Reshape") or codes is None or flat.inputs[0] is not codes:
        return None
    if cast.attributes["to"].as_int() != ir.DataType.INT32:
        return None
    if table is None or table.is_graph_input() or table.const_value is None or maker_of(codes) is None:
        return None
    if table.const_value.dtype is not ir.DataType.UINT8 or tuple(table.const_value.shape.numpy()) != (_CODES,):
        return None
    return Lookup(codes, table, (shape, flat, cast, gather, node))


def maker_of(codes: ir.Value) -> ir.Node | None:
    """The QuantizeLinear that makes codes, perhaps with Clips in between, or None."""
    producer = codes.producer()
    while producer is not None and _is(producer, "Clip"):
        inner = producer.inputs[0]
        producer = None if inner is None else inner.producer()
    return producer if _is(producer, "QuantizeLinear") else None


def is_lookup(node: ir.Node | None) -> bool:
    """Whether a node is the last one of a lookup."""
    return lookup_of(node) is not None


def lookup_nodes(graph: ir.Graph) -> set[ir.Node]:
    """All nodes of all lookups."""
    return {part for node in graph if (found := lookup_of(node)) is not None for part in found.nodes}


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
    ends = build.initializer(f"{name}_flat_shape", np.array([-1], np.int64))

    def value(part: str, dtype: ir.DataType, shape: ir.Shape | None = None) -> ir.Value:
        return ir.Value(name=build.unique(f"{name}_{part}"), type=ir.TensorType(dtype), shape=shape)

    size, index = value("shape", ir.DataType.INT64), value("index", ir.DataType.INT32)
    flat, found = value("flat", ir.DataType.UINT8), value("flat_quantized", ir.DataType.UINT8)
    levels = value("quantized", ir.DataType.UINT8, source.shape)
    result = value("dequantized", ir.DataType.FLOAT, source.shape)
    to, axis = ir.AttrInt64("to", int(ir.DataType.INT32)), ir.AttrInt64("axis", 0)
    nodes = [
        ir.Node("", "Shape", [codes], outputs=[size], name=size.name),
        ir.Node("", "Reshape", [codes, ends], outputs=[flat], name=flat.name),
        ir.Node("", "Cast", [flat], [to], outputs=[index], name=index.name),
        ir.Node("", "GatherElements", [table, index], [axis], outputs=[found], name=found.name),
        ir.Node("", "Reshape", [found, size], outputs=[levels], name=levels.name),
        ir.Node("", "DequantizeLinear", [levels, scale, zero_point], outputs=[result], name=result.name),
    ]
    graph.insert_after(dequantize, nodes)
    return result


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.op_type == op_type and not node.domain


def _numbers(dequantize: ir.Node) -> Affine:
    scale, zero_point = dequantize.inputs[1], dequantize.inputs[2]
    assert scale is not None
    assert scale.const_value is not None
    assert zero_point is not None
    assert zero_point.const_value is not None
    return Affine(scale.const_value.numpy(), zero_point.const_value.numpy().astype(np.int32), np.dtype(np.uint8))
