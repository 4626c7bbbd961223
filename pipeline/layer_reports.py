"""Per-layer rows of the report: :func:`layer_reports`, and what stayed float: :func:`float_reports`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.lut_expansion import is_two_planes, packed_layers
from postquant.passes.lut_nodes import FEW_BITS
from postquant.passes.plan import QuantPlan
from postquant.passes.subgraph import op_types
from postquant.pipeline.config import QuantConfig
from postquant.pipeline.quality import TensorQuality
from postquant.pipeline.report import FloatReport, LayerReport
from postquant.runtime_ops.code_book import CodeBook
from postquant.runtime_ops.quantizer import TensorQuantizer


def layer_reports(
    model: ir.Model,
    plan: QuantPlan,
    quality: Sequence[TensorQuality],
    gains: Mapping[str, Mapping[str, float]],
    books: Mapping[str, Mapping[str, float]],
    sensitivity: Mapping[str, Mapping[str, float]],
    history: Mapping[str, Mapping[str, float]],
) -> tuple[LayerReport, ...]:
    """One row per quantized Conv, ConvTranspose, Gemm and MatMul, in graph order.

    Args:
        model: The simplified model.
        plan: The final plan.
        quality: Measured quality of stored tensors.
        gains: Node -> stage -> gain in dB.
        books: Node -> code book of the weight -> SQNR that it would give.
        sensitivity: Node -> width -> SQNR of the outputs with this layer alone quantized.
        history: Stage -> stored tensor -> SQNR after it.
    """
    measured = {item.name: item for item in quality}
    rows = []
    for node in model.graph:
        if node.op_type not in semantics.WEIGHTED or node.name is None or node.name in plan.floats:
            continue
        index = semantics.weight_index(node)
        source = node.inputs[0 if index != 0 else 1]
        constant = None if index is None else node.inputs[index]
        requant = plan.requants.get(f"{node.name}:{0 if index != 0 else 1}")
        entry = requant if requant is not None or source is None else plan.activation_entry(source.name or "")
        activation = entry if isinstance(entry, TensorQuantizer) else None
        chosen = None if constant is None else plan.weights.get(constant.name or "")
        weight = chosen if isinstance(chosen, TensorQuantizer) else None
        item = _stored_output(node, measured)
        tensor = None if constant is None or weight is None else constant.const_value
        rows.append(
            LayerReport(
                node=node.name,
                op_type=node.op_type,
                wbits=None if weight is None else weight.spec.bits,
                abits=None if activation is None else activation.spec.bits,
                weight_shape=None if tensor is None else tuple(tensor.shape.numpy()),
                weight_scales=None if weight is None else (float(weight.scale.min()), float(weight.scale.max())),
                input_scale=None if activation is None else float(activation.scale),
                input_zero_point=None if activation is None else int(activation.zero_point),
                sqnr_db=None if item is None else item.sqnr_db,
                cosine=None if item is None else item.cosine,
                gains=dict(gains.get(node.name, {})),
                weights=None if weight is None else weight.spec.code_book.value,
                code_books=dict(books.get(node.name, {})),
                sensitivity=dict(sensitivity.get(node.name, {})),
                history={} if item is None else {s: db[item.name] for s, db in history.items() if item.name in db},
            )
        )
    return tuple(rows)


def _stored_output(node: ir.Node, measured: Mapping[str, TensorQuality]) -> TensorQuality | None:
    """The measured tensor that holds the node's output, behind the Relu and Clip that its quantizer stands for."""
    value = node.outputs[0]
    while (value.name or "") not in measured:
        uses = tuple(value.uses())
        if len(uses) != 1 or semantics.clip_bounds(uses[0].node) is None:
            return None
        value = uses[0].node.outputs[0]
    return measured[value.name or ""]


def packing_note(model: ir.Model, plan: QuantPlan, emitted: ir.Model) -> str | None:
    """A line about weights of few bits that keep one byte per code although others are packed; None without any.

    Args:
        model: The simplified model.
        plan: The final plan.
        emitted: The quantized model.
    """
    packed = packed_layers(emitted)
    names = []
    for node in model.graph:
        index = semantics.weight_index(node)
        constant = None if index is None else node.inputs[index]
        entry = None if constant is None else plan.weights.get(constant.name or "")
        if isinstance(entry, TensorQuantizer) and entry.spec.bits <= FEW_BITS and node.name not in packed:
            names.append(node.name or "")
    if not packed or not names:
        return None
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"weights of {len(names)} layers are stored as int8 although they have at most {FEW_BITS} bits: no packed "
        f"operator computes them ({shown})"
    )


def exact_post_note(model: ir.Model, plan: QuantPlan, emitted: ir.Model, config: QuantConfig) -> str | None:
    """A line about what ``post_exact`` did; None where it was not asked for.

    Args:
        model: The simplified model.
        plan: The final plan.
        emitted: The quantized model.
        config: The settings.
    """
    if not config.post_exact:
        return None
    exact = {node.name for node in emitted.graph if is_two_planes(node)}
    names = []
    for node in model.graph:
        index = semantics.weight_index(node)
        constant = None if index is None else node.inputs[index]
        entry = None if constant is None else plan.weights.get(constant.name or "")
        if isinstance(entry, TensorQuantizer) and entry.spec.code_book is CodeBook.POST and node.name not in exact:
            names.append(node.name or "")
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    rest = f"; {len(names)} other layers with POST weights, convolutions first of all, keep the lattice ({shown})"
    return f"post_exact: {len(exact)} matrix products have exact powers of sqrt(2)" + (rest if names else "")


def float_reports(model: ir.Model, plan: QuantPlan) -> tuple[FloatReport, ...]:
    """Every node that stayed in float, with its reason."""
    kinds = op_types(model.graph)
    return tuple(FloatReport(node=n, op_type=kinds.get(n, ""), reason=r) for n, r in plan.floats.items())
