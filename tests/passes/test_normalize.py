"""The normal form, point by point."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from postquant.passes.normalize import FreeInputsPass, normalize
from postquant.passes.rewiring import constant_tensor, is_constant

W = np.random.default_rng(1).standard_normal((4, 4, 3, 3)).astype(np.float32)
INPUT = "float[N,4,6,6] x"


def normal(bench: Any, model: ir.Model, **feeds: npt.NDArray[Any]) -> ir.Model:
    """The model in normal form, which is checked to say the same."""
    before = bench.run(model, feeds, optimize=False)
    normalize(model)
    bench.check(model)
    after = bench.run(model, feeds, optimize=False)
    assert list(after) == list(before)
    for name, expected in before.items():
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-5)
    for node in model.graph:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and is_constant(node.inputs[1]):
            assert len(node.inputs) == 3
            assert all(value is not None and len(value.uses()) == 1 for value in node.inputs[1:])
            assert len(constant_tensor(node.inputs[2]).shape) == 1
    assert not normalize(model).modified
    return model


def x() -> npt.NDArray[np.float32]:
    return np.random.default_rng(2).standard_normal((2, 4, 6, 6)).astype(np.float32)


def test_names(bench: Any) -> None:
    model = bench.model(bench.graph("a = Relu (x) b = Relu (a) y = Relu (b)", INPUT))
    nodes = list(model.graph)
    nodes[0].name = nodes[1].name = "same"
    nodes[2].name = ""
    nodes[0].outputs[0].name = None
    normalize(model)
    assert [node.name for node in nodes] == ["same", "same_1", "Relu"]
    names = [value.name for node in nodes for value in node.outputs]
    assert all(names)
    assert len(set(names)) == 3
    assert names[-1] == "y"


def test_shared_weight_and_bias_become_two_over_one_tensor(bench: Any) -> None:
    body = "a = Conv (x, w, b) c = Conv <pads = [1, 1, 1, 1]> (x, w, b) p = Pad (a, pads) y = Add (p, c)"
    model = bench.model(
        bench.graph(body, INPUT), w=W, b=np.ones(4, np.float32), pads=np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
    )
    normal(bench, model, x=x())
    first, second = (node for node in model.graph if node.op_type == "Conv")
    for index in (1, 2):
        assert first.inputs[index] is not second.inputs[index]
        assert first.inputs[index].const_value is second.inputs[index].const_value


def test_weight_used_in_two_layouts(bench: Any) -> None:
    body = "a = MatMul (v, w) b = Gemm <transB = 1> (v, w) c = MatMul (w, w) d = Add (a, b) y = MatMul (d, c)"
    weight = np.random.default_rng(3).standard_normal((4, 4)).astype(np.float32)
    model = bench.model(bench.graph(body, "float[N,4] v", "float[a,b] y"), w=weight)
    normal(bench, model, v=np.ones((3, 4), np.float32))
    constants = [value for node in model.graph for value in node.inputs if value.is_initializer()]
    assert len(constants) == len(set(constants)) == 5  # the bias of the Gemm is the fifth


def test_weight_that_is_an_output_is_copied(bench: Any) -> None:
    model = bench.model(bench.graph("y = Conv (x, w)", INPUT), w=W)
    model.graph.outputs.append(model.graph.initializers["w"])
    normalize(model)
    assert model.graph.node(0).inputs[1].name != "w"
    assert [value.name for value in model.graph.outputs] == ["y", "w"]


@pytest.mark.parametrize("layer", ["Conv", "ConvTranspose"])
def test_missing_bias_is_zero(bench: Any, layer: str) -> None:
    model = normal(bench, bench.model(bench.graph(f"y = {layer} (x, w)", INPUT), w=W), x=x())
    bias = constant_tensor(model.graph.node(0).inputs[2])
    assert bias.numpy().tolist() == [0, 0, 0, 0]


GEMM = np.random.default_rng(4).standard_normal((4, 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("bias", "nodes"),
    [
        (None, ["Gemm"]),
        (np.float32(2), ["Gemm"]),
        (np.array([2], np.float32), ["Gemm"]),
        (np.arange(5, dtype=np.float32), ["Gemm"]),
        (np.arange(5, dtype=np.float32)[None], ["Gemm"]),
        (np.arange(3, dtype=np.float32)[:, None], ["Gemm", "Mul", "Add"]),
        (np.ones((3, 5), np.float32), ["Gemm", "Mul", "Add"]),
    ],
)
def test_gemm(bench: Any, bias: npt.NDArray[np.float32] | None, nodes: list[str]) -> None:
    body = f"y = Gemm <alpha = 0.5, beta = 3.0> (v, w{'' if bias is None else ', b'})"
    arrays = {"w": GEMM} | ({} if bias is None else {"b": bias})
    model = bench.model(bench.graph(body, "float[N,4] v", "float[a,b] y"), **arrays)
    normal(bench, model, v=np.ones((3, 4), np.float32))
    # A constant times beta is not folded here; constant folding came before.
    assert [node.op_type for node in model.graph] in (nodes, [n for n in nodes if n != "Mul"])


def test_gemm_that_adds_an_activation_is_split(bench: Any) -> None:
    body = "y = Gemm <beta = 2.0> (v, w, u)"
    model = bench.model(bench.graph(body, "float[N,4] v, float[N,5] u", "float[a,b] y"), w=GEMM)
    normal(bench, model, v=np.ones((3, 4), np.float32), u=np.ones((3, 5), np.float32))
    assert [node.op_type for node in model.graph] == ["Gemm", "Mul", "Add"]
    assert model.graph.outputs[0].name == "y"


def test_layer_with_computed_weight_stays(bench: Any) -> None:
    body = "y = Conv (x, v)"
    model = bench.model(bench.graph(body, f"{INPUT}, float[4,4,3,3] v"))
    normal(bench, model, x=x(), v=W)
    assert len(model.graph.node(0).inputs) == 2


def test_constant_nodes_become_initializers(bench: Any) -> None:
    body = """
        a = Constant <value_float = 2.0> ()
        b = Constant <value = float[2] {1.0, 3.0}> ()
        c = Constant <value_ints = [1, 1]> ()
        d = Constant <value_floats = [1.0, 2.0]> ()
        e = Constant <value_int = 3> ()
        f = Cast <to = 1> (c)
        g = Cast <to = 1> (e)
        h = Sum (a, b, d, f, g)
        s = ReduceSum <keepdims = 0> (h)
        y = Add (x, s)
        z = Constant <value_int = 7> ()
    """
    model = bench.model(bench.graph(body, INPUT, "float[a,b,c,d] y, int64 z"))
    normal(bench, model, x=x())
    assert bench.ops(model)["Constant"] == 1  # the output z
    assert constant_tensor(model.graph.initializers["b"]).numpy().tolist() == [1, 3]


def test_unused_initializers_and_nodes_go(bench: Any) -> None:
    model = bench.model(bench.graph("u = Neg (w) y = Relu (x)", INPUT), w=W, unused=W)
    normal(bench, model, x=x())
    assert not model.graph.initializers
    assert len(model.graph) == 1


def test_initializers_leave_the_inputs(bench: Any) -> None:
    model = bench.model(bench.graph("y = Conv (x, w)", INPUT), w=W)
    model.graph.inputs.append(model.graph.initializers["w"])
    model.ir_version = 3
    assert FreeInputsPass()(model).modified
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert model.ir_version == 4
    assert not FreeInputsPass()(model).modified


def test_output_that_is_an_inner_tensor(bench: Any) -> None:
    model = bench.model(bench.graph("a = Conv (x, w) y = Relu (a)", INPUT, "float[a,b,c,d] y, float[p,q,r,s] a"), w=W)
    normal(bench, model, x=x())
    assert [value.name for value in model.graph.outputs] == ["y", "a"]


def test_optional_outputs_in_the_middle(bench: Any) -> None:
    body = "o, h, c = LSTM <hidden_size = 2> (v, w, r) y = Neg (h)"
    rng = np.random.default_rng(0)
    model = bench.model(
        bench.graph(body, "float[3,N,4] v", "float[a,b,c] y"),
        w=rng.standard_normal((1, 8, 4)).astype(np.float32),
        r=rng.standard_normal((1, 8, 2)).astype(np.float32),
    )
    before = bench.run(model, {"v": np.ones((3, 1, 4), np.float32)})["y"]
    normalize(model)
    np.testing.assert_array_equal(bench.run(model, {"v": np.ones((3, 1, 4), np.float32)})["y"], before)
