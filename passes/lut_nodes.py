"""Weights of 4 and fewer bits as packed codes in operators of ``ai.postquant``: :func:`pack_weights`.

In an emitted graph, a group

    DequantizeLinear -> Conv -> QuantizeLinear              (weight and int32 bias behind DequantizeLinear too)
    DequantizeLinear -> Gemm, MatMul or MatMul + Add -> QuantizeLinear

becomes one LutQLinearConv or LutQLinearMatMul that reads and writes the same codes, under the same names; a Gemm or
MatMul whose output stays in float becomes a LutMatMulIntegerToFloat that writes the same value. Everything around it
stays what it is: integer Clips of narrower activations, other readers of the same tensors. Its function body is that
very group, so onnxruntime runs the same kernels; its file holds 4 or 2 bits per weight.

With ``exact_post`` a weight of the POST code book has its levels exactly, not as the int8 lattice: two
LutMatMulIntegerToFloat with the same codes, one with the table of the even and one with that of the odd powers of
sqrt(2) (:mod:`postquant.runtime_ops.post_lattice`), and an Add, under the name of the node, that adds both. Where the
output is quantized its QuantizeLinear follows. Convolutions keep the lattice: onnxruntime has no integer kernel for
one with a float output.

A node says in its metadata what it stands for (:class:`Origin`), so that the group can be read back
(:mod:`postquant.passes.lut_expansion`). A group that has no such operator (:mod:`postquant.passes.lut_groups`: a
convolution with a float output or of three dimensions, a transposed one) stays as it is, with int8 weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.lut_groups import Group, as_float_output, find_group, float_bias
from postquant.passes.qdq import Builder
from postquant.runtime_ops.code_book import CodeBook, Table, table_indices, uniform_table
from postquant.runtime_ops.law_lut import pack_codes, row_bytes
from postquant.runtime_ops.post_lattice import plane_scales, two_planes
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.schema import DOMAIN

CONV, MATMUL, MATMUL_TO_FLOAT = "LutQLinearConv", "LutQLinearMatMul", "LutMatMulIntegerToFloat"
METADATA_KEY = "ai.postquant"
# Weights of more bits are not packed.
FEW_BITS = 4


@dataclasses.dataclass(frozen=True)
class Origin:
    """The float nodes that one packed node stands for.

    Attributes:
        op_type: "Conv", "Gemm" or "MatMul"; the packed node has its name.
        output: Name of the float value behind them.
        weight: Name of the weight initializer in the float model.
        trans_b: Whether a Gemm's weight is (N, K).
        add: Name of the Add that adds a MatMul's bias, else None.
        bias: Name of the bias's codes (or of its values, where it is float), None where there is no bias.
        bias_shape: Shape of the bias.
        integer_bias: Whether the float bias of a node with a float output stands for int32 codes.
        planes: Whether the node is the Add of two planes of POST.
    """

    op_type: str
    output: str
    weight: str
    trans_b: bool = False
    add: str | None = None
    bias: str | None = None
    bias_shape: tuple[int, ...] = ()
    integer_bias: bool = False
    planes: bool = False

    def to_json(self) -> str:
        """As metadata; :meth:`of` reads it back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @classmethod
    def of(cls, node: ir.Node) -> Origin:
        """What a node says about itself; of a node that says nothing, a guess that computes the same."""
        text = node.metadata_props.get(METADATA_KEY)
        if text is not None:
            values = json.loads(text)
            return cls(**{**values, "bias_shape": tuple(values.get("bias_shape", ()))})
        name = node.name or node.outputs[0].name or node.op_type
        bias = node.inputs[6]
        shape = (int(node.attributes["w_shape"].as_ints()[0]),)
        known = None if bias is None else bias.name
        if node.op_type == MATMUL_TO_FLOAT:
            return cls("MatMul", f"{name}_float", f"{name}_weight", add=f"{name}_add", bias=known, bias_shape=shape)
        op_type = "Conv" if node.op_type == CONV else "Gemm"
        return cls(op_type, f"{name}_float", f"{name}_weight", trans_b=True, bias=known, bias_shape=shape)


