"""Learned code books compute what the law computes, and have the gradients that they say."""

from __future__ import annotations

import numpy as np
import torch

from postquant.calib.activation_levels import quantizer_with_levels
from postquant.calib.learn.levels import LevelsActivation, level_quantize
from postquant.calib.learn.quantizers import fake_quantize
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
SPEC = QuantSpec(3, signed=False, symmetric=False)
LEVELS = np.array([-1.0, -0.3, 0.0, 0.1, 0.25, 0.6, 1.5, 3.0])


def entry() -> TensorQuantizer:
    """A quantizer with these levels."""
    return quantizer_with_levels(SPEC, LEVELS)


def test_values_get_the_levels_of_the_law() -> None:
    quantizer = entry()
    x = RNG.laplace(size=(3, 7, 50)).astype(np.float32)
    got = LevelsActivation(quantizer, CPU).simulate(torch.from_numpy(x), None).detach().numpy()
    expected = quantizer.simulate(x)
    differs = ~np.isclose(got, expected, atol=1e-6)
    # The cells are finer than the codes: only a value beside a middle may go to its other side.
    levels = quantizer.dequantize(quantizer.table) if quantizer.table is not None else np.zeros(1)
    beside = np.abs(x[..., None] - (levels[1:] + levels[:-1]) / 2).min(-1) <= float(quantizer.scale)
    assert not (differs & ~beside).any()
    assert differs.mean() < 0.05


def test_equal_gaps_have_the_gradients_of_a_step() -> None:
    """Against the simulation of evenly spaced codes: values on no threshold, so that the cells do not matter."""
    place = (RNG.integers(0, 15, 4000) + RNG.choice([0.2, 0.3, 0.7, 0.8], 4000)).astype(np.float32)
    values = np.concatenate([place * np.float32(0.5), np.array([-2.0, -0.1, 7.8, 30.0], np.float32)]).astype(np.float32)
    grad = torch.from_numpy(RNG.standard_normal(len(values)).astype(np.float32))
    x, y = (torch.from_numpy(values.copy()).requires_grad_() for _ in range(2))
    scale = torch.tensor(0.5, requires_grad=True)
    levels = (torch.arange(16) * 0.5).requires_grad_()
    even, found = fake_quantize(x, scale, 0.0, 15.0, None), level_quantize(y, levels, None)
    torch.testing.assert_close(found, even)
    for result in (even, found):
        torch.autograd.backward((result * grad).sum())
    assert x.grad is not None
    assert y.grad is not None
    assert scale.grad is not None
    assert levels.grad is not None
    torch.testing.assert_close(y.grad, x.grad)
    # t is that of the cell's middle: 1020 cells over 15 gaps.
    np.testing.assert_allclose(
        float(levels.grad @ torch.arange(16.0)), float(scale.grad), atol=0.02 * len(values) ** 0.5
    )


def test_gradients_to_single_levels_are_those_of_the_formula() -> None:
    levels = torch.tensor([0.0, 1.0, 4.0], requires_grad=True)
    x = torch.tensor([-1.0, 0.3, 3.1, 9.0], requires_grad=True)
    torch.autograd.backward((level_quantize(x, levels, None) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum())
    # -1: the first level. 0.3: t = 0.3 below. 3.1: t = 0.7, above. 9: the last level.
    expected = [1 + 2 * (1 - 0.7), 2 * (0 - 0.3) + 3 * (0 - 0.3), 3 * (1 - 0.7) + 4]
    assert levels.grad is not None
    assert x.grad is not None
    np.testing.assert_allclose(levels.grad.numpy(), expected, atol=0.01)
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 0.0]


def test_what_the_mask_leaves_out_stays_float_and_has_its_whole_gradient() -> None:
    levels = torch.tensor([0.0, 1.0, 4.0], requires_grad=True)
    x = torch.tensor([0.3, 0.3, 9.0, 9.0], requires_grad=True)
    result = level_quantize(x, levels, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    torch.autograd.backward(result.sum())
    assert x.grad is not None
    np.testing.assert_allclose(result.detach().numpy(), [0.0, 0.3, 4.0, 9.0], rtol=1e-6)
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 1.0]


def test_learning_moves_levels_and_keeps_zero() -> None:
    step = LevelsActivation(entry(), CPU)
    x = torch.from_numpy(RNG.laplace(size=4000).astype(np.float32))
    wanted = x.clamp(-2.0, 6.0)
    optimizer = torch.optim.Adam([step.scale.factor], lr=2e-2)

    def loss() -> torch.Tensor:
        return (step.simulate(x, None) - wanted).square().mean()

    before = float(loss().detach())
    for _ in range(150):
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()
    after = step.learned()
    assert float(loss().detach()) < 0.5 * before
    assert after.table is not None
    assert int(after.zero_point) in after.table.tolist()
    np.testing.assert_allclose(
        after.dequantize(after.table), step.levels().detach().numpy(), atol=0.6 * float(after.scale)
    )
    np.testing.assert_allclose(float(step.scale.value().detach()), float(after.scale), rtol=1e-6)


def test_nothing_learned_is_what_was_there() -> None:
    quantizer = entry()
    learned = LevelsActivation(quantizer, CPU).learned()
    assert learned.spec == quantizer.spec
    np.testing.assert_array_equal(learned.table, quantizer.table)
    np.testing.assert_allclose(learned.scale, quantizer.scale, rtol=1e-6)
