"""One layer in fixed-point numbers, ready to be written for a microcontroller or a DSP: :func:`fixed_layer`.

Codes of activations are signed, as TFLite and CMSIS-NN want them: an unsigned code and its zero point are shifted by
128, which changes no real value. Then with int32 sums

    sum    = bias + SUM (input + input_offset) * weight        input_offset = -zero_point of the input
    output = clip(sum * multiplier * 2^(shift - 31) + output_offset, activation_min, activation_max)

with the roundings of :mod:`postquant.runtime_ops.law_fixed_point`; ``multiplier * 2^(shift - 31)`` is
``s_x * s_w / s_y`` per output channel. A Relu or Clip behind the layer is in ``activation_min`` and ``activation_max``.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.biases import bias_scale, bias_values, integer_bias, weight_scale
from postquant.passes.plan import QuantPlan
from postquant.passes.weight_codes import weight_codes
from postquant.pipeline.encodings.entries import WeightEntry
from postquant.runtime_ops.code_book import table_indices
from postquant.runtime_ops.law_fixed_point import quantize_multiplier
from postquant.runtime_ops.quantizer import TensorQuantizer


class NoFixedFormError(Exception):
    """A layer that has no fixed-point form; the text is the reason, one clause."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Of a convolution; a matrix product is a 1 x 1 convolution over rows.

    Attributes:
        kernel: Height and width.
        strides: Vertical and horizontal.
        dilations: Vertical and horizontal.
        pads: Top, left, bottom, right.
        groups: Groups of channels.
    """

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class FixedLayer:
    """One layer.

    Attributes:
        name: Node name.
        geometry: Of the convolution.
        in_channels: Of the input.
        weights: (O, H, W, I / groups) int8 codes; in a depthwise layer (H, W, O).
        depthwise: Whether every group has one input channel.
        bits: 8, 4 or 2: how codes are stored.
        table: (2**bits,) int8 values of packed codes, by their bit pattern; None for 8 bits.
        packed: Flat codes: int8 values, or indices of the table.
        bias: (O,) int32.
        multiplier: (O,) int32.
        shift: (O,) int32.
        input_offset: Minus the zero point of the signed input codes.
        output_offset: Zero point of the signed output codes.
        low: Smallest output code.
        high: Largest output code.
        input_scale: Step of the input.
        output_scale: Step of the output.
    """

    name: str
    geometry: Geometry
    in_channels: int
    weights: npt.NDArray[np.int8]
    depthwise: bool
    bits: int
    table: npt.NDArray[np.int8] | None
    packed: npt.NDArray[np.integer]
    bias: npt.NDArray[np.int32]
    multiplier: npt.NDArray[np.int32]
    shift: npt.NDArray[np.int32]
    input_offset: int
    output_offset: int
    low: int
    high: int
    input_scale: float
    output_scale: float


def fixed_layer(entry: WeightEntry, plan: QuantPlan) -> FixedLayer:
    """The fixed-point form of a layer.

    Args:
        entry: A quantized weight with its layer.
        plan: A decided plan.

    Raises:
        NoFixedFormError: If it has none.
    """
    node, quantizer, source = entry.node, entry.quantizer, entry.source
    if node.op_type not in ("Conv", "Gemm", "MatMul") or entry.index != 1:
        raise NoFixedFormError(f"{node.op_type} with this weight has no fixed-point form")
    if node.op_type == "Gemm" and int(semantics.attribute(node, "transA", 0)):
        raise NoFixedFormError("its input is transposed")
    if source is None or source.spec.bits > 8:
        raise NoFixedFormError("its input has no codes of at most 8 bits")
    if source.adaptive is not None:
        raise NoFixedFormError("its input has a step per sample")
    if not quantizer.spec.signed or quantizer.zero_point.any():
        raise NoFixedFormError("its weight has unsigned codes or a zero point")
    output, low, high = _output(node, plan)
    codes = _channels_last(entry)
    bits, table, packed = _packed(codes, quantizer)
    outputs = codes.shape[-1] if _is_depthwise(entry) else codes.shape[0]
    step = np.broadcast_to(np.atleast_1d(weight_scale(node, quantizer)), (outputs,)).astype(np.float64)
    try:
        multiplier, shift = quantize_multiplier(float(source.scale) * step / float(output.scale))
    except ValueError as error:
        raise NoFixedFormError(str(error)) from None
    geometry = _geometry(node, codes, _is_depthwise(entry))
    return FixedLayer(
        name=node.name or "",
        geometry=geometry,
        in_channels=codes.shape[-1] if _is_depthwise(entry) else codes.shape[-1] * geometry.groups,
        weights=codes,
        depthwise=_is_depthwise(entry),
        bits=bits,
        table=table,
        packed=packed,
        bias=_bias(node, plan, source, quantizer, outputs),
        multiplier=multiplier,
        shift=shift,
        input_offset=-_signed(int(source.zero_point), source),
        output_offset=_signed(int(output.zero_point), output),
        low=_signed(low, output),
        high=_signed(high, output),
        input_scale=float(source.scale),
        output_scale=float(output.scale),
    )


def _signed(code: int, quantizer: TensorQuantizer) -> int:
    """A code as a signed one."""
    return code if quantizer.spec.signed else code - 128


def _is_depthwise(entry: WeightEntry) -> bool:
    """Whether a layer is stored as (H, W, O): a depthwise convolution with one output per input."""
    weight = entry.node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    shape = weight.const_value.shape.numpy()
    return semantics.is_depthwise(entry.node) and shape[0] == int(semantics.attribute(entry.node, "group", 1))


def _output(node: ir.Node, plan: QuantPlan) -> tuple[TensorQuantizer, int, int]:
    """Quantizer of what the layer writes, and the codes to which that, with Relu and Clip, is limited."""
    value, bounds = node.outputs[0], (-math.inf, math.inf)
    if node.op_type == "MatMul" and semantics.bias_of(node) is not None:
        value = next(iter(value.uses())).node.outputs[0]
    while (quantizer := plan.activation_quantizer(value.name or "")) is None:
        uses = tuple(value.uses())
        clip = semantics.clip_bounds(uses[0].node) if len(uses) == 1 and not value.is_graph_output() else None
        if clip is None:
            raise NoFixedFormError("its output stays in float")
        bounds = (min(max(bounds[0], clip[0]), clip[1]), max(min(bounds[1], clip[1]), clip[0]))
        value = uses[0].node.outputs[0]
    if quantizer.spec.bits > 8 or quantizer.border is not None:
        raise NoFixedFormError("its output has more than 8 bits, or a rounding border")
    low, high = (int(code) for code in quantizer.quantize(np.array(bounds, np.float32)))
    return quantizer, low, high


def _channels_last(entry: WeightEntry) -> npt.NDArray[np.int8]:
    """Codes as (O, H, W, I / groups), or (H, W, O) of a depthwise layer."""
    node = entry.node
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    codes = np.asarray(weight_codes(value.const_value, entry.quantizer), np.int8)
    if node.op_type == "Conv":
        if codes.ndim not in (3, 4):
            raise NoFixedFormError(f"a convolution over {codes.ndim - 2} axes has no fixed-point form")
        codes = codes[:, :, np.newaxis] if codes.ndim == 3 else codes
        codes = np.transpose(codes, (0, 2, 3, 1))
        return np.ascontiguousarray(np.moveaxis(codes[..., 0], 0, -1) if _is_depthwise(entry) else codes)
    if codes.ndim != 2:
        raise NoFixedFormError("its weight is no matrix")
    transposed = node.op_type == "Gemm" and int(semantics.attribute(node, "transB", 0))
    return np.ascontiguousarray((codes if transposed else codes.T)[:, np.newaxis, np.newaxis])


def _packed(
    codes: npt.NDArray[np.int8], quantizer: TensorQuantizer
) -> tuple[int, npt.NDArray[np.int8] | None, npt.NDArray[np.integer]]:
    """Bits, table and flat codes of a weight; two's complement patterns of uniform codes, as TFLite's int4."""
    flat = codes.reshape(-1)
    if quantizer.table is not None:
        return quantizer.spec.bits, quantizer.table, table_indices(flat, quantizer.table)
    if quantizer.spec.bits > 4:
        return 8, None, flat
    bits = 2 if quantizer.spec.bits == 2 else 4
    patterns = np.arange(1 << bits)
    table = np.where(patterns < 1 << (bits - 1), patterns, patterns - (1 << bits)).astype(np.int8)
    return bits, table, flat.astype(np.uint8) & np.uint8((1 << bits) - 1)


def _bias(
    node: ir.Node, plan: QuantPlan, source: TensorQuantizer, quantizer: TensorQuantizer, outputs: int
) -> npt.NDArray[np.int32]:
    bias = semantics.bias_of(node)
    if bias is None:
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            raise NoFixedFormError("its bias is no constant vector")
        return np.zeros(outputs, np.int32)
    codes = integer_bias(bias_values(node, bias, plan).reshape(-1), bias_scale(node, source, quantizer))
    if codes is None:
        raise NoFixedFormError("its bias does not fit int32")
    return codes


def _geometry(node: ir.Node, codes: npt.NDArray[np.int8], depthwise: bool) -> Geometry:
    kernel = codes.shape[:2] if depthwise else codes.shape[1:3]
    if node.op_type != "Conv":
        return Geometry()
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise NoFixedFormError("its padding depends on the input's size")
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    flat = len(value.const_value.shape) == 3  # a convolution over one axis has height 1

    def pair(name: str) -> tuple[int, int]:
        given = [1] * flat + list(node.attributes.get_ints(name, (1,) * (2 - flat)))
        return given[0], given[1]

    pads = list(node.attributes.get_ints("pads", (0,) * (4 - 2 * flat)))
    if flat:
        pads = [0, pads[0], 0, pads[1]]
    return Geometry(
        (int(kernel[0]), int(kernel[1])),
        pair("strides"),
        pair("dilations"),
        (pads[0], pads[1], pads[2], pads[3]),
        int(semantics.attribute(node, "group", 1)),
    )
