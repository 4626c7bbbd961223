"""What is learned computes what the NumPy law computes, and has the gradients that it says."""

from collections.abc import Callable
from typing import Any

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


class _Ste(torch.autograd.Function):
    """Rounds; gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        del ctx
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        del ctx
        return grads[0]


_round: Callable[[torch.Tensor], torch.Tensor] = _Ste.apply
# 16 channels and 64 x 64 positions are exactly one piece.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "gaps": lambda x: x.repeat(1, 2, 1, 1)[:, ::2],
}


@pytest.mark.parametrize("shape", [(1, 16, 64, 64), (1, 16, 64, 65), (3, 16, 64, 63), (0, 4, 2, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_large_tensors_have_the_plain_formula_and_autograds_gradients(
    shape: tuple[int, ...], layout: str, other: str, *, dropped: bool, per_sample: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = LAYOUTS[layout](torch.randn(shape, generator=generator) * 3).requires_grad_()
    grad = LAYOUTS[other](torch.randn(shape, generator=generator))
    start = 0.3 + 0.1 * torch.arange(shape[0]).view(-1, 1, 1, 1) if per_sample else torch.tensor(0.3)
    scale = start.clone().requires_grad_()
    mask = LAYOUTS[layout](torch.randint(0, 2, shape, generator=generator).float()) if dropped else None
    got = fake_quantize(x, scale, -3.0, 4.0, mask)
    found = torch.autograd.grad(got, (x, scale), grad)

    # In double precision, so that sums have no order; ratios and codes are float32's.
    exact, step = x.detach().double().requires_grad_(), scale.detach().double().requires_grad_()
    ratio = exact / step
    ratio = ratio + ((x / scale).detach().double() - ratio).detach()
    plain = _round(ratio.clamp(-3, 4)) * step
    if mask is not None:
        plain = torch.where(mask > 0, plain, exact)
    wanted = torch.autograd.grad(plain, (exact, step), grad.double())

    simulated = (x / scale).clamp(-3, 4).round() * scale
    assert torch.equal(got, simulated if mask is None else torch.lerp(x, simulated, mask))
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-4, atol=1e-2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            found, torch.autograd.grad(fake_quantize(x, scale, -3.0, 4.0, mask), (x, scale), grad), strict=True
        )
    )


@pytest.mark.parametrize("index", range(4))
def test_latent_weights_take_the_nearest_level_and_the_upper_one_in_the_middle(index: int) -> None:
    quantizer = _quantizers()[index]
    learner = weight_quantizer(Rounding.FREE, np.ones((4, 400), np.float32), quantizer, CPU)
    spec, point = quantizer.spec, int(np.max(quantizer.zero_point))
    grid = (
        np.arange(spec.qmin, spec.qmax + 1) - point
        if quantizer.table is None
        else np.unique(quantizer.table.astype(np.int32))
    )
    unit = np.float32((grid[-1] - grid[0]) / (len(grid) - 1))
    middles = ((grid[1:] + grid[:-1]) / 2 / unit).astype(np.float32)
    special = np.concatenate([middles, -middles, np.array([0, 0.49999997, 1e-30, 1e9], np.float32)])
    special = np.concatenate([special, np.nextafter(special, np.float32(-9e9)), np.nextafter(special, np.float32(9e9))])
    latent = RNG.uniform(middles[0] - 2, middles[-1] + 2, (4, 400)).astype(np.float32)
    latent.reshape(-1)[: special.size * 2] = np.concatenate([special, -special])
    with torch.no_grad():
        learner.variable.copy_(torch.from_numpy(latent))
    bounds = (grid[1:] + grid[:-1]) / 2
    wanted = grid[np.searchsorted(bounds, latent * unit, side="right")]
    np.testing.assert_array_equal(learner.levels().numpy(), wanted)
