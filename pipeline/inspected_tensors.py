"""Inputs, outputs, weights and stored tensors of a model as plain values, for people and for JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.pipeline.kernels import WEIGHTED
from postquant.pipeline.qdq_structure import Reading, reading
from postquant.runtime_ops.errors import VerificationError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output: name, element type, dimensions (strings and None are free)."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight of Conv, ConvTranspose, Gemm or MatMul.

    Attributes:
        name: Initializer (the codes, in a quantized model).
        node: Its first reader.
        op_type: Operator of that node.
        dtype: Element type in the file.
        shape: Shape.
        size: Bytes in the file.
        bits: Bits that the codes really use; None for a float weight.
        code_range: Smallest and largest code; None for a float weight.
        scale_range: Smallest and largest scale; None for a float weight.
        scales: Number of scales: 1, or one per channel.
    """

    name: str
    node: str
    op_type: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    bits: int | None = None
    code_range: tuple[int, int] | None = None
    scale_range: tuple[float, float] | None = None
    scales: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
    """A tensor stored as codes between nodes.

    Attributes:
        name: Float value that is quantized.
        dtype: Element type of the codes.
        bits: Bits of the code range.
        code_range: Smallest and largest code that may occur.
        scale: Scale.
        zero_point: Zero point.
        low: Smallest value that can be represented.
        high: Largest value that can be represented.
    """

    name: str
    dtype: str
    bits: int
    code_range: tuple[int, int]
    scale: float
    zero_point: int
    low: float
    high: float


def described(value: ir.Value) -> Tensor:
    """An input or output of a model."""
    shape: tuple[int | str | None, ...] | None = None
    if value.shape is not None:
        shape = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return Tensor(name=value.name or "", dtype="?" if value.dtype is None else value.dtype.name.lower(), shape=shape)


def _readings(model: ir.Model, notes: list[str]) -> list[Reading]:
    found = []
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or node.domain:
            continue
        try:
            seen = reading(node.outputs[0])
        except VerificationError as error:
            notes.append(f"not shown: {error}")
            continue
        if seen is not None:
            found.append(seen)
    return found


def stored_activations(model: ir.Model, notes: list[str]) -> tuple[Activation, ...]:
    """Tensors that a model stores as codes, in graph order; ``notes`` gets what cannot be shown."""
    found: dict[str, Activation] = {}
    for seen in _readings(model, notes):
        if seen.quantize is None or seen.numbers.scale.ndim or (seen.codes.name or "") in found:
            continue
        low, high = seen.saturation or (seen.numbers.low, seen.numbers.high)
        limits = np.asarray([low, high])
        real = seen.numbers.real(limits)
        found[seen.codes.name or ""] = Activation(
            name="" if seen.source is None else seen.source.name or "",
            dtype="?" if seen.codes.dtype is None else seen.codes.dtype.name.lower(),
            bits=used_bits(low, high),
            code_range=(low, high),
            scale=float(seen.numbers.scale),
            zero_point=int(seen.numbers.zero_point),
            low=float(real[0]),
            high=float(real[1]),
        )
    return tuple(found.values())


def used_bits(low: int, high: int) -> int:
    """Bits that codes from ``low`` to ``high`` need: signed if ``low`` is negative.

    >>> used_bits(0, 255), used_bits(-7, 7), used_bits(-127, 127), used_bits(0, 1)
    (8, 4, 8, 1)
    """
    if low >= 0:
        return max(1, int(high).bit_length())
    return max((-low - 1).bit_length(), max(high, 0).bit_length()) + 1


def weights_of(model: ir.Model, notes: list[str]) -> tuple[Weight, ...]:
    """Weights of a model, in graph order, read one at a time; ``notes`` gets what cannot be shown."""
    found: dict[str, Weight] = {}
    for node in model.graph:
        if node.op_type not in WEIGHTED or node.domain:
            continue
        for value in node.inputs[:2]:
            if value is None:
                continue
            try:
                seen = reading(value)
            except VerificationError as error:
                notes.append(f"not shown: {error}")
                continue
            source = value if seen is None else seen.codes
            tensor = None if source.is_graph_input() else source.const_value
            name = source.name or ""
            if tensor is None or name in found:
                continue
            found[name] = _weight(name, node, tensor, seen)
    return tuple(found.values())


def _weight(name: str, node: ir.Node, tensor: ir.TensorProtocol, seen: Reading | None) -> Weight:
    shape = tuple(int(d) for d in tensor.shape.numpy())
    known = {"name": name, "node": node.name or "", "op_type": node.op_type, "shape": shape}
    dtype = tensor.dtype.name.lower()
    if seen is None:
        return Weight(**known, dtype=dtype, size=tensor.nbytes)  # type: ignore[arg-type]
    codes: npt.NDArray[Any] = np.asarray(tensor.numpy())
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    scale = seen.numbers.scale
    return Weight(
        **known,  # type: ignore[arg-type]
        dtype=dtype,
        size=tensor.nbytes,
        bits=used_bits(low, high),
        code_range=(low, high),
        scale_range=(float(scale.min()), float(scale.max())),
        scales=int(scale.size),
    )
