"""Where demanded tensors are stored: :func:`find_groups`.

A *group* is one stored tensor (its root) and all values that hold the same codes because only pass-through nodes lie
between them. All members share one scale.

* Backward: a demand behind Reshape, Slice, MaxPool, ... is met in front of them, so that they run on codes; except
  where they lie between float nodes and something reads their output in float: that reader keeps full precision.
* Forward: what an anchor (Conv) writes is stored behind a Relu or Clip that alone reads it.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.regions import Regions
from postquant.passes.target import Role

_SHAPE_ONLY = frozenset({"Shape", "Size"})  # they read no element


@dataclasses.dataclass
class Group:
    """Values that share codes.

    Attributes:
        root: The value that is quantized.
        members: Root and the outputs of pass-through nodes behind it, in topological order.
        weighted_uses: ``(node, input index)`` of weighted nodes that read a member.
        other_uses: Integer element-wise nodes that read a member, and Relu / Clip nodes between stored tensors.
        read_in_float: Whether a float node (or a graph output) reads the stored, not the original, value.
    """

    root: ir.Value
    members: list[ir.Value] = dataclasses.field(default_factory=list)
    weighted_uses: list[tuple[ir.Node, int]] = dataclasses.field(default_factory=list)
    other_uses: list[ir.Node] = dataclasses.field(default_factory=list)
    read_in_float: bool = False


def find_groups(graph: ir.Graph, regions: Regions) -> tuple[list[Group], set[ir.Node]]:
    """Finds all stored tensors.

    Args:
        graph: The main graph, in topological order.
        regions: Its integer nodes.

    Returns:
        The groups, in topological order of their roots, and all nodes that run on integers: weighted, element-wise,
        pass-through between members, and Relu / Clip that a quantizer stands for.
    """
    search = _Search(graph, regions)
    return search.groups(), search.integer


class _Search:
    def __init__(self, graph: ir.Graph, regions: Regions) -> None:
        self._graph = graph
        self._regions = regions
        self.integer = set(regions.weighted) | set(regions.elementwise)
        self._root: dict[ir.Value, ir.Value] = {}
        demanded: list[ir.Value] = []
        for node in graph:
            if node in self.integer:
                demanded += [v for i in regions.quantized_inputs(node) if (v := node.inputs[i]) is not None]
            if regions.anchors(node) and node.outputs[0] not in regions.accumulated:
                demanded.append(self._behind_clips(node.outputs[0]))
        for value in demanded:
            self._store(value)
        self._absorb_clips()

    def _behind_clips(self, value: ir.Value) -> ir.Value:
        while not value.is_graph_output() and len(uses := value.uses()) == 1:
            (use,) = uses
            if self._regions.role(use.node) is not Role.RANGE or use.idx != 0 or use.node.graph is not self._graph:
                break
            value = use.node.outputs[0]
        return value

    def _store(self, value: ir.Value) -> ir.Value:
        """Records ``value`` as stored and returns its group's root."""
        if value in self._root:
            return self._root[value]
        node = value.producer()
        source = node.inputs[0] if node is not None and node.inputs else None
        root = value
        if (
            node is not None
            and source is not None
            and self._regions.role(node) is Role.PASS_THROUGH
            and not semantics.is_constant(source)
            and (self._regions.from_integers(source) or all(self._only_integer_readers(v) for v in node.outputs))
        ):
            self.integer.add(node)
            root = self._store(source)
            # All parts of a Split run on codes together; an output that nobody reads has no name.
            for output in node.outputs:
                if (output.name and output.uses()) or output.is_graph_output():
                    self._root[output] = root
        self._root[value] = root
        return root

    def _only_integer_readers(self, value: ir.Value) -> bool:
        return not value.is_graph_output() and all(
            use.node in self.integer
            or (
                self._regions.role(use.node) is Role.PASS_THROUGH
                and use.idx == 0
                and all(self._only_integer_readers(v) for v in use.node.outputs)
            )
            for use in value.uses()
        )

    def _absorb_clips(self) -> None:
        """Marks the Relu / Clip nodes in front of a stored tensor that its quantizer stands for."""
        for value in list(self._root):
            stored = value
            while (node := stored.producer()) is not None and self._regions.role(node) is Role.RANGE:
                source = node.inputs[0]
                if not (self._regions.from_integers(stored) or self._all_readers_integer(stored, value)):
                    break
                self.integer.add(node)
                if source is None or source in self._root or len(source.uses()) > 1 or source.is_graph_output():
                    break
                stored = source

    def _all_readers_integer(self, stored: ir.Value, value: ir.Value) -> bool:
        if stored is not value:  # a clip in the middle of a chain: its only reader is the next one
            return True
        return not stored.is_graph_output() and all(
            use.node in self.integer and use.node.graph is self._graph for use in stored.uses()
        )

    def groups(self) -> list[Group]:
        found: dict[ir.Value, Group] = {}
        order = [*self._graph.inputs, *(v for node in self._graph for v in node.outputs)]
        for value in order:
            root = self._root.get(value)
            if root is None:
                continue
            group = found.setdefault(root, Group(root))
            group.members.append(value)
            raw = reads_original(value, self.integer)
            if value.is_graph_output() and not raw:
                group.read_in_float = True
            for use in value.uses():
                node = use.node
                if node in self._regions.weighted and use.idx in self._regions.quantized_inputs(node):
                    group.weighted_uses.append((node, use.idx))
                elif node in self._regions.elementwise or (
                    node in self.integer and self._regions.role(node) is Role.RANGE
                ):
                    group.other_uses.append(node)
                elif node not in self.integer and node.op_type not in _SHAPE_ONLY and not raw:
                    group.read_in_float = True
        return list(found.values())


def reads_original(value: ir.Value, integer: set[ir.Node]) -> bool:
    """Whether float readers of a stored value read it before quantization.

    They do where that costs nothing: the value is a graph input, or comes from a float node, or from a Gemm or MatMul,
    whose integer kernels write float as well. A convolution runs on integers only if nothing reads its float output.
    A graph input may be an exception (``QuantPlan.rounded_inputs``): its reader decides, not this function.
    """
    node = value.producer()
    return node is None or node not in integer or node.op_type in semantics.FLOAT_OUTPUT_IS_FREE
