"""Image inputs on the grid of their 8-bit originals, so that quantizing them loses nothing: :class:`AlignInputPass`.

Images are integers 0 .. 255 before preprocessing normalises each channel, ``x_c = step_c * p + offset_c``. Where one
scale and zero point for the whole tensor cannot hit the grids of all channels, the pass inserts

    x -> Pad(0) -> Mul(1 / step_c) -> Add(-offset_c / step_c) -> p -> Conv

and gives the convolution ``W'_c = step_c W_c`` and ``b' = b + sum W_c offset_c``: the same function of ``x``. Its input
now holds the integers themselves, which scale 1 and zero point 0 represent exactly. The convolution's zero padding is
``x = 0``, another ``p`` in each channel; hence the Pad in front. Quantization rounds the padded places to the nearest
integer, the only error that remains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.input_levels import GRID_LEVELS, U8, InputGrid
from postquant.passes.layer import Layer, as_layer
from postquant.passes.plan import QuantPlan
from postquant.passes.qdq import Builder
from postquant.passes.rewiring import Initializers, constant_array, is_op
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

_REASON = "it turns the input into integers, in front of the first quantizer"


class AlignInputPass(ir.passes.InPlacePass):
    """Inserts Pad, Mul and Add behind graph inputs, and changes the convolutions that read them.

    1. An input whose grid is :attr:`InputGrid.uniform` stays as it is.
    2. Every reader must be a Conv of the main graph with constant weights and bias, all with the same padding.
    3. Padding must be known (``auto_pad`` needs static sizes), and ``x = 0`` must be a level within 0 .. 255.

    The aligned value is called ``<input>_aligned``. A second run changes nothing.

    Args:
        grids: Input name -> grid.

    Attributes:
        notes: After the pass ran: which inputs were left alone, and why.
    """

    def __init__(self, grids: Mapping[str, InputGrid]) -> None:
        super().__init__()
        self._grids = dict(grids)
        self.notes: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the main graph."""
        modified = False
        for value in list(model.graph.inputs):
            grid = self._grids.get(value.name or "")
            if grid is None or grid.uniform or aligned_value(value, grid) is not None:
                continue
            try:
                layers, pads = _readers(value, grid, model.graph)
            except _LeftAloneError as reason:
                self.notes.append(f"input {value.name} keeps its own values, although they lie on a grid: {reason}")
                continue
            _align(model.graph, value, grid, layers, pads)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


class _LeftAloneError(Exception):
    """Why an input cannot be aligned."""


def _readers(value: ir.Value, grid: InputGrid, graph: ir.Graph) -> tuple[list[Layer], tuple[int, ...]]:
    """The convolutions that read an input, and the padding that they have in common (begins, then ends)."""
    layers: list[Layer] = []
    pads: set[tuple[int, ...]] = set()
    if value.dtype is not ir.DataType.FLOAT:
        raise _LeftAloneError("it is not float32")
    for use in value.uses():
        layer = as_layer(use.node)
        if layer is None or use.node.op_type != "Conv" or use.idx != 0 or use.node.graph is not graph:
            raise _LeftAloneError(f"{use.node.name} reads it, and is no convolution with constant weights")
        if layer.inputs != len(grid.step):
            raise _LeftAloneError(f"{use.node.name} reads another number of channels")
        layers.append(layer)
        pads.add(_pads(layer, value.shape))
    if not layers:
        raise _LeftAloneError("nothing reads it")
    if len(pads) > 1:
        raise _LeftAloneError("its readers pad it differently")
    common = pads.pop()
    if any(amount < 0 for amount in common):
        raise _LeftAloneError("a negative padding cuts it")
    if any(common) and not np.all((grid.zeros > -0.5) & (grid.zeros < GRID_LEVELS - 0.5)):
        raise _LeftAloneError("the zeros of the padding lie outside the grid")
    return layers, common


