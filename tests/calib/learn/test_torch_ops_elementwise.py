"""Element-wise operators in torch equal onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

Same = Callable[..., Any]


def normal(*shape: int, seed: int = 0) -> Any:
    return (2 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def positive(*shape: int, seed: int = 0) -> Any:
    return np.abs(normal(*shape, seed=seed)) + np.float32(0.1)


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "PRelu"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4), (1,), (3, 1)])
def test_two_operands(same_as_onnxruntime: Same, op_type: str, shape: tuple[int, ...]) -> None:
    same_as_onnxruntime(op_type, [normal(2, 3, 4), normal(*shape, seed=1)])


@pytest.mark.parametrize("op_type", ["Max", "Min", "Sum", "Mean"])
def test_three_operands(same_as_onnxruntime: Same, op_type: str) -> None:
    same_as_onnxruntime(op_type, [normal(2, 3), normal(3, seed=1), normal(2, 1, seed=2)])


def test_division_of_whole_numbers_goes_towards_zero(same_as_onnxruntime: Same) -> None:
    found = same_as_onnxruntime("Div", [np.array([7, -7, 9], np.int64), np.array([2, 2, -4], np.int64)])
    assert found["y0"].tolist() == [3, -3, -2]


@pytest.mark.parametrize("exponent", [2.0, 0.5, -1.0, 3.0])
def test_power(same_as_onnxruntime: Same, exponent: float) -> None:
    same_as_onnxruntime("Pow", [positive(2, 5), np.array(exponent, np.float32)])


def test_power_keeps_the_type_of_the_base(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("Pow", [positive(2, 5), np.array(2, np.int64)])


@pytest.mark.parametrize("fmod", [0, 1])
def test_modulo(same_as_onnxruntime: Same, fmod: int) -> None:
    same_as_onnxruntime("Mod", [np.array([7, -7, 5, -5], np.int64), np.array([3, 3, -3, -3], np.int64)], fmod=fmod)


@pytest.mark.parametrize("op_type", ["Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"])
def test_comparisons(same_as_onnxruntime: Same, op_type: str) -> None:
    same_as_onnxruntime(op_type, [np.round(normal(4, 5)), np.round(normal(5, seed=1))])


@pytest.mark.parametrize("op_type", ["And", "Or", "Xor"])
def test_logic(same_as_onnxruntime: Same, op_type: str) -> None:
    same_as_onnxruntime(op_type, [normal(4, 5) > 0, normal(5, seed=1) > 0])


def test_where_and_not(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("Where", [normal(4, 1) > 0, normal(4, 5), normal(5, seed=1)])
    same_as_onnxruntime("Not", [normal(4, 1) > 0])


@pytest.mark.parametrize(
    "op_type",
    [
        *("Relu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf", "Softplus", "Softsign", "Exp", "Abs", "Neg"),
        *("Sign", "Floor", "Ceil", "Round", "Reciprocal", "Sin", "Cos", "Atan", "Identity", "LeakyRelu", "Elu"),
        *("Selu", "Celu", "ThresholdedRelu", "Mish"),
    ],
)
def test_one_operand(same_as_onnxruntime: Same, op_type: str) -> None:
    same_as_onnxruntime(
        op_type, [np.concatenate([normal(99), np.array([0.5, -1.5, 30.0, -30.0], np.float32)])], opset=18
    )


@pytest.mark.parametrize("op_type", ["Log", "Sqrt"])
def test_of_positive_numbers(same_as_onnxruntime: Same, op_type: str) -> None:
    same_as_onnxruntime(op_type, [positive(50)])


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("LeakyRelu", {"alpha": 0.3}),
        ("Elu", {"alpha": 0.5}),
        ("Celu", {"alpha": 0.5}),
        ("Selu", {"alpha": 2.0, "gamma": 1.5}),
        ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
        ("ThresholdedRelu", {"alpha": 0.5}),
    ],
)
def test_attributes_of_activations(same_as_onnxruntime: Same, op_type: str, attributes: dict[str, Any]) -> None:
    same_as_onnxruntime(op_type, [normal(60)], **attributes)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(same_as_onnxruntime: Same, approximate: str) -> None:
    same_as_onnxruntime("Gelu", [normal(60)], opset=20, approximate=approximate)


@pytest.mark.parametrize("attributes", [{}, {"min": -1.0}, {"max": 0.5}, {"min": 0.0, "max": 1.0}])
def test_clip_with_attributes(same_as_onnxruntime: Same, attributes: dict[str, float]) -> None:
    same_as_onnxruntime("Clip", [normal(60)], opset=6, **attributes)


@pytest.mark.parametrize(("low", "high"), [(None, None), (-1.0, None), (None, 0.5), (0.0, 6.0), (1.0, -1.0)])
def test_clip_with_inputs(same_as_onnxruntime: Same, low: float | None, high: float | None) -> None:
    bounds = [None if bound is None else np.array(bound, np.float32) for bound in (low, high)]
    same_as_onnxruntime("Clip", [normal(60), *bounds], fed=1)
    whole = [None if bound is None else np.array(bound, np.int32) for bound in (low, high)]
    same_as_onnxruntime("Clip", [np.arange(-9, 9, dtype=np.int32), *whole], fed=1)


def test_the_gradient_of_clip_is_that_of_clamp(op_node: Callable[..., ir.Node]) -> None:
    import torch

    from postquant.calib.learn.executor import run_nodes

    values = torch.from_numpy(normal(200)).requires_grad_()
    node = op_node("Clip", [normal(200)], opset=6, min=-1.0, max=0.5)
    weights = torch.from_numpy(normal(200, seed=1))
    results = {"x0": values}
    run_nodes([node], results)
    found, expected = (
        torch.autograd.grad((result * weights).sum(), values)[0] for result in (results["y0"], values.clamp(-1, 0.5))
    )
    assert torch.equal(found, expected)
    assert 0 < (found == 0).float().mean() < 1


@pytest.mark.parametrize("to", [onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.FLOAT])
def test_cast(same_as_onnxruntime: Same, to: int) -> None:
    same_as_onnxruntime("Cast", [normal(60)], to=to)
    same_as_onnxruntime("Cast", [normal(60) > 0], to=to)


def test_dropout_passes_its_input_on(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("Dropout", [normal(60)])
