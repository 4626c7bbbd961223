"""Weighted operators and normalizations in torch: Conv, ConvTranspose, Gemm, MatMul, BatchNormalization and its kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch.nn import functional

from postquant.calib.learn.geometry import torch_padding, windows
from postquant.calib.learn.op import Check, Inputs, Op, given, integer, integers, needed, number, opset, text

_CONVOLUTIONS: tuple[Callable[..., torch.Tensor], ...] = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED: tuple[Callable[..., torch.Tensor], ...] = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)


def _conv(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x, weight, bias = needed(inputs), needed(inputs, 1), given(inputs, 2)
    spatial = x.shape[2:]
    where = windows(node, spatial, weight.shape[2:])
    padding: Any = where.begins
    if not where.symmetric:
        x, padding = functional.pad(x, torch_padding(where.begins, where.ends)), 0
    convolve = _CONVOLUTIONS[len(spatial) - 1]
    return (convolve(x, weight, bias, where.strides, padding, where.dilations, integer(node, "group", 1)),)


def _conv_transpose(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The whole result is computed, then cut (or filled with the bias) to what the paddings leave."""
    x, weight, bias = needed(inputs), needed(inputs, 1), given(inputs, 2)
    rank = x.dim() - 2
    strides = integers(node, "strides") or [1] * rank
    dilations = integers(node, "dilations") or [1] * rank
    grown = integers(node, "output_padding") or [0] * rank
    full = [
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip(x.shape[2:], strides, weight.shape[2:], dilations, strict=True)
    ]
    begins, ends = _transposed_pads(node, x.shape[2:], strides, [f + g for f, g in zip(full, grown, strict=True)])
    transpose = _TRANSPOSED[rank - 1]
    y = transpose(x, weight, None, strides, 0, 0, integer(node, "group", 1), dilations)
    cuts = [-b for b in begins], [g - e for g, e in zip(grown, ends, strict=True)]
    if any(cuts[0]) or any(cuts[1]):
        y = functional.pad(y, torch_padding(*cuts))
    return (y if bias is None else y + bias.reshape(-1, *[1] * rank),)


def _transposed_pads(
    node: ir.Node, spatial: torch.Size, strides: list[int], full: list[int]
) -> tuple[list[int], list[int]]:
    """What is cut from the full result: ``pads``, or what ``output_shape`` or ``auto_pad`` leave of it."""
    rank = len(spatial)
    mode = text(node, "auto_pad", "NOTSET")
    wanted = integers(node, "output_shape")
    if wanted is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(spatial, strides, strict=True)]
    if wanted is None:
        pads = integers(node, "pads") if mode == "NOTSET" else None
        return (pads[:rank], pads[rank:]) if pads else ([0] * rank, [0] * rank)
    total = [max(f - w, 0) for f, w in zip(full, wanted[-rank:], strict=True)]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return (small, large) if mode == "SAME_UPPER" else (large, small)


def _gemm(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    a, b, c = needed(inputs), needed(inputs, 1), given(inputs, 2)
    a = a.mT if integer(node, "transA", 0) else a
    b = b.mT if integer(node, "transB", 0) else b
    alpha, beta = number(node, "alpha", 1.0), number(node, "beta", 1.0)
    if c is not None and c.dim() == 1 and alpha == beta == 1.0:
        return (torch.addmm(c, a, b),)
    y = a @ b if alpha == 1.0 else alpha * (a @ b)
    return (y if c is None or beta == 0.0 else y + (c if beta == 1.0 else beta * c),)


def _matmul(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    del node
    return (torch.matmul(needed(inputs), needed(inputs, 1)),)


def _batch_norm(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x, scale, bias, mean, variance = (needed(inputs, index) for index in range(5))
    return (functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, number(node, "epsilon", 1e-5)),)


def check_batch_norm(node: ir.Node) -> str | None:
    """Training mode, which computes statistics of its own."""
    return "it is in training mode" if integer(node, "training_mode", 0) else None


def _layer_norm(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Over the axes from ``axis`` to the last; scale and bias broadcast."""
    x, scale, bias = needed(inputs), needed(inputs, 1), given(inputs, 2)
    axis = integer(node, "axis", -1) % x.dim()
    shape = x.shape[axis:]
    epsilon = number(node, "epsilon", 1e-5)
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return (functional.layer_norm(x, shape, scale, bias, epsilon),)
    y = functional.layer_norm(x, shape, None, None, epsilon) * scale
    return (y if bias is None else y + bias,)


def _instance_norm(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x, scale, bias = needed(inputs), needed(inputs, 1), needed(inputs, 2)
    y = functional.group_norm(x, x.shape[1], None, None, number(node, "epsilon", 1e-5))
    return (y * _per_channel(scale, x) + _per_channel(bias, x),)


def _group_norm(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x, scale, bias = needed(inputs), needed(inputs, 1), needed(inputs, 2)
    y = functional.group_norm(x, integer(node, "num_groups", 1), None, None, number(node, "epsilon", 1e-5))
    return (y * _per_channel(scale, x) + _per_channel(bias, x),)


def check_group_norm(node: ir.Node) -> str | None:
    """Before opset 21 the operator had a scale per group, and was withdrawn."""
    return "its form of opset 18" if opset(node) < 21 else None


def _per_channel(vector: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return vector.reshape(-1, *[1] * (x.dim() - 2))


LAYERS: dict[str, Op] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
}
LAYER_CHECKS: dict[str, Check] = {
    "BatchNormalization": check_batch_norm,
    "GroupNormalization": check_group_norm,
}
