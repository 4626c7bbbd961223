"""Emission of shared scales, requantization, matrix products, transposed convolutions and packed codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from postquant.passes.concat import share_concat
from postquant.passes.emit import emit
from postquant.passes.place import Override
from postquant.passes.plan import QuantPlan
from postquant.passes.target import WeightStorage
from postquant.passes.weight_codes import weight_codes
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

KEEP = "<pads = [1, 1, 1, 1]>"
BLOCK = f"a = Conv {KEEP} (x, w1, b1) r = Relu (a) y = Conv {KEEP} (r, w2, b2)"


@pytest.fixture
def block(bench: Any, rng: np.random.Generator) -> Any:
    return bench.model(bench.graph(BLOCK), **bench.arrays(rng))


class TestSharedScales:
    BODY = f"""
        a = Conv {KEEP} (x, w1, b1)
        p = MaxPool <kernel_shape = [2, 2]> (a)
        t = Transpose <perm = [0, 1, 3, 2]> (p)
        y = Conv {KEEP} (t, w2, b2)
    """

    def test_pass_through_nodes_use_the_quantizer_of_their_input(self, bench: Any, rng: np.random.Generator) -> None:
        model = bench.model(bench.graph(self.BODY), **bench.arrays(rng))
        plan = bench.calibrate(model, bench.place(model, abits=4, first_last_bits=None), bench.feeds(rng))
        assert plan.shared == {"p": "a", "t": "p" if "p" in plan.activations else "a"}
        result = emit(model, plan)
        bench.check(result)
        values = {name: bench.array(result, f"{name}_scale") for name in ("a", "p", "t")}
        assert values["a"] == values["p"] == values["t"]
        # Codes behind a pass-through node were saturated before it: no second Clip.
        assert "p_saturated" not in {v.name for node in result.graph for v in node.outputs}

    @pytest.mark.parametrize("shared", [False, True])
    def test_concat_both_ways(self, bench: Any, rng: np.random.Generator, shared: bool) -> None:
        text = bench.graph(
            f"a = Conv {KEEP} (x, w1, b1) r = Relu (a) b = Conv {KEEP} (x, w2, b2) m = Concat <axis = 1> (r, b) "
            f"y = Conv {KEEP} (m, w3, b3)"
        )
        extra = bench.arrays(rng)
        model = bench.model(text, **extra, w3=np.concatenate([extra["w1"], extra["w2"]], 1), b3=extra["b2"])
        plan = bench.place(model)
        if shared:
            plan = share_concat(plan, next(node for node in model.graph if node.op_type == "Concat"))
        plan = bench.calibrate(model, plan, bench.feeds(rng))
        result = emit(model, plan)
        bench.check(result)
        scales = {float(bench.array(result, f"{name}_scale")) for name in ("r", "b", "m")}
        assert len(scales) == (1 if shared else 2)  # min-max: the wider input has the output's range
        # A shared zero point is not 0, so Relu needs a Clip of codes.
        assert bench.ops(result)["Clip"] == int(shared)
        feed = bench.feeds(rng)[0]
        assert bench.difference(result, model, feed) < 2e-3

    def test_split_stores_all_its_parts(self, bench: Any, rng: np.random.Generator) -> None:
        text = bench.graph(
            f"a = Conv {KEEP} (x, w1, b1) p, q = Split <axis = 1> (a, s) y = Conv {KEEP} (p, w2, b2) z = Neg (q)",
            outputs="float[a,b,c,d] y, float[e,f,g,h] z",
        )
        extra = bench.arrays(rng) | {"s": np.array([2, 2])}
        extra["w2"] = extra["w2"][:, :2].copy()
        model = bench.model(text, **extra)
        plan = bench.place(model)
        assert plan.shared == {"p": "a", "q": "a"}
        bench.check(emit(model, bench.calibrate(model, plan, bench.feeds(rng))))


class TestRequantization:
    def test_equal_requantizations_are_made_once(self, bench: Any, rng: np.random.Generator) -> None:
        text = bench.graph(
            f"a = Conv {KEEP} (x, w1, b1) b = Conv {KEEP} (a, w2, b2) c = Conv {KEEP} (a, w3, b3) s = Add (a, b) "
            "t = Add (s, c) p = GlobalAveragePool (t) f = Flatten (p) y = Gemm (f, w4, b4)",
            outputs="float[N,3] y",
        )
        extra = bench.arrays(rng)
        model = bench.model(
            text, **extra, w3=-extra["w2"], b3=extra["b2"], w4=np.ones((4, 3), np.float32), b4=np.ones(3, np.float32)
        )
        plan = bench.place(model, wbits=4, abits=4)
        assert set(plan.requants) == {"Conv_1:0", "Conv_2:0"}
        plan = bench.calibrate(model, plan, bench.feeds(rng))
        result = emit(model, plan)
        bench.check(result)
        names = [v.name for node in result.graph for v in node.outputs if "input0" in str(v.name)]
        assert names == ["Conv_1_input0_quantized", "Conv_1_input0_saturated", "Conv_1_input0_dequantized"]
        other = dataclasses.replace(plan.requants["Conv_2:0"], scale=plan.requants["Conv_2:0"].scale * 2)
        assert bench.ops(emit(model, plan.with_requant("Conv_2:0", other)))["Clip"] == 2


class TestMatrixProducts:
    @pytest.mark.parametrize("attributes", ["", "transA = 1", "transB = 1", "alpha = 0.5", "beta = 0.25, alpha = 2.0"])
    @pytest.mark.parametrize("rank", [1, 2])
    def test_gemm(self, bench: Any, rng: np.random.Generator, attributes: str, rank: int) -> None:
        text = bench.graph(
            f"y = Gemm {'<' if attributes else ''}{attributes}{'>' if attributes else ''} (x, w, b)",
            inputs="float[6,6] x",
            outputs="float[6,5] y",
        )
        weight = rng.standard_normal((5, 6) if "transB" in attributes else (6, 5)).astype(np.float32)
        bias = rng.standard_normal(5).astype(np.float32).reshape((1,) * (rank - 1) + (5,))
        model = bench.model(text, w=weight, b=bias)
        samples = bench.feeds(rng, shape=(6, 6))
        result = emit(model, bench.calibrate(model, bench.place(model), samples))
        bench.check(result)
        assert "b_quantized" in result.graph.initializers
        for optimize in (False, True):
            error = bench.run(result, samples[0], optimize=optimize)["y"] - bench.run(model, samples[0])["y"]
            assert np.abs(error).max() < 0.15

    def test_gemm_with_another_addend_keeps_it_in_float(self, bench: Any, rng: np.random.Generator) -> None:
        text = bench.graph("y = Gemm (x, w, b)", inputs="float[6,6] x", outputs="float[6,5] y")
        model = bench.model(text, w=np.ones((6, 5), np.float32), b=np.ones((6, 1), np.float32))
        plan = bench.place(model)
        assert plan.int_biases == {}
        bench.check(emit(model, bench.calibrate(model, plan, bench.feeds(rng, shape=(6, 6)))))

    def test_constant_left_operand(self, bench: Any, rng: np.random.Generator) -> None:
        text = bench.graph("y = MatMul (w, x)", inputs="float[6,6] x", outputs="float[5,6] y")
        model = bench.model(text, w=rng.standard_normal((5, 6)).astype(np.float32))
        samples = bench.feeds(rng, shape=(6, 6))
        result = emit(model, bench.calibrate(model, bench.place(model), samples))
        bench.check(result)
        error = bench.run(result, samples[0])["y"] - bench.run(model, samples[0])["y"]
        assert np.abs(error).max() < 0.15

    def test_conv_transpose(self, bench: Any, rng: np.random.Generator) -> None:
        text = bench.graph("y = ConvTranspose <strides = [2, 2]> (x, w, b)")
        model = bench.model(text, w=rng.standard_normal((4, 3, 3, 3)).astype(np.float32), b=np.ones(3, np.float32))
        samples = bench.feeds(rng)
        plan = bench.calibrate(model, bench.place(model), samples)
        result = emit(model, plan)
        bench.check(result)
        assert plan.weights["w"].scale.shape == (3,)
        error = bench.run(result, samples[0])["y"] - bench.run(model, samples[0])["y"]
        assert np.abs(error).max() < 0.2


class TestStorage:
    def test_int4_weights_and_activations(self, bench: Any, rng: np.random.Generator) -> None:
        model = bench.model(
            bench.graph(BLOCK, opset=21).replace("ir_version: 8", "ir_version: 10"), **bench.arrays(rng)
        )
        specs = bench.place(
            model, wbits=4, abits=4, first_last_bits=None, overrides=(Override(node="Conv_2", wbits=8),)
        )
        plan = bench.calibrate(model, specs, bench.feeds(rng))
        packed = emit(model, plan, weight_storage=WeightStorage.INT4)
        bench.check(packed)
        assert packed.graph.initializers["w1_quantized"].dtype == ir.DataType.INT4
        assert packed.graph.initializers["w2_quantized"].dtype == ir.DataType.INT8
        feed = bench.feeds(rng)[0]
        np.testing.assert_allclose(
            bench.run(packed, feed, optimize=False)["y"], bench.run(emit(model, plan), feed, optimize=False)["y"]
        )

    def test_int4_needs_a_new_opset(self, block: ir.Model) -> None:
        with pytest.raises(ModelError, match="opset 21"):
            emit(block, QuantPlan("t"), weight_storage=WeightStorage.INT4)

    def test_codes_are_computed_when_they_are_written(
        self, bench: Any, block: ir.Model, rng: np.random.Generator
    ) -> None:
        plan = bench.calibrate(block, bench.place(block), bench.feeds(rng))

        def fail() -> ir.TensorProtocol:
            raise AssertionError("the weight was read")

        lazy = ir.LazyTensor(fail, dtype=ir.DataType.FLOAT, shape=ir.Shape([4, 4, 3, 3]), name="w1")
        block.graph.initializers["w1"].const_value = lazy
        result = emit(block, plan)
        with pytest.raises(AssertionError, match="was read"):
            bench.array(result, "w1_quantized")

    @pytest.mark.parametrize("axis", [None, 0, 1])
    def test_large_weights_are_quantized_in_parts(self, rng: np.random.Generator, axis: int | None) -> None:
        values = rng.standard_normal((1500, 3001)).astype(np.float32)
        others = None if axis is None else 1 - axis
        top = np.abs(values).max(axis=others)
        spec = QuantSpec(8, signed=True, symmetric=True, narrow=True, axis=axis)
        quantizer = TensorQuantizer.from_range(spec, -top, top)
        np.testing.assert_array_equal(weight_codes(ir.Tensor(values), quantizer), quantizer.quantize(values))