def pack_weights(
    model: ir.Model,
    build: Builder,
    quantizers: Mapping[ir.Node, tuple[str, TensorQuantizer]],
    *,
    exact_post: bool = False,
) -> None:
    """Packs what can be packed.

    Args:
        model: An emitted model; changed in place. The functions of its operators are the caller's.
        build: Adds initializers.
        quantizers: Weighted node -> its float weight's name and quantizer, of 4 or fewer bits.
        exact_post: Whether matrix products with POST weights become two planes.
    """
    for node, (name, quantizer) in quantizers.items():
        group = find_group(node)
        if group is not None:
            planes = exact_post and quantizer.spec.code_book is CodeBook.POST
            _Packing(model.graph, build, group, name, quantizer, planes=planes).run()


def code_bits(quantizer: TensorQuantizer) -> int:
    """Bits of a packed code: 2, or 4 for 3 bits as well."""
    return 2 if quantizer.spec.bits == 2 else 4


def code_table(quantizer: TensorQuantizer) -> Table:
    """The table of a quantizer; that of uniform codes holds all of them."""
    return uniform_table(code_bits(quantizer)) if quantizer.table is None else quantizer.table


class _Packing:
    """Replaces one group."""

    def __init__(
        self, graph: ir.Graph, build: Builder, group: Group, weight: str, quantizer: TensorQuantizer, *, planes: bool
    ) -> None:
        floating = as_float_output(group) if planes else None
        self.planes, self.group = floating is not None, floating or group
        self.graph, self.build, self.weight, self.quantizer = graph, build, weight, quantizer
        node = self.group.node
        self.turned = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not semantics.attribute(node, "transB", 0)
        )
        levels = group.weight.inputs[0]
        assert levels is not None
        assert levels.const_value is not None
        self.levels = levels.const_value
        shape = tuple(self.levels.shape.numpy())
        self.shape = shape[::-1] if self.turned else shape

    def run(self) -> None:
        """Does it."""
        group, stored = self.group, self.group.output
        name = stored.name
        bias, bias_name, bias_shape = _bias(self.build, group, self.weight, self.shape[0])
        last = group.add or group.node
        origin = Origin(
            group.node.op_type,
            last.outputs[0].name or "",
            self.weight,
            trans_b=group.node.op_type == "Gemm" and not self.turned,
            add=None if group.add is None else group.add.name,
            bias=bias_name,
            bias_shape=bias_shape,
            integer_bias=group.quantize is None and group.bias_node is not None,
            planes=self.planes,
        )
        codes = self.build.initializer(
            f"{self.weight}_codes",
            _packed(self.levels, self.quantizer, self.shape, f"{self.weight}_codes", turned=self.turned),
        )
        result = self._two_planes(codes, bias) if self.planes else self._one(codes, bias)
        made = result.producer()
        assert made is not None
        made.name = group.node.name
        made.metadata_props[METADATA_KEY] = origin.to_json()
        result.name, result.type, result.shape = name, stored.type, stored.shape
        self._rewire(stored, result)

    def _one(self, codes: ir.Value, bias: ir.Value) -> ir.Value:
        group = self.group
        table = self.build.initializer(f"{self.weight}_table", code_table(self.quantizer))
        operator = CONV if group.node.op_type == "Conv" else MATMUL
        behind = () if group.quantize is None else group.quantize.inputs[1:3]
        if group.quantize is None:
            operator = MATMUL_TO_FLOAT
        return self._add(operator, [codes, table, group.weight.inputs[1], bias, *behind])

    def _two_planes(self, codes: ir.Value, bias: ir.Value) -> ir.Value:
        scale = self.group.weight.inputs[1]
        assert scale is not None
        assert scale.const_value is not None
        products = []
        none = bias
        if self.group.bias is not None:
            none = self.build.initializer(f"{self.weight}_no_bias", np.zeros(self.shape[0], np.float32))
        tables, scales = two_planes(self.quantizer.spec.bits), plane_scales(scale.const_value.numpy())
        values = zip(("even", "odd"), tables, scales, (bias, none), strict=True)
        for plane, table, plane_scale, plane_bias in values:
            name = f"{self.weight}_{plane}"
            inputs = [
                codes,
                self.build.initializer(f"{name}_table", table),
                self.build.initializer(f"{name}_scale", plane_scale),
                plane_bias,
            ]
            product = self._add(MATMUL_TO_FLOAT, inputs)
            product.name = self.build.unique(f"{self.group.node.name}_{plane}")
            product.type, product.shape = ir.TensorType(ir.DataType.FLOAT), self.group.output.shape
            made = product.producer()
            assert made is not None
            made.name = product.name
            products.append(product)
        total = ir.Node("", "Add", products)
        self.graph.insert_before(self._last(), total)
        return total.outputs[0]

    def _add(self, operator: str, inputs: Sequence[ir.Value | None]) -> ir.Value:
        made = ir.Node(
            DOMAIN,
            operator,
            [*self.group.source.inputs[:3], *inputs],
            _attributes(self.group.node, code_bits(self.quantizer), self.shape),
        )
        self.graph.insert_before(self._last(), made)
        return made.outputs[0]

    def _last(self) -> ir.Node:
        return self.group.quantize or self.group.add or self.group.node

    def _rewire(self, stored: ir.Value, result: ir.Value) -> None:
        group = self.group
        result.metadata_props.update(stored.metadata_props)
        for use in tuple(stored.uses()):
            use.node.replace_input_with(use.idx, result)
        for index, output in enumerate(self.graph.outputs):
            if output is stored:
                self.graph.outputs[index] = result
        for old in (group.quantize, group.add, group.node):
            if old is not None:
                self.graph.remove(old, safe=True)
        for old in (group.source, group.weight, group.bias_node):
            if old is not None and not old.outputs[0].uses() and not old.outputs[0].is_graph_output():
                self.graph.remove(old, safe=True)


