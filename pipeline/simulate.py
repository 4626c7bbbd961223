"""Predicts the codes of every stored tensor from the plan, the float model and the codes in front of it.

Teacher forcing: each prediction starts from the codes that onnxruntime itself wrote for the inputs, so errors do not
accumulate, and a mismatch names the one node group that is wrong. All numbers (scales, zero points, weight codes,
biases) come from the plan and the float model; the file only says where a tensor's codes are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.plan import QuantPlan
from postquant.passes.weight_codes import weight_codes
from postquant.pipeline.kernels import OptimizedGraph
from postquant.pipeline.plan_check import bias_numbers, bias_values, input_quantizer, integer_codes
from postquant.pipeline.qdq_structure import Reading, reading
from postquant.runtime_ops.integer import Affine, Prediction, quantized
from postquant.runtime_ops.kernel_laws import Operand, predict
from postquant.runtime_ops.quantizer import TensorQuantizer

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """One tensor that the emitted model stores as codes.

    Attributes:
        value: The value in the float model.
        codes: Name of the codes in the emitted model, behind the integer Clip.
        quantizer: What the plan says about it.
        reading: What the emitted model says about it.
        node: The node of the float model whose output is quantized, None for a graph input.
        output: Index of that output.
        clips: Bounds of the Relu and Clip nodes between that output and ``value``, the last one first.
        source: Name of the float value that the emitted model quantizes.
        stored_codes: For a second, narrower quantization: the codes that it reads; None otherwise.
        needs: Names of the codes that the prediction reads.
    """

    value: ir.Value
    codes: str
    quantizer: TensorQuantizer
    reading: Reading
    node: ir.Node | None
    output: int
    clips: tuple[tuple[float, float], ...]
    source: str
    stored_codes: str | None
    needs: tuple[str, ...]


class Simulation:
    """All stored tensors of an emitted model, and their laws.

    Args:
        float_model: The simplified model that the plan is about.
        emitted: The quantized model.
        plan: The plan.
    """

    def __init__(self, float_model: ir.Model, emitted: ir.Model, plan: QuantPlan) -> None:
        self._plan = plan
        self._opset = float_model.graph.opset_imports.get("", 17)
        self._float = {node.name: node for node in float_model.graph}
        self._emitted = {node.name: node for node in emitted.graph}
        self.stored = self._find(float_model, emitted)

    def _find(self, float_model: ir.Model, emitted: ir.Model) -> tuple[Stored, ...]:
        found: dict[str, Stored] = {}
        for node in emitted.graph:
            original = self._float.get(node.name)
            if original is None or original.op_type != node.op_type:
                continue
            for index, value in enumerate(node.inputs):
                seen = reading(value)
                if seen is None or seen.constant is not None or index >= len(original.inputs):
                    continue
                source = original.inputs[index]
                assert source is not None
                quantizer = input_quantizer(self._plan, original, index) or self._plan.activation_quantizer(
                    source.name or ""
                )
                if quantizer is not None:
                    self._add(found, source, quantizer, seen)
        for mine, theirs in zip(float_model.graph.outputs, emitted.graph.outputs, strict=True):
            seen, quantizer = reading(theirs), self._plan.activation_quantizer(mine.name or "")
            if seen is not None and quantizer is not None:
                self._add(found, mine, quantizer, seen)
        return tuple(found.values())

    def _add(self, found: dict[str, Stored], value: ir.Value, quantizer: TensorQuantizer, seen: Reading) -> None:
        source = seen.source
        if seen.codes.name in found or source is None:
            return
        inner = reading(source)
        if inner is not None:  # codes -> DequantizeLinear -> QuantizeLinear: the tensor is stored twice
            stored = self._plan.activation_quantizer(value.name or "")
            if stored is not None:
                self._add(found, value, stored, inner)
            codes = inner.codes.name or ""
            found[seen.codes.name or ""] = Stored(
                value, seen.codes.name or "", quantizer, seen, None, 0, (), source.name or "", codes, (codes,)
            )
            return
        node, output, clips = self._origin(value, source)
        needs: list[str] = []
        if node is not None and (written := self._emitted.get(node.name)) is not None:
            for item in written.inputs:
                part = reading(item)
                if part is not None and part.constant is None:
                    needs.append(part.codes.name or "")
        found[seen.codes.name or ""] = Stored(
            value,
            seen.codes.name or "",
            quantizer,
            seen,
            node,
            output,
            clips,
            source.name or "",
            None,
            tuple(dict.fromkeys(needs)),
        )

    def _origin(
        self, value: ir.Value, source: ir.Value
    ) -> tuple[ir.Node | None, int, tuple[tuple[float, float], ...]]:
        """The float node behind the quantizer, through the clips that the quantizer stands for."""
        clips: list[tuple[float, float]] = []
        written = source.producer()
        while True:
            node = value.producer()
            same = (
                (node is None and written is None)
                if node is None or written is None
                else (node.name == written.name and value.index() == source.index())
            )
            bounds = None if node is None else semantics.clip_bounds(node)
            if same or node is None or bounds is None or node.inputs[0] is None:
                return node, value.index() or 0, tuple(clips)
            clips.append(bounds)
            value = node.inputs[0]

    def predict(self, tensor: Stored, arrays: Arrays, feeds: Arrays, optimized: OptimizedGraph) -> Prediction | None:
        """The codes of a stored tensor.

        Args:
            tensor: Which one.
            arrays: Codes by name, at least ``tensor.needs``.
            feeds: The sample.
            optimized: onnxruntime's graph, which tells the kernel.

        Returns:
            The prediction, or None where no law describes the operator or it reads float activations.
        """
        out = Affine.of(tensor.quantizer)
        if tensor.stored_codes is not None:
            stored = self._plan.activation_quantizer(tensor.value.name or "")
            assert stored is not None
            law: Prediction | None = quantized(Affine.of(stored).real(arrays[tensor.stored_codes]), out)
        elif tensor.node is None:
            law = quantized(np.asarray(feeds[tensor.source]), out)
        else:
            law = self._law(tensor, arrays, out, optimized)
        return None if law is None else self.limited(tensor, law)

    def limited(self, tensor: Stored, law: Prediction) -> Prediction:
        """The prediction behind the clips of the float model and the code range of the format."""
        scale, zero = float(tensor.quantizer.scale), float(tensor.quantizer.zero_point)
        for low, high in reversed(tensor.clips):
            # Quantization is monotonic: clipping real values and clipping their codes are the same.
            codes = tensor.quantizer.quantize(np.asarray([low, high], np.float32)).astype(np.int64)
            value = np.clip(law.value, low / scale + zero, high / scale + zero)
            law = Prediction(np.clip(law.codes, codes[0], codes[1]).astype(np.int32), value, law.slack)
        return law.clipped(tensor.quantizer.spec.qmin, tensor.quantizer.spec.qmax)

    def _law(self, tensor: Stored, arrays: Arrays, out: Affine, optimized: OptimizedGraph) -> Prediction | None:
        node = tensor.node
        assert node is not None
        written = self._emitted.get(node.name)
        if written is None or node.domain:
            return None
        operands: list[Operand | None] = []
        for index, value in enumerate(node.inputs):
            if value is None:
                operands.append(None)
                continue
            operand = self._operand(node, index, value, written, arrays)
            if operand is None:
                return None
            operands.append(operand)
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if operands[2:3] and operands[2] is not None and operands[2].codes is not None:
            attributes.pop("beta", None)  # it is part of the codes
        kernel = optimized.kernel_of(written)
        return predict(
            node.op_type, attributes, operands, out, kernel=kernel, opset=self._opset, output=tensor.output
        )

    def _operand(
        self, node: ir.Node, index: int, value: ir.Value, written: ir.Node, arrays: Arrays
    ) -> Operand | None:
        seen = reading(written.inputs[index]) if index < len(written.inputs) else None
        if semantics.is_constant(value):
            return self._constant(node, index, value, quantized_in_file=seen is not None)
        if seen is None:
            return None
        quantizer = input_quantizer(self._plan, node, index) or self._plan.activation_quantizer(value.name or "")
        if quantizer is None:
            return None
        return Operand(arrays[seen.codes.name or ""], Affine.of(quantizer))

    def _constant(self, node: ir.Node, index: int, value: ir.Value, *, quantized_in_file: bool) -> Operand:
        assert value.const_value is not None
        entry = self._plan.weights.get(value.name or "")
        if isinstance(entry, TensorQuantizer):
            return Operand(weight_codes(value.const_value, entry), Affine.of(entry))
        numbers = bias_numbers(self._plan, value.name or "", node)
        if numbers is not None and quantized_in_file:
            codes = integer_codes(bias_values(self._plan, value, node), numbers)
            return Operand(codes.astype(np.int32), numbers)
        corrected = self._plan.biases.get(value.name or "")
        return Operand(plain=value.const_value.numpy() if corrected is None else corrected)
