"""Mul, Div, Add and Sub by constants into the layer before them, or into the layers behind them.

    s * (W x + b) + t = (s W) x + (s b + t)
    W (s * x + t) + b = (W s) x + (W t + b)      if no zero padding lies between, or t = 0

The constant is one number or one per channel. Where neither side folds, a neutral node (x * 1, x / 1, x + 0,
x - 0) is removed. MatMul followed by Add stays as it is: targets know the pair.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from postquant.passes.affine import fold_after, fold_before, read_arithmetic
from postquant.passes.rewiring import (
    Initializers,
    can_take_out,
    constant_tensor,
    is_float_constant,
    is_op,
    take_out,
)

_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0}


class FoldArithmeticPass(ir.passes.InPlacePass):
    """Folds arithmetic with constants into Conv, ConvTranspose and Gemm, and removes neutral arithmetic."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds in the main graph."""
        initializers = Initializers(model.graph)
        count = sum(_remove_neutral(node) for node in list(model.graph))
        count += fold_after(model.graph, read_arithmetic, initializers)
        count += fold_before(model.graph, read_arithmetic, initializers)
        return ir.passes.PassResult(model, modified=count > 0)


def _remove_neutral(node: ir.Node) -> bool:
    if not is_op(node, *_NEUTRAL):
        return False
    commutes = node.op_type in ("Mul", "Add")
    for source, constant in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0]))[: 1 + commutes]:
        if source is None or not is_float_constant(constant) or not can_take_out(node, source):
            continue
        tensor = constant_tensor(constant)
        # One number of no higher rank than the value: the shape stays.
        rank = 0 if source.shape is None else len(source.shape)
        if (
            tensor.size == 1
            and len(tensor.shape) <= rank
            and float(np.asarray(tensor.numpy()).item()) == _NEUTRAL[node.op_type]
        ):
            take_out(node, source)
            return True
    return False
