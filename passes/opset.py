"""Raising the operator set of a model to what the quantized form needs.

QuantizeLinear per channel exists from opset 13, 4-bit and 16-bit types from 21. A conversion is one of

1. a new number, where no operator of the model changed between the two versions (nothing can go wrong);
2. onnx's version converter, which gets the model without its weights, so that size does not matter. It drops
   model-local functions; they are put back, with the operator sets that their bodies import.

Whether outputs stayed equal is for the caller to check on data: some converters are only nearly right.
"""

from __future__ import annotations

import dataclasses

import onnx
import onnx.helper
import onnx.version_converter
import onnx_ir as ir

from postquant.passes.session import first_sentence, make_session
from postquant.passes.skeleton import declare_weights, from_skeleton, to_skeleton
from postquant.passes.subgraph import subgraphs
from postquant.runtime_ops.errors import ModelError

# Below this no QuantizeLinear takes a scale per channel.
LEAST_OPSET = 13
# From this version on the operators that exporters write are settled and all targets read them.
WANTED_OPSET = 17

_ONNX_DOMAINS = ("", "ai.onnx")


@dataclasses.dataclass(frozen=True)
class Raised:
    """A model at (or above) the wanted operator set, or the reason why it is not there.

    Attributes:
        model: The model; the one passed in when nothing was converted.
        converted: Whether operators were rewritten, so that outputs are worth comparing.
        note: What the report should say, or None.
    """

    model: ir.Model
    converted: bool
    note: str | None = None


def opset_of(model: ir.Model) -> int:
    """The version of the ONNX operator set that a model imports; 1 if it imports none."""
    versions = [model.graph.opset_imports[d] for d in _ONNX_DOMAINS if d in model.graph.opset_imports]
    return max(versions, default=1)


def raise_opset(model: ir.Model, wanted: int = WANTED_OPSET, *, custom_ops: tuple[str, ...] = ()) -> Raised:
    """Raises the operator set of a model.

    Args:
        model: The model; it may be changed.
        wanted: The least version that the result should have.
        custom_ops: Libraries of custom operators, to ask onnxruntime whether the result loads.

    Returns:
        The model at ``wanted`` or above; or, with a note, at an older version that is at least
        :data:`LEAST_OPSET`, where no conversion exists.

    Raises:
        ModelError: If it cannot be converted and its version is below :data:`LEAST_OPSET`.
    """
    present = opset_of(model)
    if present >= wanted:
        return Raised(model, converted=False)
    note = f"the operator set was raised from {present} to {wanted}"
    if all(_unchanged(node, present, wanted) for node in _all_nodes(model.graph)):
        _set_opset(model, wanted)
        return Raised(model, converted=False, note=note)
    try:
        converted = _convert(model, wanted)
        make_session(converted, optimize=False, prepack=False, custom_ops=custom_ops)
    except (ModelError, RuntimeError, ValueError, onnx.checker.ValidationError, ir.serde.SerdeError) as error:
        # RuntimeError is what the C++ converter's failed assertions and missing adapters arrive as.
        reason = error.found or error.what if isinstance(error, ModelError) else _reason(error)
        if present < LEAST_OPSET:
            raise ModelError(
                f"the operator set {present} of the model cannot be raised to {wanted}",
                found=reason,
                hint=f"export the model again with opset {wanted} or above",
            ) from error
        return Raised(model, False, f"the operator set stays at {present}: no conversion to {wanted} ({reason})")
    return Raised(converted, converted=True, note=note)


def _unchanged(node: ir.Node, present: int, wanted: int) -> bool:
    """Whether an operator is the same one in both operator sets."""
    if node.domain not in _ONNX_DOMAINS:
        return True
    try:
        old = onnx.defs.get_schema(node.op_type, present)
        new = onnx.defs.get_schema(node.op_type, wanted)
    except onnx.defs.SchemaError:
        return False
    return bool(old.since_version == new.since_version and not new.deprecated)


def _all_nodes(graph: ir.Graph) -> list[ir.Node]:
    nodes = list(graph)
    for node in nodes:  # grows while bodies of If and Loop are found
        for body in subgraphs(node):
            nodes.extend(body)
    return nodes


def _set_opset(model: ir.Model, version: int) -> None:
    for domain in _ONNX_DOMAINS:
        if domain in model.graph.opset_imports:
            model.graph.opset_imports[domain] = version
    model.ir_version = max(model.ir_version, _least_ir(version))


def _least_ir(version: int) -> int:
    """The IR version that the standard wants for an operator set."""
    return int(onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)], ignore_unknown=True))


def _convert(model: ir.Model, wanted: int) -> ir.Model:
    proto, weights = to_skeleton(model)
    declare_weights(proto, weights)
    functions = {(f.domain, f.name) for f in model.functions.values()}
    # The converter wants a schema for every node of the ONNX domain and passes other domains through.
    result = onnx.version_converter.convert_version(proto, wanted)
    result.ir_version = max(model.ir_version, result.ir_version, _least_ir(wanted))
    if functions:
        del result.functions[:]
        result.functions.extend(proto.functions)
    present = {entry.domain for entry in result.opset_import}
    for domain, version in model.graph.opset_imports.items():
        if domain not in present and domain not in _ONNX_DOMAINS:
            result.opset_import.add(domain=domain, version=version)
    return from_skeleton(result, weights)


def _reason(error: Exception) -> str:
    text = first_sentence(error)
    # "/tmp/build/.../BaseConverter.h:103: adapter_lookup: Assertion `false` failed: No Adapter From Version $16 ..."
    return text.rsplit("failed: ", 1)[-1] if "ssertion" in text else text
