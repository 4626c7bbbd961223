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

from postquant.passes.lut_groups import bias_codes
from postquant.passes.lut_nodes import CONV, MATMUL, MATMUL_TO_FLOAT, METADATA_KEY, Origin
from postquant.passes.qdq import Builder
from postquant.runtime_ops.code_book import post_table
from postquant.runtime_ops.errors import VerificationError
from postquant.runtime_ops.law_lut import LutWeight
from postquant.runtime_ops.post_lattice import lattice_scale
from postquant.runtime_ops.schema import DOMAIN

_EXACT_POST = "exact_post"


def is_packed(node: ir.Node) -> bool:
    """Whether a node has a packed weight."""
    return node.domain == DOMAIN and node.op_type in (CONV, MATMUL, MATMUL_TO_FLOAT)


def packed_layers(model: ir.Model) -> dict[str, str]:
    """The weighted nodes that packed ones stand for: name -> the value that its (first) packed node writes."""
    layers: dict[str, str] = {}
    members = {node for add in model.graph for node in _planes(add)}
    for node in model.graph:
        planes = _planes(node)
        if planes or (is_packed(node) and node not in members):
            layers[node.name or ""] = (planes[0] if planes else node).outputs[0].name or ""
    return layers


def is_two_planes(node: ir.Node) -> bool:
    """Whether a node of an emitted graph adds two planes of POST."""
    return bool(_planes(node))


def is_exact_post(node: ir.Node) -> bool:
    """Whether the DequantizeLinear of a weight in :func:`with_qdq`'s model stands for two planes of POST.

    Its codes are those of the lattice, which name the levels; the file computes with the levels themselves
    (:func:`postquant.runtime_ops.post_lattice.exact_levels`).
    """
    return node.metadata_props.get(METADATA_KEY) == _EXACT_POST


def _planes(node: ir.Node) -> list[ir.Node]:
    """The two products that an Add of two planes of POST adds; empty for any other node."""
    text = node.metadata_props.get(METADATA_KEY)
    if node.op_type != "Add" or node.domain or text is None:
        return []
    producers = [None if value is None else value.producer() for value in node.inputs]
    planes = [made for made in producers if made is not None and is_packed(made)]
    return planes if len(planes) == len(producers) else []


def _join(graph: ir.Graph, build: Builder, add: ir.Node, even: ir.Node, odd: ir.Node) -> None:
    """One packed node with the lattice's table in place of two planes and their sum."""
    table = build.initializer(f"{add.name}_lattice", post_table(even.attributes["bits"].as_int()))
    scale = build.initializer(f"{add.name}_lattice_scale", lattice_scale(_constant(even, 5).numpy()))
    stored = add.outputs[0]
    name, stored.name = stored.name, None
    result = ir.Value(name=name, type=stored.type, shape=stored.shape)
    attributes = [ir.Attr(attr.name, attr.type, attr.value) for attr in even.attributes.values()]
    inputs = [*even.inputs[:4], table, scale, even.inputs[6]]
    joined = ir.Node(DOMAIN, even.op_type, inputs, attributes, name=add.name, outputs=[result])
    joined.metadata_props.update(add.metadata_props)
    graph.insert_before(add, joined)
    _replace(graph, stored, result)
    for node in (add, even, odd):
        graph.remove(node, safe=True)


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    for use in tuple(old.uses()):
        use.node.replace_input_with(use.idx, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new


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
        planes = _planes(node)
        if planes:
            _join(copy.graph, build, node, *planes)
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
        w_scale = node.inputs[5]
        stored = node.outputs[0]
        name, stored.name = stored.name, None
        output = origin.output if node.op_type != MATMUL_TO_FLOAT else name or origin.output
        weight = self._append(
            "DequantizeLinear",
            [self._weight(), w_scale, self._zeros((self.shape[0],), np.int8)],
            f"{origin.weight}_dequantized",
            [ir.AttrInt64("axis", 1 if self.turned else 0)],
        )
        dequantize = weight.producer()
        if origin.planes and dequantize is not None:
            dequantize.metadata_props[METADATA_KEY] = _EXACT_POST
        inputs = [self._input(), weight]
        bias = self._bias()
        if bias is not None and origin.add is None:
            inputs.append(bias)
        product = output if origin.add is None else f"{output}_product"
        value = self._append(origin.op_type, inputs, product, self._attributes(), node=node.name)
        if bias is not None and origin.add is not None:
            value = self._append("Add", [value, bias], output, node=origin.add)
        if node.op_type == MATMUL_TO_FLOAT:
            result = value
            result.name, result.shape = name, stored.shape
        else:
            result = ir.Value(name=name, type=stored.type, shape=stored.shape)
            quantize = ir.Node("", "QuantizeLinear", [value, *node.inputs[7:9]], outputs=[result], name=name)
            self.graph.insert_before(node, quantize)
        _replace(self.graph, stored, result)
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
        if self.node.op_type == MATMUL_TO_FLOAT and not origin.integer_bias:
            if origin.bias_shape == (self.shape[0],):
                return codes
            return self.build.initializer(origin.bias, _constant(self.node, 6).numpy().reshape(origin.bias_shape))
        numbers = [np.asarray(_constant(self.node, index).numpy()) for index in (1, 5)]
        scale = self.build.initializer(f"{codes.name}_scale", np.asarray(numbers[0] * numbers[1], np.float32))
        if origin.integer_bias:
            flat = bias_codes(np.asarray(_constant(self.node, 6).numpy()), numbers[0], numbers[1])
            codes = self.build.initializer(origin.bias, flat.reshape(origin.bias_shape))
        elif origin.bias_shape != (self.shape[0],):
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
