"""Learned adaptive steps compute what the NumPy law computes, and have the gradients that they say."""

import dataclasses

import numpy as np
import pytest
import torch

from postquant.calib.learn.adaptive import AdaptiveActivation, neutral_module
from postquant.calib.learn.quantizers import fake_quantize
from postquant.runtime_ops.law_adaptive import Feature, adaptive_quantize
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
ALL = Feature.MEANS | Feature.DEVIATION | Feature.MAXIMUM


def _activation(features: Feature) -> AdaptiveActivation:
    quantizer = TensorQuantizer.from_range(QuantSpec(3, signed=False, symmetric=False), 0.0, 2.0)
    quantizer = dataclasses.replace(quantizer, adaptive=neutral_module(4, features))
    return AdaptiveActivation(quantizer, CPU, learned=True)


def _input(shape: tuple[int, ...]) -> np.ndarray:
    samples = RNG.uniform(0.3, 3, (shape[0], *([1] * (len(shape) - 1))))
    return np.maximum(RNG.standard_normal(shape) * samples, 0).astype(np.float32)


@pytest.mark.parametrize("features", [ALL, Feature.MEANS, Feature.DEVIATION | Feature.MAXIMUM])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 7), (6, 4, 5, 3)])
def test_the_simulation_equals_the_law_of_what_is_learned(features: Feature, shape: tuple[int, ...]) -> None:
    activation, x = _activation(features), _input(shape)
    plain = activation.simulate(torch.from_numpy(x), None).detach().numpy()
    start = TensorQuantizer(activation.learned().spec, activation.learned().scale, np.array(0, np.int32))
    np.testing.assert_allclose(plain, start.simulate(x), rtol=1e-6)  # everything starts as it was
    with torch.no_grad():
        activation.weights += torch.from_numpy(RNG.standard_normal(activation.weights.shape).astype(np.float32)) * 0.2
        activation.scale.factor *= 1.1
    learned = activation.learned()
    assert learned.adaptive is not None
    numbers = learned.adaptive.law(learned.scale, learned.zero_point, 0, 7)
    codes, steps = adaptive_quantize(x, numbers)
    assert len(set((steps / learned.scale).round(3).tolist())) > 2
    assert ((steps / learned.scale >= 0.49) & (steps / learned.scale <= 2.01)).all()
    expected = codes * steps.reshape(-1, *([1] * (x.ndim - 1)))
    got = activation.simulate(torch.from_numpy(x), None).detach().numpy()
    assert np.isclose(got, expected, rtol=1e-4, atol=1e-6).mean() > 0.99  # single values lie next to a tie
    np.testing.assert_allclose(learned.simulate(x), expected, rtol=1e-6)


def test_a_step_per_sample_has_its_own_gradient() -> None:
    x = torch.tensor([[0.3, 0.9, 9.0], [0.4, 1.2, 0.1]])
    steps = torch.tensor([[0.5], [0.25]], requires_grad=True)
    torch.autograd.backward((fake_quantize(x, steps, 0.0, 3.0, None) * torch.tensor([1.0, 2.0, 3.0])).sum())
    ratio = x.numpy() / np.array([[0.5], [0.25]])
    codes = np.clip(np.rint(ratio), 0, 3)
    expected = (np.array([1, 2, 3]) * (codes - ratio * (ratio < 3))).sum(1, keepdims=True)
    assert steps.grad is not None
    np.testing.assert_allclose(steps.grad.numpy(), expected, rtol=1e-5)


def test_learning_finds_the_step_that_follows_the_sample() -> None:
    """Samples that differ by a factor alone: the best step is proportional to any of their statistics."""
    activation = _activation(Feature.DEVIATION)
    rng = np.random.default_rng(1)
    base = np.abs(rng.standard_normal((64, 4, 8, 8)))
    x = torch.from_numpy((base * rng.uniform(0.5, 1.5, (64, 1, 1, 1))).astype(np.float32))
    errors = []
    optimizer = torch.optim.Adam([activation.weights, activation.scale.factor], lr=1e-2)
    for _ in range(60):
        penalties: list[torch.Tensor] = []
        error = (activation.simulate(x, None, penalties) - x).square().mean() / x.var()
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        torch.autograd.backward(error + penalties[0])
        optimizer.step()
    fixed = min(
        float((fake_quantize(x, torch.tensor(step), 0.0, 7.0, None) - x).square().mean() / x.var())
        for step in np.linspace(0.1, 1, 40).tolist()
    )
    assert errors[-1] < 0.9 * fixed
    assert activation.weights.item() > 0.1


def test_a_plan_whose_network_is_not_learned_further_keeps_it() -> None:
    activation, x = _activation(ALL), _input((6, 4, 5, 3))
    activation.simulate(torch.from_numpy(x), None)
    with torch.no_grad():
        activation.weights += 0.1
    learned = activation.learned()
    fixed = AdaptiveActivation(learned, CPU, learned=False)
    assert not fixed.weights.requires_grad
    np.testing.assert_allclose(
        fixed.simulate(torch.from_numpy(x), None).detach().numpy(), learned.simulate(x), rtol=1e-4, atol=1e-5
    )
    again = fixed.learned().adaptive
    assert again is not None
    assert learned.adaptive is not None
    np.testing.assert_allclose(again.w1, learned.adaptive.w1, rtol=1e-6)
    np.testing.assert_allclose(again.b1, learned.adaptive.b1, rtol=1e-6)
