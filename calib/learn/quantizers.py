"""What is learned of activations and biases, as differentiable simulations of the law.

*Activations* (QDrop, LSQ). With ``r = x / s`` and codes ``q = clip(round(r), low, high)`` counted from the zero point,
the simulation is ``s q``; elements that the mask leaves out stay float. Gradients, for the upstream ``g``:

    to x: g where low < r < high        to s: sum of g (q - r) inside, g q outside

*Biases* are learned as they are, and rounded to int32 multiples of ``s_x s_w`` where the emitted graph does that.

Scales are learned as factors of their start, so that one learning rate fits tensors of all magnitudes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from postquant.calib.learn.pieces import pieces
from postquant.runtime_ops.quantizer import TensorQuantizer

# A learned scale stays within this factor of its start: a step that collapses never comes back.
_MOST_FACTOR = 4.0
Tensor = torch.Tensor


class FakeQuantize(torch.autograd.Function):
    """``s clip(round(x / s), low, high)`` with the gradients of the module docstring."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float, mask: Tensor | None) -> Tensor:
        """Simulates one tensor.

        Args:
            ctx: Keeps what the gradient needs.
            x: Any shape, float32.
            scale: () float32, or (N, 1, ...) for a step per sample, > 0.
            low: Smallest code, counted from the zero point, <= 0.
            high: Largest code, counted from the zero point, >= 0.
            mask: Shape of ``x``, 1 where an element is quantized and 0 where it stays float; all 1 when None.
        """
        simulated = torch.empty_like(x)
        parts = _whole if scale.ndim else pieces
        for values, result in parts(x, simulated):
            torch.div(values, scale, out=result).clamp_(low, high).round_().mul_(scale)
        # The layer in front and the one behind mostly keep these two as well: so they take no memory.
        ctx.save_for_backward(x, simulated, scale, mask)
        ctx.low, ctx.high = low, high
        return simulated if mask is None else torch.lerp(x, simulated, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """The gradients to ``x`` and ``scale``."""
        (grad,) = grads
        x, simulated, scale, mask = ctx.saved_tensors
        to_x = torch.empty_like(x)
        to_scale: list[Tensor] = []
        masks = () if mask is None else (mask,)
        parts = _whole if scale.ndim else pieces
        for g, values, rounded, inside, *kept in parts(grad, x, simulated, to_x, *masks):
            quantized = g * kept[0] if kept else g
            ratio = values / scale
            # One pass, where comparing and multiplying by booleans are three.
            torch.ops.aten.hardtanh_backward.grad_input(quantized, ratio, ctx.low, ctx.high, grad_input=inside)
            # Outside, codes are the bound itself, and the ratio does not count.
            if ctx.needs_input_grad[1] and not scale.ndim:
                to_scale.append((quantized * rounded).sum() / scale - ratio.mul_(inside).sum())
            elif ctx.needs_input_grad[1]:  # one step per sample
                codes = rounded / scale
                to_scale.append((quantized * codes - inside * ratio).sum(tuple(range(1, g.ndim)), keepdim=True))
            if kept:
                inside.add_(g).sub_(quantized)
        return (
            to_x if ctx.needs_input_grad[0] else None,
            torch.stack(to_scale).sum(0) if to_scale else None,
            None,
            None,
            None,
        )


def _whole(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """As :func:`pieces`, where a step per sample would not fit to pieces."""
    yield tensors


# The function itself: (x, scale, low, high, mask) -> the simulation.
fake_quantize: Callable[..., Tensor] = FakeQuantize.apply


class DropMasks:
    """Random masks for QDrop: a pool, cut at random offsets, because drawing numbers costs as much as a convolution.

    Args:
        generator: Source of the masks and offsets; on the CPU.
        device: Where masks are wanted.
        keep: Share of elements that are 1.
    """

    _POOL = 1 << 22

    def __init__(self, generator: torch.Generator, device: torch.device, keep: float) -> None:
        bits = torch.randint(0, 256, (self._POOL,), generator=generator, dtype=torch.int16)
        # Arithmetic with 0.0 and 1.0 is many times faster than a choice by booleans.
        self._pool = (bits < round(256 * keep)).to(torch.float32).to(device)
        self._generator = generator

    def part(self) -> DropMasks:
        """Masks from the same pool whose offsets follow from one number of this generator, for another thread."""
        part = copy.copy(self)
        seed = int(torch.randint(0, 1 << 62, (), generator=self._generator))
        part._generator = torch.Generator().manual_seed(seed)
        return part

    def like(self, x: Tensor) -> Tensor:
        """A mask of the shape and memory layout of ``x``, float32; large tensors see the pool again and again."""
        offset = int(torch.randint(0, self._POOL, (), generator=self._generator))
        # What as_strided may reach; a tensor with gaps reaches beyond its number of elements.
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        pool = self._pool
        if offset + extent > self._POOL:
            pool = pool.repeat(math.ceil((offset + extent) / self._POOL))
        return pool.as_strided(x.shape, x.stride(), offset)


class LearnedScale:
    """A positive scale ``start * factor``.

    Args:
        quantizer: Has the start, () or (C,); a scale that must be a power of two stays as it is.
        device: Where it is learned.

    Attributes:
        factor: The leaf that the optimizer sees, if it has a gradient; 1 at the start.
    """

    def __init__(self, quantizer: TensorQuantizer, device: torch.device) -> None:
        self._start = torch.as_tensor(quantizer.scale.copy(), device=device)
        self.factor = torch.ones_like(self._start, requires_grad=not quantizer.spec.power_of_two)

    def value(self) -> Tensor:
        """The scale, float32, differentiable."""
        return self._start * self.factor.clamp(1 / _MOST_FACTOR, _MOST_FACTOR)

    def numpy(self) -> npt.NDArray[np.float32]:
        """The scale as the plan holds it."""
        return np.asarray(self.value().detach().cpu().numpy(), np.float32)


class ActivationQuantizer:
    """One activation's quantizer whose step is learned.

    Args:
        quantizer: The plan's: unsigned or signed, one scale, no border.
        device: Where it is learned.
    """

    def __init__(self, quantizer: TensorQuantizer, device: torch.device) -> None:
        self._quantizer = quantizer
        point = int(quantizer.zero_point)
        self._low, self._high = float(quantizer.spec.qmin - point), float(quantizer.spec.qmax - point)
        self.scale = LearnedScale(quantizer, device)

    def advance(self, share: float) -> None:
        """Told the share of the iterations that are done: nothing changes."""

    @property
    def settled(self) -> bool:
        """Runs change nothing."""
        return True

    def simulate(self, x: Tensor, masks: DropMasks | None) -> Tensor:
        """``x`` behind the quantizer; where ``masks`` drops, it stays float."""
        mask = None if masks is None else masks.like(x)
        return fake_quantize(x, self.scale.value(), self._low, self._high, mask)

    def learned(self) -> TensorQuantizer:
        """The quantizer with the learned step."""
        return dataclasses.replace(self._quantizer, scale=self.scale.numpy())


class LearnedBias:
    """A bias, rounded like the emitted graph's int32 bias.

    Args:
        values: Any shape, float32: the plan's correction or the model's bias.
        device: Where it is learned.

    Attributes:
        start: The values at the start.
        values: The leaf that the optimizer sees.
    """

    def __init__(self, values: npt.NDArray[np.float32], device: torch.device) -> None:
        self.start = torch.as_tensor(np.array(values, np.float32), device=device)
        self.values = self.start.clone().requires_grad_()

    def simulate(self, step: Tensor | None) -> Tensor:
        """The bias; in multiples of ``step`` (float32, broadcastable) where one is given."""
        if step is None:
            return self.values
        rounded = (self.values / step).round() * step
        return self.values + (rounded - self.values).detach()

    def learned(self) -> npt.NDArray[np.float32]:
        """The values as the plan holds them."""
        return np.asarray(self.values.detach().cpu().numpy(), np.float32)
