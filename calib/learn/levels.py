"""Learned code books of activations: :class:`LevelsActivation`.

The simulation is the law's: values and levels are rounded to codes of 8 bits, and every value gets its nearest level,
of its channel where channels have levels of their own, the upper one of two that are equally near. Between two levels
``L_i <= x < L_i+1``, with ``t = (x - L_i) / (L_i+1 - L_i)`` of codes, and for the upstream ``g``, the gradients are

    to x: g                   to L_i: g ([t < 1/2] - (1 - t))              to L_i+1: g ([t >= 1/2] - t)

and outside g to the level at the end. That is LSQ's gradient (Esser et al. 2020) for a rounding behind a piecewise
linear function with ``L_i -> i``: of equal gaps s, the sum of i times the gradient to L_i is that to s. Sums over
values are sums over codes: what happens at a code is looked up. Error feedback moves values in front of all that,
without a gradient (:mod:`postquant.calib.learn.feedback`); errors that it makes up for are those that are made, only if
every value gets the level that feedback has reckoned with.

Gaps are learned as factors of their start, and zero stays a level.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from postquant.calib.activation_levels import quantizer_with_levels
from postquant.calib.learn import native_levels
from postquant.calib.learn.cells import existing_places, in_cells, out_of_cells
from postquant.calib.learn.feedback import FeedbackShift
from postquant.calib.learn.level_codes import LARGEST_CODE, PLACES, LevelCodes
from postquant.calib.learn.pieces import PIECE
from postquant.calib.learn.quantizers import DropMasks
from postquant.runtime_ops.quantizer import TensorQuantizer

Tensor = torch.Tensor
# A gap stays within this factor of its start.
_MOST_FACTOR = 4.0


class LevelQuantize(torch.autograd.Function):
    """Every value's nearest level, with the gradients of the module docstring."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, levels: Tensor, mask: Tensor | None, axis: int | None, shift: FeedbackShift | None
    ) -> Tensor:
        """Simulates one tensor.

        Args:
            ctx: Keeps what the gradient needs.
            x: Any shape, float32.
            levels: (C, n) float32, every row sorted.
            mask: Shape of ``x``, 1 where an element is quantized and 0 where it stays float; all 1 when None.
            axis: The axis of the C channels, counted from the last one, -1; None where C is 1 and stands for the whole
                tensor.
            shift: What is taken off x first, or None.
        """
        ctx.layout = _Layout.of(x, axis)
        ctx.native = native_levels.usable(x, levels)
        if ctx.native:
            simulated, places = _native(x, levels, mask, ctx.layout, shift)
            ctx.save_for_backward(places, levels, None if mask is None else ctx.layout.split(mask))
            return simulated
        if shift is not None:
            x = x - _shifted(x, levels, mask, shift)
        simulated, places = _simulate(ctx.layout.split(x), levels)
        ctx.save_for_backward(places, levels, None if mask is None else ctx.layout.split(mask))
        result = ctx.layout.join(simulated)
        return result if mask is None else torch.lerp(x, result, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients to ``x`` and ``levels``."""
        places, levels, kept = ctx.saved_tensors
        upstream, wanted = ctx.layout.split(grads[0]), tuple(ctx.needs_input_grad[:2])
        if ctx.native:
            found = native_levels.gradients(upstream, places, levels, kept, wanted=wanted)
        else:
            found = _gradients(upstream, places, levels, kept, wanted)
        to_x, to_levels = found
        return None if to_x is None else ctx.layout.join(to_x), to_levels, None, None, None


def level_quantize(
    x: Tensor, levels: Tensor, mask: Tensor | None, axis: int | None, shift: FeedbackShift | None = None
) -> Tensor:
    """The simulation: :meth:`LevelQuantize.forward`, differentiable."""
    found: Tensor = _apply(x, levels, mask, axis, shift)
    return found


_apply: Callable[..., Tensor] = LevelQuantize.apply


def _native(
    x: Tensor, levels: Tensor, mask: Tensor | None, layout: _Layout, shift: FeedbackShift | None
) -> tuple[Tensor, Tensor]:
    """The simulation by the library, and the places that its gradients ask for, as the layout splits them."""
    cell = 1 if shift is None else shift.cell
    if shift is None or cell == 1:
        kept = None if mask is None else layout.split(mask)
        simulated, places = native_levels.simulate(
            layout.split(x), levels, kept, None if shift is None else shift.native
        )
        return layout.join(simulated), places
    cells, there = in_cells(x, cell), _existing(x, mask, cell)
    inner = _Layout.of(cells, layout.axis)
    kept = None if there is None else inner.split(there)
    rows = levels.repeat(cell * cell, 1)
    simulated, places = native_levels.simulate(inner.split(cells), rows, kept, shift.native)
    # Behind the feedback a place is one of its channel, wherever it lies.
    back = layout.split(out_of_cells(inner.join(places), cell, x)).contiguous()
    return out_of_cells(inner.join(simulated), cell, x), back


def _shifted(x: Tensor, levels: Tensor, mask: Tensor | None, shift: FeedbackShift) -> Tensor:
    """What feedback takes off x."""
    if shift.cell == 1:
        return shift(x, levels, mask)
    rows = levels.repeat(shift.cell**2, 1)
    found = shift(in_cells(x, shift.cell), rows, _existing(x, mask, shift.cell))
    return out_of_cells(found, shift.cell, x)


def _existing(x: Tensor, mask: Tensor | None, cell: int) -> Tensor | None:
    """The mask in cells, 0 where cells have no place."""
    return existing_places(x, cell) if mask is None else in_cells(mask, cell)


def _simulate(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest levels of (outer, C, inner), and the places that they are looked up at, counted through all channels."""
    codes = LevelCodes(levels)
    bottom, top = codes.codes[:, :1] + 1, codes.codes[:, -1:] + 1
    first = torch.arange(len(levels), device=values.device, dtype=torch.float32)[:, None] * PLACES
    table = codes.nearest().reshape(-1)
    simulated, places = torch.empty_like(values), torch.empty_like(values, dtype=torch.int32)
    for part, channels in _pieces(values):
        place = values[part].sub(codes.low).mul_(codes.per_unit).add_(1.0).clamp_(0.0, PLACES - 1.0).round_()
        place.masked_fill_(place > top[channels], PLACES - 1.0).masked_fill_(place < bottom[channels], 0.0)
        places[part] = place.add_(first[channels])
        index = places[part]
        simulated[part] = torch.index_select(table, 0, index.reshape(-1)).view(index.shape)
    return simulated, places


def _gradients(
    upstream: Tensor, places: Tensor, levels: Tensor, kept: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to values and levels; sums are of float64, in the order of memory."""
    weights, bins = LevelCodes(levels).parts()
    inside = torch.ones_like(weights)
    inside[:, 0] = inside[:, -1] = 0.0
    sums = torch.zeros(len(levels), levels.shape[1] + 1, dtype=torch.float64, device=upstream.device)
    to_x = torch.empty_like(upstream)
    for part, _ in _pieces(upstream):
        g, index = upstream[part], places[part].reshape(-1).long()
        quantized = g if kept is None else g * kept[part]
        if wanted[1]:
            of_levels = torch.index_select(weights.view(-1), 0, index).mul_(quantized.reshape(-1))
            sums.view(-1).scatter_add_(0, torch.index_select(bins.view(-1), 0, index), of_levels.double())
        result = torch.index_select(inside.view(-1), 0, index).view(g.shape).mul_(quantized)
        if kept is not None:
            result.add_(g).sub_(quantized)
        to_x[part] = result
    to_levels = (sums[:, :-1] - sums[:, 1:]).to(levels.dtype) if wanted[1] else None
    return to_x if wanted[0] else None, to_levels


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a tensor's elements lie as (outer, C, inner).

    Attributes:
        shape: That of the tensor.
        axis: The channels' axis, or None for one channel.
        last: Whether channels come last in memory, behind two axes of positions.
    """

    shape: torch.Size
    axis: int | None
    last: bool

    @classmethod
    def of(cls, x: Tensor, axis: int | None) -> _Layout:
        last = axis in (None, -3) and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return cls(x.shape, axis, last and not x.is_contiguous())

    def split(self, x: Tensor) -> Tensor:
        """A tensor of that shape as (outer, C, inner), copied where its memory has another order."""
        if self.last:
            rows = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
            return rows.reshape((1, 1, -1) if self.axis is None else (-1, self.shape[-3], 1))
        if self.axis is None:
            return x.reshape(1, 1, -1)
        return x.reshape(math.prod(self.shape[: self.axis]), self.shape[self.axis], -1)

    def join(self, values: Tensor) -> Tensor:
        """The inverse."""
        if not self.last:
            return values.view(self.shape)
        batch, channels, height, width = self.shape
        return values.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _pieces(values: Tensor) -> Iterator[tuple[tuple[slice, slice, slice], slice]]:
    """Parts of (outer, C, inner) that stay in the cache, each with its channels; the whole on other devices."""
    outer, channels, inner = values.shape
    if values.device.type != "cpu":
        outer_step, channel_step, inner_step = outer, channels, inner
    else:
        inner_step = min(inner, PIECE)
        channel_step = min(channels, max(PIECE // max(inner_step, 1), 1))
        outer_step = max(PIECE // max(inner_step * channel_step, 1), 1) if channel_step == channels else 1
    for i in range(0, outer, max(outer_step, 1)):
        for j in range(0, channels, max(channel_step, 1)):
            for k in range(0, inner, max(inner_step, 1)):
                some = slice(j, j + channel_step)
                yield (slice(i, i + outer_step), some, slice(k, k + inner_step)), some


class _Gaps:
    """The learned gaps between levels, with what others ask of a step.

    Args:
        levels: (C, n) float32, every row sorted and with a zero.

    Attributes:
        factor: The leaf that the optimizer sees, (C, n - 1); 1 at the start.
    """

    def __init__(self, levels: Tensor) -> None:
        self._start = levels.diff(dim=1)
        self._zero = levels.abs().argmin(dim=1, keepdim=True)
        self.factor = torch.ones_like(self._start, requires_grad=True)

    def levels(self) -> Tensor:
        """(C, n), differentiable; every row is sorted and has a zero."""
        gaps = self._start * self.factor.clamp(1 / _MOST_FACTOR, _MOST_FACTOR)
        above = torch.cat((torch.zeros_like(gaps[:, :1]), gaps.cumsum(1)), dim=1)
        return above - torch.gather(above, 1, self._zero)

    def value(self) -> Tensor:
        """The scale of the codes of 8 bits that the levels are among, ()."""
        levels = self.levels()
        return (levels.max() - levels.min()) / LARGEST_CODE


class LevelsActivation:
    """One activation's quantizer whose levels are learned.

    Args:
        quantizer: The plan's; it has a code book of unsigned codes.
        device: Where it is learned.

    Attributes:
        channels: How many have levels of their own; 1 where all share them.
        scale: Stands for the step: its factors are the leaf, its value is the scale of the stored codes.
    """

    def __init__(self, quantizer: TensorQuantizer, device: torch.device) -> None:
        assert quantizer.table is not None
        self._quantizer = quantizer
        levels = np.atleast_2d(quantizer.dequantize(quantizer.table))
        self.channels = len(levels)
        self.scale = _Gaps(torch.as_tensor(levels, device=device))
        feedback, axis = quantizer.feedback, quantizer.table_axis
        self._shift = None if feedback is None or axis is None else FeedbackShift(feedback, axis, device)

    def advance(self, share: float) -> None:
        """Told the share of the iterations that are done: nothing changes."""

    @property
    def settled(self) -> bool:
        """Runs change nothing."""
        return True

    def simulate(self, x: Tensor, masks: DropMasks | None) -> Tensor:
        """``x`` behind the quantizer; where ``masks`` drops, it stays float."""
        mask, levels = None if masks is None else masks.like(x), self.scale.levels()
        return level_quantize(x, levels, mask, self._quantizer.table_axis, self._shift)

    def learned(self) -> TensorQuantizer:
        """The quantizer with the learned levels."""
        levels = self.scale.levels().detach().cpu().numpy().astype(np.float64)
        axis = self._quantizer.table_axis
        found = quantizer_with_levels(self._quantizer.spec, levels[0] if axis is None else levels, axis)
        return dataclasses.replace(found, feedback=self._quantizer.feedback)