def _pads(layer: Layer, shape: ir.Shape | None) -> tuple[int, ...]:
    """A convolution's padding: begins, then ends of the spatial axes."""
    attributes, kernel = layer.node.attributes, layer.shape[2:]
    rank = len(kernel)
    auto = attributes.get_string("auto_pad", "NOTSET")
    if auto == "NOTSET":
        return tuple(attributes.get_ints("pads", ())) or (0,) * (2 * rank)
    begins, ends = [0] * rank, [0] * rank
    if auto == "VALID":
        return (*begins, *ends)
    strides = attributes.get_ints("strides", (1,) * rank)
    dilations = attributes.get_ints("dilations", (1,) * rank)
    for axis in range(rank):
        size = None if shape is None else shape[axis + 2]
        if not isinstance(size, int):
            raise _LeftAloneError(f"{layer.node.name} pads by an amount that depends on a dynamic size")
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        total = max((-(-size // strides[axis]) - 1) * strides[axis] + reach - size, 0)
        begins[axis] = total // 2 if auto == "SAME_UPPER" else total - total // 2
        ends[axis] = total - begins[axis]
    return (*begins, *ends)


def _align(graph: ir.Graph, value: ir.Value, grid: InputGrid, layers: list[Layer], pads: tuple[int, ...]) -> None:
    build = Builder(graph)
    name, rank = value.name or "", layers[0].rank
    nodes: list[ir.Node] = []

    def append(op_type: str, operand: ir.Value, label: str, output: str) -> None:
        source = nodes[-1].outputs[0] if nodes else value
        node = ir.node(op_type, [source, operand], name=build.unique(f"{name}_{label}"))
        node.outputs[0].name = build.unique(f"{name}_{output}")
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = _padded(value.shape, pads)
        nodes.append(node)

    if any(pads):
        amounts = np.asarray((0, 0, *pads[: rank - 2], 0, 0, *pads[rank - 2 :]), np.int64)
        append("Pad", build.initializer(f"{name}_pads", amounts), "pad", "padded")
    factor, summand = _constants(grid, rank)
    append("Mul", build.initializer(f"{name}_align_factor", factor), "align_mul", "scaled")
    append("Add", build.initializer(f"{name}_align_summand", summand), "align_add", "aligned")
    readers = [layer.node for layer in layers]
    graph.insert_before(next(node for node in graph if node in readers), nodes)
    initializers = Initializers(graph)
    for layer in layers:
        layer.node.attributes.pop("auto_pad", None)
        layer.node.attributes.pop("pads", None)
        layer.fold_before(grid.step, grid.offset, initializers)
        layer.node.replace_input_with(0, nodes[-1].outputs[0])


def _constants(grid: InputGrid, rank: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Factor and summand, (1, C, 1, ...)."""
    shape = (1, -1, *(1,) * (rank - 2))
    return (1 / grid.step).astype(np.float32).reshape(shape), grid.zeros.astype(np.float32).reshape(shape)


def _padded(shape: ir.Shape | None, pads: tuple[int, ...]) -> ir.Shape | None:
    if shape is None:
        return None
    rank = len(pads) // 2
    sizes: list[int | ir.SymbolicDim | None] = list(shape)
    for axis in range(rank):
        size, amount = sizes[axis + 2], pads[axis] + pads[axis + rank]
        if amount:
            sizes[axis + 2] = size + amount if isinstance(size, int) else None
    return ir.Shape(sizes)


def _chain(value: ir.Value, grid: InputGrid) -> list[ir.Node]:
    """The nodes that align an input, recognised by their constants; [] where there are none."""
    nodes: list[ir.Node] = []
    current = value
    uses = tuple(current.uses())
    if len(uses) == 1 and is_op(uses[0].node, "Pad"):
        nodes.append(uses[0].node)
        current = nodes[-1].outputs[0]
    for op_type, index in (("Mul", 0), ("Add", 1)):
        uses = tuple(current.uses())
        if len(uses) != 1 or not is_op(uses[0].node, op_type):
            return []
        node = uses[0].node
        constant = constant_array(node.inputs[1])
        if (
            constant is None
            or constant.ndim < 3
            or not np.array_equal(constant, _constants(grid, constant.ndim)[index])
        ):
            return []
        nodes.append(node)
        current = node.outputs[0]
    return nodes


def aligned_value(value: ir.Value, grid: InputGrid) -> ir.Value | None:
    """What the pass put in the place of an input, None if it did not."""
    nodes = _chain(value, grid)
    return nodes[-1].outputs[0] if nodes else None


def _stored(model: ir.Model, grids: Mapping[str, InputGrid]) -> Iterator[tuple[ir.Value, ir.Value, InputGrid]]:
    """Input, value that is quantized in its place, and grid, wherever that quantization can be exact."""
    for value in model.graph.inputs:
        grid = grids.get(value.name or "")
        stored = None if grid is None else value if grid.uniform else aligned_value(value, grid)
        if grid is not None and stored is not None:
            yield value, stored, grid


def exact_quantizers(
    model: ir.Model, grids: Mapping[str, InputGrid], spec: QuantSpec = U8
) -> dict[str, TensorQuantizer]:
    """Quantizers that represent inputs without error.

    Args:
        model: After :class:`AlignInputPass`.
        grids: Input name -> grid.
        spec: The format that they must have.

    Returns:
        Value name -> quantizer: of ``<input>_aligned`` values, and of inputs that need no alignment.
    """
    found = {}
    for _, stored, grid in _stored(model, grids):
        quantizer = grid.quantizer(spec)
        if quantizer is not None:
            found[stored.name or ""] = quantizer
    return found


def with_exact_inputs(plan: QuantPlan, model: ir.Model, grids: Mapping[str, InputGrid]) -> QuantPlan:
    """The plan with the quantizers of inputs decided, wherever the format that it has for them can be exact.

    Args:
        plan: A placed plan of the model.
        model: After :class:`AlignInputPass`.
        grids: Input name -> grid.
    """
    floats = dict(plan.floats)
    for value, stored, grid in _stored(model, grids):
        name = stored.name or ""
        entry = plan.activations.get(name)
        spec = entry.spec if isinstance(entry, TensorQuantizer) else entry
        quantizer = None if spec is None else grid.quantizer(spec)
        if quantizer is not None:
            plan = plan.with_activation(name, quantizer)
            floats.update({node.name or "": _REASON for node in _chain(value, grid) if node.name in floats})
    return dataclasses.replace(plan, floats=floats)
