"""What moves that which is learned: :func:`make_optimizer`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from postquant.calib.learn.adaptive import AdaptiveActivation
from postquant.calib.learn.block_quantizers import BlockQuantizers, Step
from postquant.calib.learn.borders import BorderedActivation
from postquant.calib.learn.levels import LevelsActivation
from postquant.calib.learn.recipe import Recipe, Rounding

Tensor = torch.Tensor
# The rate of the levels of single channels, in units of that of steps: each of them sees few values in a step.
_CHANNELS = 0.1


def make_optimizer(
    quantizers: BlockQuantizers, recipe: Recipe, sizes: Mapping[str, float]
) -> tuple[torch.optim.Optimizer, Callable[[int], None]]:
    """Adam with a rate per kind of leaf.

    Args:
        quantizers: What is learned.
        recipe: Its rates.
        sizes: Units of the biases' rate, by the name of the bias.

    Returns:
        The optimizer, and what sets the rates of an iteration.
    """
    weights, steps = quantizers.weights.values(), quantizers.steps.values()
    groups = [
        ([w.variable for w in weights], recipe.rounding_rate, recipe.rounding is Rounding.FREE),
        *(([bias.values], recipe.bias_rate * sizes[name], True) for name, bias in quantizers.biases.items()),
        ([w.scale.factor for w in weights], recipe.weight_scale_rate, True),
        ([s.scale.factor for s in steps if not _of_channels(s)], recipe.step_rate, True),
        ([s.scale.factor for s in steps if _of_channels(s)], _CHANNELS * recipe.step_rate, True),
        ([p for s in steps if isinstance(s, BorderedActivation) for p in s.parameters()], recipe.border_rate, True),
        ([s.weights for s in steps if isinstance(s, AdaptiveActivation)], recipe.adaptive_rate, True),
    ]
    learned = [([p for p in params if p.requires_grad], rate, falls) for params, rate, falls in groups]
    used = [(params, rate, falls) for params, rate, falls in learned if params]
    optimizer = torch.optim.Adam([{"params": params, "lr": rate} for params, rate, _ in used])

    def schedule(iteration: int) -> None:
        share = 0.5 * (1 + math.cos(math.pi * iteration / recipe.iterations))
        for group, (_, rate, falls) in zip(optimizer.param_groups, used, strict=True):
            group["lr"] = rate * share if falls else rate

    return optimizer, schedule


def _of_channels(step: Step) -> bool:
    return isinstance(step, LevelsActivation) and step.channels > 1


def learned_leaves(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that an optimizer moves."""
    return [leaf for group in optimizer.param_groups for leaf in group["params"]]
