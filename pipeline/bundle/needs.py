"""What a model file asks of the runtime of a receiver: :func:`model_needs`."""

from __future__ import annotations

import collections

import onnx_ir as ir

from postquant.pipeline.bundle.manifest import ModelEntry

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_NAMES = {
    ir.DataType.INT4: "4-bit tensors (INT4)",
    ir.DataType.UINT4: "4-bit tensors (UINT4)",
    ir.DataType.INT16: "16-bit activations (INT16)",
    ir.DataType.UINT16: "16-bit activations (UINT16)",
}


def model_needs(model: ir.Model) -> ModelEntry:
    """Operators, versions and features of a model."""
    operators: collections.Counter[str] = collections.Counter()
    features: set[str] = set()
    for node in model.graph.all_nodes():
        operators[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
        if node.op_type in _QUANTIZERS and not node.domain:
            features.update(_quantizer_features(node))
        if node.op_type == "Clip" and node.inputs[0] is not None and node.inputs[0].dtype in _EIGHT:
            features.add("Clip of 8-bit integers")
    if model.functions:
        features.add("model-local functions, or kernels for the operators that they define")
    if any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values()):
        features.add("external data")
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int):
                features.add(f"free size of axis {axis} of the input {value.name}")
    return ModelEntry(
        ir_version=model.ir_version,
        opsets=dict(sorted(model.graph.opset_imports.items())),
        operators=dict(sorted(operators.items())),
        functions=tuple(sorted(f"{f.domain}::{f.name}" for f in model.functions.values())),
        features=tuple(sorted(features)),
    )


_EIGHT = (ir.DataType.INT8, ir.DataType.UINT8)


def _quantizer_features(node: ir.Node) -> set[str]:
    found = set()
    scale = node.inputs[1]
    if scale is not None and scale.const_value is not None and scale.const_value.size > 1:
        found.add("scales per channel")
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = None if zero is None else zero.const_value
    if tensor is None:
        return found
    if tensor.dtype in _NAMES:
        found.add(_NAMES[tensor.dtype])
    weight = node.inputs[0] is not None and node.inputs[0].const_value is not None
    if not weight and tensor.dtype in _EIGHT:
        asymmetric = bool(tensor.numpy().any())
        found.add(f"{'asymmetric' if asymmetric else 'symmetric'} {tensor.dtype.name} activations")
    if weight and tensor.numpy().any():
        found.add("asymmetric weights")
    return found
