"""Starts from a vendor's encodings: :func:`apply_encodings` decides the tensors that a file names.

A tensor that is named gets exactly these numbers, and keeps them: no later stage moves them. Where the target stores
the other signedness, code and zero point are shifted by ``2^(bits - 1)``, which changes no real value. What cannot be
had is a :class:`Conflict`, never an approximation; calibration then decides the tensor as if it had not been named.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.plan import Entry, QuantPlan
from postquant.passes.target import Target, TensorFormat
from postquant.pipeline.encodings.vendor import VendorEncodings, VendorTensor
from postquant.runtime_ops.code_book import CodeBook
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

_SHOWN = 12


class _UnfitError(Exception):
    """Numbers that a tensor cannot have; the text is the reason, one clause."""


@dataclasses.dataclass(frozen=True)
class Conflict:
    """A tensor of the file that was not applied.

    Attributes:
        name: As in the file.
        reason: Why, one clause.
    """

    name: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Applied:
    """What the file changed.

    Attributes:
        plan: The plan with the applied tensors decided.
        names: Keys of the decided activations and weights, which stay as they are.
        conflicts: What was not applied.
    """

    plan: QuantPlan
    names: frozenset[str]
    conflicts: tuple[Conflict, ...]

    def notes(self, vendor: VendorEncodings) -> tuple[str, ...]:
        """Lines for the report: one for what was applied, one per reason of what was not."""
        lines = [f"{vendor.format}: the numbers of {len(self.names)} tensors were taken from the file and are kept"]
        by_reason: dict[str, list[str]] = defaultdict(list)
        for conflict in self.conflicts:
            by_reason[conflict.reason].append(conflict.name)
        for reason, names in by_reason.items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{vendor.format}: not applied to {', '.join(names[:_SHOWN])}{more}: {reason}")
        if vendor.skipped:
            lines.append(f"{vendor.format}: skipped {'; '.join(vendor.skipped[:_SHOWN])}")
        return tuple(lines)


def apply_encodings(model: ir.Model, plan: QuantPlan, vendor: VendorEncodings, target: Target) -> Applied:
    """Decides what a file names.

    Args:
        model: The simplified model.
        plan: A placed plan of it.
        vendor: The content of the file.
        target: What the plan was placed for.
    """
    return _Application(model, plan, target).run(vendor)


class _Application:
    def __init__(self, model: ir.Model, plan: QuantPlan, target: Target) -> None:
        self._plan = plan
        self._target = target
        self._graph = model.graph
        self._nodes = {node.name or "": node for node in model.graph}
        values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
        self._values = {value.name for value in values}
        self._order = {value.name or "": index for index, value in enumerate(values)}
        self._decided: set[str] = set()
        self._conflicts: list[Conflict] = []

    def run(self, vendor: VendorEncodings) -> Applied:
        activations, weights = self._sorted(vendor)
        groups: dict[str, list[tuple[str, str, VendorTensor]]] = defaultdict(list)
        for value, shown, tensor in activations:
            root = self._plan.shared.get(value, value)
            if root in self._plan.activations:
                groups[root].append((value, shown, tensor))
            else:
                self._conflict(shown, "the tensor is not stored: its node stays in float or runs as one with the next")
        for root, named in groups.items():
            self._activation(root, named)
        for weight, shown, tensor in weights:
            try:
                quantizer = self._weight_quantizer(weight, tensor)
            except _UnfitError as reason:
                self._conflict(shown, str(reason))
                continue
            self._plan = self._plan.with_weight(weight, quantizer)
            self._decided.add(weight)
        return Applied(self._plan, frozenset(self._decided), tuple(self._conflicts))

    def _conflict(self, name: str, reason: str) -> None:
        self._conflicts.append(Conflict(name, reason))

    def _sorted(
        self, vendor: VendorEncodings
    ) -> tuple[list[tuple[str, str, VendorTensor]], list[tuple[str, str, VendorTensor]]]:
        """(name, name in the file, numbers) of activations and of weights."""
        activations, weights = [], []
        biases = set(self._plan.int_biases)
        for name, tensor in vendor.tensors.items():
            if name in self._plan.weights:
                weights.append((name, name, tensor))
            elif name in self._values:
                activations.append((name, name, tensor))
            elif name in biases or tensor.bits == 32:
                self._conflict(name, "biases have the step of input times weight")
            elif name in self._graph.initializers:
                self._conflict(name, "the constant is not quantized")
            else:
                self._conflict(name, "the simplified model has no tensor of this name")
        for layers, index_of_weight, found in (
            (vendor.layer_inputs, False, activations),
            (vendor.layer_weights, True, weights),
        ):
            for name, tensor in layers.items():
                node = self._nodes.get(name)
                index = None if node is None else semantics.weight_index(node)
                if node is None or index is None:
                    self._conflict(name, "the simplified model has no layer with a weight of this name")
                    continue
                value = node.inputs[index if index_of_weight else 1 - index]
                assert value is not None
                if index_of_weight and value.name not in self._plan.weights:
                    self._conflict(name, "the weight is not quantized")
                else:
                    found.append((value.name or "", name, tensor))
        return activations, weights

    def _activation(self, root: str, named: Iterable[tuple[str, str, VendorTensor]]) -> None:
        """Decides one stored tensor: the entry of the tensor itself wins over those that share its numbers."""
        ordered = sorted(named, key=lambda item: (item[0] != root, self._order[item[0]]))
        entry = self._plan.activations[root]
        chosen: TensorQuantizer | None = None
        for value, shown, tensor in ordered:
            try:
                quantizer = _activation_quantizer(_spec(entry), tensor, self._target.activations)
            except _UnfitError as reason:
                self._conflict(shown, str(reason))
                continue
            if chosen is None:
                chosen = quantizer
            elif not _equal(chosen, quantizer):
                other = "the tensor" if value == root else f"it shares the numbers of {root}, which"
                self._conflict(shown, f"{other} has other numbers in the same file")
        if chosen is None:
            return
        self._plan = self._plan.with_activation(root, chosen)
        self._drop_requants(root, chosen.spec.bits)
        self._decided.add(root)

    def _drop_requants(self, root: str, bits: int) -> None:
        """Removes second quantizers in front of readers that want no fewer bits than the tensor has now."""
        requants: dict[str, Entry] = dict(self._plan.requants)
        biases = dict(self._plan.int_biases)
        for key, entry in self._plan.requants.items():
            name, _, index = key.rpartition(":")
            value = self._nodes[name].inputs[int(index)]
            assert value is not None
            stored = value.name or ""
            if self._plan.shared.get(stored, stored) == root and _spec(entry).bits >= bits:
                del requants[key]
                biases = {b: ((stored if k == key else k), w) for b, (k, w) in biases.items()}
        self._plan = dataclasses.replace(self._plan, requants=requants, int_biases=biases)

    def _weight_quantizer(self, name: str, tensor: VendorTensor) -> TensorQuantizer:
        spec = _spec(self._plan.weights[name])
        constant = self._graph.initializers[name].const_value
        assert constant is not None
        shape = tuple(constant.shape.numpy())
        bits = _bits(tensor, self._target.weights)
        zero = _shifted(tensor, spec.signed)
        axis = spec.axis
        if tensor.scale.size == 1:
            axis = None
        elif axis is None:
            raise _UnfitError(f"target {self._target.name} has one scale for this weight, the file {tensor.scale.size}")
        elif tensor.axis is not None and tensor.axis % len(shape) != axis:
            raise _UnfitError(f"output channels lie along axis {axis}, the file has axis {tensor.axis}")
        elif tensor.scale.size != shape[axis]:
            raise _UnfitError(f"the weight has {shape[axis]} channels, the file {tensor.scale.size} scales")
        middle = 0 if spec.signed else 1 << (bits - 1)
        if (zero != middle).any():
            raise _UnfitError("weights are symmetric, the file has zero points")
        wanted = dataclasses.replace(spec, bits=bits, axis=axis, code_book=CodeBook.UNIFORM)
        return _quantizer(wanted, tensor, zero)


def _activation_quantizer(spec: QuantSpec, tensor: VendorTensor, form: TensorFormat) -> TensorQuantizer:
    """The numbers of the file in the target's format.

    Raises:
        _UnfitError: If the target's format cannot have them.
    """
    bits = _bits(tensor, form)
    if tensor.scale.size != 1:
        raise _UnfitError(f"activations have one scale, the file {tensor.scale.size}")
    zero = _shifted(tensor, spec.signed)
    middle = 0 if spec.signed else 1 << (bits - 1)
    if spec.symmetric and (zero != middle).any():
        raise _UnfitError("the target's range is symmetric, that of the file is not")
    return _quantizer(dataclasses.replace(spec, bits=bits), tensor, zero)


def _bits(tensor: VendorTensor, form: TensorFormat) -> int:
    if tensor.bits not in form.bits or tensor.bits > form.max_bits:
        raise _UnfitError(f"the target has no codes of {tensor.bits} bits")
    return tensor.bits


def _shifted(tensor: VendorTensor, signed: bool) -> npt.NDArray[np.int64]:
    """Zero points of codes of the wanted signedness."""
    half = 1 << (tensor.bits - 1)
    return tensor.zero_point.astype(np.int64) + (int(tensor.signed) - int(signed)) * half


def _quantizer(spec: QuantSpec, tensor: VendorTensor, zero: npt.NDArray[np.int64]) -> TensorQuantizer:
    scale: npt.NDArray[np.float32] = tensor.scale
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise _UnfitError("a scale is zero, negative or infinite")
    if spec.power_of_two and (np.frexp(scale)[0] != 0.5).any():
        raise _UnfitError("the target's scales are powers of two, that of the file is not")
    if spec.axis is None:
        scale, zero = scale.reshape(()), zero.reshape(())
    try:
        return TensorQuantizer(spec, scale, np.asarray(zero, np.int32))
    except ValueError as error:
        raise _UnfitError(str(error)) from None


def _equal(one: TensorQuantizer, other: TensorQuantizer) -> bool:
    return bool(
        one.spec == other.spec
        and np.array_equal(one.scale, other.scale)
        and np.array_equal(one.zero_point, other.zero_point)
    )


def _spec(entry: Entry) -> QuantSpec:
    return entry.spec if isinstance(entry, TensorQuantizer) else entry
