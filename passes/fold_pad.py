"""An explicit Pad into the padding of the convolution or pool behind it.

    Conv(Pad(x, 0), pads=p)         = Conv(x, pads=p + q)
    AveragePool(Pad(x, 0), pads=p)  = AveragePool(x, pads=p + q, count_include_pad=1)
    MaxPool(Pad(x, c), pads=p)      = MaxPool(x, pads=p + q)   if c = -inf, or c = 0 and x >= 0

for a Pad in constant mode that adds q >= 0 rows and columns and touches neither batch nor channels. A pool
that pads leaves padded places out (MaxPool: -inf); so c = 0 changes nothing there only where each window also
sees a value that is at least 0. Every window does: a pool's padding is smaller than its window.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from postquant.passes.rewiring import bypass, constant_array, constant_tensor, is_constant, is_op

_NON_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Softplus"})
_KEEP_SIGN = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "Identity", "Dropout"})


class FoldPadPass(ir.passes.InPlacePass):
    """Folds Pad into Conv, AveragePool and MaxPool where the result is the same."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds in the main graph."""
        count = sum(_fold(node, model.graph) for node in list(model.graph) if is_op(node, "Pad"))
        return ir.passes.PassResult(model, modified=count > 0)


def _fold(pad: ir.Node, graph: ir.Graph) -> bool:
    source, output = pad.inputs[0], pad.outputs[0]
    uses = tuple(output.uses())
    if source is None or not uses or output.is_graph_output():
        return False
    nodes = [use.node for use in uses]
    rank = _window_rank(nodes[0])
    amounts = None if rank is None else _amounts(pad, rank)
    if rank is None or amounts is None:
        return False
    constant = _constant(pad)
    for use in uses:
        if use.idx != 0 or use.node.graph is not graph or _window_rank(use.node) != rank:
            return False
        if not _accepts(use.node, constant, amounts, source):
            return False
    for node in nodes:
        total = [int(a + b) for a, b in zip(_pads(node, rank), amounts, strict=True)]
        node.attributes["pads"] = ir.AttrInt64s("pads", total)
        node.attributes.pop("auto_pad", None)
        if node.op_type == "AveragePool":
            node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
    bypass(pad, source)
    return True


def _window_rank(node: ir.Node) -> int | None:
    """Number of spatial axes of a convolution or pool."""
    if is_op(node, "Conv"):
        weight = node.inputs[1]
        return len(constant_tensor(weight).shape) - 2 if is_constant(weight) else None
    if is_op(node, "MaxPool", "AveragePool"):
        return len(node.attributes.get_ints("kernel_shape", ()))
    return None


def _pads(node: ir.Node, rank: int) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("pads", ())) or (0,) * (2 * rank)


def _amounts(pad: ir.Node, rank: int) -> list[int] | None:
    """What a Pad adds to each spatial axis, begins then ends; None if it does anything else."""
    if pad.attributes.get_string("mode", "constant") != "constant" or len(pad.inputs) < 2:
        return None
    pads = constant_array(pad.inputs[1])
    if pads is None:
        return None
    axes = list(range(rank + 2))
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        given = constant_array(pad.inputs[3])
        if given is None:
            return None
        axes = [int(axis) % (rank + 2) for axis in given]
    if pads.size != 2 * len(axes):
        return None
    total = np.zeros((2, rank + 2), np.int64)
    for position, axis in enumerate(axes):
        total[:, axis] += pads.reshape(2, -1)[:, position].astype(np.int64)
    if (total < 0).any() or total[:, :2].any():
        return None
    return [int(amount) for amount in total[:, 2:].reshape(-1)]


def _constant(pad: ir.Node) -> float | None:
    """The number that a Pad puts in; None if it is not known."""
    if len(pad.inputs) < 3 or pad.inputs[2] is None:
        return 0.0
    value = constant_array(pad.inputs[2])
    return None if value is None else float(np.asarray(value).reshape(-1)[0])


def _accepts(node: ir.Node, constant: float | None, amounts: list[int], source: ir.Value) -> bool:
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID") or constant is None:
        return False
    if node.op_type == "Conv":
        return constant == 0.0
    rank = len(amounts) // 2
    pads = _pads(node, rank)
    window = tuple(node.attributes.get_ints("kernel_shape", ()))
    total = [a + b for a, b in zip(pads, amounts, strict=True)]
    if any(amount >= window[axis % rank] for axis, amount in enumerate(total)):
        return False
    # Rounding up makes windows that hang over the edge, which count padded and missing places differently.
    if node.attributes.get_int("ceil_mode", 0) != 0:
        return False
    if node.op_type == "AveragePool":
        counts = node.attributes.get_int("count_include_pad", 0) != 0
        return constant == 0.0 and (counts or not any(pads))
    if len(node.outputs) > 1:
        return False  # indices count places of the padded tensor
    return constant == -np.inf or (constant == 0.0 and _non_negative(source))


def _non_negative(value: ir.Value) -> bool:
    node = value.producer()
    while node is not None and is_op(node, *_KEEP_SIGN) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None:
        return False
    if is_op(node, "Clip"):
        low = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        return low is not None and float(np.asarray(low).reshape(-1)[0]) >= 0.0
    return is_op(node, *_NON_NEGATIVE)
