"""The element type of every value, also where the file does not say it: :func:`value_types`."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

_NOT_FROM_INPUT = {"Shape": ir.DataType.INT64, "Size": ir.DataType.INT64, "ArgMax": ir.DataType.INT64}


def value_types(model: ir.Model) -> Callable[[ir.Value | None], ir.DataType | None]:
    """A function that knows the type of each value.

    Types come from the model; where some are missing, from shape inference on a copy (weights are shared with it);
    where that does not know an operator either, from the operator's first input.

    Args:
        model: Not changed.

    Returns:
        Value of the model, nested graphs included -> element type; None for an absent input, and where nothing tells.
    """
    inferred: dict[str, ir.DataType] = {}
    if any(v.dtype is None for node in model.graph for v in node.outputs if v.name):
        copy = ShapeInferencePass()(model.clone()).model
        for node in copy.graph:
            inferred.update({v.name: v.dtype for v in node.outputs if v.name and v.dtype is not None})
    guessed: dict[ir.Value, ir.DataType | None] = {}

    def type_of(value: ir.Value | None) -> ir.DataType | None:
        if value is None:
            return None
        known = value.dtype or inferred.get(value.name or "")
        if known is None and value.const_value is not None:
            known = value.const_value.dtype
        return known or guessed.get(value)

    for node in model.graph:  # in topological order, so that a chain needs no recursion
        first = next((v for v in node.inputs if v is not None), None)
        for output in node.outputs:
            guessed[output] = _NOT_FROM_INPUT.get(node.op_type) or type_of(first)
    return type_of
