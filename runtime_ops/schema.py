"""What the ONNX schemas of the operators have in common.

They are for whoever wants onnx itself to know the operators (``onnx.defs.register_schema``); nothing registers them by
itself, because every emitted model carries function bodies, from which onnx infers types and shapes too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceContext, InferenceError

DOMAIN = "ai.postquant"
VERSION = 1

Dim = int | str | None


def make_schema(
    name: str,
    doc: str,
    *,
    inputs: Sequence[tuple[str, str, str]],
    outputs: Sequence[tuple[str, str, str]],
    attributes: Sequence[tuple[str, OpSchema.AttrType, str]],
    types: dict[str, list[str]],
    infer: Callable[[InferenceContext], None],
    defaults: Mapping[str, int] | None = None,
) -> OpSchema:
    """A schema of version 1 whose inputs are all present and whose attributes are all written.

    Args:
        name: The operator.
        doc: What it computes, in one sentence.
        inputs: Name, type and description of each.
        outputs: Name, type and description of each.
        attributes: Name, type and description of each.
        types: Type variables and what they stand for.
        infer: Type and shape inference.
        defaults: What an attribute is in a node of an older file, which does not have it. Functions know no defaults.
    """
    schema = OpSchema(
        name,
        DOMAIN,
        VERSION,
        doc,
        inputs=[OpSchema.FormalParameter(n, t, description=d) for n, t, d in inputs],
        outputs=[OpSchema.FormalParameter(n, t, description=d) for n, t, d in outputs],
        type_constraints=[(n, allowed, "") for n, allowed in types.items()],
        attributes=[_attribute(n, kind, d, (defaults or {}).get(n)) for n, kind, d in attributes],
    )
    schema.set_type_and_shape_inference_function(infer)
    return schema


def _attribute(name: str, kind: OpSchema.AttrType, description: str, default: int | None) -> OpSchema.Attribute:
    if default is None:
        return OpSchema.Attribute(name, kind, description, required=True)
    return OpSchema.Attribute(name, onnx.helper.make_attribute(name, default), description)


# -- inference -----------------------------------------------------------------------------------------------------


def ints_of(context: InferenceContext, name: str, default: int | None = None) -> list[int]:
    """An integer attribute (one number, the default if it is missing) or an attribute of integers.

    Raises:
        InferenceError: If it is missing, and has no default.
    """
    attribute = context.get_attribute(name)
    if attribute is None and default is not None:
        return [default]
    if attribute is None:
        raise InferenceError(f"attribute {name} is missing")
    if attribute.type == onnx.AttributeProto.INT:
        return [int(attribute.i)]
    return [int(v) for v in attribute.ints]


def dims_of(context: InferenceContext, index: int) -> list[Dim] | None:
    """The dimensions of an input (None for one that is not known), or None where its rank is not known."""
    kind = context.get_input_type(index)
    if not kind.tensor_type.HasField("shape"):
        return None
    return [
        d.dim_value if d.HasField("dim_value") else (d.dim_param if d.HasField("dim_param") else None)
        for d in kind.tensor_type.shape.dim
    ]


def set_output(context: InferenceContext, index: int, element: int, dims: Sequence[Dim] | None) -> None:
    """Sets type and, where the rank is known, shape of an output."""
    kind = onnx.TypeProto()
    kind.tensor_type.elem_type = element
    if dims is not None:
        kind.tensor_type.shape.Clear()
        for dim in dims:
            new = kind.tensor_type.shape.dim.add()
            if isinstance(dim, int):
                new.dim_value = dim
            elif dim:
                new.dim_param = dim
    context.set_output_type(index, kind)


def element_of(context: InferenceContext, index: int) -> int:
    """Element type of an input."""
    kind = context.get_input_type(index)
    return int(kind.tensor_type.elem_type)
