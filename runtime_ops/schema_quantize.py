"""ONNX schemas of Adaptive*, BorderQuantize, LutRequantize and FeedbackRequantize."""

from __future__ import annotations

from onnx import TensorProto
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceContext, InferenceError

from postquant.runtime_ops.law_feedback import CELL_AXIS, LARGEST_CELL
from postquant.runtime_ops.law_levels import FIRST_AXIS
from postquant.runtime_ops.schema import Dim, dims_of, ints_of, make_schema, set_output

_FLOAT = "tensor(float)"
_UINT8 = "tensor(uint8)"
_INT8 = "tensor(int8)"

_NETWORK = [
    ("step", _FLOAT, "Scalar, > 0: the step at beta = 1."),
    ("zero_point", _UINT8, "Scalar: zero point of the codes."),
    ("w1", _FLOAT, "(H, F): first layer; F statistics."),
    ("b1", _FLOAT, "(H,)."),
    ("w2", _FLOAT, "(1, H): second layer."),
    ("b2", _FLOAT, "(1,)."),
]
_LEVELS = [
    ("x", _UINT8, "One dimension or more."),
    ("x_scale", _FLOAT, "Scalar, > 0."),
    ("x_zero_point", _UINT8, "Scalar."),
    ("scale", _FLOAT, "Scalar, > 0: the step of the levels."),
    ("zero_point", _UINT8, "Scalar: the level of 0."),
    ("table", _UINT8, "(C, m): sorted levels of each channel, 2 to 16; C of 1: of all."),
]
_AXIS = ("axis", OpSchema.AttrType.INT, "The channels' axis, counted from the last one: -8 to -1.")
_CELL = ("cell", OpSchema.AttrType.INT, "n, 1 to 8: a point is a square of n by n places; 1 where it is not written.")
_CODE_RANGE = [
    ("qmin", OpSchema.AttrType.INT, "Smallest code, at least 0."),
    ("qmax", OpSchema.AttrType.INT, "Largest code, at most 255."),
]
_STEP_ATTRIBUTES = [
    ("features", OpSchema.AttrType.INT, "Sum of 1 (channel means), 2 (standard deviation), 4 (largest magnitude)."),
    ("beta_min", OpSchema.AttrType.FLOAT, "Smallest factor of the step, > 0."),
    ("beta_max", OpSchema.AttrType.FLOAT, "Largest factor of the step."),
    *_CODE_RANGE,
]
_STEP_OUTPUTS = [
    ("codes", _UINT8, "The shape of x."),
    ("step_out", _FLOAT, "(N,): the step of each sample."),
]


def adaptive_quantize() -> OpSchema:
    """The schema of AdaptiveQuantize."""
    return make_schema(
        "AdaptiveQuantize",
        "Quantizes each sample with a step computed from its pooled statistics.",
        inputs=[("x", _FLOAT, "(N, C, ...)."), *_NETWORK],
        outputs=_STEP_OUTPUTS,
        attributes=_STEP_ATTRIBUTES,
        types={},
        infer=_infer_adaptive,
    )


def adaptive_requantize() -> OpSchema:
    """The schema of AdaptiveRequantize."""
    return make_schema(
        "AdaptiveRequantize",
        "Quantizes codes again, each sample with a step computed from its pooled statistics.",
        inputs=[
            ("x", _UINT8, "(N, C, ...)."),
            ("x_scale", _FLOAT, "Scalar."),
            ("x_zero_point", _UINT8, "Scalar."),
            *_NETWORK,
        ],
        outputs=_STEP_OUTPUTS,
        attributes=_STEP_ATTRIBUTES,
        types={},
        infer=_infer_adaptive,
    )


def border_quantize() -> OpSchema:
    """The schema of BorderQuantize."""
    return make_schema(
        "BorderQuantize",
        "Quantizes with a rounding border that depends on the value and on the residuals around it.",
        inputs=[
            ("x", _FLOAT, "(N, C), (N, C, L) or (N, C, H, W)."),
            ("scale", _FLOAT, "Scalar, > 0."),
            ("zero_point", _UINT8, "Scalar."),
            ("border", _FLOAT, "(C, 1), or (C, qmax - qmin + 1): one per integer part."),
            ("window", _INT8, "(C, kh, kw), odd sizes: coefficients of the residuals around a value."),
            ("window_scale", _FLOAT, "(C,)."),
            ("left", _INT8, "(R, C): coefficients of the residuals of all channels at a point."),
            ("left_scale", _FLOAT, "(R,)."),
            ("right", _INT8, "(C, R)."),
            ("right_scale", _FLOAT, "(C,)."),
        ],
        outputs=[("y", _UINT8, "The shape of x.")],
        attributes=[("channels", OpSchema.AttrType.INT, "C."), *_CODE_RANGE],
        types={},
        infer=_infer_border,
    )


