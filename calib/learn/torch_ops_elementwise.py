"""Element-wise operators in torch: arithmetic, activations, comparisons. Formulas are those of ONNX."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional

from postquant.calib.learn.op import Inputs, Op, given, integer, needed, number, text

_Binary = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_Unary = Callable[[torch.Tensor], torch.Tensor]


def _together(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two operands on one device: whole numbers about shapes lie on the CPU, other tensors where the work is."""
    if a.device == b.device:
        return a, b
    device = b.device if a.device.type == "cpu" else a.device
    return a.to(device), b.to(device)


def _binary(function: _Binary) -> Op:
    def op(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        del node
        return (function(*_together(needed(inputs), needed(inputs, 1))),)

    return op


def _unary(function: _Unary) -> Op:
    def op(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        del node
        return (function(needed(inputs)),)

    return op


def _any_number(function: _Binary) -> Op:
    """An operator over one or more operands, from left to right."""

    def op(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        del node
        return (functools.reduce(lambda a, b: function(*_together(a, b)), [t for t in inputs if t is not None]),)

    return op


def _divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whole numbers are divided towards zero, as in C."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _power(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The result has the type of the base."""
    return torch.pow(a, b).to(a.dtype)


def _mean(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return (_any_number(torch.add)(node, inputs)[0] / sum(tensor is not None for tensor in inputs),)


def _modulo(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """fmod=1: the sign of the dividend; 0: of the divisor."""
    function: _Binary = torch.fmod if integer(node, "fmod", 0) else torch.remainder
    return (function(*_together(needed(inputs), needed(inputs, 1))),)


def _where(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    del node
    a, b = _together(needed(inputs, 1), needed(inputs, 2))
    return (torch.where(needed(inputs).to(a.device), a, b),)


class _Clip(torch.autograd.Function):
    """hardtanh that keeps its output, which the next layer mostly keeps as well, and not its input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        """Clips ``x``, any shape, to [low, high]."""
        result = functional.hardtanh(x, low, high)
        ctx.save_for_backward(result)
        ctx.low, ctx.high = low, high
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Passes inside of the bounds."""
        (result,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], result, ctx.low, ctx.high), None, None


_clip_function: Callable[[torch.Tensor, float, float], torch.Tensor] = _Clip.apply


def _clip(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Bounds are attributes before opset 11, inputs from then on; the upper one wins where they cross."""
    x = needed(inputs)
    bounds = []
    for index, name, free in ((1, "min", -math.inf), (2, "max", math.inf)):
        limit = given(inputs, index)
        bounds.append(number(node, name, free) if limit is None else limit.item())
    low, high = min(bounds), bounds[1]
    if x.is_floating_point():
        # Its gradient is one pass; that of a minimum and a maximum took three quarters of MobileNetV2's time.
        return (_clip_function(x, low, high),)
    x = x if low == -math.inf else x.clamp(min=low)
    return (x if high == math.inf else x.clamp(max=high),)


def _leaky_relu(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return (functional.leaky_relu(needed(inputs), number(node, "alpha", 0.01)),)


def _prelu(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    del node
    x, slope = _together(needed(inputs), needed(inputs, 1))
    return (torch.where(x < 0, slope * x, x),)


def _thresholded_relu(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x = needed(inputs)
    return (torch.where(x > number(node, "alpha", 1.0), x, torch.zeros_like(x)),)


def _elu(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return (functional.elu(needed(inputs), number(node, "alpha", 1.0)),)


def _celu(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return (functional.celu(needed(inputs), number(node, "alpha", 1.0)),)


def _selu(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """gamma * (x for x > 0, alpha * (exp(x) - 1) otherwise); the defaults are those of ONNX."""
    x = needed(inputs)
    alpha = number(node, "alpha", 1.6732631921768188)
    gamma = number(node, "gamma", 1.0507010221481323)
    return (gamma * functional.elu(x, alpha),)


def _hard_sigmoid(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x = needed(inputs)
    return ((x * number(node, "alpha", 0.2) + number(node, "beta", 0.5)).clamp(0.0, 1.0),)


def _gelu(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return (functional.gelu(needed(inputs), approximate=text(node, "approximate", "none")),)


def _swish(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x = needed(inputs)
    return (x * torch.sigmoid(number(node, "alpha", 1.0) * x),)


def _softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)); torch's own becomes linear above a threshold."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _cast(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return (needed(inputs).to(torch_type(ir.DataType(integer(node, "to", 1)))),)


def torch_type(dtype: ir.DataType) -> torch.dtype:
    """The torch type of an element type.

    Args:
        dtype: One that NumPy has, too.

    Raises:
        TypeError: If torch has no such type.
    """
    return torch.from_numpy(np.zeros(0, dtype.numpy())).dtype


def check_cast(node: ir.Node) -> str | None:
    """Casts to types that torch does not have."""
    dtype = ir.DataType(integer(node, "to", 1))
    try:
        torch_type(dtype)
    except TypeError:
        return f"a cast to {dtype.name}"
    return None


ELEMENTWISE: dict[str, Op] = {
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _binary(_divide),
    "Pow": _binary(_power),
    "Mod": _modulo,
    "Max": _any_number(torch.maximum),
    "Min": _any_number(torch.minimum),
    "Sum": _any_number(torch.add),
    "Mean": _mean,
    "Equal": _binary(torch.eq),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "And": _binary(torch.logical_and),
    "Or": _binary(torch.logical_or),
    "Xor": _binary(torch.logical_xor),
    "Not": _unary(torch.logical_not),
    "Where": _where,
    "Cast": _cast,
    "Clip": _clip,
    "Relu": _unary(torch.relu),
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "ThresholdedRelu": _thresholded_relu,
    "Elu": _elu,
    "Celu": _celu,
    "Selu": _selu,
    "Sigmoid": _unary(torch.sigmoid),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(functional.hardswish),
    "Swish": _swish,
    "Mish": _unary(functional.mish),
    "Gelu": _gelu,
    "Erf": _unary(torch.erf),
    "Tanh": _unary(torch.tanh),
    "Softplus": _unary(_softplus),
    "Softsign": _unary(functional.softsign),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt),
    "Reciprocal": _unary(torch.reciprocal),
    "Abs": _unary(torch.abs),
    "Neg": _unary(torch.neg),
    "Sign": _unary(torch.sign),
    "Floor": _unary(torch.floor),
    "Ceil": _unary(torch.ceil),
    "Round": _unary(torch.round),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Atan": _unary(torch.atan),
    "Identity": _unary(lambda x: x),
    # At inference it passes its input on; the mask is an output that nothing may read (see the executor).
    "Dropout": _unary(lambda x: x),
}
