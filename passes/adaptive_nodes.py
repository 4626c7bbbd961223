"""Adaptive steps in an emitted graph: :func:`adaptive_quantize_dequantize`.

A requantization whose quantizer has an adaptive step becomes

    x -> AdaptiveQuantize (ai.postquant) -> codes, steps -> DequantizeLinear (axis 0) -> Max of one value -> the reader

with one step per sample. onnxruntime has no integer kernel for such codes, so the reader computes in float, with a
float bias; the Max is a barrier (:mod:`postquant.passes.barriers`) that keeps it from trying. The zero point is 0.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from postquant.passes.qdq import Builder
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.schema import DOMAIN

ADAPTIVE = "AdaptiveQuantize"


def is_adaptive(node: ir.Node | None) -> bool:
    """Whether a node is an AdaptiveQuantize."""
    return node is not None and node.domain == DOMAIN and node.op_type == ADAPTIVE


def adaptive_quantize_dequantize(
    graph: ir.Graph, build: Builder, source: ir.Value, quantizer: TensorQuantizer, name: str
) -> ir.Value:
    """Appends the nodes of the module docstring behind the source's producer.

    Args:
        graph: Changed in place.
        build: Makes names and initializers of that graph.
        source: float32 value with samples on axis 0 and channels on axis 1.
        quantizer: It has an adaptive step, and the zero point 0.
        name: Prefix of names.

    Returns:
        What the reader reads.
    """
    module, spec = quantizer.adaptive, quantizer.spec
    assert module is not None
    scale = build.initializer(f"{name}_scale", quantizer.scale)
    zero_point = build.initializer(f"{name}_zero_point", ir.Tensor(quantizer.zero_point.astype(np.uint8)))
    parts = [build.initializer(f"{name}_{part}", ir.Tensor(array)) for part, array in module.network().items()]
    codes = ir.Value(name=build.unique(f"{name}_quantized"), type=ir.TensorType(ir.DataType.UINT8), shape=source.shape)
    steps = ir.Value(name=build.unique(f"{name}_steps"), type=ir.TensorType(ir.DataType.FLOAT))
    result = ir.Value(
        name=build.unique(f"{name}_dequantized"), type=ir.TensorType(ir.DataType.FLOAT), shape=source.shape
    )
    attributes = [
        ir.AttrInt64("features", int(module.features)),
        ir.AttrFloat32("beta_min", module.beta_min),
        ir.AttrFloat32("beta_max", module.beta_max),
        ir.AttrInt64("qmin", spec.qmin),
        ir.AttrInt64("qmax", spec.qmax),
    ]
    inputs = [source, scale, zero_point, *parts]
    nodes = [
        ir.Node(DOMAIN, ADAPTIVE, inputs, attributes, outputs=[codes, steps], name=codes.name),
        ir.Node("", "DequantizeLinear", [codes, steps], [ir.AttrInt64("axis", 0)], outputs=[result], name=result.name),
    ]
    producer = source.producer()
    if producer is not None:
        graph.insert_after(producer, nodes)
    else:
        graph.insert_before(next(iter(graph)), nodes)
    return build.barrier(result)


def adaptive_differences(node: ir.Node, quantizer: TensorQuantizer, arrays: list[np.ndarray]) -> list[str]:
    """What an AdaptiveQuantize has otherwise than a quantizer says.

    Args:
        node: The node.
        quantizer: It has an adaptive step.
        arrays: The constants behind the node's inputs 3 to 6.

    Returns:
        Names of inputs and attributes; scale and zero point are the caller's.
    """
    module, spec = quantizer.adaptive, quantizer.spec
    assert module is not None
    wrong = [
        f"input {name}"
        for (name, array), found in zip(module.network().items(), arrays, strict=True)
        if not np.array_equal(array, found)
    ]
    expected = {"features": int(module.features), "qmin": spec.qmin, "qmax": spec.qmax}
    limits = {"beta_min": module.beta_min, "beta_max": module.beta_max}
    for name, number in expected.items():
        attribute = node.attributes.get(name)
        if attribute is None or attribute.as_int() != number:
            wrong.append(f"attribute {name}")
    for name, limit in limits.items():
        attribute = node.attributes.get(name)
        if attribute is None or np.float32(attribute.as_float()) != np.float32(limit):
            wrong.append(f"attribute {name}")
    return wrong
