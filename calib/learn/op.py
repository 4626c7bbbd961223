"""What the torch operators have in common: their signature, attributes, and numbers that must be known to Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch

# The tensors that a node reads, None for those left out -> its outputs, in order.
Inputs = Sequence[torch.Tensor | None]
Op = Callable[[ir.Node, Inputs], tuple[torch.Tensor, ...]]
# Why a node cannot be computed, None if it can.
Check = Callable[[ir.Node], str | None]


def integer(node: ir.Node, name: str, default: int) -> int:
    """A whole number among the attributes."""
    return node.attributes.get_int(name, default)


def number(node: ir.Node, name: str, default: float) -> float:
    """A real number among the attributes."""
    return node.attributes.get_float(name, default)


def text(node: ir.Node, name: str, default: str) -> str:
    """A text among the attributes."""
    return node.attributes.get_string(name, default)


def integers(node: ir.Node, name: str) -> list[int] | None:
    """A list of whole numbers among the attributes, None if it is absent."""
    found = node.attributes.get_ints(name, None)
    return None if found is None else [int(item) for item in found]


def opset(node: ir.Node) -> int:
    """The version of the standard operator set that the node's graph uses."""
    graph = node.graph
    assert graph is not None
    return graph.opset_imports[""]


def given(inputs: Inputs, index: int) -> torch.Tensor | None:
    """An optional input."""
    return inputs[index] if index < len(inputs) else None


def needed(inputs: Inputs, index: int = 0) -> torch.Tensor:
    """An input that the operator cannot do without."""
    tensor = inputs[index]
    assert tensor is not None
    return tensor


def as_integers(tensor: torch.Tensor | None) -> list[int] | None:
    """Shapes, axes, positions: a tensor of whole numbers for Python, None for one left out."""
    return None if tensor is None else [int(item) for item in tensor.reshape(-1).tolist()]


def attribute_or_input(node: ir.Node, name: str, inputs: Inputs, index: int) -> list[int] | None:
    """What was an attribute in old operator sets and is an input in new ones."""
    listed = integers(node, name)
    return as_integers(given(inputs, index)) if listed is None else listed
