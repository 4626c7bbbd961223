"""BatchNorm and arithmetic with constants into layers: every layer kind, before and behind, and when not."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from postquant.passes.fold import fold
from postquant.passes.fold_arithmetic import FoldArithmeticPass
from postquant.passes.fold_batch_norm import FoldBatchNormPass

# Name -> (node text with data input {x} and weight w, weight shape, in channels, out channels, rank)
LAYERS = {
    "Conv": ("Conv <pads = [1, 1, 1, 1]>", (6, 4, 3, 3), 4, 6),
    "Conv, valid": ("Conv", (6, 4, 3, 3), 4, 6),
    "Conv, grouped": ("Conv <group = 2>", (6, 2, 3, 3), 4, 6),
    "Conv, depthwise": ("Conv <group = 4, pads = [1, 1, 1, 1]>", (4, 1, 3, 3), 4, 4),
    "ConvTranspose": ("ConvTranspose <strides = [2, 2]>", (4, 6, 3, 3), 4, 6),
    "ConvTranspose, grouped": ("ConvTranspose <group = 2>", (4, 3, 3, 3), 4, 6),
    "ConvTranspose, 1x1 grouped": ("ConvTranspose <group = 2>", (4, 3, 1, 1), 4, 6),
    "Gemm": ("Gemm", (4, 6), 4, 6),
    "Gemm, transposed": ("Gemm <transB = 1>", (6, 4), 4, 6),
}
# Layers that a shift of their inputs passes through exactly.
SEES_SHIFT = {"Conv, valid", "Conv, grouped", "ConvTranspose, 1x1 grouped", "Gemm", "Gemm, transposed"}


def data(rng: np.random.Generator, layer: str) -> npt.NDArray[np.float32]:
    shape = (3, 4) if layer.startswith("Gemm") else (2, 4, 5, 5)
    return rng.standard_normal(shape).astype(np.float32)


def statistics(rng: np.random.Generator, channels: int, *, centred: bool = False) -> dict[str, npt.NDArray[np.float32]]:
    made = {name: rng.standard_normal(channels).astype(np.float32) for name in ("gamma", "beta", "mean")}
    if centred:
        made["beta"] = made["mean"] = np.zeros(channels, np.float32)
    return made | {"var": rng.random(channels).astype(np.float32) + 0.5}


def build(bench: Any, layer: str, body: str, **arrays: npt.NDArray[Any]) -> ir.Model:
    dims = "N,4" if layer.startswith("Gemm") else "N,4,5,5"
    outputs = "float[a,b] y" if layer.startswith("Gemm") else "float[a,b,c,d] y"
    result: ir.Model = bench.model(bench.graph(body, f"float[{dims}] x", outputs), **arrays)
    return result


def check(
    bench: Any, model: ir.Model, x: npt.NDArray[np.float32], passes: ir.passes.PassBase, nodes: list[str]
) -> None:
    """The pass leaves ``nodes``, says that it changed something, and keeps the outputs."""
    before = bench.run(model, {"x": x}, optimize=False)
    assert passes(model).modified
    assert [node.op_type for node in model.graph] == nodes
    bench.check(model)
    after = bench.run(model, {"x": x}, optimize=False)
    for name, expected in before.items():
        np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-5)
    assert not passes(model).modified


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_batch_norm_behind(bench: Any, rng: np.random.Generator, layer: str, bias: bool) -> None:
    text, shape, _, outputs = LAYERS[layer]
    arrays = {"w": rng.standard_normal(shape).astype(np.float32), **statistics(rng, outputs)}
    if bias:
        arrays["b"] = rng.standard_normal(outputs).astype(np.float32)
    body = (
        f"c = {text} (x, w{', b' if bias else ''}) y = BatchNormalization <epsilon = 0.01> (c, gamma, beta, mean, var)"
    )
    model = build(bench, layer, body, **arrays)
    check(bench, model, data(rng, layer), FoldBatchNormPass(), [text.split()[0]])
    assert set(model.graph.initializers) >= {"w"}


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_batch_norm_in_front(bench: Any, rng: np.random.Generator, layer: str, bias: bool, centred: bool) -> None:
    text, shape, inputs, outputs = LAYERS[layer]
    arrays = {"w": rng.standard_normal(shape).astype(np.float32), **statistics(rng, inputs, centred=centred)}
    if bias:
        arrays["b"] = rng.standard_normal(outputs).astype(np.float32)
    body = f"n = BatchNormalization (x, gamma, beta, mean, var) y = {text} (n, w{', b' if bias else ''})"
    model = build(bench, layer, body, **arrays)
    if centred or layer in SEES_SHIFT:
        check(bench, model, data(rng, layer), FoldBatchNormPass(), [text.split()[0]])
    else:  # zero padding, or outputs that see some taps only: not exact
        assert not FoldBatchNormPass()(model).modified
        assert len(model.graph) == 2


@pytest.mark.parametrize(
    "chain",
    [
        "y = Mul (c, k)",
        "y = Mul (k, c)",
        "y = Add (c, k)",
        "y = Sub (c, k)",
        "y = Sub (k, c)",
        "y = Div (c, k)",
        "m = Mul (c, k) s = Sub (m, one) y = Div (s, k)",
    ],
)
@pytest.mark.parametrize("layer", LAYERS)
def test_arithmetic_behind(bench: Any, rng: np.random.Generator, layer: str, chain: str) -> None:
    text, shape, _, outputs = LAYERS[layer]
    k = (rng.random(outputs) + 0.5).astype(np.float32).reshape((-1,) if layer.startswith("Gemm") else (1, -1, 1, 1))
    arrays = {"w": rng.standard_normal(shape).astype(np.float32), "k": k, "one": np.array([0.7], np.float32)}
    model = build(bench, layer, f"c = {text} (x, w) {chain}", **arrays)
    check(bench, model, data(rng, layer), FoldArithmeticPass(), [text.split()[0]])


@pytest.mark.parametrize("op", ["Mul", "Div", "Add", "Sub"])
@pytest.mark.parametrize("layer", LAYERS)
def test_arithmetic_in_front(bench: Any, rng: np.random.Generator, layer: str, op: str) -> None:
    text, shape, inputs, _ = LAYERS[layer]
    k = (rng.random(inputs) + 0.5).astype(np.float32).reshape((-1,) if layer.startswith("Gemm") else (-1, 1, 1))
    arrays = {"w": rng.standard_normal(shape).astype(np.float32), "k": k}
    model = build(bench, layer, f"s = {op} (x, k) y = {text} (s, w)", **arrays)
    if op in ("Mul", "Div") or layer in SEES_SHIFT:
        check(bench, model, data(rng, layer), FoldArithmeticPass(), [text.split()[0]])
    else:
        assert not FoldArithmeticPass()(model).modified


CONV = np.random.default_rng(5).standard_normal((4, 4, 1, 1)).astype(np.float32)


@pytest.mark.parametrize(
    ("reason", "body", "outputs"),
    [
        ("the layer's output is read twice", "c = Conv (x, w) m = Mul (c, k) y = Add (m, c)", "float[a,b,c,d] y"),
        ("the layer's output is an output", "c = Conv (x, w) y = Mul (c, k)", "float[a,b,c,d] y, float[N,4,5,5] c"),
        ("the constant varies along the width", "c = Conv (x, w) y = Mul (c, width)", "float[a,b,c,d] y"),
        ("the constant adds an axis", "c = Conv (x, w) y = Mul (c, five)", "float[a,b,c,d,e] y"),
        ("the constant is the dividend", "c = Conv (x, w) y = Div (k, c)", "float[a,b,c,d] y"),
        ("division by zero", "c = Conv (x, w) y = Div (c, zero)", "float[a,b,c,d] y"),
        ("the weight is computed", "v = Mul (w, f) c = Conv (x, v) y = Mul (c, k)", "float[a,b,c,d] y"),
        ("something else reads the scaled input", "m = Mul (x, k) c = Conv (m, w) y = Add (c, m)", "float[a,b,c,d] y"),
    ],
)
def test_what_must_not_fold(bench: Any, reason: str, body: str, outputs: str) -> None:
    arrays = {
        "w": CONV,
        "k": np.full((1, 4, 1, 1), 2, np.float32),
        "width": np.full((1, 1, 1, 5), 2, np.float32),
        "five": np.full((1, 1, 4, 1, 1), 2, np.float32),
        "zero": np.zeros(1, np.float32),
    }
    model = bench.model(bench.graph(body, "float[N,4,5,5] x, float[1] f", outputs), **arrays)
    nodes = list(model.graph)
    assert not FoldArithmeticPass()(model).modified, reason
    assert list(model.graph) == nodes


def test_constant_that_widens_one_channel_does_not_fold(bench: Any) -> None:
    body = "m = Mul (x, k) y = Conv (m, w)"
    model = bench.model(bench.graph(body, "float[N,1,5,5] x"), w=CONV, k=np.ones((1, 4, 1, 1), np.float32) * 2)
    assert not FoldArithmeticPass()(model).modified


def test_batch_norm_in_training_stays(bench: Any, rng: np.random.Generator) -> None:
    body = "c = Conv (x, w) y, m, v = BatchNormalization <training_mode = 1> (c, gamma, beta, mean, var)"
    model = bench.model(bench.graph(body, "float[N,4,5,5] x"), w=CONV, **statistics(rng, 4))
    assert not FoldBatchNormPass()(model).modified


def test_overridable_initializer_is_no_constant(bench: Any, rng: np.random.Generator) -> None:
    body = "c = Conv (x, w) y = BatchNormalization (c, gamma, beta, mean, var)"
    model = bench.model(bench.graph(body, "float[N,4,5,5] x"), w=CONV, **statistics(rng, 4))
    model.graph.inputs.append(model.graph.initializers["w"])
    assert not FoldBatchNormPass()(model).modified


def test_weight_of_two_layers_folds_into_a_copy(bench: Any, rng: np.random.Generator) -> None:
    body = """
        c = Conv (x, w)
        n = BatchNormalization (c, gamma, beta, mean, var)
        d = Conv (x, w)
        y = Add (n, d)
    """
    model = bench.model(bench.graph(body, "float[N,4,5,5] x"), w=CONV, **statistics(rng, 4))
    x = rng.standard_normal((1, 4, 5, 5)).astype(np.float32)
    check(bench, model, x, FoldBatchNormPass(), ["Conv", "Conv", "Add"])
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), CONV)


def test_batch_norm_before_two_layers_that_share_a_weight(bench: Any, rng: np.random.Generator) -> None:
    body = """
        n = BatchNormalization (x, gamma, beta, mean, var)
        c = Conv (n, w)
        d = Conv <strides = [1, 1]> (n, w)
        y = Add (c, d)
    """
    model = bench.model(bench.graph(body, "float[N,4,5,5] x"), w=CONV, **statistics(rng, 4))
    check(bench, model, data(rng, "Conv"), FoldBatchNormPass(), ["Conv", "Conv", "Add"])


def test_output_keeps_its_name(bench: Any, rng: np.random.Generator) -> None:
    body = "c = Conv (x, w) n = BatchNormalization (c, gamma, beta, mean, var) y = Relu (n)"
    model = bench.model(
        bench.graph(body, "float[N,4,5,5] x", "float[a,b,c,d] y, float[N,4,5,5] n"), w=CONV, **statistics(rng, 4)
    )
    check(bench, model, data(rng, "Conv"), FoldBatchNormPass(), ["Conv", "Relu"])
    assert model.graph.node(0).outputs[0].name == "n"


def test_values_between_keep_the_name_of_what_they_hold(bench: Any, rng: np.random.Generator) -> None:
    body = "a = Relu (x) n = BatchNormalization (a, gamma, beta, mean, var) y = Conv (n, w)"
    model = bench.model(bench.graph(body, "float[N,4,5,5] x"), w=CONV, **statistics(rng, 4))
    assert FoldBatchNormPass()(model).modified
    assert model.graph.node(0).outputs[0].name == "a"


@pytest.mark.parametrize(("op", "number"), [("Mul", 1.0), ("Div", 1.0), ("Add", 0.0), ("Sub", 0.0)])
def test_neutral_arithmetic_is_removed(bench: Any, op: str, number: float) -> None:
    body = f"r = Relu (x) n = {op} (r, k) y = Sigmoid (n)"
    model = bench.model(bench.graph(body), k=np.float32(number))
    assert FoldArithmeticPass()(model).modified
    assert list(bench.ops(model)) == ["Relu", "Sigmoid"]


def test_neutral_number_of_higher_rank_stays(bench: Any) -> None:
    model = bench.model(
        bench.graph("r = Relu (x) y = Mul (r, k)", outputs="float[a,b,c,d,e] y"), k=np.ones((1, 1, 1, 1, 1), np.float32)
    )
    assert not FoldArithmeticPass()(model).modified


def test_large_weights_in_files_stay_lazy(bench: Any, rng: np.random.Generator, tmp_path: Any) -> None:
    weight = rng.standard_normal((1024, 512)).astype(np.float32)
    body = "c = Gemm (x, w) y = Mul (c, k)"
    model = bench.model(bench.graph(body, "float[N,1024] x", "float[N,512] y"), w=weight, k=np.float32(2))
    weight.tofile(tmp_path / "d")
    value = model.graph.initializers["w"]
    value.const_value = ir.ExternalTensor(
        "d", 0, None, ir.DataType.FLOAT, shape=ir.Shape(weight.shape), name="w", base_dir=tmp_path
    )
    assert FoldArithmeticPass()(model).modified
    assert isinstance(value.const_value, ir.LazyTensor)
    np.testing.assert_array_equal(value.const_value.numpy(), weight * 2)


def test_long_chain_in_one_call(bench: Any, rng: np.random.Generator) -> None:
    body = """
        i = Identity (x)
        m = Mul (i, k)
        p = Pad (m, pads)
        c = Conv (p, w)
        d = Div (c, k)
        n = BatchNormalization (d, gamma, beta, mean, var)
        a = Add (n, k)
        r = Relu (a)
        y = Clip (r, , high)
    """
    model = bench.model(
        bench.graph(body, "float[N,4,5,5] x"),
        w=CONV,
        k=np.full((1, 4, 1, 1), 2, np.float32),
        pads=np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        high=np.float32(6),
        **statistics(rng, 4),
    )
    x = {"x": data(rng, "Conv")}
    before = bench.run(model, x, optimize=False)["y"]
    fold(model)
    assert [node.op_type for node in model.graph] == ["Conv", "Clip"]
    np.testing.assert_allclose(bench.run(model, x, optimize=False)["y"], before, rtol=1e-5, atol=1e-5)
