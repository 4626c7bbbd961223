"""What a network consists of between the values that everything passes: :class:`Dataflow`.

A value is a *joint* of some nodes when it dominates all of them that come behind it and post-dominates all that come
before it. In a topological order that is the case exactly where no other value is alive: made, or entered, and still
to be read. Between neighbouring joints lies a *section*: one node, or all branches between a fork and its immediate
post-dominator.

Only data count. Constants, and whole numbers that are computed from shapes, cross anywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet

import onnx_ir as ir

from postquant.passes.subgraph import node_sources

_SHAPES = frozenset({"Shape", "Size"})
_NOTHING: frozenset[ir.Value] = frozenset()


class Dataflow:
    """The nodes of a graph that compute data, and who reads what.

    Args:
        graph: In topological order; not changed.

    Attributes:
        nodes: The nodes whose outputs depend on what the graph's inputs hold, not on their shapes only.
        index: Node -> position in the graph, for every node.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.index = {node: position for position, node in enumerate(graph)}
        self._data: set[ir.Value] = {v for v in graph.inputs if v.name not in graph.initializers}
        self._outputs = set(graph.outputs)
        self._readers: dict[ir.Value, set[ir.Node]] = {}
        nodes = []
        for node in graph:
            sources = self.sources(node)
            if not sources or node.op_type in _SHAPES:
                continue
            nodes.append(node)
            self._data.update(node.outputs)
            for value in sources:
                self._readers.setdefault(value, set()).add(node)
        self.nodes = tuple(nodes)

    def sources(self, node: ir.Node) -> list[ir.Value]:
        """The data that a node reads, each value once."""
        return [value for value in dict.fromkeys(node_sources(node)) if value in self._data]

    def is_data(self, value: ir.Value) -> bool:
        """Whether a value depends on what the graph's inputs hold."""
        return value in self._data

    def readers(self, value: ir.Value) -> list[ir.Node]:
        """The nodes that read a value as data, in order."""
        return sorted(self._readers.get(value, ()), key=self.index.__getitem__)

    def exits(self, nodes: AbstractSet[ir.Node]) -> list[ir.Value]:
        """Values made by ``nodes`` that other nodes read, or that are graph outputs."""
        return [v for n in sorted(nodes, key=self.index.__getitem__) for v in n.outputs if self._leaves(v, nodes)]

    def sections(self, nodes: Sequence[ir.Node], side: AbstractSet[ir.Value] = _NOTHING) -> list[list[ir.Node]]:
        """Cuts nodes at their joints.

        Args:
            nodes: In topological order.
            side: Values that do not count.

        Returns:
            The sections in order; together they are ``nodes``.
        """
        waiting = self._reads(nodes, side)
        made = {value for node in nodes for value in node.outputs}
        alive = {value for value in waiting if value not in made}
        found: list[list[ir.Node]] = [[]]
        for node in nodes:
            for value in self.sources(node):
                if value in alive:
                    waiting[value] -= 1
                    if not waiting[value]:
                        alive.discard(value)
            alive.update(value for value in node.outputs if waiting.get(value))
            found[-1].append(node)
            if len(alive) <= 1:
                found.append([])
        return [section for section in found if section]

    def components(self, nodes: Sequence[ir.Node], side: AbstractSet[ir.Value] = _NOTHING) -> list[list[ir.Node]]:
        """Parts of ``nodes`` that no value made inside, ``side`` left out, links with each other.

        Args:
            nodes: In topological order.
            side: Values that do not count.

        Returns:
            The parts, each in topological order, by their first nodes.
        """
        root = {node: node for node in nodes}

        def find(node: ir.Node) -> ir.Node:
            while root[node] is not node:
                root[node] = root[root[node]]
                node = root[node]
            return node

        for node in nodes:
            for value in self.sources(node):
                maker = value.producer()
                if value not in side and maker in root:
                    root[find(node)] = find(maker)
        parts: dict[ir.Node, list[ir.Node]] = {}
        for node in nodes:
            parts.setdefault(find(node), []).append(node)
        return list(parts.values())

    def longest(self, nodes: Sequence[ir.Node], side: AbstractSet[ir.Value]) -> ir.Value | None:
        """The value that stays alive for most of ``nodes``; None when none outlives the next node.

        Args:
            nodes: In topological order.
            side: Values that do not count.
        """
        position = {node: index for index, node in enumerate(nodes)}
        best, length = None, 1
        for value in self._reads(nodes, side):
            maker = value.producer()
            start = position.get(maker, -1) if maker is not None else -1
            inside = [position[node] for node in self._readers.get(value, ()) if node in position]
            end = len(nodes) if self._leaves(value, position) else max(inside)
            if end - start > length:
                best, length = value, end - start
        return best

    def _reads(self, nodes: Sequence[ir.Node], side: AbstractSet[ir.Value]) -> dict[ir.Value, int]:
        """How often each value that counts will be read: by nodes, and once behind the last one if it leaves them."""
        inside = set(nodes)
        reads: dict[ir.Value, int] = {}
        for node in nodes:
            for value in self.sources(node):
                if value not in side:
                    reads[value] = reads.get(value, 0) + 1
        for node in nodes:
            for value in node.outputs:
                if value not in side and self._leaves(value, inside):
                    reads[value] = reads.get(value, 0) + 1
        return reads

    def _leaves(self, value: ir.Value, nodes: Collection[ir.Node]) -> bool:
        """Whether a value made by ``nodes`` is read elsewhere."""
        if value.producer() not in nodes:
            return False
        return value in self._outputs or any(reader not in nodes for reader in self._readers.get(value, ()))
