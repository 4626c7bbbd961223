"""Does a quantized file hold what the plan says? Every scale, zero point, code, bias and bound is compared.

The plan is read against the float model, the file through its own nodes (:mod:`postquant.pipeline.qdq_structure`);
node names connect the two. One weight code, scale or zero point that differs is found here, before anything runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes import biases, semantics
from postquant.passes.adaptive_nodes import ADAPTIVE, adaptive_differences, is_adaptive
from postquant.passes.barriers import is_barrier
from postquant.passes.border_nodes import BORDER, is_border
from postquant.passes.free_memory import release_tensor
from postquant.passes.lookup_nodes import lookup_differs, lookup_nodes, lookup_of
from postquant.passes.plan import QuantPlan
from postquant.passes.weight_codes import weight_codes
from postquant.pipeline.qdq_structure import Reading, array_of, reading
from postquant.runtime_ops.integer import Affine
from postquant.runtime_ops.quantizer import TensorQuantizer


@dataclasses.dataclass(frozen=True)
class Difference:
    """One place where the file is not what the plan says.

    Attributes:
        where: Value, initializer or node input.
        what: What differs, with what was expected and what was found.
    """

    where: str
    what: str


def input_quantizer(plan: QuantPlan, node: ir.Node, index: int) -> TensorQuantizer | None:
    """What the plan says about one activation input of a node; None where it reads float."""
    entry = plan.requants.get(f"{node.name}:{index}")
    if isinstance(entry, TensorQuantizer):
        return entry
    value = node.inputs[index]
    if value is None or node.name in plan.floats:
        return None
    return plan.activation_quantizer(value.name or "")


def weight_numbers(node: ir.Node, quantizer: TensorQuantizer) -> Affine:
    """Numbers of a weight in the file: a Gemm's alpha is part of its scale."""
    return dataclasses.replace(Affine.of(quantizer), scale=biases.weight_scale(node, quantizer))


def bias_numbers(plan: QuantPlan, name: str, node: ir.Node) -> Affine | None:
    """Scale of an int32 bias by the plan, or None where it is not decided.

    Args:
        plan: The plan.
        name: The bias initializer.
        node: Its only reader.
    """
    if name not in plan.int_biases:
        return None
    source, weight = plan.int_biases[name]
    x, w = plan.input_quantizer(source), plan.weights.get(weight)
    if x is None or not isinstance(w, TensorQuantizer):
        return None
    scale = biases.bias_scale(node, x, w)
    return Affine(scale, np.zeros(scale.shape, np.int32), np.dtype(np.int32), 0 if scale.ndim else None)


def differences(float_model: ir.Model, emitted: ir.Model, plan: QuantPlan) -> Iterator[Difference]:
    """Yields every place where the emitted model is not what the plan says.

    Args:
        float_model: The simplified model that the plan is about.
        emitted: The quantized model.
        plan: The plan.

    Raises:
        VerificationError: If a scale, zero point or bound of the file is not a constant.
    """
    written = {node.name: node for node in emitted.graph if node.op_type not in _QDQ}
    for node in float_model.graph:
        other = written.pop(node.name, None)
        if other is None:
            if semantics.clip_bounds(node) is None:
                yield Difference(f"node {node.name}", f"{node.op_type} is missing")
            continue
        if (other.op_type, other.domain) != (node.op_type, node.domain):
            yield Difference(f"node {node.name}", f"expected {node.op_type}, found {other.op_type}")
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and index < len(other.inputs):
                yield from _input(plan, node, index, value, other.inputs[index])
    lookups = lookup_nodes(emitted.graph)
    for name, node in written.items():
        if is_barrier(node) or node in lookups:
            continue
        yield Difference(f"node {name}", f"{node.op_type} is in neither the model nor the plan")


_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear", "Clip", BORDER, ADAPTIVE})


