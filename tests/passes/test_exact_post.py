"""POST without its lattice: two planes, whose sum has the exact powers of sqrt(2), and the group read back."""

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
from postquant.passes.lut_expansion import is_packed, is_two_planes, packed_layers, with_qdq
from postquant.passes.plan import QuantPlan
from postquant.passes.target import WeightStorage
from postquant.pipeline.kernels import integer_coverage
from postquant.runtime_ops.code_book import CodeBook, post_table
from postquant.runtime_ops.ops import reference_classes
from postquant.runtime_ops.post_lattice import exact_levels
from postquant.runtime_ops.quantizer import TensorQuantizer

# Body, input, weights by shape; y is the only weighted output in float.
BODIES: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "matmul": (
        "a = MatMul (x, w1) s = Add (a, b1) y = Erf (s)",
        "float[N,5,6] x",
        {"w1": (6, 7), "b1": (7,)},
    ),
    "no bias": ("a = MatMul (x, w1) y = Erf (a)", "float[N,5,6] x", {"w1": (6, 7)}),
    "gemm": ("a = Gemm <transB = 1> (x, w1, b1) y = Erf (a)", "float[N,6] x", {"w1": (7, 6), "b1": (7,)}),
}


def made(
    bench: Any, rng: np.random.Generator, kind: str, bits: int = 4
) -> tuple[ir.Model, QuantPlan, dict[str, np.ndarray]]:
    """A model, its plan with POST weights, and a sample."""
    body, data, shapes = BODIES[kind]
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    outputs = f"float[{','.join('abcd'[: data.count(',') + 1])}] y"
    model = bench.model(bench.graph(body, data, outputs, 21), **arrays)
    shape = (3, 5, 6) if "5" in data else (3, 6)
    feed = {"x": rng.standard_normal(shape).astype(np.float32)}
    plan = bench.calibrate(model, bench.place(model, wbits=bits, first_last_bits=None), [feed])
    return model, with_post(model, plan), feed


def with_post(model: ir.Model, plan: QuantPlan) -> QuantPlan:
    """The same plan with lattice weights of the same range."""
    weights = {}
    for name, entry in plan.weights.items():
        assert isinstance(entry, TensorQuantizer)
        spec = dataclasses.replace(entry.spec, code_book=CodeBook.POST, narrow=False)
        scale = (entry.scale * np.float32(entry.spec.qmax / 96)).astype(np.float32)
        weights[name] = TensorQuantizer(spec, scale, entry.zero_point, table=post_table(spec.bits))
    return fit_biases(model, dataclasses.replace(plan, weights=weights))


def exact(model: ir.Model, plan: QuantPlan) -> ir.Model:
    return emit(model, plan, weight_storage=WeightStorage.PACKED, exact_post=True)


def expected(model: ir.Model, plan: QuantPlan, feed: dict[str, np.ndarray]) -> np.ndarray:
    """The pre-activation in double precision: quantized input, exact levels, bias in the units of an accumulator."""
    arrays = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    quantizer, source = plan.weights["w1"], plan.activation_quantizer("x")
    assert isinstance(quantizer, TensorQuantizer)
    assert source is not None
    codes = quantizer.quantize(arrays["w1"])
    level = dict(zip(post_table(quantizer.spec.bits).tolist(), exact_levels(quantizer.spec.bits) * 96, strict=True))
    real = np.vectorize(level.__getitem__)(codes).astype(np.float64)
    axis = quantizer.spec.axis or 0
    weight = real * np.expand_dims(quantizer.scale.astype(np.float64), 1 - axis)
    x = source.dequantize(source.quantize(feed["x"])).astype(np.float64)
    unit = float(source.scale) * quantizer.scale.astype(np.float64)
    bias = np.rint(arrays["b1"] / unit) * unit if "b1" in arrays else 0.0
    return np.asarray(x @ (weight.T if axis == 0 else weight) + bias)


