"""Activations with code books in an emitted graph: :func:`lookup_dequantize`.

A requantization whose quantizer has a code book becomes

    codes of the stored tensor -> LutRequantize (ai.postquant) -> DequantizeLinear -> the reader

(FeedbackRequantize where channels make up for each other's errors), and where readers of a tensor make up for each
other's errors, too,

    codes -> Concat with themselves -> FeedbackRequantize -> Split -> a DequantizeLinear for every reader

so that whatever makes the stored codes keeps its integer kernel, and so does the reader. Names are those of an ordinary
requantization; the table is named after it. For receivers that know nothing of ``ai.postquant`` the operator becomes a
chain of standard ones (:mod:`postquant.passes.lookup_chain`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.lookup_chain import chain_constants, chain_of, is_fixed, write_chain
from postquant.passes.qdq import Builder
from postquant.runtime_ops.code_book import CodeBook
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.integer import Affine
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.schema import DOMAIN
from postquant.runtime_ops.spec import QuantSpec

LOOKUP = "LutRequantize"
# Where channels make up for each other's errors.
FEEDBACK = "FeedbackRequantize"


@dataclasses.dataclass(frozen=True)
class Lookup:
    """The nodes that give every 8-bit code its level.

    Attributes:
        codes: The codes that it reads.
        constants: What it reads besides codes, shapes and types; :func:`lookup_differs` compares it.
        nodes: All its nodes, the one that makes the levels last, but for a Split behind it.
        copies: How many copies of the codes it reads together.
        split: The nodes around it that make copies and take them apart again; none where there is one.
    """

    codes: ir.Value
    constants: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    copies: int = 1
    split: tuple[ir.Node, ...] = ()


def lookup_of(node: ir.Node | None) -> Lookup | None:
    """The lookup whose last node this is, or None."""
    if node is not None and node.op_type == "Split" and not node.domain and node.inputs[0] is not None:
        return _split_lookup(node, node.inputs[0].producer())
    found: Lookup | None = None
    if _is_operator(node) and node is not None:
        codes, *constants = node.inputs
        known = tuple(value for value in constants if is_fixed(value) and value is not None)
        if codes is not None and len(known) == len(constants):
            found = Lookup(codes, known, (node,))
    elif (chain := chain_of(node)) is not None:
        found = Lookup(chain.codes, chain.constants, chain.nodes)
    return found if found is not None and maker_of(found.codes) is not None else None


def _split_lookup(split: ir.Node, made_by: ir.Node | None) -> Lookup | None:
    """The lookup of copies that a Split takes apart, or None."""
    inner = None if made_by is split else lookup_of(made_by)
    concat = None if inner is None else inner.codes.producer()
    if inner is None or inner.split or concat is None or concat.op_type != "Concat" or concat.inputs[0] is None:
        return None
    copies = len(concat.inputs)
    if copies != len(split.outputs):
        return None
    return dataclasses.replace(inner, codes=concat.inputs[0], copies=copies, split=(concat, split))


def maker_of(codes: ir.Value) -> ir.Node | None:
    """The QuantizeLinear that makes codes, perhaps with copies and Clips in between, or None."""
    producer = codes.producer()
    if producer is not None and producer.op_type == "Concat" and not producer.domain and len(set(producer.inputs)) == 1:
        producer = None if producer.inputs[0] is None else producer.inputs[0].producer()
    while producer is not None and producer.op_type == "Clip" and not producer.domain:
        inner = producer.inputs[0]
        producer = None if inner is None else inner.producer()
    makes = producer is not None and producer.op_type == "QuantizeLinear" and not producer.domain
    return producer if makes else None


def is_lookup(node: ir.Node | None) -> bool:
    """Whether a node is the last one of a lookup."""
    return lookup_of(node) is not None


def lookup_nodes(graph: ir.Graph) -> set[ir.Node]:
    """All nodes of all lookups."""
    return {part for node in graph if (found := lookup_of(node)) is not None for part in (*found.nodes, *found.split)}


def lookup_differs(lookup: Lookup, codes: ir.Value, quantizer: TensorQuantizer, stored: Affine) -> bool:
    """Whether a lookup computes anything else than a quantizer says.

    Args:
        lookup: One of a graph.
        codes: The levels that it makes, for one of its readers.
        quantizer: That reader's; it has a code book of unsigned codes.
        stored: The numbers of the codes of 8 bits that it reads, one scale.
    """
    node = lookup.nodes[-1]
    if lookup.copies != quantizer.copies or any(_axis(part) != quantizer.table_axis for part in lookup.split):
        return True
    if lookup.split and (codes.producer() is not lookup.split[-1] or codes.index() != quantizer.copy):
        return True
    expected: Mapping[str, npt.NDArray[np.generic]]
    if _is_operator(node):
        if node.op_type != _operator(quantizer):
            return True
        expected = _inputs(quantizer, stored)
        cell = node.attributes.get("cell")  # files from before cells have none
        if (1 if cell is None else cell.as_int()) != (1 if quantizer.feedback is None else quantizer.feedback.cell):
            return True
        axis = _axis(node)
        if axis is None or (quantizer.table_axis is not None and axis != quantizer.table_axis):
            return True
    else:
        expected = chain_constants(quantizer, stored)
    return len(lookup.constants) != len(expected) or not all(
        np.array_equal(_array(value), array) for value, array in zip(lookup.constants, expected.values(), strict=True)
    )


def lookup_dequantize(
    graph: ir.Graph, build: Builder, source: ir.Value, quantizer: TensorQuantizer, name: str
) -> tuple[ir.Value, ...]:
    """Appends the nodes of the module docstring behind the stored tensor's codes.

    Args:
        graph: Changed in place.
        build: Makes names and initializers of that graph.
        source: The stored tensor, dequantized from codes of 8 bits.
        quantizer: It has a code book of unsigned codes; which copy it reads plays no part.
        name: Prefix of names.

    Returns:
        The dequantized value of every copy.

    Raises:
        ModelError: If the tensor is not stored in unsigned codes of 8 bits.
    """
    dequantize = source.producer()
    codes = None if dequantize is None or dequantize.op_type != "DequantizeLinear" else dequantize.inputs[0]
    if dequantize is None or codes is None or codes.dtype is not ir.DataType.UINT8:
        raise ModelError(
            "an activation with a code book is read from codes of 8 bits",
            where=name,
            expected="uint8 codes",
            found="a float value" if codes is None else str(codes.dtype),
        )
    arrays = _inputs(quantizer, _numbers(dequantize))
    own = [build.initializer(f"{name}_{part}", arrays[part]) for part in list(arrays)[2:]]
    axis = ir.AttrInt64("axis", -1 if quantizer.table_axis is None else quantizer.table_axis)

    def value(part: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Value:
        return ir.Value(name=build.unique(f"{name}_{part}"), type=ir.TensorType(dtype), shape=shape)

    copies = quantizer.copies
    nodes: list[ir.Node] = []
    levels = [value("quantized", ir.DataType.UINT8, source.shape)]
    if copies == 1:
        read, made = codes, levels[0]
    else:
        # Readers, and their names, are those of the levels behind the Split.
        levels += [value("quantized", ir.DataType.UINT8, source.shape) for _ in range(copies - 1)]
        read, made = (value(part, ir.DataType.UINT8, None) for part in ("copies", "levels"))
        nodes.append(ir.Node("", "Concat", [codes] * copies, [axis], outputs=[read], name=read.name))
    inputs = [read, *dequantize.inputs[1:3], *own]
    attributes = [axis] if quantizer.feedback is None else [axis, ir.AttrInt64("cell", quantizer.feedback.cell)]
    nodes.append(ir.Node(DOMAIN, _operator(quantizer), inputs, attributes, outputs=[made], name=made.name))
    if copies > 1:
        assert quantizer.table is not None
        sizes = build.shared_initializer("lookup_split", np.full(copies, len(quantizer.table) // copies, np.int64))
        nodes.append(ir.Node("", "Split", [made, sizes], [axis], outputs=levels, name=build.unique(f"{name}_split")))
    results = [value("dequantized", ir.DataType.FLOAT, source.shape) for _ in levels]
    for level, result in zip(levels, results, strict=True):
        nodes.append(ir.Node("", "DequantizeLinear", [level, *own[:2]], outputs=[result], name=result.name))
    graph.insert_after(dequantize, nodes)
    return tuple(results)


def expand_lookups(graph: ir.Graph, build: Builder) -> list[str]:
    """Every LutRequantize becomes its chain of standard operators, every FeedbackRequantize that without feedback.

    Outputs keep their names.

    Args:
        graph: Changed in place.
        build: Makes names and initializers of that graph.

    Returns:
        Names of the outputs of nodes that had a feedback.
    """
    changed = []
    for node in tuple(graph):
        lookup = lookup_of(node) if _is_operator(node) else None
        if lookup is None:
            continue
        x_scale, x_zero_point, scale, zero_point, table = (_array(value) for value in lookup.constants[:5])
        axis = node.attributes["axis"].as_int() if len(table) > 1 else None
        spec = QuantSpec(table.shape[1].bit_length() - 1, signed=False, symmetric=False, code_book=CodeBook.LEARNED)
        levels = table if axis is not None else table[0]
        quantizer = TensorQuantizer(
            spec, scale.astype(np.float32), zero_point.astype(np.int32), table=levels, table_axis=axis
        )
        stored = Affine(x_scale.astype(np.float32), x_zero_point.astype(np.int32), np.dtype(np.uint8))
        old = node.outputs[0]
        name, old.name = old.name or "", None
        if node.op_type == FEEDBACK:
            changed.append(name)
        made = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=old.shape)
        prefix = name.removesuffix("_quantized")
        graph.insert_before(node, write_chain(build, lookup.codes, stored, quantizer, prefix, made))
        for use in tuple(old.uses()):
            use.node.replace_input_with(use.idx, made)
        graph.remove(node, safe=True)
    return changed


def _is_operator(node: ir.Node | None) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type in (LOOKUP, FEEDBACK)


def _axis(node: ir.Node) -> int | None:
    attribute = node.attributes.get("axis")
    return None if attribute is None else attribute.as_int()


def _operator(quantizer: TensorQuantizer) -> str:
    return LOOKUP if quantizer.feedback is None else FEEDBACK


def _inputs(quantizer: TensorQuantizer, stored: Affine) -> dict[str, npt.NDArray[np.generic]]:
    """What a LutRequantize reads behind the codes, in order."""
    assert quantizer.table is not None
    return {
        "x_scale": stored.scale,
        "x_zero_point": stored.zero_point.astype(np.uint8),
        "scale": quantizer.scale,
        "zero_point": quantizer.zero_point.astype(np.uint8),
        "levels": np.ascontiguousarray(np.atleast_2d(quantizer.table)),
        **({} if quantizer.feedback is None else quantizer.feedback.arrays()),
    }


def _array(value: ir.Value) -> npt.NDArray[np.generic]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _numbers(dequantize: ir.Node) -> Affine:
    scale, zero_point = dequantize.inputs[1], dequantize.inputs[2]
    assert scale is not None
    assert zero_point is not None
    return Affine(_array(scale).astype(np.float32), _array(zero_point).astype(np.int32), np.dtype(np.uint8))