def lut_requantize() -> OpSchema:
    """The schema of LutRequantize."""
    return make_schema(
        "LutRequantize",
        "Quantizes codes again, to the nearest one of the few levels of all channels or of each.",
        inputs=_LEVELS,
        outputs=[("y", _UINT8, "The shape of x.")],
        attributes=[_AXIS],
        types={},
        infer=_infer_levels,
    )


def feedback_requantize() -> OpSchema:
    """The schema of FeedbackRequantize."""
    return make_schema(
        "FeedbackRequantize",
        "Quantizes codes again, to few levels, groups of channels one after the other; each makes up for the errors.",
        inputs=[
            *_LEVELS,
            ("group", _UINT8, "(n n C,): when each channel of a point is rounded, 0 to 7."),
            ("left", _INT8, "(R, n n C): coefficients of the errors of all channels at a point."),
            ("left_scale", _FLOAT, "(R,)."),
            ("right", _INT8, "(n n C, R)."),
            ("right_scale", _FLOAT, "(n n C,)."),
        ],
        outputs=[("y", _UINT8, "The shape of x.")],
        attributes=[_AXIS, _CELL],
        types={},
        infer=_infer_feedback,
        defaults={"cell": 1},
    )


def _infer_adaptive(context: InferenceContext) -> None:
    _check_range(context)
    dims = dims_of(context, 0)
    if dims is not None and len(dims) < 2:
        raise InferenceError("the input of an adaptive step has samples and channels")
    set_output(context, 0, TensorProto.UINT8, dims)
    set_output(context, 1, TensorProto.FLOAT, [None if dims is None else dims[0]])


def _infer_border(context: InferenceContext) -> None:
    _check_range(context)
    dims, channels = dims_of(context, 0), ints_of(context, "channels")[0]
    if dims is not None and (len(dims) not in (2, 3, 4) or (isinstance(dims[1], int) and dims[1] != channels)):
        raise InferenceError(f"BorderQuantize of {channels} channels does not read shape {dims}")
    set_output(context, 0, TensorProto.UINT8, dims)


def _infer_levels(context: InferenceContext) -> None:
    table = _check_table(context)
    channels = None if table is None or table[0] == 1 else table[0]
    _infer_channels(context, channels)


def _infer_feedback(context: InferenceContext) -> None:
    table, group = _check_table(context), dims_of(context, 6)
    if group is not None and len(group) != 1:
        raise InferenceError(f"the groups of channels have one dimension, not the shape {group}")
    cell, axis = ints_of(context, "cell", 1)[0], ints_of(context, "axis")[0]
    if not 1 <= cell <= LARGEST_CELL:
        raise InferenceError(f"cell {cell} is not the side of a square of places: 1 to {LARGEST_CELL}")
    if cell > 1 and axis != CELL_AXIS:
        raise InferenceError(f"cells are those of planes: axis {CELL_AXIS}, not {axis}")
    channels = None if group is None else group[0]
    if isinstance(channels, int):
        if channels % cell**2:
            raise InferenceError(f"{channels} channels are not those of whole cells of {cell}")
        channels //= cell**2
    elif cell > 1:
        channels = None
    rows = None if table is None else table[0]
    if isinstance(channels, int) and isinstance(rows, int) and rows not in (1, channels):
        raise InferenceError(f"levels of {rows} channels are not those of {channels}")
    # Coefficients that are not those of the channels are for the kernel to refuse.
    _infer_channels(context, channels)


def _check_table(context: InferenceContext) -> list[Dim] | None:
    table = dims_of(context, 5)
    if table is not None and len(table) != 2:
        raise InferenceError(f"a table of levels has channels and levels, not the shape {table}")
    return table


def _infer_channels(context: InferenceContext, channels: Dim) -> None:
    """The output has the shape of x, which has so many channels, or any number of them."""
    dims, axis = dims_of(context, 0), ints_of(context, "axis")[0]
    if not FIRST_AXIS <= axis <= -1:
        raise InferenceError(f"axis {axis} is not counted from the last one: {FIRST_AXIS} to -1")
    if dims is not None:
        if not dims:
            raise InferenceError("codes have one dimension or more")
        if isinstance(channels, int):
            found = dims[axis] if -axis <= len(dims) else 0
            if isinstance(found, int) and found != channels:
                raise InferenceError(f"levels of {channels} channels on axis {axis} do not fit shape {dims}")
    set_output(context, 0, TensorProto.UINT8, dims)


def _check_range(context: InferenceContext) -> None:
    low, high = ints_of(context, "qmin")[0], ints_of(context, "qmax")[0]
    if not 0 <= low < high <= 255:
        raise InferenceError(f"codes from {low} to {high} are no range within 0 to 255")
