"""Reads QuantizeLinear, Clip and DequantizeLinear chains of a quantized model: :func:`reading`.

Which tensor has which scale, zero point and codes is taken from the nodes themselves, never from names, so that the
reading is independent of how the model was written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.adaptive_nodes import is_adaptive
from postquant.passes.barriers import before_barrier
from postquant.passes.border_nodes import is_border
from postquant.passes.lookup_nodes import lookup_of, maker_of
from postquant.runtime_ops.errors import VerificationError
from postquant.runtime_ops.integer import Affine


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """What stands behind a dequantized value.

    Attributes:
        codes: The codes that DequantizeLinear reads.
        numbers: Its scale and zero point.
        dequantize: The DequantizeLinear.
        quantize: The QuantizeLinear, BorderQuantize or AdaptiveQuantize that makes the codes, or the last node of the
            lookup that does; None for constants and for codes from elsewhere.
        saturation: Bounds of the integer Clip between the two, None without one.
        looked_up: What stands behind the codes that a lookup reads; None without one.
    """

    codes: ir.Value
    numbers: Affine
    dequantize: ir.Node
    quantize: ir.Node | None
    saturation: tuple[int, int] | None
    looked_up: Reading | None = None

    @property
    def constant(self) -> ir.TensorProtocol | None:
        """The codes of a weight or bias; None for an activation."""
        return None if self.codes.is_graph_input() else self.codes.const_value

    @property
    def quantized_numbers(self) -> Affine | None:
        """Scale and zero point of the QuantizeLinear; a table has those of its reader."""
        if self.looked_up is not None:
            return self.numbers
        return None if self.quantize is None else _numbers(self.quantize, self.codes)

    @property
    def source(self) -> ir.Value | None:
        """The float value that is quantized."""
        if self.looked_up is not None:
            return self.looked_up.source
        return None if self.quantize is None else self.quantize.inputs[0]


def reading(value: ir.Value | None) -> Reading | None:
    """The chain behind a value that DequantizeLinear computes (perhaps with a barrier behind it), else None.

    Raises:
        VerificationError: If a scale, zero point or bound is not a constant.
    """
    value = before_barrier(value)
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.domain:
        return None
    codes = node.inputs[0]
    assert codes is not None
    maker = codes.producer()
    # An adaptive step is computed: its numbers are those of the factor 1.
    return _behind(codes, _numbers(maker if maker is not None and is_adaptive(maker) else node, codes), node)


def _behind(codes: ir.Value, numbers: Affine, dequantize: ir.Node) -> Reading:
    """What stands behind codes with these numbers."""
    saturation: tuple[int, int] | None = None
    producer = codes.producer()
    while producer is not None and producer.op_type == "Clip" and not producer.domain:
        info = np.iinfo(numbers.dtype)
        low, high = (_bound(producer, index, default) for index, default in ((1, info.min), (2, info.max)))
        saturation = (low, high) if saturation is None else (max(low, saturation[0]), min(high, saturation[1]))
        inner = producer.inputs[0]
        producer = None if inner is None else inner.producer()
    lookup = lookup_of(producer)
    if lookup is not None:
        maker = maker_of(lookup.codes)
        assert maker is not None
        looked_up = _behind(lookup.codes, _numbers(maker, lookup.codes), dequantize)
        return Reading(codes, numbers, dequantize, producer, saturation, looked_up)
    # BorderQuantize and AdaptiveQuantize have their scale and zero point where QuantizeLinear has them.
    makes_codes = producer is not None and (
        producer.op_type == "QuantizeLinear" or is_border(producer) or is_adaptive(producer)
    )
    quantize = producer if makes_codes else None
    return Reading(codes, numbers, dequantize, quantize, saturation)


def array_of(value: ir.Value | None, node: ir.Node) -> npt.NDArray[np.generic]:
    """The constant behind an input of ``node``.

    Raises:
        VerificationError: If it is computed.
    """
    tensor = None if value is None or value.is_graph_input() else value.const_value
    if tensor is None:
        raise VerificationError(
            f"an input of {node.op_type} is not a constant",
            where=node.name,
            found=None if value is None else value.name,
        )
    return np.asarray(tensor.numpy())


def _bound(node: ir.Node, index: int, default: int) -> int:
    value = node.inputs[index] if index < len(node.inputs) else None
    return int(default) if value is None else int(array_of(value, node).reshape(-1)[0])


def _numbers(node: ir.Node, codes: ir.Value) -> Affine:
    scale = array_of(node.inputs[1], node).astype(np.float32)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        raw = array_of(node.inputs[2], node)
        zero = raw.astype(np.int32)
        dtype: np.dtype[Any] = raw.dtype
    else:
        zero = np.zeros(scale.shape, np.int32)
        dtype = np.dtype(np.uint8 if codes.dtype is None else codes.dtype.numpy())
    if dtype.kind not in "iu":  # 4-bit and 2-bit types of ml_dtypes are kept in bytes here
        dtype = np.dtype(np.uint8 if "uint" in dtype.name else np.int8)
    axis: int | None = None
    if scale.ndim and scale.size > 1:
        attribute = node.attributes.get("axis")
        axis = 1 if attribute is None else attribute.as_int()
    elif scale.ndim:
        scale, zero = scale.reshape(()), zero.reshape(())
    return Affine(scale, zero, dtype, axis)
