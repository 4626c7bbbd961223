"""A look-up of levels in standard operators: :func:`write_chain`, :func:`chain_of`.

    codes of the stored tensor -> Cast (int32) [-> Add (256 c)] -> Reshape (flat) -> GatherElements (of uint8 levels)
        -> Reshape (the codes' Shape)

Every stored code has its level, in a table of 256, or of 256 for each channel c. A Gather would need no flat tensor,
but onnxruntime's takes four times as long. (onnx's own evaluator knows no GatherElements of more than 64 elements.)

The table of all channels follows from their ``2^b`` levels each, in nodes that onnxruntime runs once, when it loads the
model; 256 levels per channel would make the file much larger:

    levels (C, 2^b) -> MatMulInteger (sums of neighbours: twice the middles) -> Unsqueeze
        -> LessOrEqual (twice the stored codes, in the quantizer's own numbers) -> Cast (int32)
        -> ReduceSum (how many middles a code has passed) -> GatherElements (of the levels) -> Reshape (flat)

Constants other than levels are shared.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.qdq import Builder
from postquant.runtime_ops import law
from postquant.runtime_ops.code_book import nearest_codes, table_rows
from postquant.runtime_ops.integer import Affine
from postquant.runtime_ops.quantizer import TensorQuantizer

_CODES = 256
# The chains of the module docstring, from the last node to the first.
_ONE = ("Reshape", "GatherElements", "Reshape", "Cast")
_CHANNELS = ("Reshape", "GatherElements", "Reshape", "Add", "Cast")
_TABLE = ("Reshape", "GatherElements", "ReduceSum", "Cast", "LessOrEqual", "Unsqueeze", "MatMulInteger")


@dataclasses.dataclass(frozen=True)
class Chain:
    """Nodes that give every 8-bit code its level.

    Attributes:
        codes: The codes that they read.
        constants: What :func:`chain_constants` tells of them, in its order.
        nodes: All of them, the one that makes the levels last.
    """

    codes: ir.Value
    constants: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]


def chain_of(node: ir.Node | None) -> Chain | None:
    """The chain whose last node this is, or None."""
    chain = _back(node, _ONE) or _back(node, _CHANNELS)
    if chain is None:
        return None
    last, gather, *middle, cast = chain
    codes, table, shape = cast.inputs[0], gather.inputs[0], _producer(last.inputs[1])
    if codes is None or table is None or not _is(shape, "Shape") or shape is None:
        return None
    if shape.inputs[0] is not codes or not _has(cast, to=int(ir.DataType.INT32)) or not _has(gather, axis=0):
        return None
    nodes = (shape, cast, *reversed(middle), gather, last)
    parts: tuple[ir.Node, ...] = ()
    constants: list[ir.Value | None] = [table]
    if len(chain) == len(_CHANNELS):
        found = _back(_producer(table), _TABLE)
        if found is None or found[1].inputs[0] is not found[-1].inputs[0]:
            return None
        parts = tuple(reversed(found))
        _, levels, counts, ones, compared, sliced, sums = found
        if not (_has(levels, axis=1) and _has(counts, keepdims=0) and _has(ones, to=int(ir.DataType.INT32))):
            return None
        constants = [levels.inputs[0], sums.inputs[1], sliced.inputs[1], compared.inputs[1], counts.inputs[1]]
        constants.append(middle[1].inputs[1])
    known = tuple(value for value in constants if is_fixed(value) and value is not None)
    if len(known) < len(constants):
        return None
    return Chain(codes, known, (*parts, *nodes))


def is_fixed(value: ir.Value | None) -> bool:
    """Whether a node's input is a constant that no caller can change."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def chain_constants(quantizer: TensorQuantizer, stored: Affine) -> dict[str, npt.NDArray[np.integer]]:
    """What the nodes of a chain read besides codes.

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


def write_chain(
    build: Builder, codes: ir.Value, stored: Affine, quantizer: TensorQuantizer, name: str, result: ir.Value
) -> list[ir.Node]:
    """The nodes of the module docstring.

    Args:
        build: Makes names and initializers of their graph.
        codes: The stored tensor's codes of 8 bits.
        stored: Their numbers.
        quantizer: It has a code book of unsigned codes.
        name: Prefix of names.
        result: The value that they make: the levels.

    Returns:
        New nodes, in order.
    """
    arrays = chain_constants(quantizer, stored)
    constants = {"levels": build.initializer(f"{name}_levels", arrays.pop("levels"))}
    constants |= {part: build.shared_initializer(f"lookup_{part}", array) for part, array in arrays.items()}
    flat_shape = build.shared_initializer("lookup_shape", np.array([-1], np.int64))
    nodes: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], part: str, dtype: ir.DataType, **given: int) -> ir.Value:
        made = ir.Value(name=build.unique(f"{name}_{part}"), type=ir.TensorType(dtype))
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
    nodes.append(ir.Node("", "Reshape", [found, size], outputs=[result], name=result.name))
    return nodes


def _back(node: ir.Node | None, kinds: tuple[str, ...]) -> tuple[ir.Node, ...] | None:
    """Nodes of these kinds, each the maker of the former's first input (of a GatherElements' index), or None."""
    found: list[ir.Node] = []
    for kind in kinds:
        if node is None or not _is(node, kind):
            return None
        found.append(node)
        node = _producer(node.inputs[1 if kind == "GatherElements" else 0])
    return tuple(found)


def _has(node: ir.Node, **attributes: int) -> bool:
    found = {name: node.attributes.get(name) for name in attributes}
    return all(value is not None and value.as_int() == attributes[name] for name, value in found.items())


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.op_type == op_type and not node.domain
