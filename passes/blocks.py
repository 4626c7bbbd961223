"""Cuts a network into blocks that are learned one after the other: :func:`cut_blocks`.

:mod:`postquant.passes.sections` finds, by dominance, the values that everything passes and the sections in between.

1. A section with a fork that ends in a sum or a Concat is a block: a residual block, an inverted residual, an
   attention, an MLP; with the activations and normalizations behind it.
2. Other sections (single nodes, gates) form chains. A chain is cut into as few blocks as the size limit allows, where
   the fewest channels cross.
3. A section with too many layers is taken apart the same way: without its last node, branch by branch; where branches
   are linked (a U-Net, dense connections), the value that lives longest no longer counts and enters blocks from the
   side, as the mask does in a transformer.
4. What cannot be taken apart becomes one block per layer.

A block has one output and one or more inputs; its nodes are those in between, those that only compute shapes among them
(several blocks may hold these). Each quantized layer is in exactly one block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.sections import Dataflow
from postquant.passes.subgraph import node_sources

# Without a fork little tells which layers belong together; an inverted residual without its sum has three.
_CHAIN_LAYERS = 3
_SUMS = frozenset({"Add", "Sub", "Sum", "Concat"})
# Behind a layer they belong to its block.
_ATTACHED = frozenset(
    {
        *("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "HardSwish", "HardSigmoid"),
        *("Sigmoid", "Tanh", "Gelu", "Erf", "Exp", "Softplus", "Softsign", "Mish", "Swish", "Softmax"),
        *("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization"),
        *("Add", "Sub", "Mul", "Div"),
    }
)
# They may put the samples of a batch elsewhere than along the first axis.
_MOVES = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})
_Nodes = Sequence[ir.Node]


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of the network that is learned as a whole.

    Attributes:
        name: Name of its output.
        nodes: Names of its nodes, in an order in which they can run.
        inputs: Names of the values that enter it, constants left out, in the order of their first use.
        output: Name of the one value that leaves it.
        layers: Names of its quantized layers, in order.
    """

    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    layers: tuple[str, ...]


def cut_blocks(model: ir.Model, layers: Collection[str], *, max_layers: int = 6) -> tuple[Block, ...]:
    """Cuts a network into blocks.

    Args:
        model: The simplified model, in topological order, with a name for every node; not changed.
        layers: Names of the quantized weighted nodes of the main graph.
        max_layers: How many of them a block may hold, at least 1; in a chain without a fork at most 3 whatever this is.

    Returns:
        Blocks in an order in which they can be learned: what a block reads depends on blocks before it only.

    Raises:
        ValueError: If ``max_layers`` is not positive, or a name is no node of the main graph.
    """
    if max_layers < 1:
        raise ValueError(f"a block has at least one layer, not {max_layers}")
    names = {node.name for node in model.graph}
    for name in layers:
        if name not in names:
            raise ValueError(f"the model has no node {name}")
    return _Cutter(model.graph, frozenset(layers), max_layers).blocks()


