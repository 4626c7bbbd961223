"""Writes a plan into a graph as QuantizeLinear / DequantizeLinear pairs: :func:`emit`.

Names (a number is appended where the model has such a name already):

| what                                   | nodes and values                                                        |
|----------------------------------------|-------------------------------------------------------------------------|
| activation ``x``                       | ``x_quantized``, ``x_saturated`` (only with a Clip), ``x_dequantized``  |
| requantization of input i of node ``n``| the same with ``n_input<i>`` for ``x``; ``..._levels`` of a code book   |
|                                        | (:mod:`postquant.passes.lookup_nodes`)                                  |
| weight or bias ``w``                   | ``w_quantized`` (codes), ``w_dequantized``                              |
| their constants                        | ``..._scale``, ``..._zero_point``, ``..._low``, ``..._high``            |
| graph output ``x`` read dequantized    | ``x`` is the dequantized value; the original one becomes ``x_float``    |
| barrier in front of a float node       | ``<its input>_barrier`` (:mod:`postquant.passes.barriers`)              |

Relu and Clip in front of a quantizer disappear: quantization is monotonic, so clipping to ``[l, h]`` and quantizing
equals quantizing and clipping codes to ``[q(l), q(h)]``, exactly. Where ``[q(l), q(h)]`` is the whole container the
quantizer's own saturation does it; otherwise an integer Clip follows, as for codes of fewer than 8 bits. A backend
that has no Clip of integers gets the Relu or Clip itself in that case.

An entry of the plan that is still a format (``QuantSpec``) is left in float: calibration runs partly decided plans.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.adaptive_nodes import adaptive_quantize_dequantize
from postquant.passes.barriers import add_barriers
from postquant.passes.biases import bias_scale, bias_values, integer_bias, weight_scale
from postquant.passes.border_nodes import border_quantize_dequantize
from postquant.passes.domain_functions import add_functions
from postquant.passes.lookup_nodes import lookup_dequantize
from postquant.passes.lut_nodes import FEW_BITS, pack_weights
from postquant.passes.plan import QuantPlan
from postquant.passes.qdq import Builder
from postquant.passes.storage import reads_original
from postquant.passes.target import WeightStorage
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.quantizer import TensorQuantizer

# ONNX INT4 exists from here on.
INT4_OPSET = 21
_INT4_IR_VERSION = 10


def emit(
    model: ir.Model,
    plan: QuantPlan,
    *,
    weight_storage: WeightStorage = WeightStorage.INT8,
    exact_post: bool = False,
    integer_clips: bool = True,
) -> ir.Model:
    """The quantized model.

    Args:
        model: The simplified model; not changed. Weights are shared with it, or computed when the result is written.
        plan: The decisions; undecided entries stay in float.
        weight_storage: Container of weight codes of 4 and fewer bits; a weight whose node has no packed form, or which
            has a code book that the container does not hold, keeps one code per byte.
        exact_post: Whether packed matrix products with POST weights compute with exact powers of sqrt(2), in two
            integer products each, instead of the int8 lattice (:mod:`postquant.passes.lut_nodes`).
        integer_clips: Whether a Relu or Clip becomes a Clip of codes where the quantizer alone does not stand for it.
            Otherwise it stays; the codes are the same.

    Returns:
        A new model with the same inputs, outputs, dynamic axes and metadata.

    Raises:
        ModelError: If the plan is of another model, or INT4 storage meets an opset below 21.
    """
    if weight_storage is WeightStorage.INT4 and model.graph.opset_imports.get("", 0) < INT4_OPSET:
        raise ModelError(
            "4-bit tensors need a newer opset",
            where="weight storage int4",
            expected=f"opset {INT4_OPSET}",
            found=f"opset {model.graph.opset_imports.get('', 0)}",
            hint="convert the model first",
        )
    copy = model.clone()
    if weight_storage is WeightStorage.INT4:
        copy.ir_version = max(copy.ir_version, _INT4_IR_VERSION)
    emission = _Emission(copy, plan, weight_storage, integer_clips=integer_clips)
    emission.run()
    if weight_storage is WeightStorage.PACKED:
        pack_weights(copy, emission.build, emission.narrow_weights, exact_post=exact_post)
        emission.drop_unread_constants()
    add_functions(copy)
    return copy


class _Emission:
    def __init__(self, model: ir.Model, plan: QuantPlan, weight_storage: WeightStorage, *, integer_clips: bool) -> None:
        self.graph = model.graph
        self.integer_clips = integer_clips
        self.plan = plan
        self.build = Builder(model.graph)
        self.packed = weight_storage is WeightStorage.INT4
        self.nodes = {node.name: node for node in self.graph}
        self.integer = {node for node in self.graph if node.name not in plan.floats}
        self.written_biases: set[str] = set()
        self.overflowing_biases: set[str] = set()
        # Weighted node -> name and quantizer of its weight, where that has at most 4 bits.
        self.narrow_weights: dict[ir.Node, tuple[str, TensorQuantizer]] = {}
        self._check_names()

    def run(self) -> None:
        values = [*self.graph.inputs, *(v for node in self.graph for v in node.outputs)]
        for value in values:
            quantizer = self.plan.activation_quantizer(value.name) if value.name else None
            if quantizer is not None:
                self._store(value, quantizer)
        self._requantize()
        self._quantize_weights()
        for name, corrected in self.plan.biases.items():
            if name not in self.written_biases:  # those of weights that stay in float
                self.graph.initializers[name].const_value = ir.Tensor(np.asarray(corrected, np.float32), name=name)
        add_barriers(self.graph, self.build, self.overflowing_biases)
        self.drop_unread_constants()

    def _check_names(self) -> None:
        values = {v.name for v in self.graph.inputs} | {v.name for node in self.graph for v in node.outputs}
        for kind, names, known in (
            ("activation", self.plan.activations, values),
            ("weight", self.plan.weights, set(self.graph.initializers)),
            ("bias", (*self.plan.int_biases, *self.plan.biases), set(self.graph.initializers)),
        ):
            for name in names:
                if name not in known:
                    raise ModelError(
                        "the plan is of another model",
                        where=f"{kind} {name}",
                        expected="a name in the simplified model",
                    )

    # -- activations ---------------------------------------------------------------------------------------------

    def _store(self, value: ir.Value, quantizer: TensorQuantizer) -> None:
        name = value.name
        assert name is not None
        original = name not in self.plan.rounded_inputs and reads_original(value, self.integer)
        uses = [use for use in value.uses() if not original or use.node in self.integer]
        is_output = value.is_graph_output()
        if not uses and (original or not is_output):
            return
        source, low, high = self._without_clips(value, quantizer)
        # Behind a pass-through node codes were saturated before, and onnxruntime wants nothing between Q and DQ.
        saturate = not (name in self.plan.shared and semantics.preserves_values(_producer(value)))
        replaces_output = is_output and not original
        if replaces_output:
            value.name = self.build.unique(f"{name}_float")
        result = self.build.quantize_dequantize(
            source,
            quantizer,
            name,
            low=low,
            high=high,
            saturate=saturate,
            packed=self.packed,
            output=name if replaces_output else None,
        )
        if replaces_output:
            # Of the clips that the codes stand for only the last one, an output, has a declared shape for certain.
            result.shape = value.shape
            for index, output in enumerate(self.graph.outputs):
                if output is value:
                    self.graph.outputs[index] = result
        result.metadata_props.update(value.metadata_props)
        for use in uses:
            use.node.replace_input_with(use.idx, result)
        self._remove_unread(value, source)

    def _without_clips(self, value: ir.Value, quantizer: TensorQuantizer) -> tuple[ir.Value, int, int]:
        """The value in front of the clips that the codes' range stands for, and that range."""
        spec = quantizer.spec
        low, high = spec.qmin, spec.qmax
        source = value
        while (node := source.producer()) is not None and node in self.integer:
            bounds = semantics.clip_bounds(node)
            if bounds is None or (source is not value and len(source.uses()) > 1):
                break
            codes = quantizer.quantize(np.asarray(bounds, np.float32))
            narrowed = min(max(int(codes[0]), low), high), max(min(int(codes[1]), high), low)
            if narrowed != (low, high) and not self.integer_clips:
                break
            low, high = narrowed
            behind = node.inputs[0]
            assert behind is not None
            source = behind
        return source, low, high

    def _remove_unread(self, value: ir.Value, source: ir.Value) -> None:
        while value is not source:
            node = _producer(value)
            behind = node.inputs[0]
            assert behind is not None
            if value.uses() or value.is_graph_output():
                return
            self.graph.remove(node, safe=True)
            value = behind

    def drop_unread_constants(self) -> None:
        """Bounds of the clips that codes stand for: onnxruntime would warn of each whenever the model is loaded."""
        for name, value in tuple(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del self.graph.initializers[name]

    def _requantize(self) -> None:
        made: dict[tuple[ir.Value, object], tuple[ir.Value, ...]] = {}
        for key, entry in sorted(self.plan.requants.items()):  # a plan from the disk has them in this order
            if not isinstance(entry, TensorQuantizer):
                continue
            node_name, _, index = key.rpartition(":")
            node = self.nodes.get(node_name)
            if node is None or int(index) >= len(node.inputs) or node.inputs[int(index)] is None:
                raise ModelError("the plan is of another model", where=f"input {key}", expected="an input of a node")
            source = node.inputs[int(index)]
            assert source is not None
            if entry.border is not None or entry.adaptive is not None:
                write = border_quantize_dequantize if entry.adaptive is None else adaptive_quantize_dequantize
                result = write(self.graph, self.build, source, entry, f"{node_name}_input{index}")
                node.replace_input_with(int(index), result)
                continue
            # Nodes that requantize a tensor alike share the result.
            levels = None if entry.table is None else _bytes(entry)
            same = (source, (entry.spec, float(entry.scale), int(entry.zero_point), levels))
            if same not in made and levels is not None:
                made[same] = lookup_dequantize(self.graph, self.build, source, entry, f"{node_name}_input{index}")
            elif same not in made:
                written = self.build.quantize_dequantize(
                    source,
                    entry,
                    f"{node_name}_input{index}",
                    low=entry.spec.qmin,
                    high=entry.spec.qmax,
                    saturate=True,
                    packed=self.packed,
                )
                made[same] = (written,)
            node.replace_input_with(int(index), made[same][entry.copy])
        for source in dict.fromkeys(source for source, _ in made):
            # A lookup reads the codes themselves.
            if not source.uses() and not source.is_graph_output() and source.producer() is not None:
                self.graph.remove(_producer(source), safe=True)

    # -- weights and biases --------------------------------------------------------------------------------------

    def _quantize_weights(self) -> None:
        """Weights to codes, their biases to int32 where the input is decided too; Gemm's alpha and beta become 1."""
        for node in tuple(self.graph):
            index = semantics.weight_index(node)
            weight = None if index is None else node.inputs[index]
            quantizer = self.plan.weights.get(weight.name or "") if weight is not None else None
            if weight is None or not isinstance(quantizer, TensorQuantizer):
                continue
            bias = semantics.bias_of(node)
            if bias is not None:
                self._quantize_bias(node, bias, quantizer)
            if index == 1 and quantizer.spec.bits <= FEW_BITS and quantizer.spec.signed:
                self.narrow_weights[node] = weight.name or "", quantizer
            self.build.dequantize_weight(weight, quantizer, scale=weight_scale(node, quantizer), packed=self.packed)
            if node.op_type == "Gemm":
                node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)

    def _quantize_bias(self, node: ir.Node, bias: ir.Value, weight: TensorQuantizer) -> None:
        assert bias.name is not None
        self.written_biases.add(bias.name)
        values = bias_values(node, bias, self.plan)
        if node.op_type == "Gemm":
            node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        known = self.plan.int_biases.get(bias.name)
        source = None if known is None else self.plan.input_quantizer(known[0])
        if source is not None:
            scale = bias_scale(node, source, weight)
            codes = integer_bias(values, scale)
            if codes is not None:
                self.build.dequantize_bias(bias, codes, scale)
                return
            self.overflowing_biases.add(bias.name)
        bias.const_value = ir.Tensor(values, name=bias.name)


def _bytes(quantizer: TensorQuantizer) -> tuple[object, ...]:
    """What tells a code book from others."""
    assert quantizer.table is not None
    feedback = () if quantizer.feedback is None else quantizer.feedback.arrays().values()
    return (
        quantizer.table.tobytes(),
        quantizer.table_axis,
        quantizer.copies,
        *(array.tobytes() for array in feedback),
    )


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
