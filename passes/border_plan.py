"""Where a plan can have a rounding border, and how it gets there: :func:`with_border`.

A border belongs to what one layer reads. Where the layer reads a tensor that has the layer's own narrow format, the
tensor is stored in 8 bits instead, over the same range, and requantized in front of each reader: codes take one byte
either way, and the layer that makes the tensor keeps its integer kernel. Of ``b`` bits with ``2^b - 1`` a divisor of
255 (1, 2, 4, 8) the codes are among those of 8 bits.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.code_book import CodeBook
from postquant.runtime_ops.quantizer import TensorQuantizer, scale_and_zero_point

_LINEAR = frozenset({"Conv", "Gemm", "MatMul"})
# Of a tensor whose readers round it in ways of their own.
STORED_BITS = 8


@dataclasses.dataclass(frozen=True)
class BorderSite:
    """A place that a border can have.

    Attributes:
        node: The layer.
        key: ``"<node>:0"``, its key among the requantizations.
        tensor: Name of the stored value that it reads.
        readers: Keys of all nodes that read the tensor in its own narrow format, this one included, with the names of
            their weights; empty where the layer has a requantization already.
    """

    node: ir.Node
    key: str
    tensor: str
    readers: tuple[tuple[str, str], ...]


def border_sites(model: ir.Model, plan: QuantPlan, *, bits: int) -> tuple[list[BorderSite], dict[str, str]]:
    """Every place for a border.

    Args:
        model: The simplified model.
        plan: A decided plan.
        bits: Only inputs of at most so many bits.

    Returns:
        The places in topological order; and for narrow inputs that can have none, node name -> reason.
    """
    found, refused = [], {}
    for node in model.graph:
        if semantics.weight_index(node) != 1 or node.name in plan.floats:
            continue
        key = f"{node.name}:0"
        value = node.inputs[0]
        quantizer = plan.input_quantizer(key) or plan.activation_quantizer((value and value.name) or "")
        if value is None or quantizer is None or quantizer.spec.bits > bits:
            continue
        reason = _why_not(node, value, quantizer, plan, own=key in plan.requants)
        if reason is not None:
            refused[node.name or ""] = reason
            continue
        readers: tuple[tuple[str, str], ...] = ()
        if key not in plan.requants:
            readers = tuple((f"{use.node.name}:0", weight_name(use.node)) for use in value.uses())
        found.append(BorderSite(node, key, value.name or "", readers))
    return found, refused


def _why_not(node: ir.Node, value: ir.Value, quantizer: TensorQuantizer, plan: QuantPlan, *, own: bool) -> str | None:
    rank = _rank(node, value)
    if node.op_type not in _LINEAR:
        return f"no border follows from a {node.op_type}"
    if not isinstance(plan.weights.get(weight_name(node)), TensorQuantizer):
        return "its weight is not quantized"
    if rank not in (2, 3, 4) or (node.op_type != "Conv" and rank != 2):
        return "its input has no channel axis 1 and at most two more axes"
    if node.op_type == "Gemm" and semantics.attribute(node, "transA", 0):
        return "its input is transposed"
    if quantizer.spec.signed or quantizer.spec.power_of_two:
        return "its input has signed codes or power-of-two scales"
    if quantizer.adaptive is not None:
        return "its input has an adaptive step"
    if quantizer.table is not None:
        return "its input has a code book"
    if own:
        return None
    stored = plan.shared.get(value.name or "", value.name or "")
    if stored != value.name or stored in plan.shared.values():
        return "its input shares a scale with other tensors"
    if value.is_graph_output() or any(f"{u.node.name}:{u.idx}" in plan.requants for u in value.uses()):
        return "its input has other readers"
    for use in value.uses():
        if use.idx != 0 or semantics.weight_index(use.node) != 1 or use.node.name in plan.floats:
            return "its input has other readers"
    return None


def with_border(plan: QuantPlan, site: BorderSite, quantizer: TensorQuantizer) -> QuantPlan:
    """The plan in which a layer reads its input through a quantizer (with a border, or with another scale).

    Args:
        plan: A decided plan.
        site: The place, of this plan or of one from which it was made by this function.
        quantizer: The layer's new input quantizer.
    """
    stored = plan.activation_quantizer(site.tensor)
    keys = [key for key, _ in site.readers]
    if stored is not None and any(key not in plan.requants for key in keys):
        by_weight = {weight: key for key, weight in site.readers}
        plan = dataclasses.replace(
            plan,
            requants={**dict.fromkeys(keys, stored), **plan.requants},
            int_biases={
                bias: (by_weight.get(weight, source), weight) for bias, (source, weight) in plan.int_biases.items()
            },
        )
    plan = plan.with_requant(site.key, quantizer)
    if not site.readers:
        return plan
    entries = [plan.requants[key] for key in keys]
    return plan.with_activation(site.tensor, wide([e for e in entries if isinstance(e, TensorQuantizer)]))


def wide(readers: list[TensorQuantizer]) -> TensorQuantizer:
    """The 8-bit quantizer over everything that some narrower ones represent.

    Args:
        readers: At least one; an adaptive step reaches as far as its largest factor.

    >>> import numpy as np
    >>> from postquant.runtime_ops.spec import QuantSpec
    >>> narrow = TensorQuantizer(QuantSpec(4, signed=False, symmetric=False), np.float32(1.7), np.int32(3))
    >>> q = wide([narrow])
    >>> round(float(q.scale), 6), int(q.zero_point)
    (0.1, 51)
    """
    spec = dataclasses.replace(readers[0].spec, bits=STORED_BITS, code_book=CodeBook.UNIFORM)
    ranges = [(*reader.range(), 1.0 if reader.adaptive is None else reader.adaptive.beta_max) for reader in readers]
    low = min(float(low) * most for low, _, most in ranges)
    high = max(float(high) * most for _, high, most in ranges)
    return TensorQuantizer(spec, *scale_and_zero_point(spec, low, high))


def _rank(node: ir.Node, value: ir.Value) -> int | None:
    """Rank of a layer's input; a MatMul takes any, and the shapes of a graph need not be known."""
    if node.op_type == "Gemm":
        return 2
    known = node.inputs[1] if node.op_type == "Conv" else value
    return None if known is None or known.shape is None else known.shape.rank()


def weight_name(node: ir.Node) -> str:
    """Name of a layer's weight, its input 1."""
    weight = node.inputs[1]
    assert weight is not None
    return weight.name or ""
