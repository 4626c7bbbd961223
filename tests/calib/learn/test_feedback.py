"""Torch shifts codes by what the law shifts them by, and lets gradients pass as without."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from postquant.calib.activation_levels import quantizer_with_levels
from postquant.calib.feedback import feedback_of
from postquant.calib.learn.levels import LevelsActivation
from postquant.calib.learn.quantizers import DropMasks
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

CPU = torch.device("cpu")
SPEC = QuantSpec(3, signed=False, symmetric=False)


def _fed(channels: int, axis: int) -> TensorQuantizer:
    rng = np.random.default_rng(0)
    levels = np.linspace(0, 4, 8)[None] ** 1.3 * rng.uniform(0.4, 1.0, (channels, 1))
    weight = rng.standard_normal((max(channels // 4, 1), channels))
    quantizer = quantizer_with_levels(SPEC, levels, axis)
    feedback = feedback_of(weight.T @ weight, np.full(channels, 0.05), float(quantizer.scale))
    return dataclasses.replace(quantizer, feedback=feedback)


@pytest.mark.parametrize(("shape", "axis"), [((2, 20, 5, 6), -3), ((3, 7, 13), -1), ((4, 9), -1)])
def test_values_get_the_levels_of_the_law(shape: tuple[int, ...], axis: int) -> None:
    quantizer = _fed(shape[axis], axis)
    plain = dataclasses.replace(quantizer, feedback=None)
    # On the grid of the codes, so that nothing lies beside a middle.
    codes = np.random.default_rng(1).integers(0, 256, shape)
    x = quantizer.dequantize(codes.astype(np.uint8))
    got = LevelsActivation(quantizer, CPU).simulate(torch.from_numpy(x), None).detach().numpy()
    expected = quantizer.simulate(x)
    assert (expected != plain.simulate(x)).mean() > 0.05
    # A cell is as wide as a code: a code in the middle may go to its other side.
    assert (~np.isclose(got, expected, atol=1e-5)).mean() < 0.02


def test_memory_order_changes_nothing() -> None:
    step = LevelsActivation(_fed(20, -3), CPU)
    x = torch.rand(2, 20, 5, 6, generator=torch.Generator().manual_seed(0)) * 4
    torch.testing.assert_close(
        step.simulate(x.contiguous(memory_format=torch.channels_last), None), step.simulate(x, None)
    )


def test_gradients_pass_as_at_the_shifted_values() -> None:
    step = LevelsActivation(_fed(12, -2), CPU)
    x = (torch.rand(12, 40, generator=torch.Generator().manual_seed(0)) * 2).requires_grad_()
    torch.autograd.backward(step.simulate(x, None).sum())
    assert x.grad is not None
    inside = (x > 0.05) & (x < 1.0)
    assert (x.grad[inside] == 1).float().mean() > 0.95
    assert step.scale.factor.grad is not None
    assert step.scale.factor.grad.abs().sum() > 0


def test_what_masks_leave_out_stays_as_it_is_and_makes_no_error() -> None:
    quantizer = _fed(16, -2)
    step = LevelsActivation(quantizer, CPU)
    x = torch.rand(16, 30, generator=torch.Generator().manual_seed(0)) * 4
    masks, same = (DropMasks(torch.Generator().manual_seed(1), CPU, 0.5) for _ in range(2))
    mask = same.like(x)
    got = step.simulate(x, masks)
    assert torch.equal(got[mask == 0], x[mask == 0])
    # All channels but the last group left out: it is rounded to nearest.
    assert quantizer.feedback is not None
    last = torch.as_tensor(quantizer.feedback.group == quantizer.feedback.group.max())

    class Last:
        def like(self, x: torch.Tensor) -> torch.Tensor:
            return last[:, None].expand_as(x).float()

    alone = step.simulate(x, Last())  # type: ignore[arg-type]
    plain = LevelsActivation(dataclasses.replace(quantizer, feedback=None), CPU).simulate(x, None)
    assert torch.equal(alone[last], plain[last])
    assert torch.equal(alone[~last], x[~last])


def test_what_was_learned_keeps_the_feedback() -> None:
    quantizer = _fed(16, -2)
    assert LevelsActivation(quantizer, CPU).learned().feedback is quantizer.feedback
