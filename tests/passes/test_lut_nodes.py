"""Packed weights: the same numbers as the plain groups, in fewer bytes, and the groups read back."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from postquant.passes.biases import fit_biases
from postquant.passes.emit import emit
from postquant.passes.lut_expansion import is_packed, with_qdq
from postquant.passes.lut_nodes import METADATA_KEY, Origin
from postquant.passes.plan import QuantPlan
from postquant.passes.target import WeightStorage
from postquant.runtime_ops.code_book import CodeBook
from postquant.runtime_ops.errors import VerificationError
from postquant.runtime_ops.ops import reference_classes
from postquant.runtime_ops.quantizer import TensorQuantizer

SAME = "<pads = [1, 1, 1, 1]>"
IMAGE, VECTOR, TOKENS = "float[N,4,8,8] x", "float[N,6] x", "float[N,5,6] x"
# Body, input, weights by shape: weighted nodes with quantized outputs, and with float ones where the body says so.
BODIES: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "conv": (
        f"a = Conv {SAME} (x, w1, b1) r = Relu (a) c = Conv {SAME} (r, w2, b2) y = Sigmoid (c)",
        IMAGE,
        {"w1": (4, 4, 3, 3), "b1": (4,), "w2": (7, 4, 3, 3), "b2": (7,)},
    ),
    "no bias, strided, dilated": (
        "a = Conv <strides = [2, 1], dilations = [1, 2], pads = [1, 0, 0, 2]> (x, w1) c = Conv (a, w2) y = Sigmoid (c)",
        IMAGE,
        {"w1": (6, 4, 3, 3), "w2": (5, 6, 1, 1)},
    ),
    "depthwise and grouped": (
        "a = Conv <group = 4, pads = [1, 1, 1, 1]> (x, w1, b1) c = Conv <group = 2> (a, w2) y = Sigmoid (c)",
        IMAGE,
        {"w1": (4, 1, 3, 3), "b1": (4,), "w2": (6, 2, 1, 1)},
    ),
    "one dimension": (
        "a = Conv <pads = [1, 1]> (x, w1, b1) c = Conv (a, w2) y = Sigmoid (c)",
        "float[N,4,9] x",
        {"w1": (5, 4, 3), "b1": (5,), "w2": (3, 5, 1)},
    ),
    "gemm": (
        """a = Gemm <alpha = 0.5, beta = 2.0> (x, w1, b1) r = Relu (a)
        c = Gemm <transB = 1> (r, w2, b2) y = Gemm (c, w3)""",
        VECTOR,
        {"w1": (6, 5), "b1": (1, 5), "w2": (3, 5), "b2": (3,), "w3": (3, 2)},
    ),
    "matmul": (
        "a = MatMul (x, w1) s = Add (a, b1) r = Relu (s) c = MatMul (r, w2) y = MatMul (c, w3)",
        TOKENS,
        {"w1": (6, 7), "b1": (7,), "w2": (7, 3), "w3": (3, 2)},
    ),
    "float outputs": (
        """a = MatMul (x, w1) s = Add (b1, a) f = Softmax (s) c = MatMul (f, w2) e = Erf (c)
        d = MatMul (e, w3) t = Add (d, b3) y = LayerNormalization (t, g)""",
        TOKENS,
        {"w1": (6, 7), "b1": (7,), "w2": (7, 3), "w3": (3, 5), "b3": (5,), "g": (5,)},
    ),
    "float outputs of a gemm": (
        """a = Gemm <alpha = 0.5, beta = 2.0> (x, w1, b1) s = Erf (a) c = Gemm <transB = 1> (s, w2) r = Erf (c)
        y = Add (r, c)""",
        VECTOR,
        {"w1": (6, 5), "b1": (1, 5), "w2": (3, 5)},
    ),
    "two readers": (
        f"a = Conv {SAME} (x, w1, b1) r = Relu (a) c = Conv {SAME} (r, w2, b2) s = Add (c, r) y = Sigmoid (s)",
        IMAGE,
        {"w1": (4, 4, 3, 3), "b1": (4,), "w2": (4, 4, 3, 3), "b2": (4,)},
    ),
}


def made(
    bench: Any, rng: np.random.Generator, kind: str, *, opset: int = 17, **settings: Any
) -> tuple[ir.Model, QuantPlan, list[Any]]:
    """A model, its plan with tables on all weights, and samples."""
    body, data, shapes = BODIES[kind]
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    rank = data.count(",")
    outputs = f"float[{','.join('abcd'[: rank + 1])}] y"
    model = bench.model(bench.graph(body, data, outputs, opset), **arrays)
    shape = [int(d) if d.isdigit() else 2 for d in data[data.index("[") + 1 : data.index("]")].split(",")]
    feeds = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(2)]
    plan = bench.calibrate(model, bench.place(model, **{"wbits": 4, "first_last_bits": None, **settings}), feeds)
    return model, plan, feeds


def with_tables(model: ir.Model, plan: QuantPlan, rng: np.random.Generator) -> QuantPlan:
    """Random tables in place of uniform codes."""
    weights = {}
    for name, entry in plan.weights.items():
        assert isinstance(entry, TensorQuantizer)
        table = np.sort(rng.choice(np.arange(-127, 128), 1 << entry.spec.bits, replace=False)).astype(np.int8)
        spec = dataclasses.replace(entry.spec, code_book=CodeBook.LEARNED, narrow=False)
        scale = (entry.scale * np.float32(entry.spec.qmax / 127)).astype(np.float32)
        weights[name] = TensorQuantizer(spec, scale, entry.zero_point, table=table)
    return fit_biases(model, dataclasses.replace(plan, weights=weights))


def packed(model: ir.Model, plan: QuantPlan) -> ir.Model:
    return emit(model, plan, weight_storage=WeightStorage.PACKED)


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("bits", [4, 2])
def test_the_same_numbers_as_plain_groups(bench: Any, rng: np.random.Generator, kind: str, bits: int) -> None:
    model, plan, feeds = made(bench, rng, kind, wbits=bits)
    plan = with_tables(model, plan, rng)
    plain, result = emit(model, plan), packed(model, plan)
    bench.check(result)
    assert sum(is_packed(node) for node in result.graph) == len(plan.weights)
    assert not {"Conv", "Gemm", "MatMul"} & {node.op_type for node in result.graph}
    for feed in feeds:
        expected = bench.run(plain, feed)["y"]
        found = bench.run(result, feed)["y"]
        if kind.startswith("float"):  # int32 biases are added before, float ones after the sum became float
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(bench.run(result, feed, optimize=False)["y"], expected, atol=0.01)


@pytest.mark.parametrize("kind", BODIES)
def test_onnx_reference_agrees(bench: Any, rng: np.random.Generator, kind: str) -> None:
    model, plan, feeds = made(bench, rng, kind, opset=21)
    result = packed(model, with_tables(model, plan, rng))
    evaluator = ReferenceEvaluator(ir.to_proto(result), new_ops=reference_classes())
    (found,) = evaluator.run(None, feeds[0])
    np.testing.assert_allclose(np.asarray(found, np.float32), bench.run(result, feeds[0])["y"], atol=0.01)


@pytest.mark.parametrize("kind", BODIES)
def test_onnxruntime_runs_integer_kernels(
    bench: Any, rng: np.random.Generator, kind: str, tmp_path: pathlib.Path
) -> None:
    model, plan, _ = made(bench, rng, kind)
    ops = bench.optimized(packed(model, with_tables(model, plan, rng)), tmp_path)
    assert ops["QLinearConv"] + ops["QGemm"] + ops["MatMulIntegerToFloat"] == len(plan.weights)
    assert not {"Conv", "Gemm", "MatMul", "Gather", "BitShift"} & set(ops)


@pytest.mark.parametrize("kind", BODIES)
def test_uniform_codes_and_narrow_activations(bench: Any, rng: np.random.Generator, kind: str) -> None:
    model, plan, feeds = made(bench, rng, kind, abits=4, wbits=3)
    result = packed(model, plan)
    assert all(node.attributes["bits"].as_int() == 4 for node in result.graph if is_packed(node))
    np.testing.assert_array_equal(bench.run(result, feeds[0])["y"], bench.run(emit(model, plan), feeds[0])["y"])


@pytest.mark.parametrize("kind", BODIES)
def test_groups_are_read_back(bench: Any, rng: np.random.Generator, kind: str, tmp_path: pathlib.Path) -> None:
    model, plan, feeds = made(bench, rng, kind)
    plan = with_tables(model, plan, rng)
    path = tmp_path / "model.onnx"
    onnx.save_model(ir.to_proto(packed(model, plan)), path)
    plain, result = emit(model, plan), with_qdq(ir.load(path))
    assert not any(is_packed(node) for node in result.graph)
    by_name = {node.name: node for node in result.graph}
    initial = {v.name: v.const_value for v in result.graph.initializers.values()}
    for node in plain.graph:
        if node.op_type in ("Conv", "Gemm", "MatMul", "Add"):
            assert by_name[node.name].op_type == node.op_type
            assert by_name[node.name].outputs[0].name is not None
    for name, value in plain.graph.initializers.items():
        if name.endswith("_quantized"):
            assert value.const_value is not None
            found = initial[name]
            assert found is not None
            np.testing.assert_array_equal(found.numpy(), value.const_value.numpy())
    np.testing.assert_array_equal(bench.run(result, feeds[0])["y"], bench.run(plain, feeds[0])["y"])
    codes = {v.name for n in plain.graph for v in n.outputs if (v.name or "").endswith("_quantized")}
    assert codes <= {v.name for n in result.graph for v in n.outputs}


def test_what_says_nothing_about_itself_is_read_all_the_same(bench: Any, rng: np.random.Generator) -> None:
    for kind in ("conv", "gemm", "matmul", "float outputs"):
        model, plan, feeds = made(bench, rng, kind)
        result = packed(model, plan)
        expected = bench.run(result, feeds[0])["y"]
        for node in result.graph:
            node.metadata_props.clear()
        found = bench.run(with_qdq(result), feeds[0])["y"] if kind not in ("matmul", "float outputs") else expected
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_model_carries_what_it_needs(bench: Any, rng: np.random.Generator) -> None:
    model, plan, _ = made(bench, rng, "conv")
    result = packed(model, plan)
    assert result.graph.opset_imports["ai.postquant"] == 1
    assert [f.name for f in result.functions.values()] == ["LutQLinearConv"]
    assert result.ir_version >= 8
    assert not set(result.graph.initializers) & {"w1_quantized", "w1_zero_point", "b1_scale"}
    one, two = (ir.to_proto(packed(model, plan)).SerializeToString(deterministic=True) for _ in range(2))
    assert one == two


def test_wide_weights_stay_plain(bench: Any, rng: np.random.Generator) -> None:
    model, plan, _ = made(bench, rng, "conv", wbits=8)
    result = packed(model, plan)
    assert not result.functions
    assert "ai.postquant" not in result.graph.opset_imports


@pytest.mark.parametrize(
    ("body", "shapes"),
    [
        ("c = ConvTranspose (x, w1) y = Sigmoid (c)", {"w1": (4, 3, 2, 2)}),
        ('c = Conv <auto_pad = "SAME_UPPER"> (x, w1) y = Sigmoid (c)', {"w1": (3, 4, 2, 2)}),
        ("y = MatMul (x, w1)", {"w1": (2, 4, 8, 3)}),
    ],
)
def test_what_has_no_packed_form_keeps_int8(
    bench: Any, rng: np.random.Generator, body: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model = bench.model(bench.graph(body), **arrays)
    plan = bench.place(model, wbits=4, first_last_bits=None)
    plan = bench.calibrate(model, plan, bench.feeds(rng))
    result = packed(model, plan)
    assert not any(is_packed(node) for node in result.graph)
    assert bench.ops(result) == bench.ops(emit(model, plan))


def test_int4_storage_leaves_tables_in_int8(bench: Any, rng: np.random.Generator) -> None:
    body, data, shapes = BODIES["conv"]
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model = bench.model(bench.graph(body, data, opset=21), **arrays)
    feeds = bench.feeds(rng)
    plan = bench.calibrate(model, bench.place(model, wbits=4, first_last_bits=None), feeds)
    tables = with_tables(model, plan, rng)
    result = emit(model, tables, weight_storage=WeightStorage.INT4)
    assert result.graph.initializers["w1_quantized"].dtype is ir.DataType.INT8
    np.testing.assert_array_equal(bench.run(result, feeds[0])["y"], bench.run(emit(model, tables), feeds[0])["y"])


def test_a_table_that_is_computed_is_refused(bench: Any, rng: np.random.Generator) -> None:
    model, plan, _ = made(bench, rng, "conv")
    result = packed(model, plan)
    node = next(node for node in result.graph if is_packed(node))
    value = ir.Value(name="t", type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape((16,)))
    result.graph.inputs.append(value)
    node.replace_input_with(4, value)
    with pytest.raises(VerificationError, match="not a constant"):
        bench.run(with_qdq(result), {})


def test_origins_survive_metadata(bench: Any, rng: np.random.Generator) -> None:
    model, plan, _ = made(bench, rng, "gemm")
    for node in packed(model, plan).graph:
        if is_packed(node):
            origin = Origin.of(node)
            assert origin.op_type == "Gemm"
            assert Origin.of(node).to_json() == node.metadata_props[METADATA_KEY]
