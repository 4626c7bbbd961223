"""Through which quantizers of a plan nodes read, as emission places them: :func:`keys_read`, :func:`copies_read`."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.quantizer import TensorQuantizer


def stored_key(node: ir.Node, value: ir.Value, plan: QuantPlan, integer: frozenset[str | None]) -> str | None:
    """Name in ``plan.activations`` of the quantizer that lies between a value and one of its readers.

    Args:
        node: The reader.
        value: What it reads.
        plan: The plan.
        integer: Names of the nodes that run on integers (:func:`integer_nodes`).

    Returns:
        None where the reader gets the value as it is: a float, or codes that were quantized before.
    """
    name = value.name or ""
    key = plan.shared.get(name, name)
    if key not in plan.activations:
        return None
    producer = value.producer()
    if node.name not in integer and (
        producer is None or producer.name not in integer or producer.op_type in semantics.FLOAT_OUTPUT_IS_FREE
    ):
        return None  # it reads the float, which costs nothing there
    # Behind a pass-through node the codes are those in front of it.
    if name in plan.shared and producer is not None and semantics.preserves_values(producer):
        return None
    return key


def keys_read(model: ir.Model, nodes: Iterable[ir.Node], plan: QuantPlan) -> list[str]:
    """Keys of all quantizers that nodes read through.

    Args:
        model: The simplified float model.
        nodes: Some of its nodes.
        plan: The plan.

    Returns:
        Names in ``plan.activations`` and keys in ``plan.requants``, in the order of the nodes.
    """
    integer = integer_nodes(model, plan)
    keys: dict[str, None] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is None or semantics.is_constant(value):
                continue
            stored = stored_key(node, value, plan, integer)
            if stored is not None:
                keys[stored] = None
            own = f"{node.name}:{index}"
            if own in plan.requants:
                keys[own] = None
    return list(keys)


def copies_read(model: ir.Model, plan: QuantPlan) -> dict[str, tuple[str, ...]]:
    """Readers of a tensor that make up for each other's errors (``TensorQuantizer.copies``).

    Args:
        model: The simplified float model.
        plan: A decided plan.

    Returns:
        Key ``"<node>:<input>"`` of each -> the keys of all of them, in the order of their copies.
    """
    found: dict[str, dict[int, str]] = {}
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            entry = plan.requants.get(f"{node.name}:{index}")
            if value is not None and isinstance(entry, TensorQuantizer) and entry.copies > 1:
                found.setdefault(value.name or "", {})[entry.copy] = f"{node.name}:{index}"
    groups = (tuple(keys[copy] for copy in sorted(keys)) for keys in found.values())
    return {key: group for group in groups for key in group}


def integer_nodes(model: ir.Model, plan: QuantPlan) -> frozenset[str | None]:
    """Names of the nodes that run on integers."""
    return frozenset(node.name for node in model.graph if node.name not in plan.floats)
