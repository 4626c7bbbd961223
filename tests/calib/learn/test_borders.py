"""Learned borders compute what the NumPy law computes, and have the gradients that they say."""

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch

from postquant.calib.border_terms import BorderTerms, border_of
from postquant.calib.layers import Layer
from postquant.calib.learn.block_borders import neutral_border
from postquant.calib.learn.borders import BorderedActivation, BorderLearning, bordered_quantize
from postquant.calib.learn.recipe import Borders
from postquant.runtime_ops.law_border import border_quantize, sigmoid_border
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((5, 4, 3, 3)).astype(np.float32)


def _layer() -> Layer:
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1, 1, 1, 1])
    info = [onnx.helper.make_tensor_value_info(name, 1, [None] * 4) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:], [onnx.numpy_helper.from_array(WEIGHT, "w")])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]))
    layer = Layer.of(next(iter(model.graph)))
    assert layer is not None
    return layer


def _quantizer(bits: int, low: float) -> TensorQuantizer:
    quantizer = TensorQuantizer.from_range(QuantSpec(bits, signed=False, symmetric=False), low, 2.0)
    return dataclasses.replace(quantizer, border=neutral_border(4))


def _activation(form: Borders, bits: int = 3, low: float = 0.0) -> BorderedActivation:
    return BorderedActivation(
        _quantizer(bits, low), BorderLearning(form, _layer(), lambda: WEIGHT * 0.9, (0.2, 0.05)), CPU
    )


def _input() -> npt.NDArray[np.float32]:
    return RNG.standard_normal((2, 4, 6, 5)).astype(np.float32) * np.float32(1.5)


@pytest.mark.parametrize("form", [Borders.OWN, Borders.NEIGHBOURS])
@pytest.mark.parametrize(("bits", "low"), [(2, 0.0), (3, -0.7), (4, 0.0)])
def test_the_simulation_equals_the_law_of_what_is_learned(form: Borders, bits: int, low: float) -> None:
    activation, x = _activation(form, bits, low), _input()
    activation.advance(0.0)
    activation.simulate(torch.from_numpy(x), None)  # the first run takes the neighbours' coefficients
    with torch.no_grad():
        activation.coefficients += torch.from_numpy(RNG.standard_normal((4, 3)).astype(np.float32))
        activation.scale.factor *= 1.1
        if form is Borders.NEIGHBOURS:
            activation.gain *= torch.tensor([0.5, 1.0, 2.0, 0.0])
    learned = activation.learned()
    border = learned.border
    assert border is not None
    spec = learned.spec
    # The law's own formula of a border per value, and the closed form of the neighbours.
    table = sigmoid_border(activation.coefficients.detach().numpy(), spec.qmin, spec.qmax)
    np.testing.assert_allclose(border.border, table, rtol=1e-6)
    if form is Borders.NEIGHBOURS:
        ratio = x / float(_quantizer(bits, low).scale)
        point = int(learned.zero_point)
        inside = (ratio > spec.qmin - point) & (ratio < spec.qmax - point) & (ratio != 0)
        expected = border_of(_layer(), WEIGHT * 0.9, BorderTerms(density=float(inside.mean())))
        assert expected is not None
        np.testing.assert_array_equal(border.window, expected.border.window)
        gains = np.array([0.5, 1.0, 2.0, 0.0])
        np.testing.assert_allclose(border.window_scale, expected.border.window_scale * gains, rtol=1e-5)
    codes = border_quantize(x, border.law(learned.scale, learned.zero_point, spec.qmin, spec.qmax))
    got = activation.simulate(torch.from_numpy(x), None).detach().numpy()
    same = np.isclose(got, learned.dequantize(codes), rtol=1e-6, atol=1e-6)
    assert same.mean() > 0.99  # a value next to its border may fall on the other side
    assert np.abs(codes.astype(int) - (learned.quantize(x)).astype(int)).max() == 0


