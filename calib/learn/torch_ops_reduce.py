"""Operators that combine elements in torch: pools, reductions, Softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.nn import functional

from postquant.calib.learn.geometry import torch_padding, windows
from postquant.calib.learn.op import Check, Inputs, Op, attribute_or_input, integer, integers, needed, opset

_MAX_POOLS: tuple[Callable[..., torch.Tensor], ...] = (
    functional.max_pool1d,
    functional.max_pool2d,
    functional.max_pool3d,
)
_AVERAGE_POOLS: tuple[Callable[..., torch.Tensor], ...] = (
    functional.avg_pool1d,
    functional.avg_pool2d,
    functional.avg_pool3d,
)


def _kernel(node: ir.Node) -> list[int]:
    return integers(node, "kernel_shape") or []


def _max_pool(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x = needed(inputs)
    spatial = x.shape[2:]
    where = windows(node, spatial, _kernel(node))
    padding = torch_padding(where.begins, where.reach(spatial))
    if any(padding):
        x = functional.pad(x, padding, value=-math.inf)
    return (_MAX_POOLS[len(spatial) - 1](x, where.kernel, where.strides, 0, where.dilations),)


def check_max_pool(node: ir.Node) -> str | None:
    """Positions of the maxima."""
    return "it also returns positions" if len(node.outputs) > 1 and node.outputs[1].uses() else None


def _average_pool(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """sum / count: the padding counts with ``count_include_pad``; what ``ceil_mode`` adds behind it never does."""
    x = needed(inputs)
    spatial = x.shape[2:]
    where = windows(node, spatial, _kernel(node))
    reach = where.reach(spatial)
    padding = torch_padding(where.begins, reach)
    pool = _AVERAGE_POOLS[len(spatial) - 1]
    mean = pool(functional.pad(x, padding) if any(padding) else x, where.kernel, where.strides)
    included = bool(integer(node, "count_include_pad", 0))
    if max(padding, default=0) <= 0 or (included and not where.grows(spatial)):
        return (mean,)
    counted = torch.ones((1, 1, *spatial), dtype=x.dtype, device=x.device)
    if included:
        counted = functional.pad(counted, torch_padding(where.begins, where.ends), value=1.0)
        reach = tuple(r - end for r, end in zip(reach, where.ends, strict=True))
        padding = torch_padding([0] * len(spatial), reach)
    return (mean / pool(functional.pad(counted, padding), where.kernel, where.strides),)


def check_average_pool(node: ir.Node) -> str | None:
    """Taps with gaps."""
    return "its dilations" if any(d != 1 for d in integers(node, "dilations") or ()) else None


def _global_average(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    del node
    x = needed(inputs)
    return (x.mean(dim=tuple(range(2, x.dim())), keepdim=True),)


def _global_max(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    del node
    x = needed(inputs)
    return (x.amax(dim=tuple(range(2, x.dim())), keepdim=True),)


def _reduction(function: Callable[[torch.Tensor, tuple[int, ...], bool], torch.Tensor]) -> Op:
    """A reduction over ``axes`` (attribute or input), all axes when there are none."""

    def op(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        x = needed(inputs)
        axes: Sequence[int] = attribute_or_input(node, "axes", inputs, 1) or ()
        if not axes and integer(node, "noop_with_empty_axes", 0):
            # Each element is reduced by itself: its square, its magnitude, ...
            return (function(x.unsqueeze(-1), (x.dim(),), False),)
        every = tuple(range(x.dim()))
        chosen = tuple(axis % x.dim() for axis in axes) or every
        return (function(x, chosen, bool(integer(node, "keepdims", 1))) if every else x,)

    return op


def _product(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def _argument(function: Callable[..., torch.Tensor]) -> Op:
    def op(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return (function(needed(inputs), integer(node, "axis", 0), keepdim=bool(integer(node, "keepdims", 1))),)

    return op


def check_argument(node: ir.Node) -> str | None:
    """The last of equal extremes."""
    return "select_last_index" if integer(node, "select_last_index", 0) else None


def _softmax(function: Callable[..., torch.Tensor]) -> Op:
    """Along one axis from opset 13 on; before, over all axes from ``axis`` to the last together."""

    def op(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        x = needed(inputs)
        if opset(node) >= 13:
            return (function(x, dim=integer(node, "axis", -1)),)
        axis = integer(node, "axis", 1) % x.dim()
        return (function(x.flatten(axis), dim=-1).reshape(x.shape),)

    return op


def _cumulative_sum(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return (torch.cumsum(needed(inputs), int(needed(inputs, 1).item())),)


def check_cumulative_sum(node: ir.Node) -> str | None:
    """Other directions."""
    return "exclusive or reverse" if integer(node, "exclusive", 0) or integer(node, "reverse", 0) else None


_Reduce = Callable[[Any, tuple[int, ...], bool], torch.Tensor]
_REDUCTIONS: dict[str, _Reduce] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
}

REDUCTIONS: dict[str, Op] = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "ArgMax": _argument(torch.argmax),
    "ArgMin": _argument(torch.argmin),
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "CumSum": _cumulative_sum,
    **{name: _reduction(function) for name, function in _REDUCTIONS.items()},
}
REDUCTION_CHECKS: dict[str, Check] = {
    "MaxPool": check_max_pool,
    "AveragePool": check_average_pool,
    "ArgMax": check_argument,
    "ArgMin": check_argument,
    "CumSum": check_cumulative_sum,
}
