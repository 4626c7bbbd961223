"""How much a block's loss bends along every latent weight: :func:`measure_stiffness`.

With the loss ``|f - y|^2 / (N V)`` over N elements, V the variance of the target, the second derivative along a latent
weight u is, without second derivatives of f (Gauss-Newton),

    h = 2 / (N V) * sum_o (df_o / du)^2

which random signs v estimate without a gradient per output: ``E (sum_o v_o df_o / du)^2 = sum_o (df_o / du)^2``
(Hutchinson 1990).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from postquant.calib.learn.weights import WeightQuantizer

Tensor = torch.Tensor

# One probe scatters by a factor of two and more; the mean of so many by a third.
_PROBES = 16


def measure_stiffness(
    weights: Iterable[WeightQuantizer],
    output: Callable[[], Tensor],
    variance: float,
    generator: torch.Generator,
) -> None:
    """Sets ``stiffness`` of every weight.

    Args:
        weights: Whose variables the output depends on.
        output: Gives the block's output for another batch, any shape, differentiable.
        variance: Of the target, > 0.
        generator: Draws the signs; on the CPU.
    """
    learned = list(weights)
    totals = [torch.zeros_like(weight.variable) for weight in learned]
    for _ in range(_PROBES if learned else 0):
        result = output()
        signs = (torch.randint(0, 2, result.shape, generator=generator) * 2 - 1).to(result)
        leaves = [weight.variable for weight in learned]
        gradients = torch.autograd.grad((result * signs).sum(), leaves, materialize_grads=True)
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient.square() * (2 / (result.numel() * variance * _PROBES))
    for weight, total in zip(learned, totals, strict=True):
        weight.stiffness = total
