"""Learned code books compute what the law computes, and have the gradients that they say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from postquant.calib.activation_levels import quantizer_with_levels
from postquant.calib.feedback import feedback_of
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
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("least", [0.0, -1.0])
def test_channels_that_feed_errors_back_get_the_levels_of_the_law(least: float) -> None:
    """Of which single values that go elsewhere cost the most: the others make up for errors that nobody makes."""
    channels = 24
    ends = [0.0] if least == 0 else [least, 0.0]
    levels = np.cumsum(RNG.uniform(0.05, 0.5, (channels, 8 - len(ends))), axis=1) * RNG.uniform(0.3, 1.0, (channels, 1))
    levels = np.concatenate((np.tile(ends, (channels, 1)), levels), axis=1)
    weight = RNG.standard_normal((6, channels))
    feedback = feedback_of(weight.T @ weight, np.full(channels, 0.01), 0.02)
    quantizer = dataclasses.replace(quantizer_with_levels(SPEC, levels, -3), feedback=feedback)
    codes = RNG.integers(0, 256, (2, channels, 9, 7))
    x = ((codes - int(quantizer.zero_point)) * quantizer.scale).astype(np.float32)
    expected = quantizer.simulate(x)
    got = LevelsActivation(quantizer, CPU).simulate(torch.from_numpy(x), None).detach().numpy()
    assert (expected != dataclasses.replace(quantizer, feedback=None).simulate(x)).mean() > 0.05
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_equal_gaps_have_the_gradients_of_a_step() -> None:
    """Against the simulation of evenly spaced codes: values on no threshold, and on codes of 8 bits, 17 of a gap."""
    place = (RNG.integers(0, 15, 4000) + RNG.choice([3, 5, 12, 14], 4000) / 17).astype(np.float32)
    values = np.concatenate([place * np.float32(0.5), np.array([-2.0, -0.1, 7.8, 30.0], np.float32)]).astype(np.float32)
    grad = torch.from_numpy(RNG.standard_normal(len(values)).astype(np.float32))
    x, y = (torch.from_numpy(values.copy()).requires_grad_() for _ in range(2))
    scale = torch.tensor(0.5, requires_grad=True)
    levels = (torch.arange(16) * 0.5).requires_grad_()
    even, found = fake_quantize(x, scale, 0.0, 15.0, None), level_quantize(y, levels[None], None, None)
    torch.testing.assert_close(found, even)
    for result in (even, found):
        torch.autograd.backward((result * grad).sum())
    assert x.grad is not None
    assert y.grad is not None
    assert scale.grad is not None
    assert levels.grad is not None
    torch.testing.assert_close(y.grad, x.grad)
    np.testing.assert_allclose(float(levels.grad @ torch.arange(16.0)), float(scale.grad), rtol=1e-3, atol=1e-3)


def test_gradients_to_single_levels_are_those_of_the_formula() -> None:
    levels = torch.tensor([0.0, 60.0, 255.0], requires_grad=True)
    x = torch.tensor([-1.0, 18.0, 177.0, 300.0], requires_grad=True)
    torch.autograd.backward((level_quantize(x, levels[None], None, None) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum())
    # -1: the first level. 18: t = 0.3, below. 177: t = 0.6, above. 300: the last level.
    expected = [1 + 2 * (1 - 0.7), 2 * (0 - 0.3) + 3 * (0 - 0.4), 3 * (1 - 0.6) + 4]
    assert levels.grad is not None
    assert x.grad is not None
    np.testing.assert_allclose(levels.grad.numpy(), expected, rtol=1e-5)
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 0.0]


def by_definition(x: torch.Tensor, levels: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The simulation of one channel and both gradients, value by value."""
    left = (x[:, None] >= levels).sum(1).sub(1).clamp(0, len(levels) - 2)
    t = (x - levels[left]) / (levels[left + 1] - levels[left])
    upper = (t >= 0.5).float()
    inside = (t >= 0) & (t <= 1)
    result = torch.where(upper > 0, levels[left + 1], levels[left])
    to_levels = torch.zeros_like(levels)
    share = torch.where(inside, t, upper)
    to_levels.index_add_(0, left, grad * ((1 - upper) - (1 - share) * inside))
    to_levels.index_add_(0, left + 1, grad * (upper - share * inside))
    return result, grad * inside, to_levels


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 3, 5, 400), -3), ((3, 3, 300, 400), -3), ((200, 3), -1), ((4, 50, 3), -1), ((2, 70, 2, 3), -3)],
)
def test_channels_are_each_like_a_tensor(shape: tuple[int, ...], axis: int, *, masked: bool) -> None:
    channels = shape[axis]
    codes = np.stack([np.sort(RNG.choice(np.arange(1, 255), 7, replace=False)) for _ in range(channels)])
    codes[0, 0], codes[1, -1] = 0, 255
    levels = torch.from_numpy((codes - 60).astype(np.float32))
    x = torch.from_numpy(RNG.integers(-80, 220, shape).astype(np.float32))
    grad = torch.from_numpy(RNG.standard_normal(shape).astype(np.float32))
    mask = torch.from_numpy(RNG.integers(0, 2, shape).astype(np.float32)) if masked else None
    ours, our_levels = x.clone().requires_grad_(), levels.clone().requires_grad_()
    result = level_quantize(ours, our_levels, mask, axis)
    torch.autograd.backward(result, grad)
    assert ours.grad is not None
    assert our_levels.grad is not None
    for channel in range(channels):
        kept = torch.ones(()) if mask is None else mask.select(axis, channel).reshape(-1)
        values, upstream = (part.select(axis, channel).reshape(-1) for part in (x, grad))
        expected, to_x, to_levels = by_definition(values, levels[channel], upstream * kept)
        got, got_x = (part.detach().select(axis, channel).reshape(-1) for part in (result, ours.grad))
        torch.testing.assert_close(got, torch.lerp(values, expected, kept))
        torch.testing.assert_close(got_x, to_x + upstream * (1 - kept))
        torch.testing.assert_close(our_levels.grad[channel], to_levels, rtol=1e-4, atol=1e-3)


