"""The adaptive step: what it computes, in whatever order; and its function bodies elsewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.law import quantize
from postquant.runtime_ops.law_adaptive import AdaptiveStep, Feature, adaptive_quantize, adaptive_requantize

SHAPES = [(3, 5, 7, 6), (2, 4), (2, 3, 11), (1, 6, 1, 1)]
FEATURES = [Feature(f) for f in (1, 2, 4, 3, 6, 7)]


def network(
    rng: np.random.Generator, features: Feature, channels: int, hidden: int = 4, qmax: int = 100
) -> AdaptiveStep:
    count = channels * bool(features & 1) + bool(features & 2) + bool(features & 4)

    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return (rng.normal(size=shape) / math.sqrt(count)).astype(np.float32)

    return AdaptiveStep(
        np.asarray(0.1, np.float32),
        np.asarray(3, np.uint8),
        normal(hidden, count),
        normal(hidden),
        normal(1, hidden),
        np.array([1], np.float32),
        features,
        0.5,
        2.0,
        2,
        qmax,
    )


def constants(settings: AdaptiveStep, *, x_scale: Any = None, x_zero_point: Any = None) -> dict[str, npt.NDArray[Any]]:
    own = {} if x_scale is None else {"x_scale": np.asarray(x_scale), "x_zero_point": np.asarray(x_zero_point)}
    return own | {name: getattr(settings, name) for name in ("step", "zero_point", "w1", "b1", "w2", "b2")}


def attributes(settings: AdaptiveStep) -> dict[str, Any]:
    names = ("beta_min", "beta_max", "qmin", "qmax")
    return {"features": int(settings.features)} | {name: getattr(settings, name) for name in names}


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_steps_and_codes_are_what_the_formula_says(features: Feature) -> None:
    rng = np.random.default_rng(int(features))
    x = rng.normal(0.3, 1.0, (4, 3, 5, 2)).astype(np.float32)
    settings = network(rng, features, 3)
    codes, steps = adaptive_quantize(x, settings)
    for sample, observed, step in zip(x, codes, steps, strict=True):
        # Correctly rounded sums, one sample at a time.
        values = [float(v) for v in sample.ravel()]
        pooled = [math.fsum(float(v) for v in channel.ravel()) / 10 for channel in sample] if features & 1 else []
        if features & 2:
            mean = math.fsum(values) / 30
            pooled.append(math.sqrt(math.fsum(v * v for v in values) / 30 - mean * mean))
        if features & 4:
            pooled.append(max(abs(v) for v in values))
        hidden = np.maximum(settings.w1.astype(float) @ pooled + settings.b1, 0)
        beta = np.float32(np.clip(float(settings.w2[0].astype(float) @ hidden + settings.b2[0]), 0.5, 2.0))
        assert step == np.float32(0.1) * beta
        expected = np.clip(quantize(sample, step, settings.zero_point, qmin=0, qmax=255), 2, 100)
        np.testing.assert_array_equal(observed, expected)


def test_steps_differ_between_samples_and_stay_in_range() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 3, 8)) * np.exp(rng.normal(size=(64, 1, 1)))).astype(np.float32)
    one, none = np.array([[1]], np.float32), np.array([0], np.float32)
    settings = AdaptiveStep(
        np.asarray(0.1, np.float32),
        np.asarray(128, np.uint8),
        one,
        none,
        one,
        none,
        Feature.DEVIATION,
        0.5,
        2.0,
        0,
        255,
    )
    _, steps = adaptive_quantize(x, settings)
    assert steps.min() == np.float32(0.05)
    assert steps.max() == np.float32(0.2)
    assert len(np.unique(steps)) > 20


def test_requantizing_equals_quantizing_the_values() -> None:
    rng = np.random.default_rng(5)
    x = rng.integers(0, 256, (3, 4, 6, 6)).astype(np.uint8)
    scale, zero = np.asarray(2.0**-5, np.float32), np.asarray(100, np.uint8)
    settings = network(rng, Feature(7), 4)
    codes, steps = adaptive_requantize(x, scale, zero, settings)
    real = ((x.astype(np.int32) - 100) * scale).astype(np.float32)
    for observed, expected in zip((codes, steps), adaptive_quantize(real, settings), strict=True):
        np.testing.assert_array_equal(observed, expected)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_bodies_on_onnxruntime_and_in_the_evaluator(operators: Any, features: Feature, opset: int) -> None:
    rng = np.random.default_rng(int(features))
    for shape in SHAPES:
        settings = network(rng, features, shape[1])
        real = rng.normal(size=shape).astype(np.float32)
        codes = rng.integers(0, 256, shape).astype(np.uint8)
        scale, zero = np.asarray(0.013, np.float32), np.asarray(101, np.uint8)
        for name, x, law, own in (
            ("AdaptiveQuantize", real, adaptive_quantize(real, settings), {}),
            (
                "AdaptiveRequantize",
                codes,
                adaptive_requantize(codes, scale, zero, settings),
                {"x_scale": scale, "x_zero_point": zero},
            ),
        ):
            model = operators.model(name, x, constants(settings, **own), attributes(settings), opset=opset)
            observed, kernels = operators.on_onnxruntime(model, x)
            assert "If" not in kernels
            results = [observed, operators.on_onnxruntime(model, x, optimize=False)[0]]
            if opset >= 19:
                results += [operators.on_evaluator(model, x), operators.on_evaluator(model, x, reference=True)]
            for got_codes, got_steps in results:
                assert (got_codes.dtype, got_steps.dtype) == (np.uint8, np.float32)
                np.testing.assert_array_equal(got_steps, law[1])
                np.testing.assert_array_equal(got_codes, law[0])


def test_the_body_reads_only_the_chosen_statistics(operators: Any) -> None:
    x = np.ones((1, 3, 4, 4), np.float32)
    settings = network(np.random.default_rng(0), Feature.MEANS, 3)
    model = operators.model("AdaptiveQuantize", x, constants(settings), attributes(settings))
    assert not operators.on_onnxruntime(model, x)[1] & {"Sqrt", "Abs", "ReduceMax"}


def test_codes_and_step_feed_an_integer_convolution(operators: Any) -> None:
    """The consumer of one sample: DequantizeLinear with the computed step as its only scale still fuses."""
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 3, 8, 8)).astype(np.float32)
    settings = network(rng, Feature(3), 3)
    model = operators.model("AdaptiveQuantize", x, constants(settings), attributes(settings))
    graph = model.graph
    more = {
        "none": np.zeros(0, np.int64),
        "w": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
        "w_scale": np.full(4, 0.01, np.float32),
        "w_zero": np.zeros(4, np.int8),
        "y_scale": np.float32(0.2),
        "y_zero": np.uint8(128),
    }
    graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in more.items())
    graph.node.extend(
        [
            helper.make_node("Reshape", ["step_out", "none"], ["scale"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["x_real"]),
            helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_real"], axis=0),
            helper.make_node("Conv", ["x_real", "w_real"], ["y_real"]),
            helper.make_node("QuantizeLinear", ["y_real", "y_scale", "y_zero"], ["y"]),
        ]
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("y", 2, ["N", 4, 6, 6]))
    assert "QLinearConv" in operators.on_onnxruntime(model, x)[1]


GOOD: dict[str, Any] = {
    "step": np.asarray(0.1, np.float32),
    "zero_point": np.asarray(0, np.uint8),
    "w1": np.ones((1, 2), np.float32),
    "b1": np.zeros(1, np.float32),
    "w2": np.ones((1, 1), np.float32),
    "b2": np.zeros(1, np.float32),
    "features": Feature.MEANS,
    "beta_min": 0.5,
    "beta_max": 2.0,
    "qmin": 0,
    "qmax": 255,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"step": np.array([0.1], np.float32)},
        {"step": np.float32(np.nan)},
        {"step": np.float32(-1)},
        {"zero_point": np.int8(0)},
        {"w1": np.ones((0, 2), np.float32)},
        {"w1": np.ones(2, np.float32)},
        {"w1": np.ones((1, 2))},
        {"b1": np.zeros(2, np.float32)},
        {"w2": np.ones((2, 1), np.float32)},
        {"b2": np.float32(0)},
        {"features": Feature(0)},
        {"beta_min": 0.0},
        {"beta_min": 3.0},
        {"beta_max": math.inf},
        {"qmin": -1},
        {"qmin": 255},
        {"qmax": 256},
    ],
    ids=str,
)
def test_networks_that_do_not_fit_are_explained(changes: dict[str, Any]) -> None:
    AdaptiveStep(**GOOD)
    with pytest.raises(ModelError):
        AdaptiveStep(**(GOOD | changes))


@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 0), (1, 2, 0)], ids=str)
def test_inputs_that_do_not_fit_are_explained(shape: tuple[int, ...]) -> None:
    settings = AdaptiveStep(**GOOD)
    assert adaptive_quantize(np.zeros((0, 2), np.float32), settings)[0].shape == (0, 2)
    with pytest.raises(ModelError):
        adaptive_quantize(np.zeros(shape, np.float32), settings)
