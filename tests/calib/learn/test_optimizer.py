"""Every kind of leaf has its rate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from postquant.calib.activation_levels import quantizer_with_levels
from postquant.calib.learn.block_quantizers import BlockQuantizers, Step
from postquant.calib.learn.levels import LevelsActivation
from postquant.calib.learn.optimizer import make_optimizer
from postquant.calib.learn.quantizers import ActivationQuantizer
from postquant.calib.learn.recipe import Recipe
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

CPU = torch.device("cpu")
SPEC = QuantSpec(2, signed=False, symmetric=False)
LEVELS = np.array([0.0, 0.2, 0.5, 1.0])


def test_levels_of_single_channels_move_less() -> None:
    """How far one step of Adam moves a leaf is its rate, whatever the gradient."""
    steps: dict[str, Step] = {
        "even": ActivationQuantizer(TensorQuantizer.from_range(SPEC, 0.0, 1.0), CPU),
        "all": LevelsActivation(quantizer_with_levels(SPEC, LEVELS), CPU),
        "channels": LevelsActivation(quantizer_with_levels(SPEC, np.outer([1.0, 0.3], LEVELS), -3), CPU),
    }
    quantizers = cast(BlockQuantizers, SimpleNamespace(weights={}, biases={}, steps=steps))
    optimizer, schedule = make_optimizer(quantizers, Recipe(iterations=10, step_rate=1e-2), {})
    schedule(0)
    for step in steps.values():
        step.scale.factor.grad = torch.ones_like(step.scale.factor)
    optimizer.step()
    moved = {name: float((1 - step.scale.factor.detach()).abs().max()) for name, step in steps.items()}
    assert moved["even"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["all"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["channels"] == pytest.approx(1e-3, rel=1e-3)
