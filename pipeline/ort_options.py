"""onnxruntime's ``extra_options``: what each may be, and what it means here.

Three kinds: options with a meaning here; options that only save memory in onnxruntime, whose results are the same
without them; and options of which only the default is possible. Every other name is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import onnx

from postquant.pipeline.settings import close_match
from postquant.runtime_ops.errors import ConfigError

# They bound onnxruntime's memory; statistics are streamed here, with the same result.
_MEMORY_ONLY = ("CalibMaxIntermediateOutputs", "CalibStridedMinMax")

# Only the default is possible, for this reason.
_FIXED: Mapping[str, tuple[Any, str]] = {
    "WeightSymmetric": (True, "integer kernels read weights without a zero point"),
    "extra.Sigmoid.nnapi": (False, "it is for NNAPI"),
    "ActivationRestrictedAsymmetric": (False, "zero points are free or in the middle"),
    "EnableSubgraph": (False, "what is inside subgraphs stays in float"),
    "ForceQuantizeNoInputCheck": (False, "an operator that only moves values is quantized where its input is"),
    "AddQDQPairToWeight": (False, "weights are written as integers"),
    "OpTypesToExcludeOutputQuantization": ([], "the target decides; see its file"),
    "DedicatedQDQPair": (False, "a tensor is quantized once"),
    "QDQOpTypePerChannelSupportToAxis": ({}, "the axis is that of the output channels"),
    "CalibMovingAverage": (False, "its result depends on the order of the samples"),
    "UseQDQContribOps": (False, "only standard operators are written"),
    "MinimumRealRange": (None, "constant tensors have a valid scale anyway"),
    "TensorQuantOverrides": ({}, 'use the "override" of postquant_config'),
    "QDQKeepRemovableActivations": (False, "ranges of Relu and Clip are kept by the quantizer"),
    "QDQDisableWeightAdjustForInt32Bias": (False, "the bias would overflow"),
    "BlockSize": (0, "integer kernels read one scale per channel"),
}
_WITH_MEANING = (
    "ActivationSymmetric",
    "CalibTensorRangeSymmetric",
    "CalibPercentile",
    "MatMulConstBOnly",
    "QuantizeBias",
    "SmoothQuant",
)


KNOWN_OPTIONS = (*_WITH_MEANING, *_FIXED, *_MEMORY_ONLY)


@dataclasses.dataclass(frozen=True)
class ExtraOptions:
    """The options that mean something here.

    Attributes:
        symmetric: Activations have symmetric ranges.
        percentile: Kept share in percent, or None for the default.
        constant_matmuls_only: MatMul of two activations stays in float.
        int32_bias: Biases become int32.
        smooth: SmoothQuant-style migration, or None for the default.
    """

    symmetric: bool = False
    percentile: float | None = None
    constant_matmuls_only: bool = False
    int32_bias: bool = True
    smooth: bool | None = None


def read_extra_options(options: Mapping[str, Any]) -> ExtraOptions:
    """Checks every option.

    Raises:
        ConfigError: If one is unknown or cannot be honoured; the text names it.
    """
    for name, value in options.items():
        if name not in KNOWN_OPTIONS:
            raise ConfigError(
                "quantize_static cannot honour an entry of extra_options",
                where=str(name),
                expected=f"one of {', '.join(sorted(KNOWN_OPTIONS))}",
                hint=close_match(str(name), KNOWN_OPTIONS),
            )
        default, why = _FIXED.get(name, (value, ""))
        if value != default:
            raise ConfigError(
                "quantize_static cannot honour an entry of extra_options",
                where=name,
                expected=str(default),
                found=str(value),
                hint=why,
            )
    percentile = options.get("CalibPercentile")
    return ExtraOptions(
        symmetric=_flag(options, "ActivationSymmetric") or _flag(options, "CalibTensorRangeSymmetric"),
        percentile=percentile,
        constant_matmuls_only=_flag(options, "MatMulConstBOnly"),
        int32_bias=_flag(options, "QuantizeBias", default=True),
        smooth=_flag(options, "SmoothQuant") if "SmoothQuant" in options else None,
    )


def _flag(options: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(
            "an entry of extra_options has a wrong value", where=name, expected="True or False", found=str(value)
        )
    return value


def float_matmuls(model: onnx.ModelProto, options: ExtraOptions) -> list[str]:
    """Names of the MatMul nodes that ``MatMulConstBOnly`` leaves in float.

    Raises:
        ConfigError: If such a node has no name.
    """
    if not options.constant_matmuls_only:
        return []
    constants = {tensor.name for tensor in model.graph.initializer}
    constants.update(name for node in model.graph.node if node.op_type == "Constant" for name in node.output)
    result = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] not in constants:
            if not node.name:
                raise ConfigError(
                    "MatMulConstBOnly needs names", where=f'the MatMul that makes "{node.output[0]}"', expected="a name"
                )
            result.append(node.name)
    return result