def test_thresholds_grow_whatever_is_learned() -> None:
    activation = _activation(Borders.OWN, bits=4)
    with torch.no_grad():
        activation.coefficients += torch.from_numpy(RNG.standard_normal((4, 3)).astype(np.float32) * 20)
    border = activation.learned().border
    assert border is not None
    assert (np.diff(np.arange(16) + border.border, axis=1) >= 0).all()


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_gradients_are_those_of_the_formula(temperature: float | None) -> None:
    x = torch.from_numpy(RNG.uniform(-1, 5, (50, 2)).astype(np.float32)).requires_grad_()
    scale = torch.tensor(0.7, requires_grad=True)
    table = torch.from_numpy(RNG.uniform(0.2, 0.8, (2, 6)).astype(np.float32)).requires_grad_()
    shift = torch.from_numpy(RNG.uniform(-0.2, 0.2, (50, 2)).astype(np.float32)).requires_grad_()
    upstream = RNG.standard_normal((50, 2)).astype(np.float32)
    result = bordered_quantize(x, scale, table, shift, 0.0, 5.0, temperature)
    torch.autograd.backward((result * torch.from_numpy(upstream)).sum())
    ratio = x.detach().numpy() / np.float32(0.7)
    clipped = np.clip(ratio, 0, 5)
    below = np.floor(clipped)
    border = table.detach().numpy()[np.arange(2), below.astype(int)] + shift.detach().numpy()
    codes = below + (clipped - below > border)
    np.testing.assert_allclose(result.detach().numpy(), codes * np.float32(0.7), rtol=1e-6)
    inside = (ratio > 0) & (ratio < 5)
    h = 1 / (1 + np.exp(-(clipped - below - border) / (temperature or 1)))
    soft = np.ones_like(h) if temperature is None else h * (1 - h) / temperature
    to_border = -upstream * inside * 0.7 * soft
    to_table = np.zeros((2, 6))
    np.add.at(to_table, (np.broadcast_to(np.arange(2), below.shape), below.astype(int)), to_border)
    for leaf, expected in (
        (x, upstream * inside),
        (scale, np.sum(upstream * (codes - ratio * inside))),
        (table, to_table),
        (shift, to_border),
    ):
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_soft_gradient_has_the_mean_of_the_straight_one() -> None:
    means = []
    for temperature in (None, 0.05):
        x = torch.from_numpy(RNG.uniform(0, 3, (20000, 1)).astype(np.float32))
        table = torch.full((1, 4), 0.5, requires_grad=True)
        one = torch.tensor(1.0)
        torch.autograd.backward(bordered_quantize(x, one, table, None, 0.0, 3.0, temperature).sum())
        assert table.grad is not None
        means.append(float(table.grad.sum()))
    assert abs(means[1] / means[0] - 1) < 0.05


def test_coefficients_follow_the_weights_while_they_are_learned() -> None:
    now = {"weight": WEIGHT}
    learning = BorderLearning(Borders.NEIGHBOURS, _layer(), lambda: now["weight"], None)
    activation, x = BorderedActivation(_quantizer(3, 0.0), learning, CPU), torch.from_numpy(_input())

    def window(share: float) -> npt.NDArray[np.int8]:
        activation.advance(share)
        activation.simulate(x, None)
        border = activation.learned().border
        assert border is not None
        return border.window

    first = window(0.0)
    now["weight"] = WEIGHT[:, ::-1].copy()
    assert np.array_equal(window(0.01), first)  # not in every step
    assert not np.array_equal(window(0.2), first)


def test_the_state_that_was_judged_comes_back_with_its_coefficients() -> None:
    now = {"weight": WEIGHT}
    learning = BorderLearning(Borders.NEIGHBOURS, _layer(), lambda: now["weight"], None)
    activation, x = BorderedActivation(_quantizer(3, 0.0), learning, CPU), torch.from_numpy(_input())
    activation.advance(0.0)
    first = activation.simulate(x, None).detach()
    activation.remember()
    now["weight"] = WEIGHT[:, ::-1].copy()
    activation.advance(0.2)
    assert not torch.equal(activation.simulate(x, None), first)
    activation.recall()
    assert torch.equal(activation.simulate(x, None), first)
