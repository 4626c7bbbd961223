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

from postquant.passes import biases, semantics
from postquant.passes.barriers import rounds_bias
from postquant.passes.free_memory import release_tensor
from postquant.passes.lut_expansion import is_exact_post
from postquant.passes.plan import QuantPlan
from postquant.passes.weight_codes import weight_codes
from postquant.pipeline.kernels import OptimizedGraph
from postquant.pipeline.plan_check import bias_numbers, input_quantizer, integer_codes, weight_numbers
from postquant.pipeline.qdq_structure import reading
from postquant.pipeline.stored import Stored, biased_product, find_stored, moved_float
from postquant.runtime_ops.integer import Affine, Prediction, quantized
from postquant.runtime_ops.kernel_laws import Operand, predict
from postquant.runtime_ops.law_float import evaluate
from postquant.runtime_ops.quantizer import TensorQuantizer

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """One operator between quantizers, with everything that it reads.

    Attributes:
        op_type: Operator type; "MatMul" for one with the Add of a constant vector behind it, its third operand.
        attributes: Its attributes as Python values.
        operands: Its inputs; None where an optional one is absent.
        kernel: What onnxruntime runs for it, "" if unknown.
        output: Index of the operator's output.
    """

    op_type: str
    attributes: Mapping[str, Any]
    operands: tuple[Operand | None, ...]
    kernel: str
    output: int = 0

    def law(self, out: Affine, opset: int) -> Prediction | None:
        """Output codes in the format ``out``, None where no law describes the operator."""
        return predict(
            self.op_type,
            self.attributes,
            self.operands,
            out,
            kernel=self.kernel,
            opset=opset,
            output=self.output,
        )


