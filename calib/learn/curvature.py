"""How much a block's loss bends along every latent weight: :func:`measure_stiffness`.

With the loss ``|f - y|^2 / (N V)`` over N elements, V the variance of the target, the second derivative along a latent
weight u is, without second derivatives of f (Gauss-Newton),

    h = 2 / (N V) * sum_o (df_o / du)^2

which random signs v estimate without a gradient per output: ``E (sum_o v_o df_o / du)^2 = sum_o (df_o / du)^2``
(Hutchinson 1990).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from postquant.calib.learn.parallel_steps import ParallelSteps
from postquant.calib.learn.weights import WeightQuantizer

Tensor = torch.Tensor

# One probe scatters by a factor of two and more; the mean of so many by a third.
_PROBES = 16


def measure_stiffness(
    weights: Mapping[str, WeightQuantizer],
    output: Callable[[Sequence[int], Mapping[str, Tensor]], Tensor],
    parts: Callable[[], Sequence[Sequence[int]]],
    variance: float,
    generator: torch.Generator,
    steps: ParallelSteps,
    *,
    at_once: int | None = None,
) -> None:
    """Sets ``stiffness`` of every weight.

    The parts of a batch have signs of their own, so that the sum of their squares has the same mean and scatters less.
    A simulated weight w follows from its own latent weight alone: derivatives are those along w times dw / du.

    Args:
        weights: Name -> what is learned of a weight.
        output: Gives the block's output for some samples and simulated weights by name, any shape, differentiable;
            called in any thread.
        parts: Gives the samples of another batch, cut into parts.
        variance: Of the target, > 0.
        generator: Draws the signs; on the CPU.
        steps: Threads for the parts.
        at_once: How many parts may be in work at the same time; None for all threads.
    """
    if not weights:
        return
    simulated = {name: weight.simulate(hard=False) for name, weight in weights.items()}
    slopes = torch.autograd.grad(
        list(simulated.values()),
        [weight.variable for weight in weights.values()],
        [torch.ones_like(tensor) for tensor in simulated.values()],
    )
    copies = {name: tensor.detach().requires_grad_() for name, tensor in simulated.items()}
    totals = [torch.zeros_like(tensor) for tensor in slopes]
    del simulated

    def squares(item: tuple[Sequence[int], int]) -> tuple[list[Tensor], int]:
        part, seed = item
        with torch.enable_grad():
            result = output(part, copies)
        own = torch.Generator().manual_seed(seed)
        signs = (torch.randint(0, 2, result.shape, generator=own) * 2 - 1).to(result)
        gradients = torch.autograd.grad(result, list(copies.values()), signs, materialize_grads=True)
        return [gradient.square() for gradient in gradients], result.numel()

    def probe() -> None:
        batch, sums, count = parts(), [torch.zeros_like(total) for total in totals], 0

        def add(found: tuple[list[Tensor], int]) -> None:
            nonlocal count
            for sum_, square in zip(sums, found[0], strict=True):
                sum_ += square
            count += found[1]

        seeds = torch.randint(0, 1 << 62, (len(batch),), generator=generator).tolist()
        steps.each(squares, list(zip(batch, seeds, strict=True)), add, at_once=at_once)
        for total, sum_ in zip(totals, sums, strict=True):
            total += sum_ * (2 / (count * variance * _PROBES))

    for _ in range(_PROBES):
        probe()
    for weight, total, slope in zip(weights.values(), totals, slopes, strict=True):
        weight.stiffness = total * slope.square()
