"""What readers see of a value: the narrowest range, everything where somebody reads a float; errors by their law."""

import dataclasses
import math

import hypothesis
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from hypothesis import strategies as st

from postquant.calib.learn.adaptive import neutral_module
from postquant.calib.learn.visible import Visible, visible_part
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.law_adaptive import Feature
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

SAFE = st.floats(-8, 8, width=32)
# The sum is stored in 8 bits; one convolution reads it through 4 bits, the next sum as it is stored.
NETWORK = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[1, 2, 4, 4] x, float[1, 2, 4, 4] z) => (float[1, 2, 4, 4] y, float[1, 2, 4, 4] t)
    <float[2, 2, 1, 1] w> {
      [sum] a = Add (x, z)
      [conv] c = Conv (a, w)
      [next] y = Add (a, c)
      [relu] r = Relu (z)
      [tanh] t = Tanh (r)
    }
"""


def _quantizer(bits: int, low: float, high: float) -> TensorQuantizer:
    return TensorQuantizer.from_range(QuantSpec(bits, signed=False, symmetric=False), low, high)


NARROW = _quantizer(4, -1.0, 2.0)
PLAN = QuantPlan(
    "onnxruntime",
    activations={"a": _quantizer(8, -6.0, 9.0), "c": _quantizer(8, -1.0, 1.0), "y": _quantizer(8, -5.0, 5.0)},
    requants={"conv:0": NARROW},
)


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(NETWORK))


def test_the_narrowest_range_counts(model: ir.Model) -> None:
    found = visible_part(model, PLAN, "a")
    low, high = NARROW.range()
    assert (found.low, found.high) == (float(low), float(high))
    lopsided = dataclasses.replace(PLAN, requants={"conv:0": _quantizer(4, -1.0, 40.0)})
    found = visible_part(model, lopsided, "a")
    assert -2.0 < found.low <= 0.0
    assert found.high == pytest.approx(9.0, abs=0.1)


def test_a_step_that_adapts_shows_what_its_widest_one_shows(model: ir.Model) -> None:
    quantizer = _quantizer(4, 0.0, 2.0)
    adaptive = dataclasses.replace(quantizer, adaptive=neutral_module(2, Feature.MAXIMUM))
    found = [
        visible_part(model, dataclasses.replace(PLAN, requants={"conv:0": reader}), "a").high
        for reader in (quantizer, adaptive)
    ]
    assert found == pytest.approx([2.0, 4.0])


@pytest.mark.parametrize("name", ["y", "t"])
def test_everything_of_an_output_is_seen(model: ir.Model, name: str) -> None:
    assert visible_part(model, PLAN, name) == Visible()


def test_everything_is_seen_where_somebody_reads_a_float(model: ir.Model) -> None:
    assert visible_part(model, PLAN, "r") == Visible()
    one_reader = dataclasses.replace(PLAN, activations={})  # the next sum reads the float
    assert visible_part(model, one_reader, "a") == Visible()


@hypothesis.given(
    st.lists(st.tuples(SAFE, SAFE), min_size=1, max_size=8), st.floats(-4, -1, width=32), st.floats(1, 4, width=32)
)
def test_errors_by_their_law(pairs: list[tuple[float, float]], low: float, high: float) -> None:
    got, wanted = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float32) for i in (0, 1))
    found = Visible(low, high).error(got, wanted)
    for error, y, target in zip(found.tolist(), got.tolist(), wanted.tolist(), strict=True):
        if target >= high:
            expected = min(y - high, 0.0)
        elif target <= low:
            expected = max(y - low, 0.0)
        else:
            expected = y - target
        assert error == pytest.approx(expected, abs=1e-5)
    assert Visible().error(got, wanted).tolist() == (got - wanted).tolist()
    assert Visible(low, high).squares(got, wanted).item() == pytest.approx((found.double() ** 2).sum().item(), rel=1e-5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.5), (-math.inf, 1.0), (-0.5, math.inf), (-math.inf, math.inf)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_the_three_cases(low: float, high: float, order: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    # More than a piece, and in orders that differ.
    wanted = torch.randn(3, 8, 64, 64, generator=generator)
    got = (wanted + torch.randn(3, 8, 64, 64, generator=generator)).contiguous(memory_format=order).requires_grad_()
    weights = torch.randn(3, 8, 64, 64, generator=generator)
    error = got - wanted.clamp(low, high)
    error = torch.where(wanted >= high, error.clamp(max=0), error)
    error = torch.where(wanted <= low, error.clamp(min=0), error)
    found = Visible(low, high).error(got, wanted)
    assert torch.equal(found, error)
    for mine, law in (
        ((found * weights).sum(), (error * weights).sum()),
        (Visible(low, high).squares(got, wanted), error.square().sum()),
    ):
        assert mine.item() == pytest.approx(law.item(), rel=1e-4)
        torch.testing.assert_close(*(torch.autograd.grad(v, got, retain_graph=True)[0] for v in (mine, law)))


def test_what_nobody_sees_has_no_gradient() -> None:
    got = torch.tensor([5.0, 1.0, 5.0, -7.0], requires_grad=True)
    loss = Visible(-1.0, 2.0).error(got, torch.tensor([3.0, 3.0, 1.0, -2.0])).square().sum()
    (gradient,) = torch.autograd.grad(loss, got)
    assert gradient.tolist() == [0.0, -2.0, 8.0, 0.0]
    assert Visible(-1.0, 2.0).clip(got).tolist() == [2.0, 1.0, 2.0, -1.0]
    assert Visible(-math.inf, math.inf).clip(got) is got
