"""Calls of model-local functions become the nodes of their bodies.

A function is a name for a piece of graph; onnxruntime inlines it too before it runs anything, so inlining
changes no number, and what was inside can be quantized. Calls stay calls where a library of custom operators
may have a kernel for them, where the body imports another version of an operator set than the model, and
where functions call each other in a circle.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from postquant.passes.subgraph import subgraphs


def inline_functions(model: ir.Model, *, keep_domains: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Inlines what can be inlined.

    Args:
        model: The model; it is changed.
        keep_domains: Domains whose functions stay calls.

    Returns:
        Lines for the report.
    """
    if not model.functions:
        return ()
    count = len(model.functions)

    def fits(function: ir.Function) -> bool:
        versions = model.graph.opset_imports
        return function.domain not in keep_domains and all(
            versions.get(domain, version) == version for domain, version in function.opset_imports.items()
        )

    try:
        common.InlinePass(criteria=fits)(model)
    except ir.passes.PreconditionError:
        return ("model-local functions call each other in a circle and stay calls, in float",)
    notes: list[str] = []
    if count > len(model.functions):
        notes.append(f"model-local functions that were inlined: {count - len(model.functions)}")
    called = sorted(
        {f"{node.domain}::{node.op_type}" for node in model.graph if node.op_identifier() in model.functions}
    )
    if called:
        notes.append(f"calls of model-local functions stay in float: {', '.join(called)}")
    return tuple(notes)


def note_subgraphs(model: ir.Model) -> tuple[str, ...]:
    """A line for the report if control flow holds nodes that stay in float."""
    holders = [node for node in model.graph if any(len(body) for body in subgraphs(node))]
    if not holders:
        return ()
    kinds = ", ".join(sorted({node.op_type for node in holders}))
    inside = sum(len(body) for node in holders for body in subgraphs(node))
    return (f"nodes inside {kinds} that stay in float: {inside}",)
