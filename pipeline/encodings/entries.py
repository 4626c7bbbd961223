"""What the formats write: a plan's quantizers with their names in the float model, in graph order.

A format says a tensor *exactly*, *approximately* (the same range on a grid that the format has) or *not at all*.
Whatever is not exact becomes an :class:`EncodingNote` with its reason; nothing is dropped without one.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.biases import bias_scale
from postquant.passes.plan import Entry, QuantPlan
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec


class Fidelity(enum.Enum):
    """How a format says a tensor that it cannot say exactly."""

    APPROXIMATED = "approximated"
    LEFT_OUT = "left out"


@dataclasses.dataclass(frozen=True)
class EncodingNote:
    """A tensor that a format does not say exactly.

    Attributes:
        tensor: Name in the float model; ``"node:input"`` for a requantization, a node's name for a layer.
        fidelity: Whether something similar is written.
        reason: Why, one clause.
    """

    tensor: str
    fidelity: Fidelity
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class ActivationEntry:
    """One quantized activation.

    Attributes:
        name: Value name.
        quantizer: Its numbers; one scale.
    """

    name: str
    quantizer: TensorQuantizer


@dataclasses.dataclass(frozen=True, eq=False)
class WeightEntry:
    """One quantized weight.

    Attributes:
        name: Initializer name.
        quantizer: Its numbers.
        node: The layer that reads it.
        index: Which input of the layer it is.
        bias: Name of its int32 bias, or None.
        bias_scale: () or (C,) float32 step of that bias.
        source: Quantizer of the layer's input; None where that stays float.
    """

    name: str
    quantizer: TensorQuantizer
    node: ir.Node
    index: int
    bias: str | None = None
    bias_scale: npt.NDArray[np.float32] | None = None
    source: TensorQuantizer | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """Everything that a format may write.

    Attributes:
        activations: Stored tensors and those that share their numbers, in graph order.
        weights: In graph order.
        floats: Nodes that stay in float.
        notes: What no format keyed by tensors can say.
    """

    activations: tuple[ActivationEntry, ...]
    weights: tuple[WeightEntry, ...]
    floats: tuple[str, ...]
    notes: tuple[EncodingNote, ...]


def collect_entries(model: ir.Model, plan: QuantPlan) -> Entries:
    """The decided quantizers of a plan.

    Args:
        model: The simplified model.
        plan: A decided plan of it; entries that are still formats are left out.
    """
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    activations = []
    for value in values:
        quantizer = plan.activation_quantizer(value.name) if value.name else None
        if quantizer is not None:
            activations.append(ActivationEntry(value.name or "", quantizer))
    weights = []
    for node in model.graph:
        index = semantics.weight_index(node)
        constant = None if index is None else node.inputs[index]
        entry = None if constant is None else plan.weights.get(constant.name or "")
        if index is not None and isinstance(entry, TensorQuantizer):
            weights.append(_weight_entry(node, index, entry, plan))
    return Entries(tuple(activations), tuple(weights), tuple(plan.floats), tuple(_general_notes(plan)))


def _weight_entry(node: ir.Node, index: int, quantizer: TensorQuantizer, plan: QuantPlan) -> WeightEntry:
    value, source_value = node.inputs[index], node.inputs[1 - index]
    assert value is not None
    assert source_value is not None
    bias = semantics.bias_of(node)
    key = f"{node.name}:{1 - index}"
    source = plan.input_quantizer(key if key in plan.requants else source_value.name or "")
    known = None if bias is None else plan.int_biases.get(bias.name or "")
    if bias is None or known is None or source is None:
        return WeightEntry(value.name or "", quantizer, node, index, source=source)
    step = bias_scale(node, source, quantizer)
    return WeightEntry(value.name or "", quantizer, node, index, bias.name, step, source)


def _general_notes(plan: QuantPlan) -> Iterable[EncodingNote]:
    for key, entry in plan.requants.items():
        codes = f"{_spec(entry).bits} bits" + (" of a code book" if _spec(entry).has_table else "")
        yield EncodingNote(
            key,
            Fidelity.LEFT_OUT,
            f"the input is quantized again, to {codes}, for this layer only: the file names tensors",
        )
    for name, entry in plan.activations.items():
        if isinstance(entry, TensorQuantizer) and entry.border is not None:
            yield EncodingNote(
                name, Fidelity.APPROXIMATED, "its rounding border is left out: codes are the nearest ones"
            )


def _spec(entry: Entry) -> QuantSpec:
    return entry.spec if isinstance(entry, TensorQuantizer) else entry


def symmetric_int8_scale(quantizer: TensorQuantizer) -> tuple[float, str | None]:
    """The scale of signed 8-bit codes with zero point 0 that reach as far as a quantizer does.

    Args:
        quantizer: Of an activation, one scale.

    Returns:
        ``(scale, None)`` where signed codes with that scale are the quantizer's own; else the scale whose code 127 (or
        -127) is the end of the range that is further from zero, and why the codes differ.
    """
    spec = quantizer.spec
    scale, zero = float(quantizer.scale), int(quantizer.zero_point)
    middle = 0 if spec.signed else 1 << (spec.bits - 1)
    if spec.bits == 8 and zero == middle:
        return scale, None
    low, high = (float(end) for end in quantizer.range())
    if spec.bits != 8:
        reason = f"the file has 8 bits, the tensor {spec.bits}: same range, other steps"
    else:
        reason = f"the file has the zero point 0, the tensor {zero} in {spec.container}: same range, coarser steps"
    return max(-low, high) / 127, reason
