"""Keeps onnxruntime from changing the numbers of an emitted graph: :func:`add_barriers`.

onnxruntime's optimizer rewrites two patterns on its own, without a word, and results change:

1. *It quantizes float constants.* Where Conv, ConvTranspose or Gemm (or MatMul + Add of a vector, which it joins to a
   Gemm) reads a DequantizeLinear and a QuantizeLinear reads its result, a float weight becomes int8 with one scale for
   the whole tensor, and a float bias int32 with scale ``s_x * s_w``, overflow included. It looks through Relu and Clip
   behind the node, and through nodes that move values on both sides.
2. *It joins two quantizations.* In ``QuantizeLinear -> DequantizeLinear -> QuantizeLinear -> DequantizeLinear`` whose
   first result nothing else reads, the two pairs become one, with another scale.

The barrier against the first is a ``Max`` of one value in front of the node: an identity that onnxruntime neither
removes nor looks through (it does with Identity, Cast and Dropout). It costs one copy of the node's input. The barrier
against the second is an integer Clip to the whole range of the container behind the second QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.qdq import Builder

_REWRITTEN = frozenset({"Conv", "ConvTranspose", "Gemm"})


def add_barriers(graph: ir.Graph, build: Builder, float_biases: AbstractSet[str]) -> None:
    """Adds barriers where they are needed.

    Args:
        graph: An emitted graph; changed in place.
        build: Adds the nodes.
        float_biases: Initializers that would be int32 biases, but do not fit.
    """
    made: dict[ir.Value, ir.Value] = {}
    for node in tuple(graph):
        source = node.inputs[0] if node.inputs else None
        if source is None or node.domain:
            continue
        if node.op_type == "QuantizeLinear":
            if _is_joined(node, source):
                build.saturate_fully(node.outputs[0])
        elif _is_quantized(node, float_biases) and _is_dequantized(source):
            if source not in made:
                made[source] = build.barrier(source)
            node.replace_input_with(0, made[source])


def rounds_bias(node: ir.Node) -> bool:
    """Whether onnxruntime makes an int32 bias of a node's float one: rule 1, where no barrier stands.

    That is so for targets with float biases; the error is at most half a step of ``s_x * s_w``.

    Args:
        node: A Conv, ConvTranspose or Gemm of an emitted graph, or a MatMul with the Add of a vector behind it.
    """
    source = node.inputs[0] if node.inputs else None
    if source is None or node.domain or not _is_dequantized(source):
        return False
    found = _bias(node)
    return found is not None and _is_float_constant(found[0]) and _leads_to_quantizers(found[1])


def is_barrier(node: ir.Node) -> bool:
    """Whether a node is a ``Max`` of one value, which changes nothing."""
    return node.op_type == "Max" and not node.domain and len(node.inputs) == 1


def before_barrier(value: ir.Value | None) -> ir.Value | None:
    """The value that a barrier copies, or the value itself where no barrier makes it."""
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and is_barrier(node) else value


def _is_quantized(node: ir.Node, float_biases: AbstractSet[str]) -> bool:
    """Whether onnxruntime would quantize a constant of a node if its input were dequantized."""
    found = _bias(node)
    if found is None:
        return False
    bias, result = found
    constant = _is_float_constant(node.inputs[1]) or (bias is not None and bias.name in float_biases)
    return constant and _leads_to_quantizers(result)


def _bias(node: ir.Node) -> tuple[ir.Value | None, ir.Value] | None:
    """The bias of a node that onnxruntime looks at, and the result behind it; None for other nodes."""
    result = node.outputs[0]
    if node.op_type in _REWRITTEN:
        return (node.inputs[2] if len(node.inputs) > 2 else None), result
    add = _only_reader(result) if node.op_type == "MatMul" else None
    if add is None or add.op_type != "Add" or add.domain:
        return None
    bias = next((value for value in add.inputs if value is not result), None)
    if not (_is_float_constant(bias) or (bias is not None and _is_dequantized(bias))):
        return None
    return bias, add.outputs[0]


def _is_float_constant(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None and semantics.is_constant(value) else None
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 else None


def _is_dequantized(value: ir.Value) -> bool:
    """Whether DequantizeLinear computes a value, perhaps through nodes that move values."""
    node = value.producer()
    while node is not None and not node.domain and node.op_type != "DequantizeLinear":
        source = node.inputs[0] if semantics.preserves_values(node) else None
        node = None if source is None else source.producer()
    return node is not None and not node.domain


def _leads_to_quantizers(value: ir.Value) -> bool:
    """Whether every reader is a QuantizeLinear, behind clips or nodes that move values; outputs do not count."""
    uses = tuple(value.uses())
    return bool(uses) and all(
        use.idx == 0
        and not use.node.domain
        and (
            use.node.op_type == "QuantizeLinear"
            or (
                (use.node.op_type in ("Relu", "Clip") or semantics.preserves_values(use.node))
                and _leads_to_quantizers(use.node.outputs[0])
            )
        )
        for use in uses
    )


def _is_joined(node: ir.Node, source: ir.Value) -> bool:
    """Whether onnxruntime would join a QuantizeLinear with the pair in front of it."""
    before = source.producer()
    if before is None or before.op_type != "DequantizeLinear" or before.domain or source.is_graph_output():
        return False
    codes = before.inputs[0]
    first = None if codes is None else codes.producer()
    if first is None or first.op_type != "QuantizeLinear" or codes is None or codes.dtype != node.outputs[0].dtype:
        return False
    return all(use.node.op_type == "QuantizeLinear" for use in source.uses()) and all(
        use.node.op_type == "DequantizeLinear" for use in node.outputs[0].uses()
    )
