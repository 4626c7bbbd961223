"""A quantized model in standard operators only, for receivers that know nothing of ``ai.postquant``.

Packed weights become int8 codes behind DequantizeLinear (:func:`postquant.passes.lut_expansion.with_qdq`): the same
numbers, so that integer kernels fuse. BorderQuantize becomes QuantizeLinear and a Clip of codes: round to nearest,
which is another number near its borders. AdaptiveQuantize becomes the same with its fixed step. LutRequantize becomes a
chain of standard operators that computes the same, and FeedbackRequantize one that takes the nearest level. Other
operators of the domain are replaced by the function bodies that the model carries.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from postquant.passes.adaptive_nodes import is_adaptive
from postquant.passes.border_nodes import is_border
from postquant.passes.inline import inline_functions
from postquant.passes.lookup_nodes import expand_lookups
from postquant.passes.lut_expansion import with_qdq
from postquant.passes.plan import Entry, QuantPlan
from postquant.passes.qdq import Builder
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.schema import DOMAIN


@dataclasses.dataclass(frozen=True)
class StandardModel:
    """The result of :func:`standard_model`.

    Attributes:
        model: The model in standard operators.
        changes: Codes that differ from those of the original model, and why; empty where all are the same.
    """

    model: ir.Model
    changes: tuple[str, ...]


def standard_model(model: ir.Model) -> StandardModel:
    """A quantized model without operators and functions of ``ai.postquant``.

    Args:
        model: An emitted model; not changed. Weights are shared with it or decoded when somebody reads them.

    Raises:
        VerificationError: If the numbers of a packed node are not constants.
    """
    copy = with_qdq(model)
    if copy is model:
        copy = model.clone()
    build = Builder(copy.graph)
    nearest = expand_lookups(copy.graph, build)
    changes = [f"{name} has its nearest levels instead of an error feedback" for name in nearest]
    for node in tuple(copy.graph):
        if is_border(node):
            changes.append(f"{node.outputs[0].name} is rounded to nearest instead of by a rounding border")
            _round_to_nearest(copy.graph, build, node)
        elif is_adaptive(node):
            changes.append(f"{node.outputs[0].name} has the fixed step instead of an adaptive one")
            for use in tuple(node.outputs[1].uses()):
                use.node.replace_input_with(use.idx, node.inputs[1])
                use.node.attributes.pop("axis", None)
            _round_to_nearest(copy.graph, build, node)
    keep = frozenset(function.domain for function in copy.functions.values()) - {DOMAIN}
    if any(node.domain == DOMAIN for node in copy.graph):
        inline_functions(copy, keep_domains=keep)
    for identifier in tuple(copy.functions):
        if identifier[0] == DOMAIN:
            del copy.functions[identifier]
    if not any(node.domain == DOMAIN for node in copy.graph.all_nodes()):
        copy.graph.opset_imports.pop(DOMAIN, None)
    for name, value in tuple(copy.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del copy.graph.initializers[name]
    return StandardModel(copy, tuple(changes))


def without_borders(plan: QuantPlan) -> QuantPlan:
    """The plan whose model :func:`standard_model` gives: rounding is to nearest, and steps are fixed."""

    def plain(entry: Entry) -> Entry:
        if not isinstance(entry, TensorQuantizer):
            return entry
        plain = entry.border is None and entry.adaptive is None and entry.feedback is None
        return entry if plain else dataclasses.replace(entry, border=None, adaptive=None, feedback=None)

    return dataclasses.replace(
        plan,
        activations={name: plain(entry) for name, entry in plan.activations.items()},
        requants={key: plain(entry) for key, entry in plan.requants.items()},
    )


def _round_to_nearest(graph: ir.Graph, build: Builder, node: ir.Node) -> None:
    """QuantizeLinear and a Clip to the border's code range in place of our quantizer; its codes keep their name.

    The Clip is there even where it changes nothing: onnxruntime would merge two quantizations in a row.
    """
    old = node.outputs[0]
    name, old.name = old.name, None
    codes = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=old.shape)
    prefix = (name or "").removesuffix("_quantized")
    bounds = [
        build.initializer(f"{prefix}_{end}", np.asarray(node.attributes[key].as_int(), np.uint8))
        for end, key in (("low", "qmin"), ("high", "qmax"))
    ]
    clipped = ir.Value(name=build.unique(f"{prefix}_saturated"), type=ir.TensorType(ir.DataType.UINT8), shape=old.shape)
    graph.insert_before(
        node,
        [
            ir.Node("", "QuantizeLinear", list(node.inputs[:3]), outputs=[codes], name=name),
            ir.Node("", "Clip", [codes, *bounds], outputs=[clipped], name=clipped.name),
        ],
    )
    for use in tuple(old.uses()):
        use.node.replace_input_with(use.idx, clipped)
    graph.remove(node, safe=True)
