"""Lets the inputs of a Concat share its output's scale: :func:`share_concat`.

With scales of their own the inputs are requantized inside QLinearConcat, one more rounding for all but the widest;
with a shared scale codes are only copied, but a narrow input loses resolution. Which is better depends on the data,
so calibration may try both.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.quantizer import TensorQuantizer


def share_concat(plan: QuantPlan, node: ir.Node) -> QuantPlan:
    """The plan in which all inputs of a Concat are stored with its output's quantizer, so that it copies codes.

    Args:
        plan: A plan in which the Concat is quantized; its inputs' own quantizers are dropped, also if decided.
        node: The Concat, a node of the simplified model.

    Returns:
        The plan unchanged where an input is not stored, or is stored in another format.
    """
    output = _name(node.outputs[0])
    key = plan.shared.get(output, output)
    names = [_name(v) for v in node.inputs if v is not None and not semantics.is_constant(v)]
    roots = {plan.shared.get(name, name) for name in names} - {key}
    entries = [plan.activations.get(root) for root in (*roots, key)]
    specs = {entry.spec if isinstance(entry, TensorQuantizer) else entry for entry in entries}
    if None in specs or len(specs) != 1:
        return plan
    shared = {name: key if root in roots else root for name, root in plan.shared.items()}
    shared.update(dict.fromkeys(roots, key))
    activations = {name: entry for name, entry in plan.activations.items() if name not in roots}
    return dataclasses.replace(plan, activations=activations, shared=shared)


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name
