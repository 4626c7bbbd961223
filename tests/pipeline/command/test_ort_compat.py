"""The drop-in: onnxruntime's signature, every argument honoured or refused by name."""

from __future__ import annotations

import inspect
import pathlib
import re
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
from onnxruntime.quantization import quantize_static as ort_quantize_static

import postquant
from postquant.passes.target import Role, Target, WeightStorage
from postquant.pipeline import ort_compat
from postquant.pipeline.config import Method, OverrideConfig, QuantConfig
from postquant.pipeline.ort_options import KNOWN_OPTIONS, read_extra_options
from postquant.runtime_ops.errors import ConfigError, ModelError


class Reader:
    """Six random feeds."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self._feeds = iter([{"x": rng.standard_normal((1, 2, 4, 4), dtype=np.float32)} for _ in range(6)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


class Seen:
    """Records what reaches ``postquant.quantize``."""

    config: QuantConfig
    target: Target


@pytest.fixture
def seen(quick_stages: None, monkeypatch: pytest.MonkeyPatch) -> Seen:
    record, real = Seen(), postquant.quantize

    def quantize(model: Any, data: Any, config: QuantConfig, *, target: Target) -> postquant.QuantizationResult:
        record.config, record.target = config, target
        return real(model, data, config, target=target)

    monkeypatch.setattr(ort_compat, "quantize", quantize)
    return record


def test_the_signature_is_onnxruntimes() -> None:
    ours = dict(inspect.signature(postquant.quantize_static).parameters)
    assert ours.pop("postquant_config").kind is inspect.Parameter.KEYWORD_ONLY
    theirs = inspect.signature(ort_quantize_static).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name


def test_the_defaults_mean_what_they_say(seen: Seen, network: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "quantized.onnx"
    assert postquant.quantize_static(network, output, Reader()) is None  # type: ignore[func-returns-value]
    assert (seen.config.method, seen.config.wbits, seen.config.abits) == (Method.MINMAX, 8, 8)
    assert (seen.target.activations.signed, seen.target.weights.per_channel) == (True, False)
    session = ort.InferenceSession(output)
    assert session.run(None, {"x": np.zeros((2, 2, 4, 4), np.float32)})[0].shape == (2, 3)
    graph = onnx.load(output).graph
    types = {t.name: t.data_type for t in graph.initializer}
    assert types["x_zero_point"] == onnx.TensorProto.INT8
    (weight_scale,) = [t for t in graph.initializer if t.name == "w1_scale"]
    assert list(weight_scale.dims) == []


def test_models_in_memory_and_external_data(seen: Seen, network: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "quantized.onnx"
    proto = onnx.load(network)
    postquant.quantize_static(proto, output, Reader(), use_external_data_format=True)
    assert (tmp_path / "quantized.onnx.data").exists() or onnx.load(output).graph.initializer
    assert proto == onnx.load(network)
    ort.InferenceSession(output)


def test_what_can_be_honoured(seen: Seen, network: pathlib.Path, tmp_path: pathlib.Path) -> None:
    postquant.quantize_static(
        network,
        tmp_path / "q.onnx",
        Reader(),
        QuantFormat.QDQ,
        ["Conv"],
        True,
        True,
        QuantType.QUInt8,
        calibrate_method=CalibrationMethod.Percentile,
        calibration_providers=["CPUExecutionProvider"],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "CalibPercentile": 99.5,
            "CalibMaxIntermediateOutputs": 4,
            "QuantizeBias": False,
            "SmoothQuant": False,
        },
    )
    config, target = seen.config, seen.target
    assert (config.method, config.percentile, config.wbits, config.smooth) == (Method.PERCENTILE, 99.5, 7, False)
    assert (target.activations.signed, target.activations.symmetric) == (False, True)
    assert (target.weights.per_channel, target.int32_bias) == (True, False)
    assert {o for o, rule in target.ops.items() if rule.role is not Role.RANGE} == {"Conv"}
    assert target.float_reasons["Gemm"] == "op_types_to_quantize leaves it out"


def test_nodes(seen: Seen, network: pathlib.Path, tmp_path: pathlib.Path) -> None:
    postquant.quantize_static(network, tmp_path / "q.onnx", Reader(), nodes_to_exclude=["gemm", "soft"])
    (left_out,) = seen.config.override
    assert left_out == OverrideConfig(node="gemm", float=True)
    report = postquant.quantize(network, [Reader().get_next()], seen.config).report
    assert {"gemm", "soft"} <= {f.node for f in report.floats}
    postquant.quantize_static(network, tmp_path / "q.onnx", Reader(), nodes_to_quantize=["gemm"])
    everything, gemm = seen.config.override
    assert everything == OverrideConfig(node="*", float=True)
    assert gemm == OverrideConfig(node="gemm", float=False)
    report = postquant.quantize(network, [Reader().get_next()], seen.config).report
    assert "gemm" not in {f.node for f in report.floats}
    assert "conv" in {f.node for f in report.floats}


def test_four_bit_weights(seen: Seen, network: pathlib.Path, tmp_path: pathlib.Path) -> None:
    postquant.quantize_static(network, tmp_path / "q.onnx", Reader(), weight_type=QuantType.QInt4)
    assert (seen.config.wbits, seen.config.weight_storage) == (4, WeightStorage.INT4)


def test_a_configuration_of_ours(seen: Seen, network: pathlib.Path, tmp_path: pathlib.Path) -> None:
    ours = QuantConfig(wbits=4, abits=6)
    postquant.quantize_static(network, tmp_path / "q.onnx", Reader(), postquant_config=ours)
    assert seen.config == ours
    assert (seen.target.activations.signed, seen.target.weights.per_channel) == (False, True)
    postquant.quantize_static(
        network, tmp_path / "q.onnx", Reader(), calibrate_method=CalibrationMethod.Entropy, postquant_config=ours
    )
    assert (seen.config.method, seen.config.wbits) == (Method.ENTROPY, 4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"calibration_data_reader": None}, "calibration_data_reader: expected a data reader"),
        ({"calibration_cache_path": "cache.json"}, "calibration_cache_path: expected None"),
        ({"quant_format": QuantFormat.QOperator}, r"quant_format: expected QuantFormat\.QDQ"),
        ({"calibrate_method": CalibrationMethod.Distribution}, "calibrate_method: expected CalibrationMethod"),
        ({"calibration_providers": ["CUDAExecutionProvider"]}, "calibration_providers"),
        ({"activation_type": QuantType.QInt16}, "activation_type"),
        ({"weight_type": QuantType.QUInt8}, "weight_type: .*found QUInt8"),
        ({"weight_type": QuantType.QInt4, "reduce_range": True}, "reduce_range"),
        ({"op_types_to_quantize": ["Conv", "Softmax"]}, "op_types_to_quantize.*found Softmax; its small outputs"),
        ({"op_types_to_quantize": ["Conf"]}, 'op_types_to_quantize.*perhaps "Conv" was meant'),
        ({"nodes_to_quantize": ["soft"]}, "nodes_to_quantize.*found soft, a Softmax"),
        ({"nodes_to_exclude": ["gem"]}, r'\(nodes_to_exclude\).*found "gem"; perhaps "gemm" was meant'),
    ],
)
def test_what_cannot_is_refused_by_name(
    seen: Seen, network: pathlib.Path, tmp_path: pathlib.Path, arguments: dict[str, Any], sentence: str
) -> None:
    output = tmp_path / "q.onnx"
    given = {"model_input": network, "model_output": output, "calibration_data_reader": Reader()}
    with pytest.raises(ConfigError, match=sentence):
        postquant.quantize_static(**{**given, **arguments})
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"WeightSymmetric": False}, r"extra_options \(WeightSymmetric\): expected True, found False; integer kernels"),
        ({"AddQDQPairToWeight": True}, "weights are written as integers"),
        ({"TensorQuantOverrides": {"x": []}}, 'use the "override" of postquant_config'),
        ({"CalibMovingAverage": True}, "depends on the order"),
        ({"ActivationSymetric": True}, 'perhaps "ActivationSymmetric" was meant'),
        ({"ActivationSymmetric": 1}, "expected True or False, found 1"),
    ],
)
def test_extra_options_are_refused_by_name(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_extra_options(options)


def test_every_extra_option_of_onnxruntime_is_known() -> None:
    documented = re.findall(r"^\s+([A-Z]\w+) = ", ort_quantize_static.__doc__ or "", re.MULTILINE)
    assert len(documented) > 15
    details_of_refused_ones = {"SmoothQuantAlpha", "SmoothQuantFolding", "CalibMovingAverageConstant"}
    assert set(documented) <= set(KNOWN_OPTIONS) | details_of_refused_ones


def test_constant_matmuls_only(seen: Seen, tmp_path: pathlib.Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) <float[4, 4] w = {1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0,
            0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0}> {
            [weighted] a = MatMul (x, w)
            [both] y = MatMul (a, x)
        }
    """)
    postquant.quantize_static(model, tmp_path / "q.onnx", Reader(), extra_options={"MatMulConstBOnly": True})
    assert seen.config.override == (OverrideConfig(node="both", float=True),)
    model.graph.node[1].name = ""
    with pytest.raises(ConfigError, match=r'MatMulConstBOnly needs names .*makes "y"'):
        postquant.quantize_static(model, tmp_path / "q.onnx", Reader(), extra_options={"MatMulConstBOnly": True})


def test_a_wrong_model_is_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelError, match="there is no such model file"):
        postquant.quantize_static(tmp_path / "absent.onnx", tmp_path / "q.onnx", Reader())