def test_the_order_in_memory_does_not_matter() -> None:
    levels = torch.tensor([[0.0, 1.0, 4.0], [-1.0, 0.0, 0.5]])
    x = torch.from_numpy(RNG.uniform(-2, 5, (3, 2, 7, 5)).astype(np.float32))
    mask = torch.from_numpy(RNG.integers(0, 2, x.shape).astype(np.float32))
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        ours, our_levels = x.clone(memory_format=layout).requires_grad_(), levels.clone().requires_grad_()
        result = level_quantize(ours, our_levels, mask, -3)
        torch.autograd.backward(result, x)
        found.append((result.detach(), ours.grad, our_levels.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_the_mask_leaves_out_stays_float_and_has_its_whole_gradient() -> None:
    levels = torch.tensor([0.0, 1.0, 4.0], requires_grad=True)
    x = torch.tensor([0.3, 0.3, 9.0, 9.0], requires_grad=True)
    result = level_quantize(x, levels[None], torch.tensor([1.0, 0.0, 1.0, 0.0]), None)
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
        after.dequantize(after.table), step.scale.levels()[0].detach().numpy(), atol=0.6 * float(after.scale)
    )
    np.testing.assert_allclose(float(step.scale.value().detach()), float(after.scale), rtol=1e-6)


@pytest.mark.parametrize("channels", [False, True])
def test_nothing_learned_is_what_was_there(*, channels: bool) -> None:
    quantizer = quantizer_with_levels(SPEC, np.outer([0.2, 1.0], LEVELS), -3) if channels else entry()
    learned = LevelsActivation(quantizer, CPU).learned()
    assert learned.spec == quantizer.spec
    np.testing.assert_array_equal(learned.table, quantizer.table)
    assert learned.table_axis == quantizer.table_axis
    np.testing.assert_allclose(learned.scale, quantizer.scale, rtol=1e-6)
