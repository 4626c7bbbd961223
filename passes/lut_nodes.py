"""Weights of 4 and fewer bits as packed codes in operators of ``ai.postquant``: :func:`pack_weights`.

In an emitted graph, a group

    DequantizeLinear -> Conv -> QuantizeLinear              (weight and int32 bias behind DequantizeLinear too)
    DequantizeLinear -> Gemm, MatMul or MatMul + Add -> QuantizeLinear

becomes one LutQLinearConv or LutQLinearMatMul that reads and writes the same codes, under the same names. Everything
around it stays what it is: integer Clips of narrower activations, other readers of the same tensors. Its function body
is that very group, so onnxruntime runs the same kernels; its file holds 4 or 2 bits per weight.

A node says in its metadata what it stands for (:class:`Origin`), so that the group can be read back
(:mod:`postquant.passes.lut_expansion`). A group that has no such operator (a float output or bias, a 3-D convolution,
a transposed convolution) stays as it is, with int8 weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.qdq import Builder
from postquant.runtime_ops.code_book import Table, table_indices, uniform_table
from postquant.runtime_ops.law_lut import pack_codes, row_bytes
from postquant.runtime_ops.ops import functions_for
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.schema import DOMAIN, VERSION

CONV, MATMUL = "LutQLinearConv", "LutQLinearMatMul"
METADATA_KEY = "ai.postquant"
# Weights of more bits are not packed.
FEW_BITS = 4
# Functions came with IR version 8.
_LEAST_IR_VERSION = 8


@dataclasses.dataclass(frozen=True)
class Origin:
    """The float nodes that one packed node stands for.

    Attributes:
        op_type: "Conv", "Gemm" or "MatMul"; the packed node has its name.
        output: Name of the float value behind them.
        weight: Name of the weight initializer in the float model.
        trans_b: Whether a Gemm's weight is (N, K).
        add: Name of the Add that adds a MatMul's bias, else None.
        bias: Name of the bias's codes, None where there is no bias.
        bias_shape: Shape of the bias.
    """

    op_type: str
    output: str
    weight: str
    trans_b: bool = False
    add: str | None = None
    bias: str | None = None
    bias_shape: tuple[int, ...] = ()

    def to_json(self) -> str:
        """As metadata; :meth:`of` reads it back."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def of(cls, node: ir.Node) -> Origin:
        """What a node says about itself; of a node that says nothing, a guess that computes the same."""
        text = node.metadata_props.get(METADATA_KEY)
        if text is not None:
            values = json.loads(text)
            return cls(**{**values, "bias_shape": tuple(values["bias_shape"])})
        name = node.name or node.outputs[0].name or node.op_type
        bias = node.inputs[6]
        shape = (int(node.attributes["w_shape"].as_ints()[0]),)
        op_type = "Conv" if node.op_type == CONV else "Gemm"
        known = None if bias is None else bias.name
        return cls(op_type, f"{name}_float", f"{name}_weight", trans_b=True, bias=known, bias_shape=shape)


@dataclasses.dataclass(frozen=True)
class _Group:
    """A weighted node between quantizers."""

    node: ir.Node
    add: ir.Node | None
    quantize: ir.Node
    source: ir.Node
    weight: ir.Node
    bias: ir.Node | None


def pack_weights(model: ir.Model, build: Builder, quantizers: Mapping[ir.Node, tuple[str, TensorQuantizer]]) -> None:
    """Packs what can be packed.

    Args:
        model: An emitted model; changed in place. It gets the functions of the operators that it uses.
        build: Adds initializers.
        quantizers: Weighted node -> its float weight's name and quantizer, of 4 or fewer bits.
    """
    used: list[str] = []
    for node, (name, quantizer) in quantizers.items():
        group = _group(node)
        if group is not None:
            used.append(_replace(model.graph, build, group, name, quantizer))
    if not used:
        return
    model.graph.opset_imports[DOMAIN] = VERSION
    model.ir_version = max(model.ir_version, _LEAST_IR_VERSION)
    for proto in functions_for(used, opset=model.graph.opset_imports[""]):
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function


def code_bits(quantizer: TensorQuantizer) -> int:
    """Bits of a packed code: 2, or 4 for 3 bits as well."""
    return 2 if quantizer.spec.bits == 2 else 4


def code_table(quantizer: TensorQuantizer) -> Table:
    """The table of a quantizer; that of uniform codes holds all of them."""
    return uniform_table(code_bits(quantizer)) if quantizer.table is None else quantizer.table


def _group(node: ir.Node) -> _Group | None:
    source, weight = _dequantizer(node, 0), _dequantizer(node, 1)
    if source is None or weight is None or not _fits(node):
        return None
    bias: ir.Node | None = None
    add: ir.Node | None = None
    last = _only_reader(node)
    if node.op_type == "MatMul" and last is not None and last.op_type == "Add" and not last.domain:
        add = last
        at = 1 if add.inputs[0] is node.outputs[0] else 0
        bias = _dequantizer(add, at)
        if bias is None:
            return None
        last = _only_reader(add)
    elif len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _dequantizer(node, 2)
        if bias is None:
            return None
    if last is None or last.op_type != "QuantizeLinear" or last.domain or len(last.inputs) < 3:
        return None
    if bias is not None and not _is_int32_constant(bias.inputs[0]):
        return None
    scale = weight.inputs[1]
    if scale is None or scale.const_value is None or scale.const_value.shape.rank() != 1:
        return None
    zero, own = last.inputs[2], source.inputs[2]
    if zero is None or own is None or zero.dtype != own.dtype or own.dtype not in _ACTIVATIONS:
        return None
    return _Group(node, add, last, source, weight, bias)


