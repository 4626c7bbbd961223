"""The emitted graph: structure, names, and numbers against the NumPy law."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from postquant.passes.emit import emit
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

KEEP = "<pads = [1, 1, 1, 1]>"
BLOCK = f"a = Conv {KEEP} (x, w1, b1) r = Relu (a) y = Conv {KEEP} (r, w2, b2)"


@pytest.fixture
def block(bench: Any, rng: np.random.Generator) -> Any:
    return bench.model(bench.graph(BLOCK), **bench.arrays(rng))


class TestStructure:
    def test_names_are_systematic(self, bench: Any, block: ir.Model, rng: np.random.Generator) -> None:
        result = emit(block, bench.calibrate(block, bench.place(block), bench.feeds(rng)))
        bench.check(result)
        names = {v.name for node in result.graph for v in node.outputs}
        assert {"x_quantized", "x_dequantized", "r_quantized", "r_dequantized", "y_quantized", "y"} <= names
        assert {"w1_quantized", "w1_scale", "w1_zero_point", "b1_quantized"} <= set(result.graph.initializers)
        assert not {"w1", "b1", "w2", "b2"} & set(result.graph.initializers)
        # Relu is the quantizer's saturation.
        assert bench.ops(result) == {"QuantizeLinear": 3, "DequantizeLinear": 7, "Conv": 2}

    def test_names_of_the_model_are_respected(self, bench: Any, rng: np.random.Generator) -> None:
        text = bench.graph(BLOCK.replace("a = Conv", "x_quantized = Conv").replace("Relu (a)", "Relu (x_quantized)"))
        model = bench.model(text, **bench.arrays(rng))
        result = emit(model, bench.calibrate(model, bench.place(model), bench.feeds(rng)))
        bench.check(result)
        assert "x_quantized_1" in {v.name for node in result.graph for v in node.outputs}

    def test_the_model_itself_is_not_changed(self, bench: Any, block: ir.Model, rng: np.random.Generator) -> None:
        before = ir.to_proto(block).SerializeToString(deterministic=True)
        emit(block, bench.calibrate(block, bench.place(block), bench.feeds(rng)))
        assert ir.to_proto(block).SerializeToString(deterministic=True) == before

    def test_interface_axes_and_metadata_are_kept(self, bench: Any, block: ir.Model, rng: np.random.Generator) -> None:
        block.metadata_props["author"] = "someone"
        block.graph.outputs[0].metadata_props["unit"] = "m"
        result = emit(block, bench.calibrate(block, bench.place(block), bench.feeds(rng)))
        assert result.metadata_props == {"author": "someone"}
        assert result.graph.outputs[0].metadata_props == {"unit": "m"}
        for old, new in zip(
            [*block.graph.inputs, *block.graph.outputs], [*result.graph.inputs, *result.graph.outputs], strict=True
        ):
            assert (old.name, old.dtype, str(old.shape)) == (new.name, new.dtype, str(new.shape))
        two = bench.feeds(rng, 1, (2, 4, 8, 8))[0]
        assert bench.run(result, two)["y"].shape == (2, 4, 8, 8)

    def test_two_emissions_are_equal(self, bench: Any, block: ir.Model, rng: np.random.Generator) -> None:
        plan = bench.calibrate(block, bench.place(block), bench.feeds(rng))
        one, two = (ir.to_proto(emit(block, plan)).SerializeToString(deterministic=True) for _ in range(2))
        assert one == two

    def test_a_plan_without_decisions_changes_nothing(
        self, bench: Any, block: ir.Model, rng: np.random.Generator
    ) -> None:
        feed = bench.feeds(rng)[0]
        result = emit(block, bench.place(block))
        assert bench.ops(result) == bench.ops(block)
        np.testing.assert_array_equal(bench.run(result, feed)["y"], bench.run(block, feed)["y"])

    @pytest.mark.parametrize("decided", list(itertools.product([False, True], repeat=3)))
    def test_any_part_of_a_plan_can_be_emitted(
        self, bench: Any, block: ir.Model, rng: np.random.Generator, decided: tuple[bool, ...]
    ) -> None:
        specs = bench.place(block)
        full = bench.calibrate(block, specs, bench.feeds(rng))
        part = QuantPlan(
            "onnxruntime",
            activations={k: (full if decided[k != "x"] else specs).activations[k] for k in specs.activations},
            weights=(full if decided[2] else specs).weights,
            int_biases=specs.int_biases,
        )
        result = emit(block, part)
        bench.check(result)
        assert ("Relu" in bench.ops(result)) is not decided[1]
        feed = bench.feeds(rng)[0]
        error = bench.difference(result, block, feed)
        assert error < 1e-3
        assert (error == 0) is not any(decided)

    def test_plan_of_another_model(self, block: ir.Model) -> None:
        entry = TensorQuantizer.from_range(QuantSpec(8, False, False), -1, 1)
        for plan in (
            QuantPlan("t", activations={"nowhere": entry}),
            QuantPlan("t", weights={"nowhere": entry}),
            QuantPlan("t", requants={"nowhere:0": entry}),
            QuantPlan("t", biases={"nowhere": np.zeros(1, np.float32)}),
        ):
            with pytest.raises(ModelError, match="nowhere"):
                emit(block, plan)


class TestNumbers:
    def test_unoptimized_graph_equals_the_law(self, bench: Any, block: ir.Model, rng: np.random.Generator) -> None:
        plan = bench.calibrate(block, bench.place(block), bench.feeds(rng))
        feed = bench.feeds(rng)[0]
        result = emit(block, plan)
        for name in ("x", "r"):
            result.graph.outputs.append(
                next(v for node in result.graph for v in node.outputs if v.name == f"{name}_quantized")
            )
        codes = bench.run(result, feed, optimize=False)
        x = plan.activations["x"]
        np.testing.assert_array_equal(codes["x_quantized"], x.quantize(feed["x"]))
        # The convolution on simulated values, through Relu, quantized.
        simulated = bench.model(
            bench.graph(f"a = Conv {KEEP} (x, w1, b1) y = Relu (a)"),
            w1=plan.weights["w1"].simulate(bench.array(block, "w1")),
            b1=bench.array(block, "b1"),
        )
        relu = bench.run(simulated, {"x": x.simulate(feed["x"])})["y"]
        steps = codes["r_quantized"].astype(int) - plan.activations["r"].quantize(relu)
        assert np.abs(steps).max() <= 1
        assert np.mean(steps != 0) < 0.01

    def test_chosen_codes_are_written(self, bench: Any, block: ir.Model, rng: np.random.Generator) -> None:
        plan = bench.calibrate(block, bench.place(block), bench.feeds(rng))
        codes = rng.integers(-127, 128, (4, 4, 3, 3)).astype(np.int8)
        plan = plan.with_weight("w1", dataclasses.replace(plan.weights["w1"], codes=codes))
        np.testing.assert_array_equal(bench.array(emit(block, plan), "w1_quantized"), codes)

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_codes_are_within_their_range_and_reach_its_ends(
        self, bench: Any, block: ir.Model, rng: np.random.Generator, bits: int
    ) -> None:
        settings = {"wbits": bits, "abits": bits, "first_last_bits": None, "sums_bits": bits}
        plan = bench.calibrate(block, bench.place(block, **settings), bench.feeds(rng))
        result = emit(block, plan)
        bench.check(result)
        for name in ("w1", "w2"):
            codes = bench.array(result, f"{name}_quantized")
            assert np.abs(codes.astype(int)).max() == 2 ** (bits - 1) - 1
        suffix = "quantized" if bits == 8 else "saturated"
        result.graph.outputs.append(next(v for node in result.graph for v in node.outputs if v.name == f"r_{suffix}"))
        # Ten times the calibrated values: everything saturates, in the optimized graph too.
        loud = {"x": 10 * bench.feeds(rng)[0]["x"]}
        codes = bench.run(result, loud)[f"r_{suffix}"]
        assert (codes.min(), codes.max()) == (0, 2**bits - 1)

    def test_corrected_biases(self, bench: Any, block: ir.Model, rng: np.random.Generator) -> None:
        specs = bench.place(block)
        plan = bench.calibrate(block, specs, bench.feeds(rng)).with_bias("b1", np.array([1, 2, 3, 4], np.float32))
        for part in (
            plan,
            dataclasses.replace(plan, activations=specs.activations),
            specs.with_bias("b1", plan.biases["b1"]),
        ):
            result = emit(block, part)
            bias = next(node for node in result.graph if node.op_type == "Conv").inputs[2]
            assert bias is not None
            if bias.const_value is not None:
                values = bias.const_value.numpy()
            else:
                result.graph.outputs.append(bias)
                values = bench.run(result, bench.feeds(rng)[0], optimize=False)[bias.name]
            np.testing.assert_allclose(values, [1, 2, 3, 4], rtol=1e-3)


class TestClips:
    @pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (-0.3, 0.4), (0.2, 0.6)])
    @pytest.mark.parametrize("wide", [0.5, 1.0, 3.0])
    def test_code_saturation_equals_clipping_exactly(
        self, bench: Any, rng: np.random.Generator, low: float, high: float, wide: float
    ) -> None:
        text = bench.graph(f"a = Conv {KEEP} (x, w1, b1) r = Clip (a, lo, hi) y = Conv {KEEP} (r, w2, b2)")
        model = bench.model(text, lo=np.float32(low), hi=np.float32(high), **bench.arrays(rng))
        plan = bench.calibrate(model, bench.place(model), bench.feeds(rng))
        spec = QuantSpec(8, signed=False, symmetric=False)
        chosen = TensorQuantizer.from_range(spec, wide * min(low, 0), wide * high)
        plan = plan.with_activation("r", chosen)
        result = emit(model, plan)
        bench.check(result)
        assert bench.ops(result)["Clip"] <= 1
        assert bench.inputs(result, "Clip")[0] == "r_quantized" if "Clip" in bench.ops(result) else True
        # With the Clip kept in float the same codes come out.
        kept = dataclasses.replace(plan, floats={node.name: "" for node in model.graph if node.op_type == "Clip"})
        feed = bench.feeds(rng)[0]
        np.testing.assert_array_equal(
            bench.run(result, feed, optimize=False)["y"], bench.run(emit(model, kept), feed, optimize=False)["y"]
        )

    @pytest.mark.parametrize("wide", [0.5, 1.0, 3.0])
    def test_a_backend_without_a_clip_of_codes_gets_the_clip_itself(
        self, bench: Any, rng: np.random.Generator, wide: float
    ) -> None:
        text = bench.graph(f"a = Conv {KEEP} (x, w1, b1) r = Clip (a, lo, hi) y = Conv {KEEP} (r, w2, b2)")
        model = bench.model(text, lo=np.float32(0), hi=np.float32(0.5), **bench.arrays(rng))
        plan = bench.calibrate(model, bench.place(model), bench.feeds(rng))
        chosen = TensorQuantizer.from_range(QuantSpec(8, signed=False, symmetric=False), 0, wide * 0.5)
        plan = plan.with_activation("r", chosen)
        codes, real = emit(model, plan), emit(model, plan, integer_clips=False)
        bench.check(real)
        # Up to its bound the quantizer's saturation is enough.
        assert [bench.inputs(real, "Clip")[0]] == ["a"] if wide > 1 else "Clip" not in bench.ops(real)
        feed = bench.feeds(rng)[0]
        np.testing.assert_array_equal(
            bench.run(codes, feed, optimize=False)["y"], bench.run(real, feed, optimize=False)["y"]
        )

    def test_chain_of_clips(self, bench: Any, rng: np.random.Generator) -> None:
        text = bench.graph(f"a = Conv {KEEP} (x, w1, b1) c = Clip (a, lo) r = Relu (c) y = Conv {KEEP} (r, w2, b2)")
        model = bench.model(text, lo=np.float32(-1), **bench.arrays(rng))
        result = emit(model, bench.calibrate(model, bench.place(model), bench.feeds(rng)))
        assert not {"Clip", "Relu"} & set(bench.ops(result))

    def test_relu_beside_another_reader_is_kept_apart(self, bench: Any, rng: np.random.Generator) -> None:
        text = bench.graph(
            f"a = Conv {KEEP} (x, w1, b1) r = Relu (a) c = Conv {KEEP} (r, w2, b2) s = Add (a, c) "
            f"y = Conv {KEEP} (s, w3, b3)"
        )
        extra = bench.arrays(rng)
        model = bench.model(text, **extra, w3=extra["w2"], b3=extra["b2"])
        plan = bench.calibrate(model, bench.place(model), bench.feeds(rng))
        assert {"a", "r"} <= set(plan.activations)
        feed = bench.feeds(rng)[0]
        result = emit(model, plan)
        assert "Relu" not in bench.ops(result)
        assert bench.difference(result, model, feed) < 2e-3


class TestFloatReaders:
    def test_they_read_a_graph_input_before_quantization(self, bench: Any, rng: np.random.Generator) -> None:
        model = bench.model(
            bench.graph(f"c = Conv {KEEP} (x, w1, b1) y = Sub (x, c)"),
            w1=bench.arrays(rng)["w1"],
            b1=bench.arrays(rng)["b1"],
        )
        result = emit(model, bench.calibrate(model, bench.place(model), bench.feeds(rng)))
        assert bench.inputs(result, "Sub") == ["x", "c_dequantized"]

    def test_they_read_a_matrix_product_before_quantization(self, bench: Any, rng: np.random.Generator) -> None:
        text = bench.graph(
            "m = MatMul (x, w1) e = Erf (m) n = MatMul (m, w2) y = Add (e, n)",
            inputs="float[N,4] x",
            outputs="float[N,4] y",
        )
        model = bench.model(text, w1=np.eye(4, dtype=np.float32), w2=np.eye(4, dtype=np.float32))
        result = emit(model, bench.calibrate(model, bench.place(model), bench.feeds(rng, shape=(3, 4))))
        assert bench.inputs(result, "Erf") == ["m"]

    def test_an_inner_tensor_that_is_an_output_is_the_stored_one(self, bench: Any, rng: np.random.Generator) -> None:
        model = bench.model(bench.graph(BLOCK, outputs="float[a,b,c,d] y, float[a,b,c,d] r"), **bench.arrays(rng))
        plan = bench.calibrate(model, bench.place(model), bench.feeds(rng))
        result = emit(model, plan)
        bench.check(result)
        assert [v.name for v in result.graph.outputs] == ["y", "r"]
        r = bench.run(result, bench.feeds(rng)[0])["r"]
        np.testing.assert_array_equal(r, plan.activations["r"].simulate(r))

    def test_the_same_value_as_two_outputs_and_twice_an_input(self, bench: Any, rng: np.random.Generator) -> None:
        text = bench.graph(
            f"a = Conv {KEEP} (x, w1, b1) s = Add (a, a) y = Conv {KEEP} (s, w2, b2)",
            outputs="float[a,b,c,d] y, float[a,b,c,d] a",
        )
        model = bench.model(text, **bench.arrays(rng))
        result = emit(model, bench.calibrate(model, bench.place(model), bench.feeds(rng)))
        bench.check(result)
        assert bench.inputs(result, "Add") == ["a", "a"]

    def test_a_subgraph_reads_the_stored_tensor(self, bench: Any, rng: np.random.Generator) -> None:
        text = bench.graph(
            f"""
            c = Conv {KEEP} (x, w1, b1)
            y = If <then_branch = t () => (float[a,b,c,d] p) {{ p = Abs (c) }},
                    else_branch = e () => (float[a,b,c,d] q) {{ q = Neg (c) }}> (flag)
            """,
            inputs="float[N,4,8,8] x, bool flag",
        )
        proto = onnx.parser.parse_model(text)
        for name in ("w1", "b1"):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(bench.arrays(rng)[name], name))
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        for index, node in enumerate(model.graph.all_nodes()):
            node.name = f"{node.op_type}_{index}"
        samples = [feed | {"flag": np.array(True)} for feed in bench.feeds(rng)]
        plan = bench.calibrate(model, bench.place(model), samples)
        y = bench.run(emit(model, plan), samples[0])["y"]
        np.testing.assert_array_equal(y, np.abs(plan.activations["c"].simulate(y)))


def test_mobilenet_is_emitted_small(bench: Any, shared_data: pathlib.Path) -> None:
    model = bench.real_model(shared_data, "mobilenetv2")
    plan = bench.calibrate(model, bench.place(model), bench.real_feeds(shared_data, "mobilenetv2", 1))
    result = emit(model, plan)
    proto = bench.check(result)
    assert len(proto.SerializeToString()) < 4_000_000
