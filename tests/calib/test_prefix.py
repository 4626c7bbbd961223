"""Spooled cuts of a network with branches: what is streamed equals a run of the whole network."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from postquant.calib.input_spec import input_specs
from postquant.calib.open_source import open_source
from postquant.calib.prefix import Prefix
from postquant.calib.source import CalibrationSource
from postquant.passes.emit import emit
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

# "s" is read by a deep branch at once and by "c6" at the very end.
NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
m (float[N,2,5,5] x) => (float[N,2,5,5] y) {
    [c0] s0 = Conv (x, w, b)
    [r0] s = Relu (s0)
    [c1] t1 = Conv (s, w, b)
    [c2] t2 = Conv (t1, w, b)
    [c3] t3 = Conv (t2, w, b)
    [c4] t4 = Conv (t3, w, b)
    [c5] t5 = Conv (t4, w, b)
    [c6] u = Conv (s, w, b)
    [c7] v = Conv (u, w, b)
    [sum] y = Add (t5, v)
}"""


def network() -> tuple[ir.Model, CalibrationSource]:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(NETWORK)
    for name, shape in (("w", (2, 2, 1, 1)), ("b", (2,))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    return model, open_source(rng.normal(size=(5, 2, 5, 5)).astype(np.float32), input_specs(model))


def test_a_tensor_behind_the_cut_that_a_later_layer_still_reads(tmp_path: pathlib.Path) -> None:
    model, source = network()
    quantizer = TensorQuantizer.from_range(QuantSpec(8, False, False), -6.0, 6.0)
    order = ["x", "s", "t1", "t2", "t3", "t4", "t5", "u", "v"]
    prefix = Prefix(model, source, tmp_path)
    for position, tensor in enumerate(order):
        plan = QuantPlan("", activations=dict.fromkeys(order[:position], quantizer))
        streamed = list(prefix.stream(plan, [tensor], decided=order[:position]))
        whole = make_session(emit(model, plan), outputs=[tensor]) if tensor != "x" else None
        exact = make_session(model, outputs=[tensor]) if tensor != "x" else None
        for sample, (found, quantized) in zip(source, streamed, strict=True):
            assert found is not None
            wanted: Any = sample["x"] if exact is None else exact.run(sample)[tensor]
            np.testing.assert_allclose(found[tensor], wanted, rtol=1e-5, atol=1e-6)
            wanted = sample["x"] if whole is None else whole.run(sample)[tensor]
            np.testing.assert_allclose(quantized[tensor], wanted, rtol=1e-5, atol=1e-5)


def test_a_tensor_in_front_of_the_cut_that_is_asked_for_later(tmp_path: pathlib.Path) -> None:
    """As for tensors that share a scale: decided with the last of them, and the first one lies far in front."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(NETWORK)
    for name, shape in (("w", (2, 2, 1, 1)), ("b", (2,))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    source = open_source(rng.normal(size=(5, 2, 5, 5)).astype(np.float32), input_specs(model))
    quantizer = TensorQuantizer.from_range(QuantSpec(8, False, False), -6.0, 6.0)
    asked = ["s", "t2", "t3", "t4", "t5", "t1", "u", "v"]  # t1 comes when t5 is done
    decided = ["x", "s", "t2", "t3", "t4", "t5", "t1", "u"]
    prefix = Prefix(model, source, tmp_path)
    for position, tensor in enumerate(asked):
        plan = QuantPlan("", activations=dict.fromkeys(decided[: position + 1], quantizer))
        streams = prefix.stream(plan, [tensor], decided=decided[: position + 1], kept=asked[position + 1 :])
        exact = make_session(model, outputs=[tensor])
        for sample, (found, _) in zip(source, streams, strict=True):
            assert found is not None
            np.testing.assert_allclose(found[tensor], exact.run(sample)[tensor], rtol=1e-5, atol=1e-6)


def test_values_that_nothing_behind_the_cut_reads_are_kept_on_demand(tmp_path: pathlib.Path) -> None:
    model, source = network()
    quantizer = TensorQuantizer.from_range(QuantSpec(8, False, False), -6.0, 6.0)
    decided = ["x", "s", "t1", "t2", "t3", "t4"]
    plan = QuantPlan("", activations=dict.fromkeys(decided, quantizer))
    prefix = Prefix(model, source, tmp_path, float_samples=None)
    # The first pass makes the cut behind t4; t1 lies in front of it.
    for found, quantized in prefix.stream(plan, ["t5"], decided=decided, kept=["t1"], float_tensors=["t2"]):
        assert found is not None
        assert set(found) >= {"t5", "t2"}
        assert set(quantized) == {"t5"}
    streamed = list(prefix.stream(plan, ["t1", "s"], float_tensors=["y"], decided=None))
    whole = make_session(emit(model, plan), outputs=["t1", "s_dequantized"])
    exact = make_session(model, outputs=["t1", "y"])
    for sample, (found, quantized) in zip(source, streamed, strict=True):
        assert found is not None
        for name, wanted in exact.run(sample).items():
            np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-5)
        expected = whole.run(sample)
        np.testing.assert_allclose(quantized["t1"], expected["t1"], rtol=1e-5, atol=1e-5)
        # The quantizer of s stands for its Relu: there is no tensor in front of it.
        np.testing.assert_allclose(quantized["s"], expected["s_dequantized"], rtol=1e-5, atol=1e-5)


def test_samples_that_nobody_wants_are_not_run(tmp_path: pathlib.Path) -> None:
    model, source = network()
    quantizer = TensorQuantizer.from_range(QuantSpec(8, False, False), -6.0, 6.0)
    plan = QuantPlan("", activations={"x": quantizer, "s": quantizer})
    prefix = Prefix(model, source, tmp_path, float_samples=1)
    streamed = list(prefix.stream(plan, ["t1"], wanted=lambda index: index == 3))
    assert [set(quantized) for _, quantized in streamed] == [{"t1"}, set(), set(), {"t1"}, set()]
    every = list(prefix.stream(plan, ["t1"]))
    np.testing.assert_array_equal(streamed[3][1]["t1"], every[3][1]["t1"])
    # Where a cut is written, later calls need all samples.
    decided = ["x", "s", "t1", "t2", "t3", "t4"]
    plan = QuantPlan("", activations=dict.fromkeys(decided, quantizer))
    cut = list(prefix.stream(plan, ["t5"], decided=decided, kept=["u"], wanted=lambda index: False))
    assert all(quantized for _, quantized in cut)


def test_a_value_that_a_subgraph_captures_crosses_the_cut(tmp_path: pathlib.Path) -> None:
    model, source = network()
    proto = onnx.parser.parse_model(
        NETWORK.replace(
            "y = Add (t5, v)",
            """yes = Constant <value = bool {1}> ()
            y = If (yes) <then_branch = g () => (float[N,2,5,5] q1) { q1 = Add (v, t1) },
                          else_branch = h () => (float[N,2,5,5] q2) { q2 = Sub (v, t1) }>""",
        ).replace("[sum] ", "")
    )
    proto.graph.initializer.extend(ir.to_proto(model).graph.initializer)
    model = ir.from_proto(proto)
    quantizer = TensorQuantizer.from_range(QuantSpec(8, False, False), -6.0, 6.0)
    decided = ["x", "s", "t1", "t2", "t3", "t4"]
    plan = QuantPlan("", activations=dict.fromkeys(decided, quantizer))
    prefix = Prefix(model, source, tmp_path, float_samples=None)
    for _ in prefix.stream(plan, ["t5"], decided=decided):
        pass
    exact, whole = make_session(model, outputs=["y"]), make_session(emit(model, plan), outputs=["y"])
    for sample, (found, quantized) in zip(source, prefix.stream(plan, ["y"]), strict=True):
        assert found is not None
        np.testing.assert_allclose(found["y"], exact.run(sample)["y"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(quantized["y"], whole.run(sample)["y"], rtol=1e-5, atol=1e-5)
