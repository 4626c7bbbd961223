"""The simplified graph with the formats of a plan, for the map in the report: :func:`graph_outline`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.plan import QuantPlan
from postquant.passes.rewiring import is_constant
from postquant.pipeline.tensor_statistics import OutlineNode
from postquant.runtime_ops.quantizer import TensorQuantizer


def graph_outline(model: ir.Model, plan: QuantPlan) -> tuple[OutlineNode, ...]:
    """Graph inputs and nodes in order.

    Args:
        model: The simplified model.
        plan: The final plan.
    """
    return _Outline(model, plan).run()


class _Outline:
    def __init__(self, model: ir.Model, plan: QuantPlan) -> None:
        self._graph, self._plan = model.graph, plan
        self._rows: list[OutlineNode] = []
        self._row_of: dict[ir.Value, int] = {}

    def run(self) -> tuple[OutlineNode, ...]:
        for value in self._graph.inputs:
            if not value.is_initializer():
                self._add([value], OutlineNode(name=value.name or "", ops=("input",), abits=self._bits(value)))
        for node in self._graph:
            if not self._merged(node):
                self._add(node.outputs, self._node(node))
        return tuple(self._rows)

    def _add(self, outputs: Sequence[ir.Value], row: OutlineNode) -> None:
        for value in outputs:
            self._row_of[value] = len(self._rows)
        self._rows.append(row)

    def _bits(self, value: ir.Value) -> int | None:
        quantizer = self._plan.activation_quantizer(value.name or "")
        return None if quantizer is None else quantizer.spec.bits

    def _merged(self, node: ir.Node) -> bool:
        """Joins a Relu or Clip with its producer where the producer's output exists nowhere else."""
        source = node.inputs[0] if node.inputs else None
        if source is None or semantics.clip_bounds(node) is None or source not in self._row_of:
            return False
        alone = len(tuple(source.uses())) == 1 and not source.is_graph_output() and self._bits(source) is None
        if not alone or source.producer() is None or node.name in self._plan.floats:
            return False
        index = self._row_of[source]
        row = self._rows[index]
        bits = self._bits(node.outputs[0])
        self._rows[index] = dataclasses.replace(row, ops=(*row.ops, node.op_type), abits=bits)
        self._row_of[node.outputs[0]] = index
        return True

    def _node(self, node: ir.Node) -> OutlineNode:
        name = node.name or ""
        index = semantics.weight_index(node)
        constant = None if index is None else node.inputs[index]
        weight = None if constant is None else self._plan.weights.get(constant.name or "")
        if name in self._plan.floats or not isinstance(weight, TensorQuantizer):
            weight = None
        sources = [value for value in node.inputs if value is not None and not is_constant(value)]
        # Values of an outer graph, and what subgraphs read, are no rows of this one.
        inputs = sorted({self._row_of[value] for value in sources if value in self._row_of})
        read = [
            entry
            for position in range(len(node.inputs))
            if (entry := self._read(node, position)) is not None and name not in self._plan.floats
        ]
        constants = [value for value in node.inputs if value is not None and is_constant(value)]
        return OutlineNode(
            name=name,
            ops=(node.op_type,),
            inputs=tuple(inputs),
            wbits=None if weight is None else weight.spec.bits,
            weights=None if weight is None else weight.spec.code_book.value,
            abits=next((bits for value in node.outputs if (bits := self._bits(value)) is not None), None),
            reads=min((entry.spec.bits for entry in read), default=None),
            border=any(entry.border is not None for entry in read),
            parameters=sum(value.const_value.size for value in constants if value.const_value is not None),
            reason=self._plan.floats.get(name),
        )

    def _read(self, node: ir.Node, index: int) -> TensorQuantizer | None:
        """The quantizer of what a node reads at an input."""
        entry = self._plan.requants.get(f"{node.name}:{index}")
        value = node.inputs[index]
        if entry is None and value is not None:
            entry = self._plan.activation_entry(value.name or "")
        return entry if isinstance(entry, TensorQuantizer) else None
