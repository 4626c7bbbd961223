"""Which nodes run on integers: :func:`integer_nodes`.

1. A *weighted* node (Conv, ConvTranspose, Gemm, MatMul) always does, on its inputs. One whose kernel needs a quantized
   output (Conv) *anchors* an integer region; Gemm and MatMul write float for nothing and anchor none.
2. An *element-wise* node (Add, Concat, pooling, ...) does where it lies inside a region: at least one input comes from
   it (an anchor, or another such node) and at least one reader runs on integers. So every residual Add of a
   convolutional network does; those of a transformer, between MatMul and LayerNormalization, stay in float, where
   8 bits would destroy the result (measured: MiniLM, all operators quantized: SQNR -0.1 dB); so do the last nodes
   before a graph output, which would only lose precision. It is the greatest such set: nodes start inside and leave
   it until nothing changes.
3. *Ranges* (Relu, Clip) and *pass-through* nodes carry both properties along.
4. Where the kernel of a sum is the end of a convolution's (``accumulates`` in the target), the result of that
   convolution is never stored: it is added before anything rounds it.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.target import Role, Target


class Regions:
    """The integer nodes of a graph, and what follows from them.

    Attributes:
        weighted: Nodes of the first rule.
        elementwise: Nodes of the second rule.
        accumulated: Results of the fourth rule, which stay in float although an integer node makes and reads them.
    """

    def __init__(self, graph: ir.Graph, target: Target, blocked: Mapping[ir.Node, str]) -> None:
        """Finds them.

        Args:
            graph: The main graph, in topological order.
            target: Which operators have integer kernels.
            blocked: Nodes that must stay in float, with the reason.
        """
        self._target = target
        self._graph = graph
        self._roles: dict[ir.Node, Role] = {}
        for node in graph:
            rule = target.ops.get(node.op_type) if node.domain == "" else None
            if rule is None or node in blocked:
                continue
            role = rule.role
            if role is Role.RANGE and semantics.clip_bounds(node) is None:
                continue
            if role is Role.PASS_THROUGH and not semantics.preserves_values(node):
                role = Role.ELEMENTWISE
            self._roles[node] = role
        self.weighted = {n for n, role in self._roles.items() if role is Role.WEIGHTED}
        self.elementwise = {n for n, role in self._roles.items() if role is Role.ELEMENTWISE}
        self._order = tuple(graph)
        self.accumulated: set[ir.Value] = set()
        self._shrink()
        self.accumulated = self._find_accumulated()

    def role(self, node: ir.Node | None) -> Role | None:
        """The node's role, None for one that stays in float whatever its neighbours do."""
        return None if node is None else self._roles.get(node)

    def quantized_inputs(self, node: ir.Node) -> tuple[int, ...]:
        """Indices of the node's inputs that are quantized activations (not weights, not constants)."""
        rule = self._target.ops[node.op_type]
        indices = range(len(node.inputs)) if rule.inputs is None else rule.inputs
        return tuple(
            i
            for i in indices
            if i < len(node.inputs) and node.inputs[i] is not None and not semantics.is_constant(node.inputs[i])
            if node.inputs[i] not in self.accumulated
        )

    def anchors(self, node: ir.Node | None) -> bool:
        """Whether the node's own kernel needs its output quantized."""
        if node in self.weighted:
            return self._target.ops[node.op_type].output_quantized
        return node in self.elementwise

    def from_integers(self, value: ir.Value | None) -> bool:
        """Whether the value comes out of an integer region."""
        return value in self._produced

    def to_integers(self, value: ir.Value | None) -> bool:
        """Whether some reader of the value runs on integers."""
        return value in self._wanted

    def why_float(self, node: ir.Node) -> str:
        """The reason why an element-wise, range or pass-through node was left out."""
        if any(self.from_integers(v) for v in node.inputs):
            return "nothing that reads it runs on integers"
        return "nothing that it reads comes from an integer operator"

    def _find_accumulated(self) -> set[ir.Value]:
        """One input of each sum: the result of the last convolution that nothing else reads."""
        position = {node: number for number, node in enumerate(self._order)}
        found = set()
        for node in self.elementwise:
            if not self._target.ops[node.op_type].accumulates:
                continue
            sums = [
                value
                for value in node.inputs
                if value is not None
                and value.producer() in self.weighted
                and self.anchors(value.producer())
                and len(value.uses()) == 1
                and not value.is_graph_output()
            ]
            others = {value for value in node.inputs if value is not None and not semantics.is_constant(value)}
            if sums and len(others) > 1:
                found.add(max(sums, key=lambda value: position[_producer(value)]))
        return found

    def _shrink(self) -> None:
        while True:
            self._produced = self._find_produced()
            self._wanted = self._find_wanted()
            leaving = {
                n
                for n in self.elementwise
                if not any(n.inputs[i] in self._produced for i in self.quantized_inputs(n))
                or n.outputs[0] not in self._wanted
            }
            if not leaving:
                return
            self.elementwise -= leaving

    def _carries(self, node: ir.Node) -> bool:
        return self._roles.get(node) in (Role.RANGE, Role.PASS_THROUGH)

    def _find_produced(self) -> set[ir.Value | None]:
        found: set[ir.Value | None] = set()
        for node in self._order:
            if self.anchors(node) or (self._carries(node) and node.inputs[0] in found):
                found.update(node.outputs)
        return found

    def _find_wanted(self) -> set[ir.Value | None]:
        found: set[ir.Value | None] = set()
        for node in reversed(self._order):
            if node in self.weighted or node in self.elementwise:
                found.update(node.inputs[i] for i in self.quantized_inputs(node))
            elif self._carries(node) and any(output in found for output in node.outputs):
                found.add(node.inputs[0])
        return found


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
