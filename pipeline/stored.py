"""Which tensors a quantized model stores as codes, and where they come from: :func:`find_stored`.

Node names connect the emitted model with the float model; the nodes QuantizeLinear, Clip and DequantizeLinear in
between tell where the codes are.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.plan import QuantPlan
from postquant.pipeline.plan_check import input_quantizer
from postquant.pipeline.qdq_structure import Reading, reading
from postquant.runtime_ops.law_float import MOVING_OPS
from postquant.runtime_ops.quantizer import TensorQuantizer


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """One tensor that the emitted model stores as codes.

    Attributes:
        value: The value in the float model.
        codes: Name of the codes in the emitted model, behind the integer Clip.
        quantizer: What the plan says about it.
        reading: What the emitted model says about it.
        node: The node of the float model whose output is quantized, None for a graph input.
        output: Index of that output.
        clips: Bounds of the Relu and Clip nodes between that output and ``value``, the last one first.
        source: Name of the float value that the emitted model quantizes.
        stored_codes: For a second quantization: the codes that it reads; None otherwise.
        stored_quantizer: What the plan says about those codes.
        needs: Names of the codes that the prediction reads.
    """

    value: ir.Value
    codes: str
    quantizer: TensorQuantizer
    reading: Reading
    node: ir.Node | None
    output: int
    clips: tuple[tuple[float, float], ...]
    source: str
    stored_codes: str | None
    stored_quantizer: TensorQuantizer | None
    needs: tuple[str, ...]

    @property
    def again(self) -> bool:
        """Whether the same value is also stored with a quantizer of its own, which this one narrows."""
        return self.stored_codes is not None and not self.clips


def find_stored(float_model: ir.Model, emitted: ir.Model, plan: QuantPlan) -> tuple[Stored, ...]:
    """All stored tensors of an emitted model, in the order in which its nodes read them.

    Args:
        float_model: The simplified model that the plan is about.
        emitted: The quantized model.
        plan: The plan.
    """
    return _Search(float_model, emitted, plan).run()


class _Search:
    def __init__(self, float_model: ir.Model, emitted: ir.Model, plan: QuantPlan) -> None:
        self._float_model, self._model, self._plan = float_model, emitted, plan
        self._float = {node.name: node for node in float_model.graph}
        self._emitted = {node.name: node for node in emitted.graph}

    def run(self) -> tuple[Stored, ...]:
        found: dict[str, Stored] = {}
        for node in self._model.graph:
            original = self._float.get(node.name)
            if original is None or original.op_type != node.op_type:
                continue
            for index, value in enumerate(node.inputs):
                seen = reading(value)
                if seen is None or seen.constant is not None or index >= len(original.inputs):
                    continue
                source = original.inputs[index]
                assert source is not None
                quantizer = input_quantizer(self._plan, original, index) or self._plan.activation_quantizer(
                    source.name or ""
                )
                if quantizer is not None:
                    self._add(found, source, quantizer, seen)
        for mine, theirs in zip(self._float_model.graph.outputs, self._model.graph.outputs, strict=True):
            seen, quantizer = reading(theirs), self._plan.activation_quantizer(mine.name or "")
            if seen is not None and quantizer is not None:
                self._add(found, mine, quantizer, seen)
        return tuple(found.values())

    def _add(self, found: dict[str, Stored], value: ir.Value, quantizer: TensorQuantizer, seen: Reading) -> None:
        source = seen.source
        if seen.codes.name in found or source is None:
            return
        inner = reading(source) if seen.looked_up is None else seen.looked_up
        if inner is not None:  # codes -> DequantizeLinear -> QuantizeLinear: the tensor is stored twice
            first, clips = self._stored_first(value, quantizer)
            stored = self._plan.activation_quantizer(first.name or "")
            if stored is not None:
                self._add(found, first, stored, inner)
            codes = inner.codes.name or ""
            found[seen.codes.name or ""] = Stored(
                value,
                seen.codes.name or "",
                quantizer,
                seen,
                None,
                0,
                clips,
                source.name or "",
                codes,
                stored,
                (codes,),
            )
            return
        node, output, clips = self._origin(value, source)
        needs: list[str] = []
        for written in () if node is None else self._readers(node):
            for item in written.inputs:
                part = reading(item)
                if part is not None and part.constant is None:
                    needs.append(part.codes.name or "")
        found[seen.codes.name or ""] = Stored(
            value,
            seen.codes.name or "",
            quantizer,
            seen,
            node,
            output,
            clips,
            source.name or "",
            None,
            None,
            tuple(dict.fromkeys(needs)),
        )

    def _stored_first(
        self, value: ir.Value, quantizer: TensorQuantizer
    ) -> tuple[ir.Value, tuple[tuple[float, float], ...]]:
        """The value whose codes a second quantizer reads, and the clips in between, the last one first.

        That is ``value`` itself where one node reads it with fewer bits. Where ``value`` has only this quantizer, it is
        the Relu or Clip of a tensor that is stored as well, because something else (a graph output) reads it.
        """
        clips: list[tuple[float, float]] = []
        if quantizer is not self._plan.activation_quantizer(value.name or ""):
            return value, ()
        while (node := value.producer()) is not None and node.inputs and node.inputs[0] is not None:
            bounds = semantics.clip_bounds(node)
            if bounds is None:
                break
            clips.append(bounds)
            value = node.inputs[0]
            if self._plan.activation_quantizer(value.name or "") is not None:
                break
        return value, tuple(clips)

    def _readers(self, node: ir.Node) -> list[ir.Node]:
        """The emitted nodes whose codes the prediction of a node's output reads."""
        found: list[ir.Node] = []
        nodes = [node]
        while nodes:
            item = nodes.pop()
            written = self._emitted.get(item.name)
            if written is not None:
                found.append(written)
                behind, product = moved_float(item, written), biased_product(item)
                nodes += [n for n in (product, None if behind is None else behind.producer()) if n is not None]
        return found

    def _origin(self, value: ir.Value, source: ir.Value) -> tuple[ir.Node | None, int, tuple[tuple[float, float], ...]]:
        """The float node behind the quantizer, through the clips that the quantizer stands for."""
        clips: list[tuple[float, float]] = []
        written = source.producer()
        while True:
            node = value.producer()
            same = (
                (node is None and written is None)
                if node is None or written is None
                else (node.name == written.name and value.index() == source.index())
            )
            bounds = None if node is None else semantics.clip_bounds(node)
            if same or node is None or bounds is None or node.inputs[0] is None:
                return node, value.index() or 0, tuple(clips)
            clips.append(bounds)
            value = node.inputs[0]


def biased_product(node: ir.Node) -> ir.Node | None:
    """The MatMul whose bias an Add adds, else None."""
    if node.op_type != "Add":
        return None
    for value in node.inputs:
        product = None if value is None else value.producer()
        if product is not None and product.op_type == "MatMul":
            bias = semantics.bias_of(product)
            if bias is not None and any(item is bias for item in node.inputs):
                return product
    return None


def moved_float(node: ir.Node, written: ir.Node | None) -> ir.Value | None:
    """The computed float value whose elements a node moves about, None if it reads codes or computes.

    Args:
        node: A node of the float model.
        written: The same node in the emitted model.
    """
    value = node.inputs[0] if node.inputs else None
    if node.op_type not in MOVING_OPS or node.op_type in ("Concat", "Split") or node.domain or written is None:
        return None
    if value is None or value.producer() is None or reading(written.inputs[0]) is not None:
        return None
    # Reshape keeps the order of elements, whatever its shape.
    constant = all(v is None or semantics.is_constant(v) for v in node.inputs[1:])
    return value if constant or node.op_type == "Reshape" else None
