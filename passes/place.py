"""Decides which tensors are quantized, and in which format: :func:`place`, model + target -> plan of specs.

1. :mod:`postquant.passes.regions` finds the integer nodes. Each demands its inputs quantized, an anchor its output too.
2. A demanded tensor is *stored* where it is made: back through pass-through nodes, whose outputs share its scale, and
   forward through Relu and Clip, for which the quantizer's saturation stands.
3. A stored tensor has the width that its readers want. One that only weighted nodes read has their input width; one
   that anything else reads as well has ``sums_bits``, and is requantized in front of the narrower weighted nodes.
4. Weights have a scale per output channel; biases of integer nodes are int32 with scale ``s_x * s_w``.
5. Every other node that computes floats is in ``plan.floats`` with its reason.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.concat import share_concat
from postquant.passes.plan import Entry, QuantPlan
from postquant.passes.regions import Regions
from postquant.passes.storage import Group, find_groups
from postquant.passes.subgraph import subgraphs
from postquant.passes.target import ConcatScales, Role, Target
from postquant.passes.value_types import value_types
from postquant.runtime_ops.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Override:
    """Other settings for the nodes that it selects; a later override wins over an earlier one.

    Attributes:
        node: Pattern of node names (``*``, ``?``, ``[]`` as in a shell), or None for any node.
        op_type: Operator type, or None for any.
        wbits: Bits of the node's weight.
        abits: Bits of the node's inputs.
        float_: True keeps the node in float, False undoes an earlier True, None leaves it open.
        symmetric: Whether the stored output of the node has a symmetric range.
    """

    node: str | None = None
    op_type: str | None = None
    wbits: int | None = None
    abits: int | None = None
    float_: bool | None = None
    symmetric: bool | None = None

    def selects(self, node: ir.Node) -> bool:
        """Whether the override is for this node."""
        return (self.node is None or fnmatch.fnmatchcase(node.name or "", self.node)) and (
            self.op_type is None or node.op_type == self.op_type
        )


@dataclasses.dataclass(frozen=True)
class PlacementSettings:
    """What the user wants.

    Attributes:
        wbits: Bits of weights.
        abits: Bits of the inputs of weighted nodes.
        first_last_bits: Bits of weights and inputs of the first and last weighted nodes (those with no weighted node
            before, or after, them) where the above are narrower; None treats them like the others.
        depthwise_bits: Bits of weights of depthwise convolutions where ``wbits`` is narrower; None treats them like the
            others.
        sums_bits: Bits of every other stored tensor: residual sums, pooling, Concat, element-wise operators.
        overrides: Exceptions for single nodes.
    """

    wbits: int = 8
    abits: int = 8
    first_last_bits: int | None = 8
    depthwise_bits: int | None = None
    sums_bits: int = 8
    overrides: tuple[Override, ...] = ()


def place(model: ir.Model, target: Target, settings: PlacementSettings) -> QuantPlan:
    """Places quantizers.

    Args:
        model: The simplified model; not changed.
        target: The backend.
        settings: Widths and exceptions.

    Returns:
        A plan that holds formats only (``QuantSpec``), reasons for what stays in float, and notes.

    Raises:
        ConfigError: If the target lacks a width, or an override selects nothing.
    """
    return _Placement(model, target, settings).plan()


class _Placement:
    def __init__(self, model: ir.Model, target: Target, settings: PlacementSettings) -> None:
        self.graph = model.graph
        self.target = target
        self.settings = settings
        self.notes: list[str] = []
        self.chosen = {node: self._override(node) for node in self.graph}
        self._check_overrides()
        self.type_of = value_types(model)
        self.blocked = self._blocked()
        self.regions = Regions(self.graph, target, self.blocked)
        self.edge_nodes = _edge_nodes(self.graph, self.regions.weighted)
        self.groups, self.integer = find_groups(self.graph, self.regions)

    def plan(self) -> QuantPlan:
        activations: dict[str, Entry] = {}
        shared: dict[str, str] = {}
        requants: dict[str, Entry] = {}
        weights: dict[str, Entry] = {}
        int_biases: dict[str, tuple[str, str]] = {}
        for group in self.groups:
            name = _name(group.root)
            bits = self._stored_bits(group)
            symmetric = self._symmetric(group.root)
            activations[name] = self.target.activations.spec(bits, symmetric=symmetric)
            shared.update({_name(member): name for member in group.members if member is not group.root})
            for node, index in group.weighted_uses:
                wanted = self._activation_bits(node)
                if wanted < bits:
                    requants[f"{node.name}:{index}"] = self.target.activations.spec(wanted, symmetric=symmetric)
        for node in self.graph:
            position = semantics.weight_index(node) if node in self.regions.weighted else None
            if position is None:
                continue
            weight = node.inputs[position]
            weights[_name(weight)] = self.target.weights.spec(
                self._weight_bits(node), axis=semantics.channel_axis(node), left=position == 0
            )
            bias = semantics.bias_of(node)
            if self.target.int32_bias and bias is not None:
                key = f"{node.name}:0"
                int_biases[_name(bias)] = (key if key in requants else _name(node.inputs[0]), _name(weight))
        plan = QuantPlan(
            target=self.target.name,
            activations=activations,
            shared=shared,
            requants=requants,
            weights=weights,
            int_biases=int_biases,
            floats=self._floats(),
            notes=tuple(self._notes()),
        )
        if self.target.concat_scales is ConcatScales.SHARED:
            for node in self.graph:
                if node.op_type == "Concat" and node in self.integer:
                    plan = share_concat(plan, node)
        return plan

    def _override(self, node: ir.Node) -> Override:
        merged = Override()
        for override in self.settings.overrides:
            if override.selects(node):
                given = {f.name: getattr(override, f.name) for f in dataclasses.fields(override)}
                merged = dataclasses.replace(merged, **{k: v for k, v in given.items() if v is not None})
        return merged

    def _check_overrides(self) -> None:
        for override in self.settings.overrides:
            where = " ".join(filter(None, (override.node, override.op_type)))
            selected = [node for node in self.graph if override.selects(node)]
            if not selected:
                raise ConfigError(
                    "an override selects no node",
                    where=where,
                    expected=self._known(override),
                    hint="names are those of the simplified model; --verbose and `postquant inspect` show them",
                )
            if override.wbits is not None and all(semantics.weight_index(node) is None for node in selected):
                raise ConfigError(
                    "an override sets wbits of nodes that have no weights",
                    where=where,
                    expected="a Conv, ConvTranspose, Gemm or MatMul with constant weights",
                    found=_some([f"{node.op_type} {node.name}" for node in selected]),
                    hint="the width of what other operators read is abits",
                )

    def _known(self, override: Override) -> str:
        """What an override that selects nothing could have named."""
        types = {node.op_type for node in self.graph}
        if override.op_type is not None and override.op_type not in types:
            return f"an operator type of the model: {_some(sorted(types), most=20)}"
        names = [node.name or "" for node in self.graph if override.op_type in (None, node.op_type)]
        return f"a pattern that fits a node: {_some(names)}"

    def _blocked(self) -> dict[ir.Node, str]:
        blocked: dict[ir.Node, str] = {}
        for node in self.graph:
            rule = self.target.ops.get(node.op_type) if node.domain == "" else None
            if self.chosen[node].float_:
                blocked[node] = "the configuration keeps it in float"
            elif any(True for _ in subgraphs(node)):
                blocked[node] = "it holds subgraphs, which stay in float"
            elif rule is None:
                label = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
                known = self.target.float_reasons.get(node.op_type) if node.domain == "" else None
                blocked[node] = known or f"target {self.target.name} has no integer form of {label}"
            elif self.type_of(node.outputs[0]) != ir.DataType.FLOAT:
                blocked[node] = "it does not compute in float32"
            elif rule.role is Role.WEIGHTED:
                index = semantics.weight_index(node)
                if node.op_type in ("Conv", "ConvTranspose") and index != 1:
                    blocked[node] = "its weight is computed at run time"
                elif node.op_type == "Gemm" and float(semantics.attribute(node, "alpha", 1.0)) <= 0:
                    blocked[node] = "its alpha is not positive"
                elif index is not None and all(semantics.is_constant(v) for v in node.inputs[:2]):
                    blocked[node] = "all its inputs are constant"
            elif rule.role is Role.RANGE and semantics.clip_bounds(node) is None:
                blocked[node] = "its bounds are computed at run time"
        return blocked

    def _symmetric(self, root: ir.Value) -> bool | None:
        """The scheme that overrides ask for: of the node that makes the tensor, or of a Relu or Clip in between."""
        value: ir.Value | None = root
        while value is not None and (node := value.producer()) is not None:
            if self.chosen[node].symmetric is not None or self.regions.role(node) is not Role.RANGE:
                return self.chosen[node].symmetric
            value = node.inputs[0]
        return None

    def _activation_bits(self, node: ir.Node) -> int:
        own = self.chosen[node].abits
        bits = own or (self.settings.abits if node in self.regions.weighted else self.settings.sums_bits)
        edge = self.settings.first_last_bits
        if own is None and edge is not None and node in self.edge_nodes:
            bits = max(bits, edge)
        return min(bits, self.target.activations.max_bits)

    def _weight_bits(self, node: ir.Node) -> int:
        own = self.chosen[node].wbits
        bits = own or self.settings.wbits
        edge = self.settings.first_last_bits
        if own is None and edge is not None and node in self.edge_nodes:
            bits = max(bits, edge)
        inner = self.settings.depthwise_bits
        if own is None and inner is not None and semantics.is_depthwise(node):
            bits = max(bits, inner)
        return min(bits, self.target.weights.max_bits)

    def _stored_bits(self, group: Group) -> int:
        bits = [self._activation_bits(node) for node, _ in group.weighted_uses]
        bits += [self._activation_bits(node) for node in group.other_uses]
        if group.read_in_float or not bits:
            bits.append(min(self.settings.sums_bits, self.target.activations.max_bits))
        return max(bits)

    def _floats(self) -> dict[str, str]:
        floats: dict[str, str] = {}
        for node in self.graph:
            if node in self.integer or node.op_type == "Constant":
                continue
            if not any(self._is_floating(output) for output in node.outputs):
                continue
            floats[node.name or ""] = self.blocked.get(node) or self.regions.why_float(node)
            for nested in subgraphs(node):
                for inner in nested.all_nodes():
                    if inner.op_type in self.target.ops and any(self._is_floating(v) for v in inner.outputs):
                        floats[f"{node.name}/{inner.name}"] = "it is inside a subgraph"
        return floats

    def _is_floating(self, value: ir.Value) -> bool:
        dtype = self.type_of(value)
        return dtype is not None and dtype.is_floating_point()

    def _notes(self) -> Iterable[str]:
        edge = self.settings.first_last_bits
        if edge is not None and min(self.settings.wbits, self.settings.abits) < edge and self.edge_nodes:
            names = ", ".join(sorted(n.name or "" for n in self.edge_nodes))
            yield f"first and last weighted nodes keep {edge} bits: {names}"
        inner = self.settings.depthwise_bits
        if inner is not None and self.settings.wbits < inner:
            count = sum(semantics.is_depthwise(node) for node in self.regions.weighted)
            if count:
                yield f"weights of {count} depthwise convolutions keep {inner} bits"
        for what, tensors, bits in (
            ("weights", self.target.weights, self.settings.wbits),
            ("activations", self.target.activations, self.settings.abits),
        ):
            if bits > tensors.max_bits:
                yield f"{what} have {tensors.max_bits} instead of {bits} bits: {tensors.max_bits_reason}"
        if min(self.settings.abits, self.settings.sums_bits) < self.settings.sums_bits:
            yield f"residual sums, pooling and other element-wise tensors keep {self.settings.sums_bits} bits"


def _edge_nodes(graph: ir.Graph, weighted: set[ir.Node]) -> set[ir.Node]:
    """Weighted nodes with constant weights that have no weighted node before, or after, them."""
    after_weight: set[ir.Value | None] = set()
    edges = set()
    for node in graph:
        behind = any(v in after_weight for v in node.inputs)
        if node in weighted and not behind and semantics.weight_index(node) is not None:
            edges.add(node)
        if behind or node in weighted:
            after_weight.update(node.outputs)
    before_weight: set[ir.Value | None] = set()
    for node in reversed(tuple(graph)):
        ahead = any(v in before_weight for v in node.outputs)
        if node in weighted and not ahead and semantics.weight_index(node) is not None:
            edges.add(node)
        if ahead or node in weighted:
            before_weight.update(v for v in node.inputs if v is not None)
    return edges


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name is not None
    return value.name


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
