"""Packed nodes as the groups of standard operators that they stand for: :func:`with_qdq`.

The inverse of :func:`postquant.passes.lut_nodes.pack_weights`. Whoever reads a quantized model (verification, recovery,
inspection) sees QuantizeLinear, DequantizeLinear and weighted nodes only; weights are decoded from the very codes and
tables of the file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.lut_nodes import CONV, MATMUL, Origin
from postquant.passes.qdq import Builder
from postquant.runtime_ops.errors import VerificationError
from postquant.runtime_ops.law_lut import LutWeight
from postquant.runtime_ops.schema import DOMAIN


def is_packed(node: ir.Node) -> bool:
    """Whether a node has a packed weight."""
    return node.domain == DOMAIN and node.op_type in (CONV, MATMUL)


def with_qdq(model: ir.Model) -> ir.Model:
    """A model in which no node has a packed weight.

    Args:
        model: Any model; not changed.

    Returns:
        The model itself where it has no such node. Codes keep their names, and so do the nodes and values that a node
        stands for as far as it says so. Weights are decoded when somebody reads them.

    Raises:
        VerificationError: If codes, table, scales or bias are not constants.
    """
    if not any(is_packed(node) for node in model.graph):
        return model
    copy = model.clone()
    build = Builder(copy.graph)
    for node in tuple(copy.graph):
        if is_packed(node):
            _Expansion(copy.graph, build, node).run()
    return copy


class _Expansion:
    def __init__(self, graph: ir.Graph, build: Builder, node: ir.Node) -> None:
        self.graph, self.build, self.node = graph, build, node
        self.origin = Origin.of(node)
        self.shape = tuple(node.attributes["w_shape"].as_ints())
        self.turned = self.origin.op_type == "MatMul" or (self.origin.op_type == "Gemm" and not self.origin.trans_b)

    def run(self) -> None:
        node, origin = self.node, self.origin
        w_scale, y_scale, y_zero = (node.inputs[index] for index in (5, 7, 8))
        inputs = [
            self._input(),
            self._append(
                "DequantizeLinear",
                [self._weight(), w_scale, self._zeros((self.shape[0],), np.int8)],
                f"{origin.weight}_dequantized",
                [ir.AttrInt64("axis", 1 if self.turned else 0)],
            ),
        ]
        bias = self._bias()
        if bias is not None and origin.add is None:
            inputs.append(bias)
        product = origin.output if origin.add is None else f"{origin.output}_product"
        value = self._append(origin.op_type, inputs, product, self._attributes(), node=node.name)
        if bias is not None and origin.add is not None:
            value = self._append("Add", [value, bias], origin.output, node=origin.add)
        stored = node.outputs[0]
        name, stored.name = stored.name, None
        codes = ir.Value(name=name, type=stored.type, shape=stored.shape)
        quantize = ir.Node("", "QuantizeLinear", [value, y_scale, y_zero], outputs=[codes], name=name)
        self.graph.insert_before(node, quantize)
        for use in tuple(stored.uses()):
            use.node.replace_input_with(use.idx, codes)
        for index, output in enumerate(self.graph.outputs):
            if output is stored:
                self.graph.outputs[index] = codes
        self.graph.remove(node, safe=True)

    def _append(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: list[ir.Attr] | None = None,
        *,
        node: str | None = None,
    ) -> ir.Value:
        value = ir.Value(name=self.build.unique(name), type=ir.TensorType(ir.DataType.FLOAT))
        made = ir.Node("", op_type, inputs, attributes or [], outputs=[value], name=node or value.name)
        self.graph.insert_before(self.node, made)
        return value

    def _input(self) -> ir.Value:
        """The dequantized input: that of another reader of the same codes, if there is one."""
        codes, *numbers = self.node.inputs[:3]
        assert codes is not None
        for use in codes.uses():
            if use.node.op_type == "DequantizeLinear" and not use.node.domain and list(use.node.inputs[1:]) == numbers:
                return use.node.outputs[0]
        return self._append("DequantizeLinear", [codes, *numbers], f"{codes.name}_dequantized")

    def _weight(self) -> ir.Value:
        """int8 levels in the layout of the float weight."""
        node, shape, turned = self.node, self.shape, self.turned
        codes, table, scale = (_constant(node, index) for index in (3, 4, 5))
        name = f"{self.origin.weight}_quantized"

        def compute() -> ir.TensorProtocol:
            bits = node.attributes["bits"].as_int()
            levels = LutWeight(codes.numpy(), table.numpy(), scale.numpy(), bits, shape).decoded()
            return ir.Tensor(np.ascontiguousarray(levels.T) if turned else levels, name=name)

        shown = ir.Shape(shape[::-1] if turned else shape)
        return self.build.initializer(name, ir.LazyTensor(compute, dtype=ir.DataType.INT8, shape=shown, name=name))

    def _bias(self) -> ir.Value | None:
        origin = self.origin
        if origin.bias is None:
            return None
        codes = self.node.inputs[6]
        assert codes is not None
        numbers = [np.asarray(_constant(self.node, index).numpy()) for index in (1, 5)]
        scale = self.build.initializer(f"{codes.name}_scale", np.asarray(numbers[0] * numbers[1], np.float32))
        if origin.bias_shape != (self.shape[0],):
            flat = np.asarray(_constant(self.node, 6).numpy())
            codes = self.build.initializer(origin.bias, flat.reshape(origin.bias_shape))
        axis = ir.AttrInt64("axis", max(len(origin.bias_shape) - 1, 0))
        zeros = self._zeros((self.shape[0],), np.int32)
        return self._append("DequantizeLinear", [codes, scale, zeros], f"{origin.bias}_dequantized", [axis])

    def _zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> ir.Value:
        return self.build.initializer(f"{self.node.name}_zero_points", np.zeros(shape, dtype))

    def _attributes(self) -> list[ir.Attr]:
        if self.origin.op_type == "Gemm":
            return [ir.AttrInt64("transB", int(self.origin.trans_b))]
        if self.origin.op_type == "MatMul":
            return []
        kept = [self.node.attributes[name] for name in ("group", "strides", "dilations", "pads")]
        attributes = [ir.Attr(attr.name, attr.type, attr.value) for attr in kept]
        return [*attributes, ir.AttrInt64s("kernel_shape", self.shape[2:])]


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index]
    tensor = None if value is None or value.is_graph_input() else value.const_value
    if tensor is None:
        raise VerificationError(
            f"an input of {node.op_type} is not a constant",
            where=node.name,
            found=None if value is None else value.name,
        )
    return tensor
