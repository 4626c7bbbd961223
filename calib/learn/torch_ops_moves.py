"""Operators that move elements, or tell about shapes, in torch."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional

from postquant.calib.learn.geometry import torch_padding
from postquant.calib.learn.op import (
    Check,
    Inputs,
    Op,
    as_integers,
    attribute_or_input,
    given,
    integer,
    integers,
    needed,
    number,
    text,
)


def _concat(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return (torch.cat([tensor for tensor in inputs if tensor is not None], integer(node, "axis", 1)),)


def _split(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Into the given sizes, else into as many equal parts as there are outputs, the last one smaller if need be."""
    x, axis = needed(inputs), integer(node, "axis", 0)
    sizes = attribute_or_input(node, "split", inputs, 1)
    if sizes is None:
        return torch.split(x, -(-x.shape[axis] // len(node.outputs)), axis)
    return torch.split(x, sizes, axis)


def _slice(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Starts and ends may be negative or beyond the data; a negative step runs backwards."""
    x = needed(inputs)
    starts = attribute_or_input(node, "starts", inputs, 1) or []
    ends = attribute_or_input(node, "ends", inputs, 2) or []
    axes = attribute_or_input(node, "axes", inputs, 3) or list(range(len(starts)))
    steps = as_integers(given(inputs, 4)) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        taken = range(x.shape[axis])[slice(start, _end(end, x.shape[axis], step), step)]
        if step < 0:
            x = x.index_select(axis, torch.tensor(list(taken), dtype=torch.int64, device=x.device))
        else:
            index = [slice(None)] * x.dim()
            index[axis] = slice(taken.start, taken.stop, step)
            x = x[tuple(index)]
    return (x,)


def _end(end: int, size: int, step: int) -> int | None:
    """An end before the first element, as a backward slice writes it, is "until the beginning" for Python."""
    return None if step < 0 and end < -size else end


def _pad(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x, mode = needed(inputs), text(node, "mode", "constant")
    listed = attribute_or_input(node, "pads", inputs, 1) or []
    axes = as_integers(given(inputs, 3))
    axes = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    begins, ends = [0] * x.dim(), [0] * x.dim()
    for position, axis in enumerate(axes):
        begins[axis], ends[axis] = listed[position], listed[position + len(axes)]
    if mode == "constant":
        fill = given(inputs, 2)
        value = number(node, "value", 0.0) if fill is None else fill.item()
        return (functional.pad(x, torch_padding(begins, ends), value=value),)
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if begin or end:
            x = x.index_select(
                axis, _outside(torch.arange(-begin, x.shape[axis] + end), x.shape[axis], mode).to(x.device)
            )
    return (x,)


def _outside(index: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """Which element stands at each position, also before 0 and from ``size`` on."""
    if mode == "edge":
        return index.clamp(0, size - 1)
    if mode == "wrap":
        return index % size
    period = max(2 * (size - 1), 1)
    folded = index % period
    return torch.where(folded >= size, period - folded, folded)


def _transpose(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x = needed(inputs)
    return (x.permute(integers(node, "perm") or tuple(reversed(range(x.dim())))),)


def _reshape(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """0 copies the size from the input (unless ``allowzero``), -1 is what is left.

    A model that was exported for one sample names all sizes. Several samples lie one behind the other in its outermost
    axis, before and behind the operator.
    """
    x, shape = needed(inputs), as_integers(needed(inputs, 1))
    assert shape is not None
    if not integer(node, "allowzero", 0):
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    named = math.prod(shape)
    if named > 0 and x.numel() > named and x.numel() % named == 0:
        shape[0] *= x.numel() // named
    return (x.reshape(shape),)


def _flatten(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x, axis = needed(inputs), integer(node, "axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return (x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:])),)


def _squeeze(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x = needed(inputs)
    axes = attribute_or_input(node, "axes", inputs, 1)
    return (x.squeeze() if axes is None else x.squeeze(tuple(axes)),)


def _unsqueeze(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x = needed(inputs)
    axes = attribute_or_input(node, "axes", inputs, 1) or []
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return (x,)


def _gather(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x, index = needed(inputs), needed(inputs, 1)
    axis = integer(node, "axis", 0) % x.dim()
    size = x.shape[axis]
    index = torch.where(index < 0, index + size, index).to(device=x.device, dtype=torch.int64)
    taken = x.index_select(axis, index.reshape(-1))
    return (taken.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])),)


def _gather_elements(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x, index = needed(inputs), needed(inputs, 1)
    axis = integer(node, "axis", 0) % x.dim()
    index = torch.where(index < 0, index + x.shape[axis], index).to(device=x.device, dtype=torch.int64)
    return (torch.gather(x, axis, index),)


def _expand(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Broadcasts both ways: a size 1 of the shape leaves the tensor's own."""
    del node
    x = needed(inputs)
    return (x.expand(np.broadcast_shapes(tuple(x.shape), tuple(as_integers(needed(inputs, 1)) or ()))),)


def _tile(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    del node
    return (needed(inputs).repeat(as_integers(needed(inputs, 1)) or []),)


def _shape(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Always on the CPU: shapes are for Python."""
    shape = list(needed(inputs).shape)
    end = node.attributes.get_int("end", len(shape))
    return (torch.tensor(shape[integer(node, "start", 0) : end], dtype=torch.int64),)


def _size(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    del node
    return (torch.tensor(needed(inputs).numel(), dtype=torch.int64),)


def _constant_of_shape(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    value = node.attributes.get("value")
    fill = torch.zeros(1) if value is None else torch.from_numpy(value.as_tensor().numpy().copy())
    return (fill.reshape(()).expand(as_integers(needed(inputs)) or []).clone(),)


def _constant(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    del inputs
    constant = ir.convenience.get_const_tensor(node.outputs[0])
    assert constant is not None
    return (torch.from_numpy(constant.numpy().copy()),)


def check_constant(node: ir.Node) -> str | None:
    """Texts and sparse tensors."""
    constant = ir.convenience.get_const_tensor(node.outputs[0])
    return "its form of constant" if constant is None or constant.dtype is ir.DataType.STRING else None


def _range(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    del node
    start, limit, step = (needed(inputs, index) for index in range(3))
    return (torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype),)


def _depth_to_space(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """DCR: the block's position is the slower part of the channel; CRD: the faster one."""
    x, b = needed(inputs), integer(node, "blocksize", 1)
    n, c, h, w = x.shape
    if text(node, "mode", "DCR") == "DCR":
        parts = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return (parts.reshape(n, c // (b * b), h * b, w * b),)


def _space_to_depth(node: ir.Node, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x, b = needed(inputs), integer(node, "blocksize", 1)
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return (parts.reshape(n, c * b * b, h // b, w // b),)


MOVES: dict[str, Op] = {
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Expand": _expand,
    "Tile": _tile,
    "Shape": _shape,
    "Size": _size,
    "ConstantOfShape": _constant_of_shape,
    "Constant": _constant,
    "Range": _range,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
}
MOVE_CHECKS: dict[str, Check] = {"Constant": check_constant}