def _packed(
    levels: ir.TensorProtocol, quantizer: TensorQuantizer, shape: tuple[int, ...], name: str, *, turned: bool
) -> ir.TensorProtocol:
    """(M, bytes per row) uint8; computed when it is read."""
    rows, terms, bits = shape[0], int(np.prod(shape[1:])), code_bits(quantizer)

    def compute() -> ir.TensorProtocol:
        array = np.asarray(levels.numpy())
        matrix = (array.T if turned else array).reshape(rows, terms)
        return ir.Tensor(pack_codes(table_indices(matrix, code_table(quantizer)), bits), name=name)

    return ir.LazyTensor(compute, dtype=ir.DataType.UINT8, shape=ir.Shape((rows, row_bytes(terms, bits))), name=name)


def _bias(build: Builder, group: Group, weight: str, channels: int) -> tuple[ir.Value, str | None, tuple[int, ...]]:
    """(M,) int32 codes, or float values of a float output; the name and the shape of what was there."""
    value = group.bias
    if value is None:
        dtype = np.float32 if group.quantize is None else np.int32
        return build.initializer(f"{weight}_no_bias", np.zeros(channels, dtype)), None, ()
    assert value.const_value is not None
    shape = tuple(value.const_value.shape.numpy())
    if group.quantize is None and group.bias_node is not None:
        real = float_bias(group)
        assert real is not None
        return build.initializer(f"{weight}_bias", real), value.name, shape
    if shape == (channels,):
        return value, value.name, shape
    return build.initializer(f"{value.name}_flat", value.const_value.numpy().reshape(-1)), value.name, shape


def _attributes(node: ir.Node, bits: int, shape: tuple[int, ...]) -> list[ir.Attr]:
    result = [ir.AttrInt64("bits", bits), ir.AttrInt64s("w_shape", shape)]
    if node.op_type == "Conv":
        rank = len(shape) - 2
        result.append(ir.AttrInt64("group", int(semantics.attribute(node, "group", 1))))
        for name, default in (("strides", [1] * rank), ("dilations", [1] * rank), ("pads", [0] * 2 * rank)):
            given = node.attributes.get(name)
            result.append(ir.AttrInt64s(name, default if given is None else list(given.as_ints())))
    return result