class _Cutter:
    def __init__(self, graph: ir.Graph, layers: frozenset[str], most: int) -> None:
        self._graph = graph
        self._flow = Dataflow(graph)
        self._layer_names = layers
        self._most = most

    def blocks(self) -> tuple[Block, ...]:
        groups = [self._without_moves(group) for group in self._take_apart(self._flow.nodes, frozenset())]
        taken = {node for group in groups for node in group}
        found = [self._block((*self._moves_before(group, taken), *group)) for group in groups]
        makers = {v.name: position for node, position in self._flow.index.items() for v in node.outputs}
        return tuple(sorted(found, key=lambda block: makers[block.output]))

    # -- parts of the network ------------------------------------------------------------------------------------

    def _layers(self, nodes: _Nodes) -> list[str]:
        return [node.name for node in nodes if node.name in self._layer_names and node.name is not None]

    def _take_apart(self, nodes: _Nodes, side: frozenset[ir.Value], tail: _Nodes = ()) -> list[_Nodes]:
        """Groups of nodes, each with one exit and at least one layer, that hold every layer of ``nodes``.

        ``tail`` are the activations behind ``nodes``, which stay with the last group where that ends with ``nodes``.
        """
        while self._layers(nodes):
            sections = self._flow.sections(nodes, side)
            if len(sections) > 1:
                return self._sequence(sections, side)
            if self._is_block(nodes):
                return [nodes]
            inner, last = nodes[:-1], nodes[-1:]
            parts = self._flow.components(inner, side)
            if len(parts) > 1 or len(self._flow.sections(inner, side)) > 1:
                return [group for part in (*parts, last) for group in self._take_apart(part, side)]
            longest = self._flow.longest(nodes, side)
            if longest is None:
                return [self._with_activations(node) for node in nodes if self._layers([node])]
            nodes, tail, side = (*nodes, *tail), (), side | {longest}
        return []

    def _is_block(self, nodes: _Nodes) -> bool:
        return len(self._layers(nodes)) <= self._most and len(self._flow.exits(frozenset(nodes))) == 1

    def _with_activations(self, layer: ir.Node) -> _Nodes:
        """A layer and the nodes that alone read what comes out of it, as far as they are attached."""
        group = [layer]
        while True:
            exits = self._flow.exits(frozenset(group))
            readers = self._flow.readers(exits[0]) if len(exits) == 1 else []
            if len(readers) != 1 or readers[0].op_type not in _ATTACHED or self._layers(readers):
                return group
            group.append(readers[0])

    # -- chains ----------------------------------------------------------------------------------------------------

    def _sequence(self, sections: Sequence[_Nodes], side: frozenset[ir.Value]) -> list[_Nodes]:
        """Groups out of sections that follow each other."""
        groups: list[_Nodes] = []
        chain: list[_Nodes] = []
        for core, tail in self._with_tails(sections):
            nodes = (*core, *tail)
            layers = self._layers(core)
            fits = self._is_block(nodes)
            sums = len(core) > 1 and core[-1].op_type in _SUMS
            if not layers or (fits and not sums and len(layers) <= self._chain_limit):
                chain.append(nodes)
                continue
            groups.extend(self._cut_chain(chain))
            chain = []
            groups.extend([nodes] if fits else self._take_apart(core, side, tail))
        return [*groups, *self._cut_chain(chain)]

    def _with_tails(self, sections: Sequence[_Nodes]) -> list[tuple[_Nodes, _Nodes]]:
        """Sections with layers and the activations that follow them; other sections as they are."""
        found: list[tuple[_Nodes, _Nodes]] = []
        for section in sections:
            attached = not self._layers(section) and all(node.op_type in _ATTACHED for node in section)
            if found and attached and self._layers(found[-1][0]):
                core, tail = found[-1]
                if len(self._flow.exits(frozenset((*core, *tail, *section)))) == 1:
                    found[-1] = core, (*tail, *section)
                    continue
            found.append((section, ()))
        return found

    @property
    def _chain_limit(self) -> int:
        return min(self._most, _CHAIN_LAYERS)

    def _cut_chain(self, atoms: Sequence[_Nodes]) -> list[_Nodes]:
        """The fewest groups of atoms, and among these the ones with the fewest channels in between."""
        if not any(self._layers(atom) for atom in atoms):
            return []
        # Number of groups and of channels between them, and the groups, for every number of atoms from the first on.
        best: list[tuple[int, int, list[_Nodes]] | None] = [(0, 0, [])]
        for end in range(1, len(atoms) + 1):
            choices = []
            for start in range(end):
                before = best[start]
                group = self._trim(atoms[start:end])
                if before is None or not self._may_join(group, atoms[start:end]):
                    continue
                count, channels, groups = before
                choices.append((count + 1, channels + self._channels(groups), [*groups, group]))
            best.append(min(choices, key=lambda choice: choice[:2]) if choices else None)
        assert best[-1] is not None
        return best[-1][2]

    def _trim(self, atoms: Sequence[_Nodes]) -> _Nodes:
        """The nodes from the first atom with layers to the last one."""
        holding = [index for index, atom in enumerate(atoms) if self._layers(atom)]
        if not holding:
            return ()
        return tuple(node for atom in atoms[holding[0] : holding[-1] + 1] for node in atom)

    def _may_join(self, group: _Nodes, atoms: Sequence[_Nodes]) -> bool:
        layers = self._layers(group)
        if sum(bool(self._layers(atom)) for atom in atoms) == 1:
            return True  # one atom with layers is a block by itself
        return 0 < len(layers) <= self._chain_limit and self._is_block(group)

    def _channels(self, groups: Sequence[_Nodes]) -> int:
        """Output channels of the last layer of the last group, 0 in front of the first group."""
        for node in reversed(groups[-1]) if groups else ():
            weight = None if semantics.weight_index(node) != 1 else node.inputs[1]
            if weight is not None and weight.const_value is not None and len(weight.const_value.shape) > 1:
                return semantics.channel_counts(node, tuple(weight.const_value.shape.numpy()))[1]
        return 0

    # -- reshapes at the ends --------------------------------------------------------------------------------------

    def _without_moves(self, group: _Nodes) -> _Nodes:
        """A group without the reshapes in front of its output: samples shall lie along the output's first axis."""
        while group[-1].op_type in _MOVES and len(self._flow.exits(frozenset(group[:-1]))) == 1:
            group = group[:-1]
        return group

    def _moves_before(self, group: _Nodes, taken: set[ir.Node]) -> list[ir.Node]:
        """The reshapes in no group that nothing but the group reads: samples shall lie along an input's first axis."""
        inside = set(group)
        found: list[ir.Node] = []
        stack = list(group)
        while stack:
            for value in self._flow.sources(stack.pop()):
                maker = value.producer()
                if maker is None or maker in taken or maker in inside or maker.op_type not in _MOVES:
                    continue
                if len(self._flow.sources(maker)) == 1 and set(self._flow.readers(value)) <= inside:
                    inside.add(maker)
                    found.append(maker)
                    stack.append(maker)
        return found

    # -- the result ------------------------------------------------------------------------------------------------

    def _block(self, group: _Nodes) -> Block:
        """The nodes between a group's inputs and its output."""
        (output,) = self._flow.exits(frozenset(group))
        inside = set(group)
        nodes: set[ir.Node] = set()
        inputs: dict[ir.Value, None] = {}
        stack = [output.producer()]
        while stack:
            node = stack.pop()
            if node is None or node in nodes:
                continue
            nodes.add(node)
            for value in node_sources(node):
                maker = value.producer()
                if maker is not None and (maker in inside or not self._flow.is_data(value)):
                    stack.append(maker)
                elif self._flow.is_data(value):
                    inputs[value] = None
        order = sorted(nodes, key=self._flow.index.__getitem__)
        first_use = [value for node in order for value in node_sources(node) if value in inputs]
        name = output.name or ""
        return Block(
            name=name,
            nodes=tuple(node.name or "" for node in order),
            inputs=tuple(dict.fromkeys(value.name or "" for value in first_use)),
            output=name,
            layers=tuple(self._layers(order)),
        )
