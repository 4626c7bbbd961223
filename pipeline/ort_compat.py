"""``onnxruntime.quantization.quantize_static`` with postquant behind it.

The arguments, their order and their defaults are onnxruntime's. What can be honoured is; everything else is an error
that names the argument: nothing is ignored. ``docs/api.md`` has the table.

``calibrate_method`` defaults to MinMax as in onnxruntime, and then means min-max. EasyQuant, other bits and every
other setting come with the extra keyword ``postquant_config``; arguments that are not at their defaults win over it.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType

from postquant.passes.target import Role, Target, WeightStorage, load_target
from postquant.pipeline.api import quantize
from postquant.pipeline.config import Method, OverrideConfig, QuantConfig
from postquant.pipeline.load import load_model, save_model
from postquant.pipeline.ort_options import ExtraOptions, float_matmuls, read_extra_options
from postquant.pipeline.output import output_folder
from postquant.pipeline.settings import close_match
from postquant.runtime_ops.errors import ConfigError

_METHODS = {
    CalibrationMethod.MinMax: Method.MINMAX,
    CalibrationMethod.Entropy: Method.ENTROPY,
    CalibrationMethod.Percentile: Method.PERCENTILE,
}
_ORT_PERCENTILE = 99.999


def quantize_static(
    model_input: str | os.PathLike[str] | onnx.ModelProto,
    model_output: str | os.PathLike[str],
    calibration_data_reader: CalibrationDataReader | None = None,
    quant_format: QuantFormat = QuantFormat.QDQ,
    op_types_to_quantize: Sequence[str] | None = None,
    per_channel: bool = False,
    reduce_range: bool = False,
    activation_type: QuantType = QuantType.QInt8,
    weight_type: QuantType = QuantType.QInt8,
    nodes_to_quantize: Sequence[str] | None = None,
    nodes_to_exclude: Sequence[str] | None = None,
    use_external_data_format: bool = False,
    calibrate_method: CalibrationMethod = CalibrationMethod.MinMax,
    calibration_providers: Sequence[str] | None = None,
    extra_options: Mapping[str, Any] | None = None,
    calibration_cache_path: str | os.PathLike[str] | None = None,
    *,
    postquant_config: QuantConfig | None = None,
) -> None:
    """Quantizes a model like ``onnxruntime.quantization.quantize_static`` and writes ``model_output``.

    Args:
        model_input: Model file or message.
        model_output: File to write.
        calibration_data_reader: Yields one mapping of input names to arrays per ``get_next``.
        quant_format: QDQ only.
        op_types_to_quantize: Operator types to quantize; all that the target knows by default.
        per_channel: One scale per output channel of a weight instead of one per weight.
        reduce_range: 7-bit weights.
        activation_type: QInt8 or QUInt8.
        weight_type: QInt8, or QInt4.
        nodes_to_quantize: Names of the only nodes to quantize.
        nodes_to_exclude: Names of nodes to leave in float.
        use_external_data_format: Write the weights to ``<model_output>.data``.
        calibrate_method: MinMax, Entropy or Percentile.
        calibration_providers: None or ``["CPUExecutionProvider"]``.
        extra_options: See ``docs/api.md``.
        calibration_cache_path: None only.
        postquant_config: Settings that onnxruntime has no argument for.

    Raises:
        ConfigError: If an argument cannot be honoured.
        PostquantError: If anything else is wrong; see :func:`postquant.quantize`.
    """
    if calibration_data_reader is None:
        raise _unsupported("calibration_data_reader", "a data reader", None, "calibration caches are not read")
    if calibration_cache_path is not None:
        raise _unsupported("calibration_cache_path", "None", calibration_cache_path, "only ranges would fit into it")
    if quant_format is not QuantFormat.QDQ:
        raise _unsupported(
            "quant_format", "QuantFormat.QDQ", quant_format, "onnxruntime fuses QDQ to the same integer kernels"
        )
    if calibration_providers is not None and list(calibration_providers) != ["CPUExecutionProvider"]:
        raise _unsupported(
            "calibration_providers",
            'None or ["CPUExecutionProvider"]',
            calibration_providers,
            "calibration is on the CPU",
        )
    extra = read_extra_options(extra_options or {})
    base = postquant_config or QuantConfig(method=_method(calibrate_method), percentile=_ORT_PERCENTILE)
    if postquant_config is not None and calibrate_method is not CalibrationMethod.MinMax:
        base = dataclasses.replace(base, method=_method(calibrate_method))
    target = _target(
        base, plain=postquant_config is None, per_channel=per_channel, activation_type=activation_type, extra=extra
    )
    target = _with_op_types(target, op_types_to_quantize)
    model = _load(model_input)
    overrides = [
        *base.override,
        *_node_overrides(model, target, nodes_to_quantize, nodes_to_exclude),
        *(OverrideConfig(node=_literal(name), float=True) for name in float_matmuls(model, extra)),
    ]
    config = dataclasses.replace(
        base,
        wbits=_weight_bits(base, weight_type, reduce_range=reduce_range),
        weight_storage=WeightStorage.INT4 if weight_type is QuantType.QInt4 else base.weight_storage,
        percentile=base.percentile if extra.percentile is None else extra.percentile,
        smooth=base.smooth if extra.smooth is None else extra.smooth,
        override=tuple(overrides),
    )
    source: Any = model if isinstance(model_input, onnx.ModelProto) else pathlib.Path(model_input)
    output = pathlib.Path(model_output)
    with output_folder(output.parent):
        result = quantize(source, calibration_data_reader, config, target=target)
        save_model(result.model, output, external=use_external_data_format or None)


def _unsupported(argument: str, supported: str, found: object, why: str | None) -> ConfigError:
    return ConfigError(
        f"quantize_static cannot honour the argument {argument}", expected=supported, found=str(found), hint=why
    )


def _method(method: CalibrationMethod) -> Method:
    if method not in _METHODS:
        raise _unsupported(
            "calibrate_method", ", ".join(str(m) for m in _METHODS), method, "float8 has no integer kernels"
        )
    return _METHODS[method]


def _weight_bits(base: QuantConfig, weight_type: QuantType, *, reduce_range: bool) -> int:
    if weight_type is QuantType.QInt4:
        if reduce_range:
            raise _unsupported("reduce_range", "False with QuantType.QInt4", reduce_range, "it means 7 bits")
        return 4
    if weight_type is not QuantType.QInt8:
        raise _unsupported(
            "weight_type", "QuantType.QInt8 or QuantType.QInt4", weight_type, "integer kernels read signed weights"
        )
    return min(base.wbits, 7) if reduce_range else base.wbits


def _target(
    base: QuantConfig, *, plain: bool, per_channel: bool, activation_type: QuantType, extra: ExtraOptions
) -> Target:
    """The configured target with onnxruntime's choice of weight scales, activation type and bias.

    ``plain`` is False with a ``postquant_config``: the target then decides what is at onnxruntime's default.
    """
    if activation_type not in (QuantType.QInt8, QuantType.QUInt8):
        raise _unsupported(
            "activation_type", "QuantType.QInt8 or QuantType.QUInt8", activation_type, "there are no integer kernels"
        )
    target = load_target(base.target)
    activations, weights = target.activations, target.weights
    if plain or activation_type is QuantType.QUInt8:
        activations = dataclasses.replace(activations, signed=activation_type is QuantType.QInt8)
    if plain or per_channel:
        weights = dataclasses.replace(weights, per_channel=per_channel)
    if extra.symmetric:
        activations = dataclasses.replace(activations, symmetric=True)
    return dataclasses.replace(
        target, activations=activations, weights=weights, int32_bias=target.int32_bias and extra.int32_bias
    )


def _with_op_types(target: Target, wanted: Sequence[str] | None) -> Target:
    """The target that quantizes the wanted operator types only (and Relu and Clip with them)."""
    if not wanted:
        return target
    for op_type in wanted:
        if op_type not in target.ops:
            raise _unsupported(
                "op_types_to_quantize",
                f"types that the target quantizes ({', '.join(sorted(target.ops))})",
                op_type,
                target.float_reasons.get(op_type) or close_match(op_type, target.ops),
            )
    kept = {o: rule for o, rule in target.ops.items() if o in wanted or rule.role is Role.RANGE}
    reasons = {o: "op_types_to_quantize leaves it out" for o in target.ops if o not in kept}
    return dataclasses.replace(target, ops=kept, float_reasons={**target.float_reasons, **reasons})


def _node_overrides(
    model: onnx.ModelProto, target: Target, wanted: Sequence[str] | None, excluded: Sequence[str] | None
) -> list[OverrideConfig]:
    """Leaves excluded nodes in float, and all but the wanted ones."""
    types = {node.name: node.op_type for node in model.graph.node if node.name}
    for argument, given in (("nodes_to_quantize", wanted), ("nodes_to_exclude", excluded)):
        for name in given or ():
            if name not in types:
                raise ConfigError(
                    "quantize_static was given a node that the model does not have",
                    where=argument,
                    found=f'"{name}"',
                    hint=close_match(name, types),
                )
    result = []
    if wanted:
        result.append(OverrideConfig(node="*", float=True))
    for name in wanted or ():
        if types[name] not in target.ops:
            raise _unsupported(
                "nodes_to_quantize",
                "nodes of types that the target quantizes",
                f"{name}, a {types[name]}",
                target.float_reasons.get(types[name]),
            )
        result.append(OverrideConfig(node=_literal(name), float=False))
    # What the target keeps in float anyway, and what simplification removes, needs no override.
    left_out = [n for n in excluded or () if types[n] in target.ops and types[n] != "Identity"]
    return [*result, *(OverrideConfig(node=_literal(name), float=True) for name in left_out)]


def _literal(name: str) -> str:
    """A pattern that matches exactly ``name``."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _load(model_input: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """The nodes of the model; external weights stay in their files."""
    if isinstance(model_input, onnx.ModelProto):
        return model_input
    load_model(model_input, check=False)  # tells what is wrong with the file
    return onnx.load_model(model_input, load_external_data=False)