def _input(
    plan: QuantPlan, node: ir.Node, index: int, value: ir.Value, written: ir.Value | None
) -> Iterator[Difference]:
    name = value.name or ""
    found = reading(written)
    where = f"input {index} of {node.name} ({name})"
    entry = plan.weights.get(name)
    if isinstance(entry, TensorQuantizer):
        yield from _weight(where, node, value, entry, found)
        return
    if name in plan.int_biases and value.is_initializer():
        yield from _bias(plan, where, node, value, written, found)
        return
    if semantics.is_constant(value):
        if found is not None:
            yield Difference(where, "a constant of the float model is quantized, the plan does not say so")
        return
    quantizer = input_quantizer(plan, node, index)
    if quantizer is not None and found is None:
        yield Difference(where, "expected quantized by the plan, found float")
    elif quantizer is not None and found is not None:
        yield from _activation(where, quantizer, found)
    elif found is not None and plan.activation_quantizer(name) is None:
        yield Difference(where, "expected float by the plan, found quantized")
    elif found is not None:  # a float node may read the stored value
        stored = plan.activation_quantizer(name)
        assert stored is not None
        yield from _activation(where, stored, found)


def _same_numbers(where: str, expected: Affine, found: Affine) -> Iterator[Difference]:
    for what, left, right in (
        ("scale", expected.scale, found.scale),
        ("zero point", expected.zero_point, found.zero_point),
    ):
        a, b = np.broadcast_arrays(left, right) if left.size == right.size or right.size == 1 else (left, right)
        if a.shape != b.shape:
            yield Difference(where, f"{what}: expected shape {left.shape}, found {right.shape}")
        elif not np.array_equal(a, b):
            at = int(np.argmax(a.reshape(-1) != b.reshape(-1)))
            wrong, right_one = b.reshape(-1)[at], a.reshape(-1)[at]
            yield Difference(where, f"{what} of channel {at}: expected {right_one}, found {wrong}")


def _activation(where: str, quantizer: TensorQuantizer, found: Reading) -> Iterator[Difference]:
    expected = Affine.of(quantizer)
    yield from _same_numbers(where, expected, found.numbers)
    if found.quantized_numbers is None:
        yield Difference(where, "no QuantizeLinear makes its codes")
        return
    yield from _same_numbers(f"{where}, QuantizeLinear", found.numbers, found.quantized_numbers)
    yield from _border(where, quantizer, found.quantize)
    yield from _adaptive(where, quantizer, found.quantize)
    yield from _code_book(where, quantizer, found)
    if found.saturation is not None:
        low, high = found.saturation
        if low < quantizer.spec.qmin or high > quantizer.spec.qmax or low > high:
            allowed = f"[{quantizer.spec.qmin}, {quantizer.spec.qmax}]"
            yield Difference(where, f"codes are clipped to [{low}, {high}], the format allows {allowed}")


def _border(where: str, quantizer: TensorQuantizer, node: ir.Node | None) -> Iterator[Difference]:
    """The rounding border of a quantizer, and of the node that makes its codes."""
    if quantizer.adaptive is not None or is_adaptive(node):
        return
    if (quantizer.border is not None) != is_border(node):
        expected = "rounding to nearest" if quantizer.border is None else "a rounding border"
        yield Difference(where, f"expected {expected} by the plan, found {None if node is None else node.op_type}")
        return
    if quantizer.border is None or node is None:
        return
    spec = quantizer.spec
    for name, number in (("channels", quantizer.border.channels), ("qmin", spec.qmin), ("qmax", spec.qmax)):
        attribute = node.attributes.get(name)
        if attribute is None or attribute.as_int() != number:
            yield Difference(where, f"attribute {name} of the border: expected {number}")
    for index, (name, array) in enumerate(quantizer.border.arrays().items(), start=3):
        if not np.array_equal(array_of(node.inputs[index], node), array):
            yield Difference(where, f"the border's {name} differs from the plan's")


