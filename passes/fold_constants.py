"""Nodes that depend on nothing but constants become initializers, computed by onnxruntime itself.

Random operators, operators with subgraphs, calls of model-local functions and QuantizeLinear /
DequantizeLinear (a quantized weight must stay small) are left. So is what would grow the model by more than a
limit: a constant that ConstantOfShape, Expand or Tile makes is small in the file and large in memory.
"""

from __future__ import annotations

import onnx_ir as ir

from postquant.passes.rewiring import Initializers, is_constant
from postquant.passes.session import make_session
from postquant.passes.subgraph import subgraphs
from postquant.runtime_ops.errors import ModelError

# Results of more bytes than this beyond what they replace are not stored.
GROWTH_LIMIT = 16 << 20
# Sources of more bytes than this in total are not read: folding computes everything at once.
SOURCE_LIMIT = 512 << 20

_LEFT = frozenset(
    {
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    }
)


class FoldConstantsPass(ir.passes.InPlacePass):
    """Computes what is constant in the main graph.

    Attributes:
        notes: After the pass ran: what could not be folded and why.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds in the main graph."""
        self.notes = []
        nodes = _constant_nodes(model)
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        inside = set(nodes)
        wanted = [
            value
            for node in nodes
            for value in node.outputs
            if not value.is_graph_output() and any(use.node not in inside for use in value.uses())
        ]
        # A graph output keeps its node: an output that is an initializer is not read by every tool.
        if not wanted:
            return ir.passes.PassResult(model, modified=False)
        sources = {value for node in nodes for value in node.inputs if value is not None and is_constant(value)}
        size = sum(value.const_value.nbytes for value in sources if value.const_value is not None)
        if size > SOURCE_LIMIT:
            self.notes.append(f"{len(nodes)} constant nodes are not folded: they read {size / 1e6:.0f} MB of weights")
            return ir.passes.PassResult(model, modified=False)
        try:
            session = make_session(
                model, inputs=(), outputs=[value.name or "" for value in wanted], optimize=False, prepack=False
            )
            results = session.run({})
        except ModelError as error:
            self.notes.append(f"constant nodes are not folded: {error.found or error.what}")
            return ir.passes.PassResult(model, modified=False)
        initializers = Initializers(model.graph)
        count = 0
        for value in wanted:
            array = results[value.name or ""]
            if array.nbytes > GROWTH_LIMIT + size:
                self.notes.append(f"{value.name} is constant but not stored: it takes {array.nbytes / 1e6:.0f} MB")
                continue
            tensor = ir.tensor(array)
            name, value.name = value.name, None
            value.replace_all_uses_with(initializers.add(f"{name}", tensor, own=True))
            count += 1
        graph = model.graph
        for node in reversed(nodes):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=count > 0)


def _constant_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes whose inputs are constants or come from such nodes, in the order of the graph."""
    known: set[ir.Value] = set()
    result: list[ir.Node] = []
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") or node.op_type in _LEFT or node.op_identifier() in model.functions:
            continue
        if any(True for _ in subgraphs(node)) or not all(
            value is None or value in known or is_constant(value) for value in node.inputs
        ):
            continue
        result.append(node)
        known.update(node.outputs)
    return result
