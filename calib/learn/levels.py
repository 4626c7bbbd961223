"""Learned code books of activations: :class:`LevelsActivation`.

The simulation gives every value its nearest level. Between two levels ``L_i <= x < L_i+1``, with ``t = (x - L_i) /
(L_i+1 - L_i)``, and for the upstream ``g``, the gradients are

    to x: g                   to L_i: g ([t < 1/2] - (1 - t))              to L_i+1: g ([t >= 1/2] - t)

and outside g to the level at the end. That is LSQ's gradient (Esser et al. 2020) for a rounding behind a piecewise
linear function with ``L_i -> i``: of equal gaps s, the sum of i times the gradient to L_i is that to s. Sums over
values are sums over the cells of a fine grid: what happens in a cell is looked up.

Gaps are learned as factors of their start, and zero stays a level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from postquant.calib.activation_levels import quantizer_with_levels
from postquant.calib.learn.pieces import pieces
from postquant.calib.learn.quantizers import DropMasks
from postquant.runtime_ops.quantizer import TensorQuantizer

Tensor = torch.Tensor
# Cells between the first and the last level, four per code of 8 bits; one more on each side is for what lies outside.
_CELLS = 1020
# A gap stays within this factor of its start.
_MOST_FACTOR = 4.0
_LARGEST_CODE = 255


class LevelQuantize(torch.autograd.Function):
    """Every value's nearest level, with the gradients of the module docstring."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor, mask: Tensor | None) -> Tensor:
        """Simulates one tensor.

        Args:
            ctx: Keeps what the gradient needs.
            x: Any shape, float32.
            levels: (n,) float32, increasing.
            mask: Shape of ``x``, 1 where an element is quantized and 0 where it stays float; all 1 when None.
        """
        low, high = float(levels[0]), float(levels[-1])
        per_unit = _CELLS / max(high - low, 1e-30)
        simulated, cells = torch.empty_like(x), torch.empty_like(x, dtype=torch.int32)
        table = _nearest(levels)[0]
        for values, result, cell in pieces(x, simulated, cells):
            place = values.sub(low).mul_(per_unit).add_(1.0).clamp_(0.0, _CELLS + 2.0).round_()
            cell.copy_(place)
            result.copy_(torch.index_select(table, 0, cell.reshape(-1)).view(cell.shape))
        ctx.save_for_backward(cells, levels, mask)
        return simulated if mask is None else torch.lerp(x, simulated, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradients to ``x`` and ``levels``."""
        (grad,) = grads
        cells, levels, mask = ctx.saved_tensors
        to_x = torch.empty_like(grad)
        inside = torch.ones(_CELLS + 3, device=grad.device)
        inside[0] = inside[-1] = 0.0
        sums = torch.zeros(_CELLS + 3, device=grad.device)
        masks = () if mask is None else (mask,)
        for g, cell, result, *kept in pieces(grad, cells, to_x, *masks):
            quantized = g * kept[0] if kept else g
            index = cell.reshape(-1)
            if ctx.needs_input_grad[1]:
                sums += torch.bincount(index, weights=quantized.reshape(-1), minlength=_CELLS + 3)
            torch.mul(quantized, torch.index_select(inside, 0, index).view(cell.shape), out=result)
            if kept:
                result.add_(g).sub_(quantized)
        to_levels = sums @ _nearest(levels)[1] if ctx.needs_input_grad[1] else None
        return to_x if ctx.needs_input_grad[0] else None, to_levels, None


# The function itself: (x, levels, mask) -> the simulation.
level_quantize: Callable[..., Tensor] = LevelQuantize.apply


def _nearest(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Of every cell its level, and what the levels' gradients get of its gradient, (cells + 3, n)."""
    count = len(levels)
    place = torch.linspace(0, 1, _CELLS + 1, device=levels.device) * (levels[-1] - levels[0]) + levels[0]
    left = (torch.searchsorted(levels, place, right=True) - 1).clamp(0, count - 2)
    share = ((place - levels[left]) / (levels[left + 1] - levels[left]).clamp_min(1e-30)).clamp(0, 1)
    nearest = left + (share >= 0.5)
    rows = torch.arange(_CELLS + 1, device=levels.device)
    weights = torch.zeros(_CELLS + 1, count, device=levels.device)
    weights[rows, nearest] += 1.0
    weights[rows, left] -= 1.0 - share
    weights[rows, left + 1] -= share
    ends = torch.zeros(2, count, device=levels.device)
    ends[0, 0] = ends[1, -1] = 1.0
    table = torch.cat((levels[:1], levels[nearest], levels[-1:]))
    return table, torch.cat((ends[:1], weights, ends[1:]))


class _Gaps:
    """The learned gaps between levels, with what others ask of a step.

    Args:
        gaps: (n - 1,) float32, >= 0.

    Attributes:
        factor: The leaf that the optimizer sees; 1 at the start.
    """

    def __init__(self, gaps: Tensor) -> None:
        self._start = gaps
        self.factor = torch.ones_like(gaps, requires_grad=True)

    def gaps(self) -> Tensor:
        """(n - 1,), differentiable."""
        return self._start * self.factor.clamp(1 / _MOST_FACTOR, _MOST_FACTOR)

    def value(self) -> Tensor:
        """The scale of the codes of 8 bits that the levels are among, ()."""
        return self.gaps().sum() / _LARGEST_CODE


class LevelsActivation:
    """One activation's quantizer whose levels are learned.

    Args:
        quantizer: The plan's; it has a code book of unsigned codes.
        device: Where it is learned.

    Attributes:
        scale: Stands for the step: its factors are the leaf, its value is the scale of the stored codes.
    """

    def __init__(self, quantizer: TensorQuantizer, device: torch.device) -> None:
        assert quantizer.table is not None
        self._quantizer = quantizer
        levels = quantizer.dequantize(quantizer.table)
        self._zero = int(np.abs(levels).argmin())
        self.scale = _Gaps(torch.as_tensor(np.diff(levels), device=device))

    def advance(self, share: float) -> None:
        """Told the share of the iterations that are done: nothing changes."""

    @property
    def settled(self) -> bool:
        """Runs change nothing."""
        return True

    def levels(self) -> Tensor:
        """(n,) float32, increasing, differentiable; zero is among them."""
        above = torch.cat((torch.zeros(1, device=self.scale.factor.device), self.scale.gaps().cumsum(0)))
        return above - above[self._zero]

    def simulate(self, x: Tensor, masks: DropMasks | None) -> Tensor:
        """``x`` behind the quantizer; where ``masks`` drops, it stays float."""
        return level_quantize(x, self.levels(), None if masks is None else masks.like(x))

    def learned(self) -> TensorQuantizer:
        """The quantizer with the learned levels."""
        levels = self.levels().detach().cpu().numpy().astype(np.float64)
        return quantizer_with_levels(self._quantizer.spec, levels)