_ACTIVATIONS = (ir.DataType.UINT8, ir.DataType.INT8)


def _fits(node: ir.Node) -> bool:
    """Whether an operator with packed codes exists for a weighted node."""
    weight = node.inputs[1]
    rank = None if weight is None or weight.shape is None else weight.shape.rank()
    if node.op_type == "Conv":
        return rank in (3, 4) and semantics.attribute(node, "auto_pad", "NOTSET") == "NOTSET"
    if node.op_type == "Gemm":
        plain = semantics.attribute(node, "alpha", 1.0) == 1.0 and semantics.attribute(node, "beta", 1.0) == 1.0
        return rank == 2 and plain and not semantics.attribute(node, "transA", 0)
    return node.op_type == "MatMul" and rank == 2


def _dequantizer(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index]
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear" or producer.domain or len(producer.inputs) < 3:
        return None
    return producer


def _only_reader(node: ir.Node) -> ir.Node | None:
    value = node.outputs[0]
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _is_int32_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.dtype == ir.DataType.INT32


def _replace(graph: ir.Graph, build: Builder, group: _Group, weight: str, quantizer: TensorQuantizer) -> str:
    node, stored = group.node, group.quantize.outputs[0]
    levels = group.weight.inputs[0]
    assert levels is not None
    assert levels.const_value is not None
    shape = tuple(levels.const_value.shape.numpy())
    turned = node.op_type == "MatMul" or (node.op_type == "Gemm" and not semantics.attribute(node, "transB", 0))
    if turned:
        shape = shape[::-1]
    bits = code_bits(quantizer)
    tensor = _packed(levels.const_value, quantizer, shape, f"{weight}_codes", turned=turned)
    table = ir.Tensor(code_table(quantizer), name=f"{weight}_table")
    bias, bias_name, bias_shape = _bias(build, group, weight, shape[0])
    inputs = [
        *group.source.inputs[:3],
        build.initializer(f"{weight}_codes", tensor),
        build.initializer(f"{weight}_table", table),
        group.weight.inputs[1],
        bias,
        *group.quantize.inputs[1:3],
    ]
    last = group.add or node
    origin = Origin(
        node.op_type,
        last.outputs[0].name or "",
        weight,
        trans_b=node.op_type == "Gemm" and not turned,
        add=None if group.add is None else group.add.name,
        bias=bias_name,
        bias_shape=bias_shape,
    )
    name = stored.name
    packed = ir.Node(
        DOMAIN,
        CONV if node.op_type == "Conv" else MATMUL,
        inputs,
        _attributes(node, bits, shape),
        name=node.name,
        outputs=[ir.Value(name=name, type=stored.type, shape=stored.shape)],
        metadata_props={METADATA_KEY: origin.to_json()},
    )
    graph.insert_before(group.quantize, packed)
    result = packed.outputs[0]
    result.metadata_props.update(stored.metadata_props)
    for use in tuple(stored.uses()):
        use.node.replace_input_with(use.idx, result)
    for index, output in enumerate(graph.outputs):
        if output is stored:
            graph.outputs[index] = result
    for old in (group.quantize, group.add, node):
        if old is not None:
            graph.remove(old, safe=True)
    for old in (group.source, group.weight, group.bias):
        if old is not None and not old.outputs[0].uses() and not old.outputs[0].is_graph_output():
            graph.remove(old, safe=True)
    return packed.op_type


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


def _bias(build: Builder, group: _Group, weight: str, channels: int) -> tuple[ir.Value, str | None, tuple[int, ...]]:
    """(M,) int32 codes, the name and the shape of those that were there."""
    if group.bias is None:
        return build.initializer(f"{weight}_no_bias", np.zeros(channels, np.int32)), None, ()
    value = group.bias.inputs[0]
    assert value is not None
    assert value.const_value is not None
    codes: npt.NDArray[np.int32] = value.const_value.numpy()
    if codes.shape == (channels,):
        return value, value.name, codes.shape
    return build.initializer(f"{value.name}_flat", codes.reshape(-1)), value.name, codes.shape


def _attributes(node: ir.Node, bits: int, shape: tuple[int, ...]) -> list[ir.Attr]:
    result = [ir.AttrInt64("bits", bits), ir.AttrInt64s("w_shape", shape)]
    if node.op_type == "Conv":
        rank = len(shape) - 2
        result.append(ir.AttrInt64("group", int(semantics.attribute(node, "group", 1))))
        for name, default in (("strides", [1] * rank), ("dilations", [1] * rank), ("pads", [0] * 2 * rank)):
            given = node.attributes.get(name)
            result.append(ir.AttrInt64s(name, default if given is None else list(given.as_ints())))
    return result
