"""Barriers against what onnxruntime rewrites by itself: where they stand, and that the numbers stay the plan's."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from postquant.passes.barriers import before_barrier, is_barrier
from postquant.passes.emit import emit
from postquant.passes.place import Override
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

KEEP = "<pads = [1, 1, 1, 1]>"
U8 = QuantSpec(8, signed=False, symmetric=False)


class Bench:
    """``x -> integer Conv -> [middle] -> integer Conv``; the node named ``middle`` stays in float."""

    def __init__(self, bench: Any, rng: np.random.Generator, folder: pathlib.Path) -> None:
        self.bench, self.rng, self.folder = bench, rng, folder

    def quantized(self, middle: str, *, outputs: str = "", **arrays: Any) -> tuple[ir.Model, ir.Model, QuantPlan]:
        """The float model, the emitted one, and the plan."""
        weights = {name: self.rng.standard_normal((4, 4, 3, 3)).astype(np.float32) for name in ("w1", "w9")}
        # Channels of very different size: one scale for the whole tensor ruins the small ones.
        spread = np.array([1, 0.1, 0.01, 0.003], np.float32)
        wide = self.rng.standard_normal((4, 4, 3, 3)).astype(np.float32) * spread[:, None, None, None]
        bias = self.rng.standard_normal(4).astype(np.float32)
        known = {"w5": wide, "wt": wide.swapaxes(0, 1).copy(), "b5": bias, **arrays}
        text = self.bench.graph(
            f"a = Conv {KEEP} (x, w1, b1) {middle} y = Conv {KEEP} (z, w9, b9)",
            outputs=f"float[a,b,c,d] y{outputs}",
        )
        zeros = np.zeros(4, np.float32)
        used = {name: array for name, array in known.items() if f" {name}" in middle}
        model = self.bench.model(text, **weights, b1=zeros, b9=zeros, **used)
        next(node for node in model.graph if node.outputs[0].name == "m").name = "middle"
        placed = self.bench.place(model, overrides=(Override(node="middle", float_=True),))
        plan = self.bench.calibrate(model, placed, self.bench.feeds(self.rng, 3))
        return model, emit(model, plan), plan

    def barriers(self, model: ir.Model) -> list[str]:
        """Names of the values that barriers copy."""
        return [node.inputs[0].name or "" for node in model.graph if is_barrier(node) and node.inputs[0] is not None]

    def difference(self, model: ir.Model, output: str = "y") -> float:
        """Share of outputs that change when onnxruntime optimizes."""
        feed = self.bench.feeds(self.rng, 1)[0]
        plain, fast = (self.bench.run(model, feed, optimize=optimize)[output] for optimize in (False, True))
        return float(np.mean(np.abs(plain - fast) > 1e-5 * np.abs(plain).max()))

    def without_barriers(self, model: ir.Model) -> ir.Model:
        """A copy in which nobody reads a barrier."""
        copy = model.clone()
        for node in copy.graph:
            for index, value in enumerate(node.inputs):
                node.replace_input_with(index, before_barrier(value))
        copy.graph.remove([node for node in copy.graph if is_barrier(node)], safe=True)
        return copy

    def ops(self, model: ir.Model) -> Any:
        """Operators of the optimized graph."""
        return self.bench.optimized(model, self.folder)


@pytest.fixture
def lab(bench: Any, rng: np.random.Generator, tmp_path: pathlib.Path) -> Bench:
    return Bench(bench, rng, tmp_path)


class TestFloatConstants:
    @pytest.mark.parametrize(
        "middle",
        [
            f"m = Conv {KEEP} (a, w5, b5) z = Relu (m)",
            f"m = Conv {KEEP} (a, w5, b5) r = Relu (m) z = Clip (r, , six)",
            f"m = Conv {KEEP} (a, w5, b5) z = LeakyRelu <alpha = 1.0> (m)",
            f"m = Conv {KEEP} (a, w5, b5) s = Relu (m) z = MaxPool <kernel_shape = [2, 2]> (s)",
            f"m = Conv {KEEP} (a, w5, b5) z = Transpose <perm = [0, 1, 3, 2]> (m)",
            f"p = MaxPool <kernel_shape = [2, 2]> (a) m = Conv {KEEP} (p, w5, b5) z = Relu (m)",
            f"m = ConvTranspose {KEEP} (a, wt, b5) z = Relu (m)",
        ],
    )
    def test_the_node_stays_float_and_numbers_equal(self, lab: Bench, middle: str) -> None:
        _, result, plan = lab.quantized(middle, six=np.float32(6))
        lab.bench.check(result)
        assert plan.floats["middle"] == "the configuration keeps it in float"
        assert lab.difference(result) < 0.02  # rounding ties of the integer convolution behind it
        ops = lab.ops(result)
        assert ops["QLinearConv"] == 2
        assert ops["Conv"] + ops["FusedConv"] + ops["ConvTranspose"] == 1
        # The barrier is there if, and only if, onnxruntime quantizes the weight without it.
        bare = lab.without_barriers(result)
        assert bool(lab.barriers(result)) == (lab.difference(bare) > 0.1)

    @pytest.mark.parametrize("op", ["Gemm (a, w, b)", "Gemm <transB = 1> (a, w, b)", "MatMul (a, w)"])
    @pytest.mark.parametrize("inputs", ["float[6,8] x", "float[N,8] x"])
    def test_matrix_products(self, lab: Bench, op: str, inputs: str) -> None:
        add = "m = Add (t, b)" if op.startswith("MatMul") else "m = Relu (t)"
        text = lab.bench.graph(
            f"a = Gemm (x, v, b) t = {op} {add} r = Relu (m) y = Gemm (r, v, b)", inputs, "float[K,8] y"
        )
        spread = np.logspace(-2, 0, 8).astype(np.float32)
        w = lab.rng.standard_normal((8, 8)).astype(np.float32) * spread
        v, b = lab.rng.standard_normal((8, 8)).astype(np.float32), lab.rng.standard_normal(8).astype(np.float32)
        model = lab.bench.model(text, w=w.T.copy() if "transB" in op else w, v=v, b=b)
        feeds = lab.bench.feeds(lab.rng, 3, (6, 8))
        middle = {"MatMul_1", "Gemm_1", "Add_2"} & {node.name for node in model.graph}
        overrides = tuple(Override(node=name, float_=True) for name in sorted(middle))
        plan = lab.bench.calibrate(model, lab.bench.place(model, overrides=overrides), feeds)
        # Its input is stored by force: what Gemm writes is read in float otherwise.
        plan = plan.with_activation("a", TensorQuantizer.from_range(U8, -8, 8))
        stored = emit(model, dataclasses.replace(plan, floats={**plan.floats, "Gemm_0": "so that a is stored"}))
        source = next(node for node in stored.graph if node.name in middle and "Add" not in node.name)
        assert (source.inputs[0] is not before_barrier(source.inputs[0])) == bool(lab.barriers(stored))
        plain, fast = (lab.bench.run(stored, feeds[0], optimize=optimize)["y"] for optimize in (False, True))
        np.testing.assert_allclose(plain, fast, atol=1e-4 * np.abs(plain).max())

    def test_two_nodes_share_one_barrier(self, lab: Bench) -> None:
        arrays = lab.bench.arrays(lab.rng)
        model = lab.bench.model(
            lab.bench.graph(
                f"a = Conv {KEEP} (x, w1, b1) k = Conv {KEEP} (a, w1, b1) m = Conv {KEEP} (a, w2, b2) "
                f"p = Conv {KEEP} (k, w3, b3) q = Conv {KEEP} (m, w4, b4) y = Add (p, q)"
            ),
            **arrays,
            w3=arrays["w1"],
            b3=arrays["b1"],
            w4=arrays["w2"],
            b4=arrays["b2"],
        )
        overrides = tuple(Override(node=name, float_=True) for name in ("Conv_1", "Conv_2"))
        plan = lab.bench.calibrate(model, lab.bench.place(model, overrides=overrides), lab.bench.feeds(lab.rng))
        result = emit(model, plan)
        assert lab.barriers(result) == ["a_dequantized"]
        assert lab.difference(result) < 0.02
        assert lab.ops(result)["QLinearConv"] == 3

    def test_no_barrier_where_nothing_is_quantized(self, lab: Bench) -> None:
        # Another reader of the float result keeps onnxruntime from it.
        middle = f"m = Conv {KEEP} (a, w5, b5) e = Exp (m) q = Relu (m) z = Add (q, a)"
        _, result, _ = lab.quantized(middle, outputs=", float[a,b,c,d] e")
        assert lab.barriers(result) == []
        assert lab.difference(result) < 0.02
        # Neither is there one in a model without float layers.
        model = lab.bench.model(
            lab.bench.graph(f"a = Conv {KEEP} (x, w1, b1) y = Conv {KEEP} (a, w2, b2)"), **lab.bench.arrays(lab.rng)
        )
        plan = lab.bench.calibrate(model, lab.bench.place(model), lab.bench.feeds(lab.rng))
        assert lab.barriers(emit(model, plan)) == []

    def test_partly_decided_plans(self, lab: Bench) -> None:
        """Calibration runs graphs whose activations are decided before their weights."""
        model = lab.bench.model(
            lab.bench.graph(f"a = Conv {KEEP} (x, w1, b1) y = Conv {KEEP} (a, w2, b2)"), **lab.bench.arrays(lab.rng)
        )
        specs = lab.bench.place(model)
        plan = lab.bench.calibrate(model, specs, lab.bench.feeds(lab.rng))
        result = emit(model, dataclasses.replace(plan, weights=specs.weights))
        assert lab.barriers(result) == ["x_dequantized", "a_dequantized"]
        assert lab.difference(result) < 1e-3
        assert "QLinearConv" not in lab.ops(result)

    def test_a_bias_that_does_not_fit_int32(self, lab: Bench) -> None:
        arrays = lab.bench.arrays(lab.rng)
        model = lab.bench.model(lab.bench.graph(f"y = Conv {KEEP} (x, w1, b1)"), w1=arrays["w1"], b1=arrays["b1"])
        plan = lab.bench.calibrate(model, lab.bench.place(model), lab.bench.feeds(lab.rng))
        weight = plan.weights["w1"]
        tiny = dataclasses.replace(weight, scale=np.where(np.arange(4) == 2, 1e-12, weight.scale).astype(np.float32))
        result = emit(model, plan.with_weight("w1", tiny))
        assert lab.barriers(result) == ["x_dequantized"]
        assert lab.difference(result) < 1e-3
        assert lab.difference(lab.without_barriers(result)) > 0.1


class TestRequantization:
    @pytest.fixture
    def block(self, lab: Bench) -> tuple[ir.Model, QuantPlan]:
        model = lab.bench.model(
            lab.bench.graph(f"a = Conv {KEEP} (x, w1, b1) y = Conv {KEEP} (a, w2, b2)"), **lab.bench.arrays(lab.rng)
        )
        plan = lab.bench.calibrate(model, lab.bench.place(model), lab.bench.feeds(lab.rng))
        second = next(node for node in model.graph if node.outputs[0].name == "y")
        key = f"{second.name}:0"
        stored = plan.activations["a"]
        other = TensorQuantizer(stored.spec, stored.scale * np.float32(3.7), stored.zero_point)
        plan = plan.with_requant(key, other)
        return model, dataclasses.replace(plan, int_biases={**plan.int_biases, "b2": (key, "w2")})

    def test_pairs_with_one_reader_are_kept_apart(self, lab: Bench, block: tuple[ir.Model, QuantPlan]) -> None:
        model, plan = block
        result = emit(model, plan)
        lab.bench.check(result)
        (clip,) = (node for node in result.graph if node.op_type == "Clip")
        bounds = [lab.bench.array(result, value.name) for value in clip.inputs[1:] if value is not None]
        assert [int(b) for b in bounds] == [0, 255]
        assert lab.difference(result) < 0.03
        ops = lab.ops(result)
        assert (ops["QLinearConv"], ops["Clip"], ops["QuantizeLinear"]) == (2, 1, 2)
        bare = result.clone()
        (clip,) = (node for node in bare.graph if node.op_type == "Clip")
        codes = clip.inputs[0]
        assert codes is not None
        clip.outputs[0].replace_all_uses_with(codes)
        bare.graph.remove(clip, safe=True)
        assert lab.difference(bare) > 0.1  # what happens without it

    def test_another_reader_needs_no_clip(self, lab: Bench, block: tuple[ir.Model, QuantPlan]) -> None:
        model, plan = block
        value = next(v for node in model.graph for v in node.outputs if v.name == "a")
        model.graph.outputs.append(value)
        result = emit(model, plan)
        assert not [node for node in result.graph if node.op_type == "Clip"]
        assert lab.difference(result) < 0.03
        assert lab.difference(result, "a") < 0.03

    def test_narrow_codes_have_a_clip_already(self, lab: Bench, block: tuple[ir.Model, QuantPlan]) -> None:
        model, plan = block
        (key,) = plan.requants
        plan = plan.with_requant(key, TensorQuantizer.from_range(QuantSpec(4, False, False), -3, 5))
        result = emit(model, plan)
        assert len([node for node in result.graph if node.op_type == "Clip"]) == 1
        assert lab.difference(result) < 0.03
