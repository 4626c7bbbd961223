"""Rounding borders in an emitted graph: :func:`border_quantize_dequantize`.

A requantization whose quantizer has a border becomes

    x -> BorderQuantize (ai.postquant) -> DequantizeLinear -> the reader

where ``x`` is a DequantizeLinear's output (or a float value), so that whatever makes ``x`` keeps its integer kernel,
and the reader is fused with its DequantizeLinear as ever. BorderQuantize saturates to the format's own code range: no
Clip follows. Names are those of an ordinary requantization, and the parts of the border are named after it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from postquant.passes.qdq import Builder
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.schema import DOMAIN

BORDER = "BorderQuantize"


def is_border(node: ir.Node | None) -> bool:
    """Whether a node is a BorderQuantize."""
    return node is not None and node.domain == DOMAIN and node.op_type == BORDER


def border_quantize_dequantize(
    graph: ir.Graph, build: Builder, source: ir.Value, quantizer: TensorQuantizer, name: str
) -> ir.Value:
    """Appends ``source -> BorderQuantize -> DequantizeLinear`` behind the source's producer.

    Args:
        graph: Changed in place.
        build: Makes names and initializers of that graph.
        source: float32 value with channels on axis 1.
        quantizer: It has a border.
        name: Prefix of names.

    Returns:
        The dequantized value.
    """
    border, spec = quantizer.border, quantizer.spec
    assert border is not None
    scale = build.initializer(f"{name}_scale", quantizer.scale)
    zero_point = build.initializer(f"{name}_zero_point", ir.Tensor(quantizer.zero_point.astype(np.uint8)))
    parts = [build.initializer(f"{name}_{part}", ir.Tensor(array)) for part, array in border.arrays().items()]
    codes = _value(build, f"{name}_quantized", ir.DataType.UINT8, source)
    result = _value(build, f"{name}_dequantized", ir.DataType.FLOAT, source)
    attributes = [
        ir.AttrInt64("channels", border.channels),
        ir.AttrInt64("qmin", spec.qmin),
        ir.AttrInt64("qmax", spec.qmax),
    ]
    nodes = [
        ir.Node(DOMAIN, BORDER, [source, scale, zero_point, *parts], attributes, outputs=[codes], name=codes.name),
        ir.Node("", "DequantizeLinear", [codes, scale, zero_point], outputs=[result], name=result.name),
    ]
    producer = source.producer()
    if producer is not None:
        graph.insert_after(producer, nodes)
    else:
        graph.insert_before(next(iter(graph)), nodes)
    return result


def _value(build: Builder, name: str, dtype: ir.DataType, like: ir.Value) -> ir.Value:
    return ir.Value(name=build.unique(name), type=ir.TensorType(dtype), shape=like.shape)