class Simulation:
    """All stored tensors of an emitted model, and their laws.

    Args:
        float_model: The simplified model that the plan is about.
        emitted: The quantized model.
        plan: The plan.
    """

    def __init__(self, float_model: ir.Model, emitted: ir.Model, plan: QuantPlan) -> None:
        self._plan = plan
        self.opset = float_model.graph.opset_imports.get("", 17)
        self._emitted = {node.name: node for node in emitted.graph}
        self.stored = find_stored(float_model, emitted, plan)
        self._whole = {tensor.codes: tensor for tensor in self.stored}

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
        law = self.unlimited(tensor, arrays, feeds, optimized)
        return None if law is None else self.limited(tensor, law)

    def unlimited(self, tensor: Stored, arrays: Arrays, feeds: Arrays, optimized: OptimizedGraph) -> Prediction | None:
        """The prediction in front of the clips of :meth:`limited`; arguments and result as of :meth:`predict`."""
        out = Affine.of(tensor.quantizer)
        if tensor.stored_codes is not None:
            assert tensor.stored_quantizer is not None
            real = Affine.of(tensor.stored_quantizer).real(arrays[tensor.stored_codes])
            ours = (tensor.quantizer.border, tensor.quantizer.adaptive, tensor.quantizer.table)
            plain = all(part is None for part in ours)
            return quantized(real, out) if plain else self._ours(tensor, real)
        if tensor.node is None:
            return quantized(np.asarray(feeds[tensor.source]), out)
        law = self._law(tensor, arrays, out, optimized)
        for node in (tensor.node, biased_product(tensor.node)):
            for value in () if node is None else node.inputs:
                release_tensor(None if value is None else value.const_value)
        return law

    def limited(self, tensor: Stored, law: Prediction) -> Prediction:
        """The prediction behind the clips of the float model and the code range of the format."""
        scale, zero = float(tensor.quantizer.scale), float(tensor.quantizer.zero_point)
        for low, high in reversed(tensor.clips):
            # Quantization is monotonic: clipping real values and clipping their codes are the same.
            codes = tensor.quantizer.quantize(np.asarray([low, high], np.float32)).astype(np.int64)
            value = np.clip(law.value, low / scale + zero, high / scale + zero)
            law = Prediction(np.clip(law.codes, codes[0], codes[1]).astype(np.int32), value, law.slack)
        return law.clipped(tensor.quantizer.spec.qmin, tensor.quantizer.spec.qmax)

    def _ours(self, tensor: Stored, real: npt.NDArray[np.float32]) -> Prediction:
        """Codes of BorderQuantize, AdaptiveQuantize and code books, which agree to the bit: there is no slack."""
        codes = tensor.quantizer.quantize(real).astype(np.int32)
        return Prediction(codes, codes.astype(np.float32), 0.0)

    def remark(self, tensor: Stored, optimized: OptimizedGraph) -> str:
        """What may explain a mismatch; "" where nothing is known."""
        written = None if tensor.node is None else self._emitted.get(tensor.node.name)
        if written is None or written.op_type not in semantics.WEIGHTED:
            return ""
        integer = optimized.kernel_of(written).startswith("Q")
        floats = [i for i, value in enumerate(written.inputs) if i and semantics.is_constant(value)]
        if integer and floats:
            return f"; input {floats[0]} of {written.name} is a float constant, which onnxruntime quantizes by itself"
        return ""

    def _law(self, tensor: Stored, arrays: Arrays, out: Affine, optimized: OptimizedGraph) -> Prediction | None:
        node = tensor.node
        assert node is not None
        written = self._emitted.get(node.name)
        if written is None or node.domain:
            return None
        behind = None if biased_product(node) is not None else moved_float(node, written)
        if behind is not None:
            return self._moved(tensor, behind, arrays, out, optimized)
        if node.op_type == "Reshape" and node.inputs[0] is not None:
            codes = self._operand(node, 0, node.inputs[0], written, arrays)
            return None if codes is None else self._reshaped(tensor, quantized(codes.real, out), arrays)
        group = self.group(tensor, arrays, optimized)
        return None if group is None else group.law(out, self.opset)

    def group(self, tensor: Stored, arrays: Arrays, optimized: OptimizedGraph) -> Group | None:
        """The operator of a stored tensor with the operands that it reads.

        Args:
            tensor: Which one.
            arrays: Codes by name, at least ``tensor.needs``.
            optimized: onnxruntime's graph, which tells the kernel.

        Returns:
            None where there is no single operator or it reads float activations.
        """
        node = tensor.node
        written = None if node is None else self._emitted.get(node.name)
        if node is None or written is None or node.domain:
            return None
        product = biased_product(node)
        if product is not None:
            return self._biased_product(tensor, product, arrays, optimized)
        operands: list[Operand | None] = []
        for index, value in enumerate(node.inputs):
            if value is None:
                operands.append(None)
                continue
            operand = self._operand(node, index, value, written, arrays)
            if operand is None:
                return None
            operands.append(operand)
        _round_bias(operands, written)
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if node.op_type == "Gemm" and operands[1] is not None and operands[1].codes is not None:
            # They are part of the weight's scale and of the bias.
            attributes |= {"alpha": 1.0, "beta": 1.0}
        return Group(node.op_type, attributes, tuple(operands), optimized.kernel_of(written), tensor.output)

    def _moved(
        self, tensor: Stored, value: ir.Value, arrays: Arrays, out: Affine, optimized: OptimizedGraph
    ) -> Prediction | None:
        """A float value that is moved about (Reshape, Transpose) and then quantized."""
        node = tensor.node
        assert node is not None
        inner = dataclasses.replace(tensor, node=value.producer(), output=value.index() or 0)
        law = self._law(inner, arrays, out, optimized)
        if law is None:
            return None
        if node.op_type == "Reshape":
            return self._reshaped(tensor, law, arrays)
        if not all(v is None or semantics.is_constant(v) for v in node.inputs[1:]):
            return None
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        constants = [None if (v is None or v.const_value is None) else v.const_value.numpy() for v in node.inputs[1:]]
        slack = np.broadcast_to(np.asarray(law.slack), law.codes.shape)
        codes, moved, slack = (
            evaluate(node.op_type, attributes, [np.ascontiguousarray(array), *constants], self.opset)[0]
            for array in (law.codes, law.value, slack)
        )
        return Prediction(codes, moved, slack)

    def _reshaped(self, tensor: Stored, law: Prediction, arrays: Arrays) -> Prediction | None:
        """The prediction in the shape of the stored tensor: Reshape keeps the order of elements.

        Its shape may be computed at run time, so that of the stored tensor is taken; a Reshape in front of other moving
        nodes has no law.
        """
        observed = arrays[tensor.codes]
        if self._whole[tensor.codes] is not tensor or observed.size != law.codes.size:
            return None
        shape = observed.shape
        slack = np.broadcast_to(np.asarray(law.slack), law.codes.shape)
        return Prediction(law.codes.reshape(shape), law.value.reshape(shape), slack.reshape(shape))

    def _biased_product(
        self, tensor: Stored, product: ir.Node, arrays: Arrays, optimized: OptimizedGraph
    ) -> Group | None:
        """MatMul followed by an Add of a constant vector, which onnxruntime joins into one QGemm."""
        add, bias = tensor.node, semantics.bias_of(product)
        written = self._emitted.get(product.name)
        if add is None or bias is None or written is None or add.name not in self._emitted:
            return None
        at = add.inputs.index(bias)
        codes = reading(self._emitted[add.name].inputs[at]) is not None
        operands: list[Operand | None] = []
        for index in (0, 1):
            value = product.inputs[index]
            operand = None if value is None else self._operand(product, index, value, written, arrays)
            if operand is None:
                return None
            operands.append(operand)
        operands.append(self._constant(add, at, bias, quantized_in_file=codes))
        _round_bias(operands, written)
        kernel = optimized.by_value.get(tensor.codes, "")
        return Group("MatMul", {}, tuple(operands), kernel)

    def _operand(self, node: ir.Node, index: int, value: ir.Value, written: ir.Node, arrays: Arrays) -> Operand | None:
        seen = reading(written.inputs[index]) if index < len(written.inputs) else None
        if semantics.is_constant(value):
            if seen is not None and is_exact_post(seen.dequantize):
                return None  # the plan's codes only name the levels that the file computes with
            return self._constant(node, index, value, quantized_in_file=seen is not None)
        if seen is None:
            return None
        quantizer = input_quantizer(self._plan, node, index) or self._plan.activation_quantizer(value.name or "")
        if quantizer is None or quantizer.adaptive is not None:
            return None  # with an adaptive step the reader computes in float
        return Operand(arrays[seen.codes.name or ""], Affine.of(quantizer))

    def _constant(self, node: ir.Node, index: int, value: ir.Value, *, quantized_in_file: bool) -> Operand:
        assert value.const_value is not None
        entry = self._plan.weights.get(value.name or "")
        if isinstance(entry, TensorQuantizer):
            return Operand(weight_codes(value.const_value, entry), weight_numbers(node, entry))
        numbers = bias_numbers(self._plan, value.name or "", node)
        if numbers is not None and quantized_in_file:
            codes = integer_codes(biases.bias_values(node, value, self._plan), numbers)
            return Operand(codes.astype(np.int32), numbers)
        if value.name in self._plan.biases or value.name in self._plan.int_biases:
            return Operand(plain=biases.bias_values(node, value, self._plan))
        return Operand(plain=value.const_value.numpy())


def _round_bias(operands: list[Operand | None], written: ir.Node) -> None:
    """Makes codes of a float bias where onnxruntime does; changes the list."""
    if len(operands) < 3 or not rounds_bias(written):
        return
    x, w, bias = operands
    if x is None or w is None or bias is None or bias.plain is None or x.numbers is None or w.numbers is None:
        return
    scale = np.asarray(x.numbers.scale * w.numbers.scale, np.float32)
    codes = np.rint(np.asarray(bias.plain, np.float32) / scale).astype(np.int32)
    numbers = Affine(scale, np.zeros(scale.shape, np.int32), np.dtype(np.int32), 0 if scale.ndim else None)
    operands[2] = Operand(codes, numbers, rounded_from=bias.plain)
