"""Choice of smoothing factors: what gains, what does not, and what is left alone."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import onnx_ir as ir
import pytest

from postquant.calib.input_spec import input_specs
from postquant.calib.layers import layers_of
from postquant.calib.open_source import open_source
from postquant.calib.smoothing import (
    SmoothingOptions,
    candidate_factors,
    kept_factors,
    measure_smoothing,
)
from postquant.calib.source import CalibrationSource
from postquant.passes.session import make_session
from postquant.passes.smooth import SmoothPass, smooth_groups
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

K, M = 48, 40
# Three channels of LayerNormalization are far larger than the others, as in every large transformer.
LOUD = np.array([5, 17, 30])
POST_NORM = "h = LayerNormalization (x, g, b) m = MatMul (h, w) a = Add (m, c) y = Concat <axis = -1> (a, h)"
PRE_NORM = "h = LayerNormalization (x, g, b) m = MatMul (h, w) y = Add (m, c)"


def build(body: str, rng: np.random.Generator, *, loud: float = 40.0, width: int = M) -> ir.Model:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,{K}] x) => (float[N,P] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    gain = np.ones(K, np.float32)
    gain[LOUD] = loud
    arrays = {
        "g": gain,
        "b": np.zeros(K, np.float32),
        "w": rng.standard_normal((K, width)).astype(np.float32),
        "c": rng.standard_normal(width).astype(np.float32),
    }
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{index}"
    model: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    return model


def data(model: ir.Model, rng: np.random.Generator, count: int = 12) -> CalibrationSource:
    feeds = [{"x": rng.standard_normal((16, K)).astype(np.float32)} for _ in range(count)]
    return open_source(feeds, input_specs(model))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def quantized_error(model: ir.Model, source: CalibrationSource) -> float:
    """Relative squared error of the layer with its input and weight rounded to 8 bits, by NumPy alone."""
    (layer,) = layers_of(model)
    rows = np.concatenate([make_session(model, outputs=[layer.input]).run(s)[layer.input] for s in source])
    tensor = model.graph.initializers[layer.weight].const_value
    assert tensor is not None
    weight = tensor.numpy()
    x = TensorQuantizer.from_range(QuantSpec(8, signed=False, symmetric=False), rows.min(), rows.max()).simulate(rows)
    step = np.abs(weight).max(0) / 127
    difference = x @ (np.rint(weight / step) * step) - rows @ weight
    return float(np.square(difference).sum() / np.square(rows @ weight).sum())


@pytest.mark.parametrize(("body", "absorbed"), [(PRE_NORM, True), (POST_NORM, False)])
def test_loud_channels_give_way(rng: np.random.Generator, body: str, absorbed: bool) -> None:
    model = build(body, rng)
    source = data(model, rng)
    (choice,) = measure_smoothing(model, source, smooth_groups(model))
    assert choice.group.absorbed is absorbed
    assert choice.kept
    assert choice.after_db > choice.before_db + 6
    quiet = np.setdiff1d(np.arange(K), LOUD)
    assert choice.factors[LOUD].min() > 3 * choice.factors[quiet].max()
    before = quantized_error(model, source)
    expected = [make_session(model).run(sample)["y"] for sample in source]
    SmoothPass([(choice.group, choice.factors)])(model)
    assert quantized_error(model, source) < before / 2
    for sample, y in zip(source, expected, strict=True):
        np.testing.assert_allclose(make_session(model).run(sample)["y"], y, rtol=1e-4, atol=1e-3)


def test_even_channels_are_left_alone(rng: np.random.Generator) -> None:
    model = build(POST_NORM, rng, loud=1.0)
    (choice,) = measure_smoothing(model, data(model, rng), smooth_groups(model))
    assert not choice.kept
    assert kept_factors([choice]) == []


def test_inserted_mul_must_gain_more(rng: np.random.Generator) -> None:
    """A gain that is worth it for nothing is not worth a Mul."""
    kept = []
    for body in (PRE_NORM, POST_NORM):
        model = build(body, np.random.default_rng(3), loud=3.0)
        (choice,) = measure_smoothing(model, data(model, np.random.default_rng(4)), smooth_groups(model))
        assert 0.5 < choice.after_db - choice.before_db < 6
        kept.append(choice.kept)
    assert kept == [True, False]


def test_several_layers_and_progress(rng: np.random.Generator) -> None:
    """Layers that read one tensor share factors; a Gemm with a transposed weight is read as such."""
    body = "h = LayerNormalization (x, g, b) p = MatMul (h, w) q = Gemm <transB = 1> (h, w2, c) y = Add (p, q)"
    model = build(body, rng)
    second = ir.Tensor(rng.standard_normal((M, K)).astype(np.float32), name="w2")
    value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == "w2")
    value.const_value = second
    model.graph.register_initializer(value)
    done: list[int] = []
    choices = measure_smoothing(model, data(model, rng), smooth_groups(model), progress=lambda: done.append(1))
    ((group, factors),) = kept_factors(choices)
    assert len(group.layers) == 2
    assert factors[LOUD].min() > 3
    assert done == [1]


def test_fewer_bits_and_symmetric_ranges(rng: np.random.Generator) -> None:
    model = build(PRE_NORM, rng)
    source = data(model, rng)
    groups = smooth_groups(model)
    settings: dict[str, dict[str, Any]] = {
        "8": {},
        "6": {"abits": 6},
        "w4": {"wbits": 4},
        "symmetric": {"symmetric": True},
    }
    before = {
        name: measure_smoothing(model, source, groups, **arguments)[0].before_db for name, arguments in settings.items()
    }
    assert before["6"] < before["8"] - 6
    assert before["w4"] < before["8"]
    assert before["symmetric"] <= before["8"] + 0.5


def test_threads_do_not_matter(rng: np.random.Generator) -> None:
    model = build(PRE_NORM, rng)
    source = data(model, rng)
    first, second = (measure_smoothing(model, source, smooth_groups(model), threads=threads) for threads in (1, 2))
    np.testing.assert_array_equal(first[0].factors, second[0].factors)


def test_dead_channels_and_all_zero_tensors() -> None:
    options = SmoothingOptions()
    r = np.array([0.0, 1e-12, 1.0, 2.0, 1.0])
    v = np.array([1.0, 0.0, 1.0, 1.0, 1e-9])
    for _, factors in candidate_factors(r, v, options):
        assert np.isfinite(factors).all()
        assert factors.max() / factors.min() < 1e3
    assert list(candidate_factors(np.zeros(3), np.ones(3), options)) == []
    assert list(candidate_factors(np.ones(3), np.zeros(3), options)) == []


def test_zero_input(rng: np.random.Generator) -> None:
    model = build("h = Sub (x, x) m = MatMul (h, w) y = Add (m, c)", rng)
    (choice,) = measure_smoothing(model, data(model, rng), smooth_groups(model))
    assert not choice.kept
    np.testing.assert_array_equal(choice.factors, np.ones(K))


def test_no_groups(rng: np.random.Generator) -> None:
    model = build("y = Relu (x)", rng)
    assert measure_smoothing(model, data(model, rng), []) == []


def test_large_weights_are_let_go(rng: np.random.Generator, tmp_path: pathlib.Path) -> None:
    """A weight in a file is mapped, read and released; rows obey their bound."""
    model = build(PRE_NORM, rng, width=300)
    path = tmp_path / "model.onnx"
    ir.save(model, path, external_data="model.data", size_threshold_bytes=1024)
    loaded = ir.load(path)
    options = SmoothingOptions(row_bytes=1)
    source = data(loaded, rng, count=40)
    expected = measure_smoothing(model, source, smooth_groups(model), options=options)
    found = measure_smoothing(loaded, source, smooth_groups(loaded), options=options)
    np.testing.assert_array_equal(found[0].factors, expected[0].factors)
    tensor = loaded.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None


@pytest.mark.parametrize("kinds", [("MatMul", "Add"), ("MatMul",), ("Gemm",)])
def test_bias_of_a_layer(kinds: Sequence[str], rng: np.random.Generator) -> None:
    """MatMul's bias is the vector of the Add behind it."""
    bodies: dict[tuple[str, ...], tuple[str, Any]] = {
        ("MatMul", "Add"): ("m = MatMul (x, w) y = Add (c, m)", "c"),
        ("MatMul",): ("y = MatMul (x, w)", None),
        ("Gemm",): ("y = Gemm (x, w, c)", "c"),
    }
    body, bias = bodies[tuple(kinds)]
    (layer,) = layers_of(build(body, rng))
    assert layer.bias == bias


def test_model_is_not_changed(rng: np.random.Generator) -> None:
    """The factors are a function of the float model and the data: nothing of the model changes."""
    model = build(PRE_NORM, rng)
    before: dict[str, npt.NDArray[Any]] = {
        name: value.const_value.numpy().copy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    measure_smoothing(model, data(model, rng), smooth_groups(model))
    for name, array in before.items():
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)
