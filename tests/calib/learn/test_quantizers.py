"""What is learned computes what the NumPy law computes, and has the gradients that it says."""

import numpy as np
import pytest
import torch

from postquant.calib.learn.quantizers import ActivationQuantizer, DropMasks, LearnedBias, fake_quantize
from postquant.calib.learn.recipe import Rounding
from postquant.calib.learn.weights import weight_quantizer
from postquant.runtime_ops.code_book import CodeBook
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bits", [2, 4, 7])
@pytest.mark.parametrize("low", [0.0, -1.3])
def test_activation_equals_the_law(bits: int, low: float) -> None:
    quantizer = TensorQuantizer.from_range(QuantSpec(bits, signed=False, symmetric=False), low, 2.0)
    x = RNG.standard_normal((3, 4, 5)).astype(np.float32) * 2
    got = ActivationQuantizer(quantizer, CPU).simulate(torch.from_numpy(x), None)
    np.testing.assert_array_equal(got.detach().numpy(), quantizer.simulate(x))


def test_gradients_are_those_of_the_formula() -> None:
    x = torch.tensor([-3.0, -0.6, 0.2, 0.7, 1.1, 9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    grad = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    torch.autograd.backward((fake_quantize(x, scale, -1.0, 2.0, None) * torch.from_numpy(grad)).sum())
    ratio = x.detach().numpy() / 0.5
    inside = (ratio > -1) & (ratio < 2)
    codes = np.clip(np.rint(ratio), -1, 2)
    assert x.grad is not None
    assert scale.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), grad * inside)
    np.testing.assert_allclose(float(scale.grad), np.sum(grad * (codes - ratio * inside)), rtol=1e-6)


def test_what_the_mask_leaves_out_stays_float_and_has_its_whole_gradient() -> None:
    x = torch.tensor([0.3, 0.3, 5.0, 5.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    result = fake_quantize(x, scale, 0.0, 3.0, mask)
    torch.autograd.backward(result.sum())
    assert x.grad is not None
    assert scale.grad is not None
    np.testing.assert_allclose(result.detach().numpy(), [0.5, 0.3, 1.5, 5.0])
    np.testing.assert_allclose(x.grad.numpy(), [1, 1, 0, 1])
    np.testing.assert_allclose(float(scale.grad), (1 - 0.6) + 3, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (1 << 12, 1 << 11)])
def test_masks_have_the_share_and_the_layout(shape: tuple[int, ...]) -> None:
    masks = DropMasks(torch.Generator().manual_seed(1), CPU, 0.25)
    x = torch.zeros(shape).t()
    mask = masks.like(x)
    assert mask.stride() == x.stride()
    assert set(mask.flatten()[:1000].tolist()) <= {0.0, 1.0}
    if x.numel() > 1000:
        assert abs(float(mask.mean()) - 0.25) < 0.01


def _quantizers() -> list[TensorQuantizer]:
    uniform = QuantSpec(3, signed=True, symmetric=True, axis=0, narrow=True)
    post = QuantSpec(4, signed=True, symmetric=True, axis=0, code_book=CodeBook.POST)
    learned = QuantSpec(2, signed=True, symmetric=True, axis=0, code_book=CodeBook.LEARNED)
    left = QuantSpec(4, signed=False, symmetric=True)
    zeros = np.zeros(4, np.int32)
    return [
        TensorQuantizer(uniform, np.array([0.3, 0.4, 0.5, 0.6], np.float32), zeros),
        TensorQuantizer(post, np.array([0.01, 0.02, 0.012, 0.015], np.float32), zeros),
        TensorQuantizer(
            learned,
            np.array([0.01, 0.02, 0.012, 0.015], np.float32),
            zeros,
            table=np.array([-127, -30, 35, 120], np.int8),
        ),
        TensorQuantizer(left, np.array(0.25, np.float32), np.array(8, np.int32)),
    ]


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("chosen", [False, True])
def test_weights_start_at_the_plans_codes_and_end_as_simulated(rounding: Rounding, index: int, *, chosen: bool) -> None:
    quantizer = _quantizers()[index]
    weight = RNG.standard_normal((4, 3, 2)).astype(np.float32)
    if chosen:  # codes that are not the nearest ones
        codes = quantizer.quantize(weight + RNG.standard_normal(weight.shape).astype(np.float32) * np.float32(0.4))
        quantizer = TensorQuantizer(quantizer.spec, quantizer.scale, quantizer.zero_point, codes, quantizer.table)
    learner = weight_quantizer(rounding, weight, quantizer, CPU)
    np.testing.assert_allclose(learner.simulate(hard=True).detach().numpy(), quantizer.simulate(weight), rtol=1e-6)
    with torch.no_grad():
        learner.variable += torch.from_numpy(RNG.standard_normal(weight.shape).astype(np.float32))
        learner.scale.factor *= 1.1
    learned = learner.learned()
    np.testing.assert_allclose(learner.simulate(hard=True).detach().numpy(), learned.simulate(weight), rtol=1e-6)
    np.testing.assert_allclose(learned.scale, quantizer.scale * np.float32(1.1), rtol=1e-6)
    assert learned.codes is not None
    if learned.table is not None:
        assert set(learned.codes.reshape(-1).tolist()) <= set(learned.table.tolist())
    else:
        assert learned.codes.min() >= learned.spec.qmin
        assert learned.codes.max() <= learned.spec.qmax


def test_the_regulariser_is_zero_for_decided_weights_only() -> None:
    quantizer = _quantizers()[0]
    learner = weight_quantizer(Rounding.NEIGHBOURS, np.full((4, 2), 0.1, np.float32), quantizer, CPU)
    assert learner.regulariser(2.0).item() > 0.1
    with torch.no_grad():
        learner.variable.fill_(20.0)
    assert learner.regulariser(2.0).item() == 0.0


def test_bias_is_rounded_to_its_units_with_the_gradient_of_no_rounding() -> None:
    bias = LearnedBias(np.array([0.3, -0.7], np.float32), CPU)
    simulated = bias.simulate(torch.tensor([0.25, 0.5]))
    torch.autograd.backward((simulated * torch.tensor([2.0, 3.0])).sum())
    np.testing.assert_allclose(simulated.detach().numpy(), [0.25, -0.5])
    assert bias.values.grad is not None
    np.testing.assert_allclose(bias.values.grad.numpy(), [2.0, 3.0])


def test_scales_that_must_be_powers_of_two_stay() -> None:
    spec = QuantSpec(4, signed=True, symmetric=True, power_of_two=True)
    quantizer = TensorQuantizer(spec, np.array(0.25, np.float32), np.array(0, np.int32))
    assert not ActivationQuantizer(quantizer, CPU).scale.factor.requires_grad
    weight = weight_quantizer(Rounding.FREE, np.ones((2, 2), np.float32), quantizer, CPU)
    assert not weight.scale.factor.requires_grad
    assert weight.variable.requires_grad
