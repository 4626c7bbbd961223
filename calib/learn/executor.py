"""Runs nodes of an ONNX graph in torch: :func:`run_nodes`.

Every operator agrees with onnxruntime on float32 up to rounding (the tests compare them one by one). Shapes, axes and
other whole numbers that Python must know lie on the CPU, whatever device the data are on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence

import onnx_ir as ir
import torch

from postquant.calib.learn.op import Check, Op
from postquant.calib.learn.torch_ops_elementwise import ELEMENTWISE, check_cast
from postquant.calib.learn.torch_ops_layers import LAYER_CHECKS, LAYERS
from postquant.calib.learn.torch_ops_moves import MOVE_CHECKS, MOVES
from postquant.calib.learn.torch_ops_reduce import REDUCTION_CHECKS, REDUCTIONS
from postquant.calib.learn.torch_ops_resize import RESIZE_CHECKS, RESIZES
from postquant.passes.subgraph import subgraphs

# Called for every input of every node: node, index of the input, name of the value, its tensor -> what the node reads.
Read = Callable[[ir.Node, int, str, torch.Tensor], torch.Tensor]

_OPS: Mapping[str, Op] = {**ELEMENTWISE, **LAYERS, **MOVES, **REDUCTIONS, **RESIZES}
_CHECKS: Mapping[str, Check] = {
    "Cast": check_cast,
    **LAYER_CHECKS,
    **MOVE_CHECKS,
    **REDUCTION_CHECKS,
    **RESIZE_CHECKS,
}
# Their further outputs are left out; a node whose further outputs are read is not supported.
_ONE_OUTPUT = frozenset({"BatchNormalization", "Dropout", "LayerNormalization", "MaxPool"})


def supported(node: ir.Node) -> str | None:
    """Whether torch can run a node.

    Args:
        node: A node of a graph.

    Returns:
        None if it can, else the reason, a clause such as ``operator Loop``.
    """
    name = node.op_type if node.domain == "" else f"{node.domain}.{node.op_type}"
    if node.domain != "" or node.op_type not in _OPS or any(True for _ in subgraphs(node)):
        return f"operator {name}"
    if node.op_type in _ONE_OUTPUT and any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return f"operator {name}: more than one of its outputs is read"
    check = _CHECKS.get(node.op_type)
    reason = None if check is None else check(node)
    return None if reason is None else f"operator {name}: {reason}"


def constant_values(nodes: Iterable[ir.Node], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """The constants that nodes read, by name.

    Args:
        nodes: Nodes of a model; their initializers have values.
        device: Where float tensors go; others stay on the CPU.

    Returns:
        Copies: changing them does not change the model.
    """
    found: dict[str, torch.Tensor] = {}
    for node in nodes:
        for value in node.inputs:
            if value is None or value.const_value is None or not value.is_initializer():
                continue
            assert value.name is not None
            if value.name not in found:
                tensor = torch.from_numpy(value.const_value.numpy().copy())
                found[value.name] = tensor.to(device) if tensor.is_floating_point() else tensor
    return found


def run_nodes(
    nodes: Sequence[ir.Node],
    values: MutableMapping[str, torch.Tensor],
    read: Read | None = None,
    *,
    wanted: Collection[str] | None = None,
) -> None:
    """Computes the outputs of nodes.

    Args:
        nodes: In an order in which they can run; :func:`supported` has nothing against them.
        values: Every value that the nodes read and do not make themselves, constants among them
            (:func:`constant_values`), by name; their outputs are added.
        read: Called for every input of every node, constants included, in order; the node reads what it returns.
            That is where quantizers stand.
        wanted: Names of the values that the caller reads: others are removed from ``values`` behind their last reader.
            None keeps all.

    Raises:
        KeyError: If a value is missing.
    """
    last = {} if wanted is None else {value.name: node for node in nodes for value in node.inputs if value is not None}
    for node in nodes:
        inputs: list[torch.Tensor | None] = []
        for index, value in enumerate(node.inputs):
            if value is None or not value.name:
                inputs.append(None)
                continue
            tensor = values[value.name]
            inputs.append(tensor if read is None else read(node, index, value.name, tensor))
        for output, tensor in zip(node.outputs, _OPS[node.op_type](node, inputs), strict=False):
            if output.name:
                values[output.name] = tensor
        for name in {value.name for value in node.inputs if value is not None and last.get(value.name) is node}:
            if name and name not in (wanted or ()):
                del values[name]
