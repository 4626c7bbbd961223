"""Verification accepts what is right, and rejects every single fault."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from postquant.passes.barriers import before_barrier, is_barrier
from postquant.passes.emit import emit
from postquant.passes.place import Override, PlacementSettings
from postquant.passes.plan import QuantPlan
from postquant.passes.target import WeightStorage
from postquant.pipeline.qdq_structure import reading
from postquant.pipeline.recover import recover_float_model
from postquant.pipeline.save import save_model
from postquant.pipeline.verify import Verification, verify_model
from postquant.runtime_ops.errors import VerificationError
from postquant.runtime_ops.quantizer import TensorQuantizer

PLAN, INTEGERS = "the file holds the plan", "integers equal the simulation"


def failed(result: Verification) -> set[str]:
    return {check.name for check in result.checks if not check.passed}


def copy_of(model: ir.Model) -> ir.Model:
    return ir.serde.deserialize_model(ir.serde.serialize_model(model))


def initializer(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return np.array(tensor.numpy())


def replace(model: ir.Model, name: str, array: Any) -> None:
    model.graph.initializers[name].const_value = ir.Tensor(np.asarray(array), name=name)


def test_the_right_model_passes(cnn: Any) -> None:
    result = verify_model(cnn.model, cnn.emitted, cnn.plan, cnn.samples)
    assert result.passed
    assert result.failure is None
    assert sum(t.mismatches for t in result.tensors) == 0
    assert {t.law for t in result.tensors} == {"kernel"}
    assert {t.name for t in result.tensors} >= {"image", "r1", "r2", "sum", "cat"}
    assert result.coverage.share == 1.0
    assert set(result.coverage.integer) == {"conv1", "depthwise", "project", "reduce", "head"}
    assert result.outputs[0].sqnr_db > 20
    assert result.outputs[0].agreement is not None
    assert {q.name for q in result.quality} >= {"r1", "r2", "sum"}
    assert all(q.sqnr_db > 15 for q in result.quality)
    assert result.file_bytes > 0
    assert result.float_bytes > 4 * 8 * 3 * 9


def test_the_result_is_json(cnn: Any) -> None:
    result = verify_model(cnn.model, cnn.emitted, cnn.plan, cnn.samples)
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["passed"] is True
    assert data["tensors"][0]["codes"] > 0
    assert data["coverage"]["integer"]["conv1"] == "QLinearConv"


@pytest.mark.parametrize(("wbits", "abits"), [(7, 7), (4, 8), (4, 4), (2, 3)])
def test_fewer_bits(cases: Any, wbits: int, abits: int) -> None:
    case = cases.build(settings=PlacementSettings(wbits=wbits, abits=abits))
    result = verify_model(case.model, case.emitted, case.plan, case.samples)
    assert any(t.op_type == "requantize" for t in result.tensors) == (abits < 8)
    assert sum(t.mismatches for t in result.tensors) == 0


def test_int4_storage_runs_in_float(cases: Any) -> None:
    case = cases.build(
        cases.cnn.replace('["" : 17]', '["" : 21]'),
        settings=PlacementSettings(wbits=4),
        weight_storage=WeightStorage.INT4,
    )
    result = verify_model(case.model, case.emitted, case.plan, case.samples)
    assert result.coverage.floating  # onnxruntime does not fuse 4-bit weights
    assert {t.law for t in result.tensors} == {"kernel"}


def test_a_file_is_verified_where_it_lies(cnn: Any, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.onnx"
    save_model(cnn.emitted, path, external=True)
    result = verify_model(cnn.model, path, cnn.plan, cnn.samples)
    assert result.file_bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    assert {f.name for f in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}


def one_weight_code(model: ir.Model) -> None:
    codes = initializer(model, "w3_quantized")
    codes[3, 2] += 1 if codes[3, 2, 0, 0] < 0 else -1
    replace(model, "w3_quantized", codes)


def one_weight_scale(model: ir.Model) -> None:
    scale = initializer(model, "w1_scale")
    scale[2] *= 1.02
    replace(model, "w1_scale", scale)


def one_activation_scale(model: ir.Model) -> None:
    replace(model, "r2_scale", initializer(model, "r2_scale") * np.float32(1.01))


def one_zero_point(model: ir.Model) -> None:
    replace(model, "sum_zero_point", initializer(model, "sum_zero_point") + np.uint8(1))


def one_bias_code(model: ir.Model) -> None:
    codes = initializer(model, "b4_quantized")
    codes[5] += 4000
    replace(model, "b4_quantized", codes)


@pytest.mark.parametrize(
    "fault", [one_weight_code, one_weight_scale, one_activation_scale, one_zero_point, one_bias_code]
)
def test_one_wrong_number_is_found_twice(cnn: Any, fault: Callable[[ir.Model], None]) -> None:
    wrong = copy_of(cnn.emitted)
    fault(wrong)
    result = verify_model(cnn.model, wrong, cnn.plan, cnn.samples, strict=False)
    assert failed(result) >= {PLAN, INTEGERS}
    with pytest.raises(VerificationError, match="does not do what the plan says") as caught:
        verify_model(cnn.model, wrong, cnn.plan, cnn.samples)
    assert caught.value.exit_code == 3


def test_a_wrong_attribute_is_found_by_running(cnn: Any) -> None:
    wrong = copy_of(cnn.emitted)
    (node,) = (n for n in wrong.graph if n.name == "leaky")
    node.attributes["alpha"] = ir.AttrFloat32("alpha", 0.12)
    result = verify_model(cnn.model, wrong, cnn.plan, cnn.samples, strict=False)
    assert failed(result) == {INTEGERS}
    assert result.failure is not None
    assert "tensor l4" in str(result.failure)


def test_a_quantizer_that_is_missing(cnn: Any) -> None:
    wrong = copy_of(cnn.emitted)
    for node in wrong.graph:
        if node.name == "project":
            seen = reading(node.inputs[0])
            assert seen is not None
            quantize = seen.quantize
            assert quantize is not None
            node.replace_input_with(0, quantize.inputs[0])
    result = verify_model(cnn.model, wrong, cnn.plan, cnn.samples, strict=False)
    assert PLAN in failed(result)
    assert "input 0 of project" in str(result.failure)


def test_a_plan_of_other_numbers(cnn: Any) -> None:
    entry = cnn.plan.activations["sum"]
    other = TensorQuantizer(entry.spec, entry.scale * np.float32(1.1), entry.zero_point)
    result = verify_model(cnn.model, cnn.emitted, cnn.plan.with_activation("sum", other), cnn.samples, strict=False)
    assert failed(result) >= {PLAN, INTEGERS}


def test_a_float_node_between_quantized_tensors_stays_float(cases: Any) -> None:
    settings = PlacementSettings(overrides=(Override(node="project", float_=True),))
    case = cases.build(settings=settings)
    result = verify_model(case.model, case.emitted, case.plan, case.samples)
    assert set(result.coverage.floating) == {"project"}
    # The same from the file alone, as `postquant verify` sees it.
    recovered = recover_float_model(case.emitted, case.plan)
    assert not any(is_barrier(node) for node in recovered.graph)
    assert verify_model(recovered, case.emitted, case.plan, case.samples).passed


def test_a_float_constant_that_onnxruntime_quantizes_itself(cases: Any) -> None:
    settings = PlacementSettings(overrides=(Override(node="project", float_=True),))
    case = cases.build(settings=settings)
    wrong = copy_of(case.emitted)
    for node in wrong.graph:
        if node.name == "project":
            source = node.inputs[0]
            assert source is not None
            node.replace_input_with(0, before_barrier(source))
    result = verify_model(case.model, wrong, case.plan, case.samples, strict=False)
    assert "float nodes stay float" in failed(result)
    assert "onnxruntime quantized its weights by itself" in str(result.failure)


def test_quantizers_that_onnxruntime_removes_unobserved(cases: Any) -> None:
    """Two quantizations in a row without a Clip are merged by onnxruntime, unless somebody looks at the codes."""
    case = cases.build(TWO_CONVOLUTIONS)
    plan, entry = _requantized(case)
    merged = _requantized_without_clip(case.emitted, plan, entry)
    result = verify_model(case.model, merged, plan, case.samples, strict=False)
    assert failed(result) == {"observing changes nothing"}


def test_requantization_to_8_bits(cases: Any) -> None:
    case = cases.build(TWO_CONVOLUTIONS)
    plan, _ = _requantized(case)
    result = verify_model(case.model, emit(case.model, plan), plan, case.samples)
    assert [t.op_type for t in result.tensors].count("requantize") == 1
    assert result.coverage.share == 1.0


TWO_CONVOLUTIONS = """<ir_version: 8, opset_import: ["" : 17]>
m (float[N,3,8,8] x) => (float[N,8,8,8] y) <float[8,3,3,3] w1, float[8] b1, float[8,8,1,1] w2, float[8] b2> {
    [first] c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    [second] y = Conv (c, w2, b2)
}"""


def _requantized(case: Any) -> tuple[QuantPlan, TensorQuantizer]:
    """The plan in which the second convolution reads other 8-bit codes than the first one writes."""
    stored = case.plan.activations["c"]
    entry = TensorQuantizer(stored.spec, stored.scale * np.float32(3.7), stored.zero_point)
    plan = case.plan.with_requant("second:0", entry)
    return dataclasses.replace(plan, int_biases={**plan.int_biases, "b2": ("second:0", "w2")}), entry


def _requantized_without_clip(emitted: ir.Model, plan: QuantPlan, entry: TensorQuantizer) -> ir.Model:
    proto = ir.serde.serialize_model(emitted)
    graph = proto.graph
    second = next(node for node in graph.node if node.name == "second")
    source = second.input[0]
    nodes = [
        onnx.helper.make_node("QuantizeLinear", [source, "again_scale", "again_zero"], ["again"], name="again_q"),
        onnx.helper.make_node("DequantizeLinear", ["again", "again_scale", "again_zero"], ["again_d"], name="again_dq"),
    ]
    second.input[0] = "again_d"
    index = list(graph.node).index(second)
    for offset, node in enumerate(nodes):
        graph.node.insert(index + offset, node)
    weight = plan.weights["w2"]
    assert isinstance(weight, TensorQuantizer)
    scale = np.asarray(entry.scale * weight.scale, np.float32)
    for tensor in graph.initializer:
        if tensor.name == "b2_quantized":
            old = next(t for t in graph.initializer if t.name == "b2_scale")
            bias = onnx.numpy_helper.to_array(tensor) * onnx.numpy_helper.to_array(old).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.rint(bias / scale).astype(np.int32), tensor.name))
    for tensor in graph.initializer:
        if tensor.name == "b2_scale":
            tensor.CopyFrom(onnx.numpy_helper.from_array(scale, tensor.name))
    graph.initializer.append(onnx.numpy_helper.from_array(entry.scale, "again_scale"))
    graph.initializer.append(onnx.numpy_helper.from_array(entry.zero_point.astype(np.uint8), "again_zero"))
    return ir.serde.deserialize_model(proto)


def test_a_model_that_onnxruntime_refuses(cnn: Any) -> None:
    wrong = copy_of(cnn.emitted)
    for node in wrong.graph:
        if node.name == "leaky":
            node.op_type = "NoSuchOperator"
    result = verify_model(cnn.model, wrong, cnn.plan, cnn.samples, strict=False)
    assert failed(result) == {"onnx checker", "onnxruntime loads it"}


def test_no_sample(cnn: Any) -> None:
    with pytest.raises(VerificationError, match="no sample"):
        verify_model(cnn.model, cnn.emitted, cnn.plan, [])


def test_samples_from_a_generator(cnn: Any) -> None:
    result = verify_model(cnn.model, cnn.emitted, cnn.plan, (feed for feed in cnn.samples))
    assert result == verify_model(cnn.model, cnn.emitted, cnn.plan, cnn.samples)
    assert result.quality_samples == 3
