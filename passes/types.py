"""Which values hold float32, also where the file does not say so: :func:`float_types`."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

# Without type information these do not return their first input's type.
_NOT_FLOAT = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero", "Equal", "Greater", "Less", "Not", "And", "Or"})


def float_types(model: ir.Model) -> Callable[[ir.Value | None], bool]:
    """A test for float32 values.

    Types come from the model; where some are missing, from shape inference on a copy (weights are shared with it);
    where that does not know an operator either, from the operator's first input.

    Args:
        model: Not changed.

    Returns:
        A function that tells whether a value of the model, nested graphs included, holds float32.
    """
    inferred: dict[str, ir.DataType] = {}
    if any(v.dtype is None for node in model.graph for v in node.outputs if v.name):
        copy = ShapeInferencePass()(model.clone()).model
        for node in copy.graph:
            inferred.update({v.name: v.dtype for v in node.outputs if v.name and v.dtype is not None})
    known: dict[ir.Value, bool] = {}

    def is_float(value: ir.Value | None) -> bool:
        if value is None:
            return False
        dtype = value.dtype or inferred.get(value.name or "")
        if dtype is not None:
            return dtype == ir.DataType.FLOAT
        if value.const_value is not None:
            return value.const_value.dtype == ir.DataType.FLOAT
        return known.get(value, False)

    for node in model.graph:  # in topological order, so that a chain needs no recursion
        first = next((v for v in node.inputs if v is not None), None)
        for output in node.outputs:
            known[output] = node.op_type not in _NOT_FLOAT and is_float(first)
    return is_float
