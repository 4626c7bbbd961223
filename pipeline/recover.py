"""The float model that a quantized one stands for: :func:`recover_float_model`.

A result folder holds no float model. It is put together again from the quantized model and its plan, so that the
receiver can check one against the other: weights and biases are what their codes stand for, quantizers disappear, and
where a quantizer stands for a Relu or Clip, a Relu takes its place, or a Clip to the range of its codes. Quantizing the
recovered model by the plan gives the same codes.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.adaptive_nodes import is_adaptive
from postquant.passes.barriers import is_barrier
from postquant.passes.border_nodes import is_border
from postquant.passes.lookup_nodes import lookup_nodes
from postquant.passes.lut_expansion import with_qdq
from postquant.passes.plan import QuantPlan
from postquant.pipeline.qdq_structure import Reading, reading
from postquant.runtime_ops.errors import VerificationError

# Elements that are decoded at a time: double precision takes eight times the bytes of the codes.
_PART = 1 << 22
# emit names the codes of a tensor "<name>_quantized", with a number behind it where that name was taken.
_CODES_NAME = re.compile(r"(.*)_quantized(_\d+)?")


def recover_float_model(emitted: ir.Model, plan: QuantPlan) -> ir.Model:
    """Undoes the quantizers of a model that was emitted from ``plan``.

    Args:
        emitted: The quantized model; not changed.
        plan: The plan that it was emitted from.

    Returns:
        A float model with the names of the simplified model. Weights are computed when somebody reads them.

    Raises:
        VerificationError: If the model has quantizers that the plan does not know.
    """
    groups = with_qdq(emitted)
    model = groups.clone() if groups is emitted else groups
    _Recovery(model.graph, plan).run()
    return model


class _Recovery:
    def __init__(self, graph: ir.Graph, plan: QuantPlan) -> None:
        self.graph = graph
        self.plan = plan
        self.values = {value.name: value for value in graph.inputs}
        self.values.update((value.name, value) for node in graph for value in node.outputs)
        self.requants = {key.replace(":", "_input"): key for key in plan.requants}

    def run(self) -> None:
        for node in tuple(self.graph):
            if is_barrier(node) and node.inputs[0] is not None and not node.outputs[0].is_graph_output():
                self._replace(node.outputs[0], node.inputs[0])
            seen = reading(node.outputs[0]) if node.op_type == "DequantizeLinear" else None
            if seen is None:
                continue
            if seen.constant is not None:
                self._constant(seen, seen.constant)
            elif seen.source is not None:
                self._activation(seen, seen.source)
        self._remove_unread()

    def _constant(self, seen: Reading, codes: ir.TensorProtocol) -> None:
        name = self._original_name(seen.codes.name, (*self.plan.weights, *self.plan.int_biases))
        tensor = _dequantized(codes, seen, name)
        value = ir.Value(
            name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(codes.shape.numpy()), const_value=tensor
        )
        self.graph.register_initializer(value)
        self._replace(seen.dequantize.outputs[0], value)

    def _activation(self, seen: Reading, source: ir.Value) -> None:
        if seen.looked_up is not None:  # the stored tensor may have no DequantizeLinear of its own
            self._activation(seen.looked_up, source)
            return
        assert seen.quantize is not None
        result = seen.dequantize.outputs[0]
        codes_name = seen.quantize.outputs[0].name
        match = _CODES_NAME.fullmatch(codes_name or "")
        if match and match.group(1) in self.requants:
            self._replace(result, source)
            return
        name = self._original_name(codes_name, (*self.plan.activations, *self.plan.shared))
        known = self.values.get(name)
        if known is result:  # an output of the graph; the value before it was renamed
            result.name = f"{name}_recovered"
            known = None
        if known is None and source.name is not None and source.name.startswith(f"{name}_float"):
            source.name = name
            known = source
        self.values[name] = known if known is not None else self._clipped(seen, source, name)
        self._replace(result, self.values[name])

    def _clipped(self, seen: Reading, source: ir.Value, name: str) -> ir.Value:
        """The value that a dropped Relu or Clip computed, as far as the codes can tell."""
        quantizer = self.plan.activation_quantizer(name)
        if quantizer is None:
            raise VerificationError("a tensor is quantized, but not decided by the plan", where=name)
        low, high = seen.saturation or (quantizer.spec.qmin, quantizer.spec.qmax)
        if low == int(quantizer.zero_point) and high == quantizer.spec.qmax:
            return self._insert("Relu", [source], seen, name)  # the upper end is the quantizer's own
        bounds = []
        for end, code in (("low", low), ("high", high)):
            real = np.asarray((code - int(quantizer.zero_point)) * np.float64(quantizer.scale), np.float32)
            bound = ir.Value(
                name=f"{name}_recovered_{end}",
                type=ir.TensorType(ir.DataType.FLOAT),
                shape=ir.Shape(()),
                const_value=ir.Tensor(real, name=f"{name}_recovered_{end}"),
            )
            self.graph.register_initializer(bound)
            bounds.append(bound)
        return self._insert("Clip", [source, *bounds], seen, name)

    def _insert(self, op_type: str, inputs: list[ir.Value], seen: Reading, name: str) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=inputs[0].shape)
        node = ir.Node("", op_type, inputs, outputs=[value], name=f"{name}_recovered")
        assert seen.quantize is not None
        self.graph.insert_before(seen.quantize, node)
        return value

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        for use in tuple(old.uses()):
            use.node.replace_input_with(use.idx, new)
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[index] = new

    def _remove_unread(self) -> None:
        lookups = lookup_nodes(self.graph)
        quantizers = ("DequantizeLinear", "Clip", "QuantizeLinear")
        for node in reversed(tuple(self.graph)):
            ours = node in lookups or any(is_ours(node) for is_ours in (is_barrier, is_border, is_adaptive))
            removable = node.op_type in quantizers or ours
            if removable and not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in tuple(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]

    def _original_name(self, codes_name: str | None, known: tuple[str, ...]) -> str:
        match = _CODES_NAME.fullmatch(codes_name or "")
        if match is None or match.group(1) not in known:
            raise VerificationError("the plan does not know a quantized tensor of the model", where=codes_name)
        return match.group(1)


def _dequantized(codes: ir.TensorProtocol, seen: Reading, name: str) -> ir.TensorProtocol:
    numbers = seen.numbers

    def compute() -> ir.TensorProtocol:
        integers = np.asarray(codes.numpy())
        if integers.size <= _PART or integers.ndim < 2:
            return ir.Tensor(_real(integers, numbers.scale, numbers.zero_point, numbers.axis), name=name)
        real = np.empty(integers.shape, np.float32)
        rows = max(1, _PART * len(integers) // integers.size)
        for start in range(0, len(integers), rows):
            part = slice(start, start + rows)
            scale, zero = numbers.scale, numbers.zero_point
            if numbers.axis == 0:
                scale, zero = scale[part], zero[part]
            real[part] = _real(integers[part], scale, zero, numbers.axis)
        return ir.Tensor(real, name=name)

    return ir.LazyTensor(compute, dtype=ir.DataType.FLOAT, shape=ir.Shape(codes.shape.numpy()), name=name)


def _real(
    codes: npt.NDArray[np.integer], scale: npt.NDArray[np.float32], zero: npt.NDArray[np.int32], axis: int | None
) -> npt.NDArray[np.float32]:
    shape = [1] * codes.ndim
    if axis is not None:
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    # In double precision, rounded once: quantizing the result gives the codes back, those of int32 biases too.
    return ((codes.astype(np.float64) - zero) * scale.astype(np.float64)).astype(np.float32)
