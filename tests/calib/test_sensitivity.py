"""Sensitivities of a small network against onnxruntime runs of float models with simulated weights and inputs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from postquant.calib.input_spec import input_specs
from postquant.calib.open_source import open_source
from postquant.calib.sensitivity import Sensitivity, SensitivityOptions, quantized_layers
from postquant.calib.source import CalibrationSource
from postquant.passes.place import PlacementSettings, place
from postquant.passes.target import load_target
from postquant.runtime_ops.quantizer import TensorQuantizer

NETWORK = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3, 6, 6] x) => (float[N, 4] y)
    <float[6, 3, 3, 3] w0, float[6] b0, float[6, 6, 3, 3] w1, float[6] b1, float[4, 6] w2, float[4] b2> {
      [first] c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
      [relu] r0 = Relu (c0)
      [second] c1 = Conv <pads = [1, 1, 1, 1]> (r0, w1, b1)
      [relu1] r1 = Relu (c1)
      [pool] p = GlobalAveragePool (r1)
      [flat] f = Flatten (p)
      [head] y = Gemm <transB = 1> (f, w2, b2)
    }
"""
SAMPLES = 8


@pytest.fixture(scope="module")
def proto() -> onnx.ModelProto:
    model = onnx.parser.parse_model(NETWORK)
    rng = np.random.default_rng(0)
    for value in model.graph.value_info:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape).astype(np.float32) * np.float32(0.3)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    return model


@pytest.fixture(scope="module")
def data() -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((SAMPLES, 3, 6, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def found(proto: onnx.ModelProto, data: npt.NDArray[np.float32]) -> Sensitivity:
    model = ir.serde.deserialize_model(proto)
    plan = place(model, load_target("onnxruntime"), PlacementSettings(first_last_bits=None))
    options = SensitivityOptions((2, 3, 4, 8), (3, 6, 8), correct_biases=False)
    return Sensitivity(model, model, plan, _source(model, data), options)


def _source(model: ir.Model, data: npt.NDArray[np.float32]) -> CalibrationSource:
    return open_source(data, input_specs(model))


def _outputs(proto: onnx.ModelProto, data: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    result: npt.NDArray[np.float64] = session.run(None, {"x": data})[0].astype(np.float64)
    return result


def _error(proto: onnx.ModelProto, other: onnx.ModelProto, data: npt.NDArray[np.float32]) -> float:
    """The squared error that decides, written out (docs of ``combined_error``)."""
    right, got = _outputs(proto, data), _outputs(other, data)
    relative = ((got - right) ** 2).sum(1) / (right**2).sum(1)
    whole = ((got - right) ** 2).sum() / (right**2).sum()
    return float(np.sqrt(relative).mean() * np.sqrt(whole))


@pytest.mark.parametrize("bits", [2, 4])
def test_noise_of_weights_is_that_of_the_network_with_simulated_weights(
    proto: onnx.ModelProto, data: npt.NDArray[np.float32], found: Sensitivity, bits: int
) -> None:
    for layer in found.layers:
        assert layer.measured == (2, 4)
        changed = onnx.ModelProto.FromString(proto.SerializeToString())
        (tensor,) = (t for t in changed.graph.initializer if t.name == layer.weight)
        weight = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(layer.widths[bits].quantizer.simulate(weight), layer.weight))
        assert layer.weight_noise[bits] == pytest.approx(_error(proto, changed, data), rel=1e-3)


def test_more_bits_are_never_worse(found: Sensitivity) -> None:
    for layer in found.layers:
        for noises in (layer.weight_noise, layer.input_noise):
            values = [noises[bits] for bits in sorted(noises)]
            assert values == sorted(values, reverse=True)
            assert values[0] > values[-1]


def test_what_is_not_tried_follows_the_layers_own_error(
    proto: onnx.ModelProto, data: npt.NDArray[np.float32], found: Sensitivity
) -> None:
    for layer in found.layers:
        changed = onnx.ModelProto.FromString(proto.SerializeToString())
        (tensor,) = (t for t in changed.graph.initializer if t.name == layer.weight)
        weight = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(layer.widths[3].quantizer.simulate(weight), layer.weight))
        wrong_db = 10 * np.log10(layer.weight_noise[3] / _error(proto, changed, data))
        assert abs(wrong_db) < 4, layer.layer


def test_plans_take_the_wanted_bits(found: Sensitivity) -> None:
    plan = found.quick_plan({"first": 8, "second": 2})
    chosen = plan.weights["w1"]
    assert isinstance(chosen, TensorQuantizer)
    assert chosen.spec.bits == 2
    wide, narrow = (found.measure(found.quick_plan(dict.fromkeys(("first", "second", "head"), b))) for b in (8, 2))
    assert wide.sqnr_db > narrow.sqnr_db + 15


def test_a_fixed_layer_has_one_width(proto: onnx.ModelProto, data: npt.NDArray[np.float32]) -> None:
    model = ir.serde.deserialize_model(proto)
    plan = place(model, load_target("onnxruntime"), PlacementSettings(first_last_bits=None))
    assert [layer.name for layer in quantized_layers(model, plan)] == ["first", "second", "head"]
    options = SensitivityOptions((2, 4, 8), fixed_weights={"second": 5})
    found = Sensitivity(model, model, plan, _source(model, data), options)
    assert [tuple(layer.widths) for layer in found.layers] == [(2, 4, 8), (5,), (2, 4, 8)]
    assert not any(layer.input_noise for layer in found.layers)
