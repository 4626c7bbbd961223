"""ONNX schemas of LutQLinearConv, LutQLinearMatMul and LutMatMulIntegerToFloat."""

from __future__ import annotations

import onnx
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceContext, InferenceError

from postquant.runtime_ops.schema import Dim, dims_of, element_of, ints_of, make_schema, set_output

_SCALAR = "Scalar."
_CODES = "Packed codes, (M, ceil(K * bits / 8)); element 0 of a row in the lowest bits of its first byte."


def lut_qlinear_conv() -> OpSchema:
    """The schema of LutQLinearConv."""
    return make_schema(
        "LutQLinearConv",
        "QLinearConv (1-D or 2-D) whose weight is packed codes, an int8 table and a scale per output channel.",
        inputs=[("x", "T", "(N, C, spatial...)."), *_lut_inputs("x")],
        outputs=[("y", "T", "(N, M, spatial...).")],
        attributes=[
            *_lut_attributes("(M, C / group, kernel...)"),
            ("group", OpSchema.AttrType.INT, "Number of groups."),
            ("strides", OpSchema.AttrType.INTS, "One per spatial axis."),
            ("dilations", OpSchema.AttrType.INTS, "One per spatial axis."),
            ("pads", OpSchema.AttrType.INTS, "Begin of each spatial axis, then end of each."),
        ],
        types={"T": ["tensor(uint8)", "tensor(int8)"]},
        infer=_infer_conv,
    )


def lut_qlinear_matmul() -> OpSchema:
    """The schema of LutQLinearMatMul."""
    return make_schema(
        "LutQLinearMatMul",
        "QLinearMatMul with bias whose weight is packed codes, an int8 table and a scale per output channel.",
        inputs=[("a", "T", "(..., K)."), *_lut_inputs("a")],
        outputs=[("y", "T", "(..., N).")],
        attributes=_lut_attributes("(N, K)"),
        types={"T": ["tensor(uint8)", "tensor(int8)"]},
        infer=_infer_matmul,
    )


def lut_matmul_integer_to_float() -> OpSchema:
    """The schema of LutMatMulIntegerToFloat."""
    return make_schema(
        "LutMatMulIntegerToFloat",
        "A matrix product of codes with a float bias and output; its weight is packed codes, an int8 table and scales.",
        inputs=[
            ("a", "T", "(..., K)."),
            *_weight_inputs("a"),
            ("bias", "tensor(float)", "One per output channel."),
        ],
        outputs=[("y", "tensor(float)", "(..., N).")],
        attributes=_lut_attributes("(N, K)"),
        types={"T": ["tensor(uint8)", "tensor(int8)"]},
        infer=_infer_matmul_to_float,
    )


def _weight_inputs(x: str) -> list[tuple[str, str, str]]:
    return [
        (f"{x}_scale", "tensor(float)", _SCALAR),
        (f"{x}_zero_point", "T", _SCALAR),
        ("codes", "tensor(uint8)", _CODES),
        ("table", "tensor(int8)", "(2**bits,): what each code stands for."),
        ("w_scale", "tensor(float)", "One per output channel."),
    ]


def _lut_inputs(x: str) -> list[tuple[str, str, str]]:
    return [
        *_weight_inputs(x),
        ("bias", "tensor(int32)", f"One per output channel, at scale {x}_scale * w_scale."),
        ("y_scale", "tensor(float)", _SCALAR),
        ("y_zero_point", "T", _SCALAR),
    ]


def _lut_attributes(shape: str) -> list[tuple[str, OpSchema.AttrType, str]]:
    return [
        ("bits", OpSchema.AttrType.INT, "Bits of a code: 2 or 4."),
        ("w_shape", OpSchema.AttrType.INTS, f"Shape of the decoded weight: {shape}."),
    ]


def _infer_conv(context: InferenceContext) -> None:
    element = element_of(context, 8)
    dims, w = dims_of(context, 0), ints_of(context, "w_shape")
    if dims is None:
        set_output(context, 0, element, None)
        return
    rank = len(w) - 2
    strides, dilations, pads = (ints_of(context, name) for name in ("strides", "dilations", "pads"))
    group = ints_of(context, "group")[0]
    if rank not in (1, 2) or len(dims) != len(w):
        raise InferenceError(f"LutQLinearConv of {len(dims)} dimensions with a weight of {len(w)}")
    if (len(strides), len(dilations), len(pads)) != (rank, rank, 2 * rank) or min(strides) < 1 or group < 1:
        raise InferenceError("strides, dilations, pads or group do not fit the weight")
    if isinstance(dims[1], int) and dims[1] != group * w[1]:
        raise InferenceError(f"{dims[1]} channels do not fit {group} groups of {w[1]}")
    result: list[Dim] = [dims[0], w[0]]
    for i in range(rank):
        size = dims[2 + i]
        if isinstance(size, int):
            free = size + pads[i] + pads[rank + i] - dilations[i] * (w[2 + i] - 1) - 1
            if free < 0:
                raise InferenceError("the kernel is larger than its padded input")
            result.append(free // strides[i] + 1)
        else:
            result.append(None)
    set_output(context, 0, element, result)


def _infer_matmul(context: InferenceContext) -> None:
    _set_product(context, element_of(context, 8))


def _infer_matmul_to_float(context: InferenceContext) -> None:
    _set_product(context, onnx.TensorProto.FLOAT)


def _set_product(context: InferenceContext, element: int) -> None:
    dims, w = dims_of(context, 0), ints_of(context, "w_shape")
    if len(w) != 2:
        raise InferenceError(f"w_shape of a matrix product has 2 dimensions, not {len(w)}")
    if dims is not None and (not dims or (isinstance(dims[-1], int) and dims[-1] != w[1])):
        raise InferenceError(f"an input of shape {dims} does not fit a weight of shape {w}")
    set_output(context, 0, element, None if dims is None else [*dims[:-1], w[0]])