def before_erf(model: ir.Model) -> ir.Model:
    """The model with the input of Erf as its output."""
    copy = model.clone()
    node = next(node for node in copy.graph if node.op_type == "Erf")
    value = node.inputs[0]
    assert value is not None
    copy.graph.outputs[0] = value
    value.dtype = ir.DataType.FLOAT
    copy.graph.remove(node, safe=False)
    return copy


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("bits", [4, 2])
def test_the_sum_of_both_planes_is_exact(bench: Any, rng: np.random.Generator, kind: str, bits: int) -> None:
    model, plan, feed = made(bench, rng, kind, bits)
    result = exact(model, plan)
    bench.check(result)
    assert sum(is_packed(node) for node in result.graph) == 2
    (layer,) = [node for node in result.graph if is_two_planes(node)]
    assert list(packed_layers(result)) == [layer.name]
    law = expected(model, plan, feed)
    shown = before_erf(result)
    (found,) = bench.run(shown, feed).values()
    np.testing.assert_allclose(found, law, rtol=0, atol=2e-6 * np.abs(law).max())
    (reference,) = ReferenceEvaluator(ir.to_proto(shown), new_ops=reference_classes()).run(None, feed)
    np.testing.assert_allclose(np.asarray(reference), law, rtol=0, atol=2e-6 * np.abs(law).max())
    # The lattice is further away.
    lattice = emit(model, plan, weight_storage=WeightStorage.PACKED)
    (near,) = bench.run(before_erf(lattice), feed).values()
    assert np.abs(near - law).max() > 20 * np.abs(found - law).max()


@pytest.mark.parametrize("kind", BODIES)
def test_onnxruntime_runs_two_integer_products(bench: Any, rng: np.random.Generator, kind: str, tmp_path: Any) -> None:
    model, plan, _ = made(bench, rng, kind)
    result = exact(model, plan)
    ops = bench.optimized(result, tmp_path)
    assert ops["MatMulIntegerToFloat"] == 2
    assert not {"Gemm", "MatMul", "Gather", "BitShift", "DequantizeLinear"} & set(ops)
    coverage = integer_coverage(result)
    assert set(coverage.integer.values()) == {"MatMulIntegerToFloat"}
    assert not coverage.floating


@pytest.mark.parametrize("kind", BODIES)
def test_the_group_is_read_back(bench: Any, rng: np.random.Generator, kind: str, tmp_path: pathlib.Path) -> None:
    model, plan, _ = made(bench, rng, kind)
    path = tmp_path / "model.onnx"
    onnx.save_model(ir.to_proto(exact(model, plan)), path)
    result, plain = with_qdq(ir.load(path)), emit(model, plan)
    assert not any(is_packed(node) for node in result.graph)
    assert bench.ops(result) == bench.ops(plain)
    assert constants(result) == constants(plain)
    assert len(constants(plain)) == (6 if "b1" in BODIES[kind][2] else 3)


def constants(model: ir.Model) -> dict[tuple[str | None, str, int, int], bytes]:
    """Codes, scales and zero points of dequantized constants, by node, operator, its input and theirs."""
    found = {}
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            dequantize = None if value is None else value.producer()
            if dequantize is None or dequantize.op_type != "DequantizeLinear" or node.op_type == "QuantizeLinear":
                continue
            parts = [None if part is None else part.const_value for part in dequantize.inputs]
            if parts[0] is not None:
                for at, part in enumerate(parts):
                    assert part is not None
                    found[node.name, node.op_type, index, at] = part.numpy().tobytes()
    return found


def test_other_books_and_convolutions_are_left_alone(bench: Any, rng: np.random.Generator) -> None:
    model, plan, _ = made(bench, rng, "matmul")
    entry = plan.weights["w1"]
    assert isinstance(entry, TensorQuantizer)
    learned = dataclasses.replace(entry, spec=dataclasses.replace(entry.spec, code_book=CodeBook.LEARNED))
    result = exact(model, dataclasses.replace(plan, weights={"w1": learned}))
    assert [node.op_type for node in result.graph if is_packed(node)] == ["LutMatMulIntegerToFloat"]
    arrays = {"w1": rng.standard_normal((3, 4, 2, 2)).astype(np.float32)}
    model = bench.model(bench.graph("c = Conv (x, w1) y = Sigmoid (c)"), **arrays)
    plan = bench.calibrate(model, bench.place(model, wbits=4, first_last_bits=None), bench.feeds(rng))
    result = exact(model, with_post(model, plan))
    assert [node.op_type for node in result.graph if is_packed(node)] == ["LutQLinearConv"]
