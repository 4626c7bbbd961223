"""Activations with code books in an emitted graph: :func:`lookup_dequantize`.

A requantization whose quantizer has a code book becomes

    codes of the stored tensor -> Cast (int32) [-> Add (256 c)] -> Reshape (flat) -> GatherElements (of uint8 levels)
        -> Reshape (the codes' Shape) -> DequantizeLinear -> the reader

in standard operators: every stored code has its level, in a table of 256, or of 256 for each channel c. A Gather would
need no flat tensor, but onnxruntime's takes four times as long. (onnx's own evaluator knows no GatherElements of more
than 64 elements.) Whatever makes the stored codes keeps its integer kernel, and so does the reader.

The table of all channels follows from their ``2^b`` levels each, in nodes that onnxruntime runs once, when it loads the
model; 256 levels per channel would make the file much larger:

    levels (C, 2^b) -> MatMulInteger (sums of neighbours: twice the middles) -> Unsqueeze
        -> LessOrEqual (twice the stored codes, in the quantizer's own numbers) -> Cast (int32)
        -> ReduceSum (how many middles a code has passed) -> GatherElements (of the levels) -> Reshape (flat)

Names are those of an ordinary requantization; the table is named after it. Constants other than levels are shared.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.qdq import Builder
from postquant.runtime_ops import law
from postquant.runtime_ops.code_book import nearest_codes, table_rows
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.integer import Affine
from postquant.runtime_ops.quantizer import TensorQuantizer

_CODES = 256
# The chains of the module docstring, from the last node to the first.
_ONE = ("Reshape", "GatherElements", "Reshape", "Cast")
_CHANNELS = ("Reshape", "GatherElements", "Reshape", "Add", "Cast")
_TABLE = ("Reshape", "GatherElements", "ReduceSum", "Cast", "LessOrEqual", "Unsqueeze", "MatMulInteger")


@dataclasses.dataclass(frozen=True)
class Lookup:
    """The nodes that give every 8-bit code its level.

    Attributes:
        codes: The codes that it reads.
        constants: What :func:`lookup_constants` tells of them.
        nodes: All its nodes, the one that makes the levels last.
    """

    codes: ir.Value
    constants: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]


def lookup_of(node: ir.Node | None) -> Lookup | None:
    """The lookup whose last node this is, or None."""
    chain = _back(node, _ONE) or _back(node, _CHANNELS)
    if chain is None:
        return None
    last, gather, *middle, cast = chain
    codes, table, shape = cast.inputs[0], gather.inputs[0], _producer(last.inputs[1])
    if codes is None or table is None or not _is(shape, "Shape") or shape is None:
        return None
    if shape.inputs[0] is not codes or maker_of(codes) is None:
        return None
    nodes = (shape, cast, *reversed(middle), gather, last)
    parts: tuple[ir.Node, ...] = ()
    constants: list[ir.Value | None] = [table]
    if len(chain) == len(_CHANNELS):
        found = _back(_producer(table), _TABLE)
        if found is None or found[1].inputs[0] is not found[-1].inputs[0]:
            return None
        parts = tuple(reversed(found))
        _, levels, counts, _, compared, sliced, sums = found
        constants = [levels.inputs[0], sums.inputs[1], sliced.inputs[1], compared.inputs[1], counts.inputs[1]]
        constants.append(middle[1].inputs[1])
    known = tuple(value for value in constants if value is not None and not value.is_graph_input())
    if len(known) < len(constants) or any(value.const_value is None for value in known):
        return None
    return Lookup(codes, known, (*parts, *nodes))


def maker_of(codes: ir.Value) -> ir.Node | None:
    """The QuantizeLinear that makes codes, perhaps with Clips in between, or None."""
    producer = codes.producer()
    while producer is not None and _is(producer, "Clip"):
        inner = producer.inputs[0]
        producer = None if inner is None else inner.producer()
    return producer if _is(producer, "QuantizeLinear") else None


def is_lookup(node: ir.Node | None) -> bool:
    """Whether a node is the last one of a lookup."""
    return lookup_of(node) is not None


def lookup_nodes(graph: ir.Graph) -> set[ir.Node]:
    """All nodes of all lookups."""
    return {part for node in graph if (found := lookup_of(node)) is not None for part in found.nodes}


def lookup_constants(quantizer: TensorQuantizer, stored: Affine) -> dict[str, npt.NDArray[np.integer]]:
    """What the nodes of a lookup read besides codes.

    Args:
        quantizer: It has a code book of unsigned codes.
        stored: The numbers of the codes of 8 bits that it reads, one scale.

    Returns:
        Name -> constant. Without channels the levels of all 256 stored codes, uint8. Else the levels (C, n) uint8;
        (n, n - 1) uint8 that adds neighbours; the axis behind them, int64; twice the stored codes in the quantizer's
        numbers, (256,) int32; the axis that middles are counted along, int64; 256 c for every channel, int32, which
        broadcasts to the codes.
    """
    assert quantizer.table is not None
    own = law.quantize(stored.real(np.arange(_CODES)), quantizer.scale, quantizer.zero_point, qmin=0, qmax=_CODES - 1)
    if quantizer.table_axis is None:
        return {"levels": nearest_codes(quantizer.table)[own]}
    channels, count = quantizer.table.shape
    return {
        "levels": np.ascontiguousarray(quantizer.table),
        "pairs": np.eye(count, count - 1, dtype=np.uint8) + np.eye(count, count - 1, k=-1, dtype=np.uint8),
        "last_axis": np.array([2], np.int64),
        "doubled": (2 * own).astype(np.int32),
        "middle_axis": np.array([1], np.int64),
        "offsets": table_rows(channels, quantizer.table_axis),
    }


def lookup_dequantize(
    graph: ir.Graph, build: Builder, source: ir.Value, quantizer: TensorQuantizer, name: str
) -> ir.Value:
    """Appends the nodes of the module docstring behind the stored tensor's codes.

    Args:
        graph: Changed in place.
        build: Makes names and initializers of that graph.
        source: The stored tensor, dequantized from codes of 8 bits.
        quantizer: It has a code book of unsigned codes.
        name: Prefix of names.

    Returns:
        The dequantized value.

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
    arrays = lookup_constants(quantizer, _numbers(dequantize))
    constants = {"levels": build.initializer(f"{name}_levels", arrays.pop("levels"))}
    constants |= {part: build.shared_initializer(f"lookup_{part}", array) for part, array in arrays.items()}
    scale = build.initializer(f"{name}_scale", quantizer.scale)
    zero_point = build.initializer(f"{name}_zero_point", ir.Tensor(quantizer.zero_point.astype(np.uint8)))
    flat_shape = build.shared_initializer("lookup_shape", np.array([-1], np.int64))
    nodes: list[ir.Node] = []

    def add(
        op_type: str, inputs: list[ir.Value], part: str, dtype: ir.DataType, shape: ir.Shape | None = None, **given: int
    ) -> ir.Value:
        made = ir.Value(name=build.unique(f"{name}_{part}"), type=ir.TensorType(dtype), shape=shape)
        attributes = [ir.AttrInt64(key, number) for key, number in given.items()]
        nodes.append(ir.Node("", op_type, inputs, attributes, outputs=[made], name=made.name))
        return made

    uint8, int32 = ir.DataType.UINT8, ir.DataType.INT32
    table = constants["levels"]
    if quantizer.table_axis is not None:
        sums = add("MatMulInteger", [table, constants["pairs"]], "sums", int32)
        column = add("Unsqueeze", [sums, constants["last_axis"]], "middles", int32)
        passed = add("LessOrEqual", [column, constants["doubled"]], "passed", ir.DataType.BOOL)
        ones = add("Cast", [passed], "ones", int32, to=int(int32))
        counted = add("ReduceSum", [ones, constants["middle_axis"]], "counted", int32, keepdims=0)
        rows = add("GatherElements", [table, counted], "rows", uint8, axis=1)
        table = add("Reshape", [rows, flat_shape], "table", uint8)
    size = add("Shape", [codes], "shape", ir.DataType.INT64)
    index = add("Cast", [codes], "index", int32, to=int(int32))
    if quantizer.table_axis is not None:
        index = add("Add", [index, constants["offsets"]], "place", int32)
    flat = add("Reshape", [index, flat_shape], "flat", int32)
    found = add("GatherElements", [table, flat], "flat_quantized", uint8, axis=0)
    levels = add("Reshape", [found, size], "quantized", uint8, source.shape)
    result = add("DequantizeLinear", [levels, scale, zero_point], "dequantized", ir.DataType.FLOAT, source.shape)
    graph.insert_after(dequantize, nodes)
    return result


def _back(node: ir.Node | None, kinds: tuple[str, ...]) -> tuple[ir.Node, ...] | None:
    """Nodes of these kinds, each the maker of the former's first input (of a GatherElements' index), or None."""
    found: list[ir.Node] = []
    for kind in kinds:
        if node is None or not _is(node, kind):
            return None
        found.append(node)
        node = _producer(node.inputs[1 if kind == "GatherElements" else 0])
    return tuple(found)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.op_type == op_type and not node.domain


def _numbers(dequantize: ir.Node) -> Affine:
    scale, zero_point = dequantize.inputs[1], dequantize.inputs[2]
    assert scale is not None
    assert scale.const_value is not None
    assert zero_point is not None
    assert zero_point.const_value is not None
    return Affine(scale.const_value.numpy(), zero_point.const_value.numpy().astype(np.int32), np.dtype(np.uint8))
