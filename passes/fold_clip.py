"""Chains of Relu and Clip into one node.

    Relu(Relu(x))          = Relu(x)
    Clip(Clip(x, a, b), c, d) = Clip(x, clip(a, c, d), clip(b, c, d))        a <= b, c <= d
    Relu(x)                = Clip(x, 0, inf)

so any chain is one Clip [low, high]; it is written as Relu when low = 0 and high = inf. How the one that is
left becomes the range of a quantizer is decided at placement.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from postquant.passes.rewiring import Initializers, constant_array, is_op, sole_user, take_out

_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})


class FoldClipPass(ir.passes.InPlacePass):
    """Merges neighbouring Relu and Clip nodes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merges in the main graph."""
        graph = model.graph
        initializers = Initializers(graph)
        count = 0
        for node in list(graph):
            if node.graph is None:
                continue  # merged into the one before it
            first = _range(node)
            while first is not None and (user := sole_user(node.outputs[0], graph)) is not None:
                second = _range(user)
                if second is None or user.inputs[0] is not node.outputs[0]:
                    break
                first = (_clip(first[0], second), _clip(first[1], second))
                _set_range(node, user, first, initializers)
                take_out(user, node.outputs[0])
                count += 1
        return ir.passes.PassResult(model, modified=count > 0)


def _clip(number: float, bounds: tuple[float, float]) -> float:
    return min(max(number, bounds[0]), bounds[1])


def _range(node: ir.Node) -> tuple[float, float] | None:
    """The bounds of a Relu or Clip; None for anything else, unknown bounds and bounds in the wrong order."""
    if is_op(node, "Relu"):
        return 0.0, math.inf
    if not is_op(node, "Clip") or any(name in node.attributes for name in ("min", "max")):
        return None
    bounds = [-math.inf, math.inf]
    for index in (1, 2):
        if index < len(node.inputs) and node.inputs[index] is not None:
            value = constant_array(node.inputs[index])
            if value is None:
                return None
            bounds[index - 1] = float(np.asarray(value).reshape(-1)[0])
    return (bounds[0], bounds[1]) if bounds[0] <= bounds[1] else None


def _set_range(node: ir.Node, user: ir.Node, bounds: tuple[float, float], initializers: Initializers) -> None:
    dtype = next(
        (v.dtype for v in (*node.inputs, *user.inputs, *user.outputs) if v is not None and v.dtype in _TYPES),
        ir.DataType.FLOAT,
    )
    node.attributes.clear()
    source = node.inputs[0]
    if bounds == (0.0, math.inf):
        node.op_type = "Relu"
        node.resize_inputs(1)
        return
    node.op_type = "Clip"
    node.resize_inputs(1)
    node.resize_inputs(3)
    assert node.inputs[0] is source
    for index, (bound, name) in enumerate(zip(bounds, ("min", "max"), strict=True), start=1):
        if math.isfinite(bound):
            tensor = ir.Tensor(np.array(bound, dtype.numpy()), dtype=dtype)
            node.replace_input_with(index, initializers.add(f"{node.name or 'clip'}.{name}", tensor))