def _code_book(where: str, quantizer: TensorQuantizer, found: Reading) -> Iterator[Difference]:
    """The levels of a quantizer, and of the table that its codes come from."""
    if (quantizer.table is not None) != (found.looked_up is not None):
        names = ("uniform codes", "levels of a table")
        expected, seen = names[quantizer.table is not None], names[found.looked_up is not None]
        yield Difference(where, f"expected {expected} by the plan, found {seen}")
        return
    lookup = lookup_of(found.quantize)
    if quantizer.table is None or found.looked_up is None or lookup is None:
        return
    if lookup_differs(lookup, found.codes, quantizer, found.looked_up.numbers):
        yield Difference(where, "the table of its levels differs from the plan's")


def _adaptive(where: str, quantizer: TensorQuantizer, node: ir.Node | None) -> Iterator[Difference]:
    """The adaptive step of a quantizer, and of the node that makes its codes."""
    if (quantizer.adaptive is not None) != is_adaptive(node):
        expected = "a fixed step" if quantizer.adaptive is None else "an adaptive step"
        yield Difference(where, f"expected {expected} by the plan, found {None if node is None else node.op_type}")
        return
    if quantizer.adaptive is None or node is None:
        return
    arrays = [np.asarray(array_of(value, node)) for value in node.inputs[3:]]
    for part in adaptive_differences(node, quantizer, arrays):
        yield Difference(where, f"{part} of the adaptive step differs from the plan's")


def _weight(
    where: str, node: ir.Node, value: ir.Value, quantizer: TensorQuantizer, found: Reading | None
) -> Iterator[Difference]:
    if found is None or found.constant is None:
        yield Difference(where, "expected integer codes by the plan, found a float weight")
        return
    expected = weight_numbers(node, quantizer)
    yield from _same_numbers(where, expected, found.numbers)
    if expected.scale.ndim and expected.scale.size > 1 and found.numbers.axis != expected.axis:
        yield Difference(where, f"channel axis: expected {expected.axis}, found {found.numbers.axis}")
    assert value.const_value is not None
    yield from _same_codes(where, weight_codes(value.const_value, quantizer), found.constant)
    release_tensor(value.const_value)
    release_tensor(found.constant)


def _bias(
    plan: QuantPlan, where: str, node: ir.Node, value: ir.Value, written: ir.Value | None, found: Reading | None
) -> Iterator[Difference]:
    numbers = bias_numbers(plan, value.name or "", node)
    real = biases.bias_values(node, value, plan)
    if found is None:
        # Left in float where a code would leave int32, or where calibration has not decided it.
        tensor = None if written is None else written.const_value
        if tensor is None or not np.array_equal(tensor.numpy(), real):
            yield Difference(where, "the float bias differs from the plan's")
        elif numbers is not None and _fits_int32(real, numbers):
            yield Difference(where, "expected an int32 bias by the plan, found a float one")
        return
    if numbers is None or found.constant is None:
        yield Difference(where, "expected a float bias by the plan, found a quantized one")
        return
    yield from _same_numbers(where, numbers, found.numbers)
    yield from _same_codes(where, integer_codes(real, numbers), found.constant)


def integer_codes(real: npt.NDArray[np.float32], numbers: Affine) -> npt.NDArray[np.int64]:
    """Codes of a bias: ``round(b / s)``, half to even, in double precision."""
    return np.rint(real.astype(np.float64) / numbers.scale).astype(np.int64)


def _fits_int32(real: npt.NDArray[np.float32], numbers: Affine) -> bool:
    if not (numbers.scale > 0).all():
        return False
    return bool((np.abs(real.astype(np.float64) / numbers.scale) < np.iinfo(np.int32).max).all())


def _same_codes(where: str, expected: npt.NDArray[np.integer], found: ir.TensorProtocol) -> Iterator[Difference]:
    codes = np.asarray(found.numpy()).astype(np.int64)
    if codes.shape != expected.shape:
        yield Difference(where, f"codes: expected shape {expected.shape}, found {codes.shape}")
        return
    wrong = np.argwhere(codes != expected)
    if wrong.size:
        at = tuple(int(i) for i in wrong[0])
        yield Difference(
            where, f"{len(wrong)} codes differ; the first, {list(at)}: expected {expected[at]}, found {codes[at]}"
        )
