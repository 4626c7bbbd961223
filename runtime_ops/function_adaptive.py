"""Function bodies of AdaptiveQuantize and AdaptiveRequantize: standard ONNX operators, from opset 13 on.

Which statistics are pooled is an attribute, so the conditions of the If nodes are constants, and onnxruntime keeps the
chosen branches only. Statistics are computed in float64 (``wide``), where the order of a sum does not matter to the
result in float32. QuantizeLinear along axis 0 takes one step per sample.
"""

from __future__ import annotations

import onnx
import onnx.parser

# From this version on ReduceMax takes its axes from an input.
_AXES_INPUT_OPSET = 18

# Reads: wide (N, C, P) float64, unit () float64. Writes: step_out (N,) float.
_STEP = """
    zero = Constant <value_int = 0> ()
    two = Constant <value_int = 2> ()
    four = Constant <value_int = 4> ()
    axis_zero = Constant <value_ints = [0]> ()
    axis_one = Constant <value_ints = [1]> ()
    axis_two = Constant <value_ints = [2]> ()
    end = Constant <value_ints = [3]> ()
    nothing = Constant <value = double {0.0}> ()
    wide_dims = Shape (wide)
    batch = Slice (wide_dims, axis_zero, axis_one)
    channel_count = Slice (wide_dims, axis_one, axis_two)
    point_count = Slice (wide_dims, axis_two, end)
    element_count = Mul (channel_count, point_count)
    points = Cast <to = 11> (point_count)
    elements = Cast <to = 11> (element_count)
    empty_dims = Concat <axis = 0> (batch, axis_zero)
    empty = ConstantOfShape <value = double[1] {0.0}> (empty_dims)
    wanted = Constant <value_int: int = @features> ()
    wants_means = Mod (wanted, two)
    halved = Div (wanted, two)
    wants_deviation = Mod (halved, two)
    wants_maximum = Div (wanted, four)
    with_means = Greater (wants_means, zero)
    with_deviation = Greater (wants_deviation, zero)
    with_maximum = Greater (wants_maximum, zero)
    means = If (with_means) <
        then_branch = pool_means () => (double[?, ?] some_means) {
            channel_sums = ReduceSum <keepdims = 0> (wide, axis_two)
            raw_means = Div (channel_sums, points)
            some_means = Mul (raw_means, unit)
        },
        else_branch = no_means () => (double[?, ?] any_means) { any_means = Identity (empty) }
    >
    deviation = If (with_deviation) <
        then_branch = pool_deviation () => (double[?, ?] some_deviation) {
            square = Mul (wide, wide)
            sums = ReduceSum <keepdims = 0> (wide, axis_two)
            square_sums = ReduceSum <keepdims = 0> (square, axis_two)
            total = ReduceSum <keepdims = 1> (sums, axis_one)
            square_total = ReduceSum <keepdims = 1> (square_sums, axis_one)
            mean = Div (total, elements)
            mean_square = Div (square_total, elements)
            square_mean = Mul (mean, mean)
            signed_variance = Sub (mean_square, square_mean)
            variance = Max (signed_variance, nothing)
            raw_deviation = Sqrt (variance)
            some_deviation = Mul (raw_deviation, unit)
        },
        else_branch = no_deviation () => (double[?, ?] any_deviation) { any_deviation = Identity (empty) }
    >
    maximum = If (with_maximum) <
        then_branch = pool_maximum () => (double[?, ?] some_maximum) {
            sizes = Abs (wide)
            REDUCE_MAX
            some_maximum = Mul (raw_maximum, unit)
        },
        else_branch = no_maximum () => (double[?, ?] any_maximum) { any_maximum = Identity (empty) }
    >
    pooled = Concat <axis = 1> (means, deviation, maximum)
    w1_wide = Cast <to = 11> (w1)
    b1_wide = Cast <to = 11> (b1)
    w2_wide = Cast <to = 11> (w2)
    b2_wide = Cast <to = 11> (b2)
    hidden = Gemm <transB = 1> (pooled, w1_wide, b1_wide)
    active = Max (hidden, nothing)
    raw_beta = Gemm <transB = 1> (active, w2_wide, b2_wide)
    lowest = Constant <value_float: float = @beta_min> ()
    highest = Constant <value_float: float = @beta_max> ()
    lowest_wide = Cast <to = 11> (lowest)
    highest_wide = Cast <to = 11> (highest)
    floored = Max (raw_beta, lowest_wide)
    clamped = Min (floored, highest_wide)
    beta_column = Cast <to = 1> (clamped)
    beta = Reshape (beta_column, batch)
    step_out = Mul (step, beta)
"""

# Reads: real (x as float), step_out. Writes: codes.
_QUANTIZE = """
    zero_points = Expand (zero_point, batch)
    unlimited = QuantizeLinear <axis = 0> (real, step_out, zero_points)
    low = Constant <value_int: int = @qmin> ()
    high = Constant <value_int: int = @qmax> ()
    low_code = Cast <to = 2> (low)
    high_code = Cast <to = 2> (high)
    codes = Clip (unlimited, low_code, high_code)
"""


def adaptive_quantize(opset: int) -> onnx.FunctionProto:
    """The body of AdaptiveQuantize in operators of ``opset``."""
    return onnx.parser.parse_function(f"""
<domain: "ai.postquant", opset_import: ["" : {opset}]>
AdaptiveQuantize <features, beta_min, beta_max, qmin, qmax>
    (x, step, zero_point, w1, b1, w2, b2) => (codes, step_out) {{
    channels_first = Constant <value_ints = [0, 0, -1]> ()
    flat = Reshape (x, channels_first)
    wide = Cast <to = 11> (flat)
    unit = Constant <value = double {{1.0}}> ()
{_step(opset)}
    real = Identity (x)
{_QUANTIZE}
}}""")


def adaptive_requantize(opset: int) -> onnx.FunctionProto:
    """The body of AdaptiveRequantize in operators of ``opset``."""
    return onnx.parser.parse_function(f"""
<domain: "ai.postquant", opset_import: ["" : {opset}]>
AdaptiveRequantize <features, beta_min, beta_max, qmin, qmax>
    (x, x_scale, x_zero_point, step, zero_point, w1, b1, w2, b2) => (codes, step_out) {{
    channels_first = Constant <value_ints = [0, 0, -1]> ()
    flat = Reshape (x, channels_first)
    unsigned_wide = Cast <to = 11> (flat)
    middle = Cast <to = 11> (x_zero_point)
    wide = Sub (unsigned_wide, middle)
    unit = Cast <to = 11> (x_scale)
{_step(opset)}
    real = DequantizeLinear (x, x_scale, x_zero_point)
{_QUANTIZE}
}}""")


def _step(opset: int) -> str:
    if opset >= _AXES_INPUT_OPSET:
        reduce_max = (
            "point_maximum = ReduceMax <keepdims = 0> (sizes, axis_two)\n"
            "            raw_maximum = ReduceMax <keepdims = 1> (point_maximum, axis_one)"
        )
    else:
        reduce_max = (
            "point_maximum = ReduceMax <axes = [2], keepdims = 0> (sizes)\n"
            "            raw_maximum = ReduceMax <axes = [1], keepdims = 1> (point_maximum)"
        )
    return _STEP.replace("REDUCE_MAX", reduce_max)
