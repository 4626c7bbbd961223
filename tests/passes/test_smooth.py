"""Scales that move from activations into MatMul and Gemm weights: who absorbs them, and that outputs stay equal."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from postquant.passes.smooth import SmoothGroup, SmoothPass, smooth_groups

K, M = 6, 5
SEQUENCE = f"float[N,L,{K}] x"
OUT = f"float[N,L,{M}] y"
# What makes ``h`` from the input x -> the nodes, and the constants whose values must change.
ABSORBING = {
    "LayerNormalization": ("h = LayerNormalization (x, g, b)", {"g", "b"}),
    "LayerNormalization without bias": ("h = LayerNormalization (x, g)", {"g"}),
    "Mul by a vector": ("h = Mul (x, g)", {"g"}),
    "Mul by a number": ("h = Mul (n, x)", {"n"}),
    "Div by a vector": ("h = Div (x, g)", {"g"}),
    "Div of a vector": ("e = Exp (x) h = Div (g, e)", {"g"}),
    "MatMul": ("h = MatMul (x, v)", {"v"}),
    "MatMul and Add": ("m = MatMul (x, v) h = Add (m, b)", {"v", "b"}),
    "MatMul, Add of a number": ("m = MatMul (x, v) h = Add (n, m)", {"v", "n"}),
    "MatMul, Add and Relu": ("m = MatMul (x, v) a = Add (m, b) h = Relu (a)", {"v", "b"}),
    "Sub from a vector": ("m = MatMul (x, v) h = Sub (b, m)", {"v", "b"}),
    "Gelu with Erf": ("d = Mul (x, n) e = Erf (d) f = Add (e, one) f2 = Mul (f, half) h = Mul (x, f2)", {"half"}),
    "two branches": ("p = MatMul (x, v) q = Mul (x, g) h = Add (p, q)", {"v", "g"}),
}


def arrays(rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    """Constants of all the graphs; those that a graph does not read are dropped."""
    return {
        "g": 1 + rng.random(K).astype(np.float32),
        "b": rng.standard_normal(K).astype(np.float32),
        "n": np.array(0.75, np.float32),
        "one": np.array(1, np.float32),
        "half": np.array(0.5, np.float32),
        "v": rng.standard_normal((K, K)).astype(np.float32),
        "w": rng.standard_normal((K, M)).astype(np.float32),
        "u": rng.standard_normal((K, M)).astype(np.float32),
        "t": rng.standard_normal((M, K)).astype(np.float32),
        "c": rng.standard_normal(M).astype(np.float32),
        "k": rng.standard_normal((K, 1, 3)).astype(np.float32),
    }


def build(bench: Any, rng: np.random.Generator, body: str, inputs: str = SEQUENCE, outputs: str = OUT) -> ir.Model:
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: array for name, array in arrays(rng).items() if name in words}
    result: ir.Model = bench.model(bench.graph(body, inputs, outputs), **used)
    return result


def smoothed(bench: Any, rng: np.random.Generator, model: ir.Model, shape: tuple[int, ...] = (2, 3, K)) -> set[str]:
    """Applies random factors to every group; outputs stay equal; returns the names of changed constants."""
    groups = smooth_groups(model)
    assert groups
    before = {name: bench.array(model, name).copy() for name in model.graph.initializers}
    feed = {"x": rng.standard_normal(shape).astype(np.float32)}
    expected = bench.run(model, feed, optimize=False)
    result = SmoothPass([(group, np.exp(rng.standard_normal(group.channels))) for group in groups])(model)
    assert result.modified
    bench.check(model)
    for name, values in bench.run(model, feed, optimize=False).items():
        assert values.shape == expected[name].shape
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-5)
    return {name for name, array in before.items() if not np.array_equal(array, bench.array(model, name))}


@pytest.mark.parametrize("case", ABSORBING)
def test_absorbed(bench: Any, rng: np.random.Generator, case: str) -> None:
    body, changed = ABSORBING[case]
    model = build(bench, rng, f"{body} y = MatMul (h, w)")
    nodes = len(list(model.graph))
    (group,) = [group for group in smooth_groups(model) if group.value == "h"]
    assert group == SmoothGroup("h", (group.layers[0],), K, absorbed=True)
    factors = np.exp(rng.standard_normal(K))
    feed = {"x": rng.standard_normal((2, 3, K)).astype(np.float32)}
    before, expected = {n: bench.array(model, n).copy() for n in model.graph.initializers}, bench.run(model, feed)
    h = bench.values(model, ["h"], feed)["h"]
    assert SmoothPass([(group, factors)])(model).modified
    bench.check(model)
    np.testing.assert_allclose(bench.run(model, feed)["y"], expected["y"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bench.values(model, ["h"], feed)["h"], h / factors, rtol=1e-4, atol=1e-5)
    assert len(list(model.graph)) == nodes
    assert {n for n, a in before.items() if not np.array_equal(a, bench.array(model, n))} == changed | {"w"}


@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_reads_and_absorbs(bench: Any, rng: np.random.Generator, trans: int) -> None:
    weight = "t" if trans else "w"
    body = f"h = Gemm <transB = 1> (x, v, b) y = Gemm <transB = {trans}> (h, {weight}, c)"
    model = build(bench, rng, body, f"float[N,{K}] x", f"float[N,{M}] y")
    assert [(g.value, g.absorbed) for g in smooth_groups(model)] == [("x", False), ("h", True)]
    assert smoothed(bench, rng, model, (4, K)) == {"v", "b", weight}
    assert bench.ops(model) == {"Mul": 1, "Gemm": 2}


def test_readers_of_one_tensor_share_factors(bench: Any, rng: np.random.Generator) -> None:
    model = build(bench, rng, "h = LayerNormalization (x, g, b) p = MatMul (h, w) q = MatMul (h, u) y = Add (p, q)")
    (group,) = smooth_groups(model)
    assert len(group.layers) == 2
    assert group.absorbed
    assert smoothed(bench, rng, model) == {"g", "b", "w", "u"}


@pytest.mark.parametrize(
    "body",
    [
        "h = LayerNormalization (x, g, b) p = MatMul (h, v) y = Add (p, h)",  # the residual sum reads h itself
        "h = Softmax (x) y = MatMul (h, v)",
        "a = Mul (x, g) h = Add (a, x) y = MatMul (h, v)",
    ],
)
def test_mul_in_front_of_the_layers_only(bench: Any, rng: np.random.Generator, body: str) -> None:
    model = build(bench, rng, body, outputs=f"float[N,L,{K}] y")
    (group,) = smooth_groups(model)
    assert not group.absorbed
    muls = bench.ops(model)["Mul"]
    layer = next(node for node in model.graph if node.op_type == "MatMul")
    others = [node for node in model.graph if node is not layer and any(v.name == "h" for v in node.inputs if v)]
    assert smoothed(bench, rng, model) == {"v"}
    assert bench.ops(model)["Mul"] == muls + 1
    assert layer.inputs[0] is not None
    assert layer.inputs[0].name == "h_smoothed"
    assert all(any(v is not None and v.name == "h" for v in node.inputs) for node in others)


@pytest.mark.parametrize("residual", [True, False])
def test_reshape_between(bench: Any, rng: np.random.Generator, residual: bool) -> None:
    """What exporters make of MatMul and Add: Reshape to a matrix, Gemm, Reshape back."""
    body = "h = LayerNormalization (x, g, b) r = Reshape (h, rows) r2 = Reshape (h, rows) "
    body += "p = Gemm (r, w, c) q = Gemm (r2, u) s = Add (p, q) z = Shape (x) "
    body += "y = Reshape (s, back)" if not residual else "a = Relu (h) y = Concat <axis = -1> (a, b3)"
    names = {"rows": np.array([-1, K]), "back": np.array([2, 3, M]), "b3": np.ones((2, 3, 1), np.float32)}
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: array for name, array in (arrays(rng) | names).items() if name in words}
    model = bench.model(bench.graph(body.replace("z = Shape (x) ", ""), "float[2,3,6] x", "float[a,b,c] y"), **used)
    (group,) = smooth_groups(model)
    assert (group.value, len(group.layers), group.absorbed) == ("h", 2, not residual)
    assert smoothed(bench, rng, model) == ({"w", "u"} if residual else {"g", "b", "w", "u"})


def test_graph_output_is_not_changed(bench: Any, rng: np.random.Generator) -> None:
    body = "h = LayerNormalization (x, g, b) y = MatMul (h, w)"
    model = build(bench, rng, body, outputs=f"{OUT}, float[N,L,{K}] h")
    assert [group.absorbed for group in smooth_groups(model)] == [False]
    assert smoothed(bench, rng, model) == {"w"}


def test_names_that_are_taken(bench: Any, rng: np.random.Generator) -> None:
    model = build(bench, rng, "h_smoothed = Softmax (x) h = Exp (h_smoothed) y = MatMul (h, w)")
    smoothed(bench, rng, model)
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names)


def test_number_without_shapes(bench: Any, rng: np.random.Generator) -> None:
    """Where no shapes are known, a number becomes a vector only if the nodes tell that the result is as wide."""
    gelu = "d = MatMul (x, v) e = Erf (d) f = Add (e, one) f2 = Mul (f, half) h = Mul (d, f2) y = MatMul (h, w)"
    narrow = "d = ReduceMax <axes = [2]> (x) f2 = Mul (d, half) h = Mul (x, f2) y = MatMul (h, w)"
    for body, absorbed in ((gelu, True), (narrow, False)):
        model = build(bench, rng, body)
        for node in model.graph:
            for value in node.outputs:
                value.shape = None if not value.is_graph_output() else value.shape
        (group,) = [group for group in smooth_groups(model) if group.value == "h"]
        assert group.absorbed is absorbed
        feed = {"x": rng.standard_normal((2, 3, K)).astype(np.float32)}
        expected = bench.run(model, feed)["y"]
        SmoothPass([(group, np.exp(rng.standard_normal(K)))])(model)
        np.testing.assert_allclose(bench.run(model, feed)["y"], expected, rtol=1e-4, atol=1e-5)


def test_shared_constant_is_copied(bench: Any, rng: np.random.Generator) -> None:
    body = "a = Mul (x, g) h = Mul (a, g) y = MatMul (h, w)"
    model = build(bench, rng, body)
    (group,) = [group for group in smooth_groups(model) if group.absorbed]
    g = bench.array(model, "g").copy()
    assert smoothed(bench, rng, model) == {"w"}
    np.testing.assert_array_equal(bench.array(model, "g"), g)
    assert group.value == "h"


@pytest.mark.parametrize(
    "body",
    [
        "s = Softmax (x) r = Transpose <perm = [0, 2, 1]> (x) y = MatMul (s, r)",  # two activations
        "y = Relu (x)",
    ],
)
def test_no_group(bench: Any, rng: np.random.Generator, body: str) -> None:
    model = build(bench, rng, body, outputs="float[a,b,c] y")
    assert smooth_groups(model) == []
    assert not SmoothPass([])(model).modified


def test_no_mul_behind_a_convolution(bench: Any, rng: np.random.Generator) -> None:
    body = f"c1 = Conv <group = {K}, pads = [1, 1]> (x, k) r = Sigmoid (c1) p = GlobalAveragePool (r) "
    body += "h = Flatten (p) y = Gemm <transB = 1> (h, t, c)"
    model = build(bench, rng, body, f"float[N,{K},L] x", f"float[N,{M}] y")
    assert smooth_groups(model) == []


def test_ones_change_nothing(bench: Any, rng: np.random.Generator) -> None:
    model = build(bench, rng, "h = Softmax (x) y = MatMul (h, w)")
    (group,) = smooth_groups(model)
    assert not SmoothPass([(group, np.ones(K))])(model).modified
    assert bench.ops(model) == {"Softmax": 1, "MatMul": 1}


@pytest.mark.parametrize("factors", [np.ones(K + 1), np.zeros(K), np.full(K, np.nan), np.full(K, np.inf)])
def test_bad_factors(factors: npt.NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match=f"h needs {K} positive, finite factors"):
        SmoothPass([(SmoothGroup("h", ("m",), K, absorbed=False), factors)])


def test_real_transformer(bench: Any, rng: np.random.Generator, shared_data: pathlib.Path) -> None:
    """MiniLM: q, k, v read one tensor beside a residual sum; Gelu's constant takes the factors of what reads Gelu."""
    model = bench.real_model(shared_data, "minilm")
    (feed,) = bench.real_feeds(shared_data, "minilm", 1)
    groups = smooth_groups(model)
    assert [len(group.layers) for group in groups] == [3, 1, 1, 1] * 6
    assert [group.absorbed for group in groups] == [False, False, False, True] * 6
    expected = bench.run(model, feed)
    SmoothPass([(group, np.exp(rng.standard_normal(group.channels))) for group in groups])(model)
    for name, values in bench.run(model, feed).items():
        np.testing.assert_allclose(values, expected[name], atol=1e-5)
