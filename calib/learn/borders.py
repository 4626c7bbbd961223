"""Learned rounding borders: :class:`BorderedActivation`, a differentiable simulation of BorderQuantize.

With ``r = clip(x / s, low, high)``, ``n = floor(r)`` and ``f = r - n``, a value is rounded up where ``f > B``:

    B = sigmoid(z_c(n)) + g_c * N        z_c(n) = z0_c(n) + b0_c + b1_c u + b2_c u^2        u = n / (levels - 1)

b0, b1, b2 (own form: per channel, a quadratic in a sigmoid, AQuant-style) and g (neighbourhood form: per channel, the
strength of the neighbours' residuals N, whose coefficients follow from the layer's weights of that moment:
:mod:`postquant.calib.border_terms`) are learned. z0 is what the plan has, 0 for rounding to nearest. A sigmoid lies
between 0 and 1, so the thresholds ``n + sigmoid(z_c(n))`` grow with n by themselves.

Gradients for the upstream g, counted inside the range: to x and s as without a border
(:mod:`postquant.calib.learn.quantizers`), and to B

    straight through   -g s                         every value alike
    soft               -g s h (1 - h) / T           h = sigmoid((f - B) / T): values near their border

Both have the same mean over evenly spread fractions; T falls while a block is learned. Forward is always hard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from postquant.calib.border_terms import BorderTerms, border_of
from postquant.calib.layers import Layer
from postquant.calib.learn.quantizers import DropMasks, LearnedScale
from postquant.calib.learn.recipe import Borders
from postquant.runtime_ops.law_border import RESIDUAL_UNITS
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.rounding_border import RoundingBorder

Tensor = torch.Tensor
# How often the neighbours' coefficients follow the weights while a block is learned.
_REFITS = 8


class BorderedQuantize(torch.autograd.Function):
    """``s (n + [f > max(B, 0)])`` with the gradients of the module docstring; channels are the last axis."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        table: Tensor,
        shift: Tensor | None,
        low: float,
        high: float,
        temperature: float | None,
    ) -> Tensor:
        """Simulates one tensor.

        Args:
            ctx: Keeps what the gradient needs.
            x: (..., C) float32.
            scale: () float32, > 0.
            table: (C, levels) float32, the border of every integer part.
            shift: The shape of ``x``, what the neighbours add; None for nothing.
            low: Smallest code, counted from the zero point, <= 0.
            high: Largest code, counted from the zero point, >= 0.
            temperature: T of the soft gradient; None for straight through.
        """
        ratio = x / scale
        clipped = ratio.clamp(low, high)
        below = clipped.floor()
        clipped -= below  # the fraction
        channels, levels = table.shape
        index = (below - low).long() + torch.arange(channels, device=x.device) * levels
        border = table.reshape(-1)[index]
        if shift is not None:
            border += shift
        codes = below + (clipped > border.clamp_min(0)).to(x.dtype)
        distance = None if temperature is None else clipped.sub_(border)
        ctx.save_for_backward(ratio, codes, scale, index, distance)
        ctx.low, ctx.high, ctx.temperature, ctx.shape = low, high, temperature, table.shape
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients to ``x``, ``scale``, ``table`` and ``shift``."""
        (grad,) = grads
        ratio, codes, scale, index, distance = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(grad, ratio, ctx.low, ctx.high)
        to_scale = (grad * codes).sum() - (inside * ratio).sum() if ctx.needs_input_grad[1] else None
        to_table = to_border = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            to_border = inside * -scale
            if distance is not None:
                soft = torch.sigmoid(distance / ctx.temperature)
                to_border *= soft * (1 - soft) / ctx.temperature
        if ctx.needs_input_grad[2]:
            assert to_border is not None
            sums = torch.bincount(index.reshape(-1), to_border.reshape(-1), minlength=ctx.shape[0] * ctx.shape[1])
            to_table = sums.to(grad.dtype).view(ctx.shape)
        return inside, to_scale, to_table, to_border if ctx.needs_input_grad[3] else None, None, None, None


bordered_quantize: Callable[..., Tensor] = BorderedQuantize.apply


@dataclasses.dataclass(frozen=True)
class BorderLearning:
    """How a border is learned.

    Attributes:
        form: What is learned of it; OFF keeps the border that the plan has.
        layer: The layer that reads through it.
        weight: Gives the layer's quantized weight as it is now, in the tensor's own layout.
        temperature: T of the soft gradient at the start and at the end; None for straight through.
    """

    form: Borders
    layer: Layer
    weight: Callable[[], npt.NDArray[np.float32]]
    temperature: tuple[float, float] | None


class BorderedActivation:
    """One layer's input quantizer with a rounding border.

    Args:
        quantizer: The plan's; it has a border.
        learning: How.
        device: Where it is learned.

    Attributes:
        scale: The step.
        coefficients: (C, 3): b0, b1, b2, leaf.
        gain: (C,): g, leaf; it has a gradient in the neighbourhood form only.
    """

    def __init__(self, quantizer: TensorQuantizer, learning: BorderLearning, device: torch.device) -> None:
        border, spec, point = quantizer.border, quantizer.spec, int(quantizer.zero_point)
        assert border is not None
        self._quantizer, self._learning, self._device = quantizer, learning, device
        self._low, self._high = float(spec.qmin - point), float(spec.qmax - point)
        levels = spec.qmax - spec.qmin + 1
        self._u = torch.arange(levels, dtype=torch.float32, device=device) / (levels - 1)
        known = np.broadcast_to(border.border.astype(np.float64), (border.channels, levels)).clip(1e-6, 1 - 1e-6)
        self._start = np.log(known / (1 - known))
        self._logits = torch.as_tensor(self._start.astype(np.float32), device=device)
        self.scale = LearnedScale(quantizer, device)
        own, near = learning.form is not Borders.OFF, learning.form is Borders.NEIGHBOURS
        self.coefficients = torch.zeros(border.channels, 3, device=device, requires_grad=own)
        self.gain = torch.ones(border.channels, device=device, requires_grad=near)
        # A border that saw neighbours before keeps its coefficients.
        self._follows = near and not border.has_window and not border.rank
        self._fit_now = False
        self._fits = 0
        self._temperature = None if learning.temperature is None else learning.temperature[0]
        self._take(border)
        self._kept = border

    def parameters(self) -> list[Tensor]:
        """The leaves of the border."""
        return [self.coefficients, self.gain]

    def advance(self, share: float) -> None:
        """Told the share of the iterations that are done, in [0, 1)."""
        if self._learning.temperature is not None:
            first, last = self._learning.temperature
            self._temperature = first * (last / first) ** share
        if self._follows and share * _REFITS >= self._fits:
            self._fit_now, self._fits = True, self._fits + 1

    @property
    def settled(self) -> bool:
        """Whether the neighbours' coefficients follow the weights already; if not, the next run lets them."""
        return not self._fit_now

    def remember(self) -> None:
        """Keeps the neighbours' coefficients; the leaves are the caller's."""
        self._kept = self._border

    def recall(self) -> None:
        """Takes those that were kept last."""
        self._take(self._kept)

    def simulate(self, x: Tensor, masks: DropMasks | None) -> Tensor:
        """``x`` (N, C, ...) behind the quantizer; where ``masks`` drops, it stays float."""
        scale = self.scale.value()
        shift = None
        if self._follows or self._neighbours:
            with torch.no_grad():
                ratio = (x / scale).clamp(self._low, self._high)
                if self._fit_now:
                    self._fit(ratio)
                field = self._field(ratio) if self._neighbours else None
            if field is not None:
                shift = field.movedim(1, -1) * self.gain
        table = torch.sigmoid(self._logits + self._polynomial())
        moved = x.movedim(1, -1)
        result = bordered_quantize(moved, scale, table, shift, self._low, self._high, self._temperature)
        result = result.movedim(-1, 1)
        return result if masks is None else torch.lerp(x, result, masks.like(x))

    def learned(self) -> TensorQuantizer:
        """The quantizer with the learned step and border."""
        gain = self.gain.detach().cpu().numpy()
        z = self._start + self._polynomial().detach().cpu().numpy()
        border = dataclasses.replace(
            self._border,
            border=(1 / (1 + np.exp(-z))).astype(np.float32),
            window_scale=np.asarray(self._border.window_scale * gain, np.float32),
            right_scale=np.asarray(self._border.right_scale * gain, np.float32),
        )
        return dataclasses.replace(self._quantizer, scale=self.scale.numpy(), border=border)

    def _polynomial(self) -> Tensor:
        b = self.coefficients
        return b[:, :1] + self._u * (b[:, 1:2] + self._u * b[:, 2:])

    def _fit(self, ratio: Tensor) -> None:
        """The neighbours' coefficients for the weights as they are now."""
        self._fit_now = False
        inside = (ratio > self._low) & (ratio < self._high) & (ratio != 0)
        terms = BorderTerms(density=float(inside.float().mean()))
        found = border_of(self._learning.layer, self._learning.weight(), terms)
        if found is not None:
            self._take(found.border)

    def _take(self, border: RoundingBorder) -> None:
        self._border = border
        self._neighbours = bool(border.window.any()) or border.rank > 0

        def tensor(array: npt.NDArray[Any]) -> Tensor:
            return torch.as_tensor(array.astype(np.float32), device=self._device)

        self._window, self._window_scale = tensor(border.window)[:, None], tensor(border.window_scale)
        self._left, self._left_scale = tensor(border.left)[:, :, None, None], tensor(border.left_scale)
        self._right, self._right_scale = tensor(border.right)[:, :, None, None], tensor(border.right_scale)

    def _field(self, ratio: Tensor) -> Tensor:
        """N: what the neighbours' residuals add to the border (N, C, ...)."""
        shape = ratio.shape
        images = ratio if ratio.ndim == 4 else ratio.reshape(*shape[:2], *([1] * (4 - ratio.ndim)), *shape[2:])
        residual = ((images.round() - images) * RESIDUAL_UNITS).round_()
        result = torch.zeros_like(residual)
        if self._border.window.any():
            height, width = self._window.shape[2:]
            window = self._window.to(memory_format=torch.channels_last)
            sums = torch.conv2d(residual, window, padding=(height // 2, width // 2), groups=len(window))
            result = sums * self._window_scale[:, None, None]
        if self._border.rank:
            inner = torch.conv2d(residual, self._left) * self._left_scale[:, None, None]
            inner = inner.round_().clamp_(-127, 127)
            result = result + torch.conv2d(inner, self._right) * self._right_scale[:, None, None]
        return result.reshape(shape)
