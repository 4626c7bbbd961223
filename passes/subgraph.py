"""The part of a graph between given values: which nodes and initializers it needs, and as a model of its own.

A cut is complete when every path from the wanted outputs back to the graph's inputs meets a given input or
ends at an initializer. Subgraphs (bodies of If and Loop) belong to the node that holds them; what they
capture from outside counts as an input of that node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from postquant.runtime_ops.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Cut:
    """The part of a graph between ``inputs`` and ``outputs``.

    Attributes:
        inputs: Values that are fed, in the order in which they were named.
        outputs: Values that are wanted, in the order in which they were named.
        nodes: The nodes in between, in an order in which they can run.
        initializers: The initializers that these nodes (or their subgraphs) read.
    """

    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    initializers: tuple[ir.Value, ...]


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that a node holds as attributes (bodies of If, Loop, Scan)."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def op_types(graph: ir.Graph) -> dict[str, str]:
    """Operator types by node name; a node inside a subgraph is ``<its holder>/<its name>``, as in a plan."""
    found = {node.name or "": node.op_type for node in graph}
    for node in graph:
        for body in subgraphs(node):
            found |= {f"{node.name}/{inner.name}": inner.op_type for inner in body.all_nodes()}
    return found


def captured_values(node: ir.Node) -> tuple[ir.Value, ...]:
    """Values of outer graphs that the node's subgraphs read, each once, in the order of their first use."""
    found: dict[ir.Value, None] = {}
    for graph in subgraphs(node):
        inside: set[ir.Value] = set()
        _collect_outer(graph, inside, found)
    return tuple(found)


def _collect_outer(graph: ir.Graph, inside: set[ir.Value], found: dict[ir.Value, None]) -> None:
    inside.update(graph.inputs)
    inside.update(graph.initializers.values())
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in inside:
                found[value] = None
        for body in subgraphs(node):
            _collect_outer(body, inside, found)
        inside.update(node.outputs)
    for value in graph.outputs:
        if value not in inside:
            found[value] = None


def node_sources(node: ir.Node) -> tuple[ir.Value, ...]:
    """Everything that a node reads: its inputs, and what its subgraphs capture."""
    direct = tuple(value for value in node.inputs if value is not None)
    return direct + captured_values(node)


def values_by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    """Every named value of a graph (not of its subgraphs): inputs, initializers and node outputs."""
    result = {value.name: value for value in graph.inputs if value.name}
    result.update(graph.initializers)
    for node in graph:
        for value in node.outputs:
            if value.name:
                result[value.name] = value
    return result


def find_cut(graph: ir.Graph, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> Cut:
    """Finds the nodes between values.

    Args:
        graph: The graph; it is not changed.
        inputs: Names of the values that will be fed: any value of the graph. None: the graph's own inputs
            (without those that have an initializer).
        outputs: Names of the values that are wanted. None: the graph's own outputs.

    Raises:
        ModelError: If a name is not a value of the graph, or if the outputs need a graph input that is not
            among ``inputs``.
    """
    names = values_by_name(graph)

    def lookup(name: str) -> ir.Value:
        if name not in names:
            raise ModelError("there is no such value in the model", where=name)
        return names[name]

    wanted = tuple(graph.outputs) if outputs is None else tuple(lookup(name) for name in outputs)
    if inputs is None:
        fed = tuple(value for value in graph.inputs if value.name not in graph.initializers)
    else:
        fed = tuple(lookup(name) for name in inputs)

    have = set(fed)
    nodes: dict[ir.Node, None] = {}
    initializers: dict[ir.Value, None] = {}
    # Depth first with an explicit stack: a node is listed when all that it reads has been listed.
    stack: list[tuple[ir.Value, bool]] = [(value, False) for value in reversed(wanted)]
    while stack:
        value, expanded = stack.pop()
        node = value.producer()
        if expanded and node is not None:
            nodes.setdefault(node)
            have.update(node.outputs)
            continue
        if value in have:
            continue
        if value.is_initializer():
            initializers[value] = None
            have.add(value)
            continue
        if node is None and not value.is_graph_input():
            raise ModelError("a node reads a value that nothing computes", where=value.name)
        if node is None:
            raise ModelError(
                "the part of the model between the given values is not complete",
                where=", ".join(v.name or "?" for v in wanted[:3]),
                expected=f"the value {value.name} among the inputs",
                found=", ".join(v.name or "?" for v in fed[:8]) or "none",
            )
        stack.append((value, True))
        stack.extend((source, False) for source in reversed(node_sources(node)) if source not in have)
    return Cut(fed, wanted, tuple(nodes), tuple(initializers))


def used_functions(model: ir.Model, nodes: Sequence[ir.Node]) -> list[ir.Function]:
    """The model-local functions that ``nodes`` call, directly or through other functions or subgraphs."""
    if not model.functions:
        return []
    found: dict[ir.OperatorIdentifier, ir.Function] = {}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        for graph in subgraphs(node):
            stack.extend(graph)
        function = model.functions.get(node.op_identifier())
        if function is not None and function.identifier() not in found:
            found[function.identifier()] = function
            stack.extend(function)
    return [function for identifier, function in model.functions.items() if identifier in found]


def extract(
    model: ir.Model,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    dtypes: Mapping[str, ir.DataType] | None = None,
) -> ir.Model:
    """The part of a model between values, as a new model that shares the tensors of the old one.

    Args:
        model: The model; it is not changed.
        inputs: Names of the values that become graph inputs.
        outputs: Names of the values that become graph outputs.
        dtypes: Element types of inputs whose type the model does not tell; float32 otherwise.

    Returns:
        A new model with the same opsets, and the functions that its nodes call.

    Raises:
        ModelError: As :func:`find_cut`.
    """
    cut = find_cut(model.graph, inputs, outputs)
    view = ir.GraphView(
        cut.inputs,
        cut.outputs,
        nodes=cut.nodes,
        initializers=cut.initializers,
        opset_imports=model.graph.opset_imports,
        name=model.graph.name,
    )
    graph = view.clone()
    for value in graph.inputs:
        value.const_value = None
        if value.type is None:
            value.type = ir.TensorType((dtypes or {}).get(value.name or "", ir.DataType.FLOAT))
    functions = [function.clone() for function in used_functions(model, cut.nodes)]
    return ir.Model(
        graph,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        functions=functions,
    )
