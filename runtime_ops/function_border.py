"""Function body of BorderQuantize: standard ONNX operators, from opset 13 on.

Residuals and coefficients are integers in float32, so that sums are exact in any order. A Round of an exact sum changes
nothing, but keeps onnxruntime from merging the scale behind it into the coefficients. What a node does not use (a
border per integer part, a window, channels) is behind an If with a constant condition: onnxruntime leaves it out.
Branches hold only what depends on x. onnxruntime 1.26 cannot load a model in which it has folded constants within a
branch before it takes the If away, so everything that is computed from coefficients alone stands in front of it.
"""

from __future__ import annotations

import onnx
import onnx.parser


def border_quantize(opset: int) -> onnx.FunctionProto:
    """The body of BorderQuantize in operators of ``opset``."""
    return onnx.parser.parse_function(_TEXT.replace("OPSET", str(opset)))


_TEXT = """
<domain: "ai.postquant", opset_import: ["" : OPSET]>
BorderQuantize <channels, qmin, qmax>
    (x, scale, zero_point, border, window, window_scale, left, left_scale, right, right_scale) => (y) {
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis_zero = Constant <value_ints = [0]> ()
    axis_one = Constant <value_ints = [1]> ()
    axis_two = Constant <value_ints = [2]> ()
    axis_three = Constant <value_ints = [3]> ()
    end = Constant <value_ints = [9]> ()
    ones = Constant <value_ints = [1, 1]> ()
    copied = Constant <value_ints = [0, 0]> ()
    column = Constant <value_ints = [-1, 1, 1]> ()
    nothing = Constant <value_float = 0.0> ()
    units = Constant <value_float = 128.0> ()
    x_dims = Shape (x)
    rank = Shape (x_dims)
    missing = Sub (rank, axis_two)
    leading = Slice (ones, missing, axis_two)
    spatial = Slice (x_dims, axis_two, end)
    image_dims = Concat <axis = 0> (copied, leading, spatial)
    image = Reshape (x, image_dims)
    lowest_code = Constant <value_int: int = @qmin> ()
    highest_code = Constant <value_int: int = @qmax> ()
    lowest_real = Cast <to = 1> (lowest_code)
    highest_real = Cast <to = 1> (highest_code)
    middle = Cast <to = 1> (zero_point)
    low = Sub (lowest_real, middle)
    high = Sub (highest_real, middle)
    quotient = Div (image, scale)
    ratio = Clip (quotient, low, high)
    below = Floor (ratio)
    fraction = Sub (ratio, below)

    border_dims = Shape (border)
    levels = Slice (border_dims, axis_one, axis_two)
    level_count = Squeeze (levels, axis_zero)
    with_levels = Greater (level_count, one)
    channels = Shape (window_scale)
    channel_count = Squeeze (channels, axis_zero)
    channel = Range (zero, channel_count, one)
    row = Mul (channel, level_count)
    row_column = Reshape (row, column)
    flat_dims = Constant <value_ints = [-1]> ()
    flat = Reshape (border, flat_dims)
    border_column_dims = Constant <value_ints = [1, -1, 1, 1]> ()
    border_column = Reshape (border, border_column_dims)
    base = If (with_levels) <
        then_branch = per_level () => (float[?, ?, ?, ?] level_border) {
            distance = Sub (below, low)
            level = Cast <to = 7> (distance)
            index = Add (level, row_column)
            level_border = Gather <axis = 0> (flat, index)
        },
        else_branch = per_channel () => (float[?, ?, ?, ?] channel_border) { channel_border = Identity (border_column) }
    >

    window_real = Cast <to = 1> (window)
    window_sizes = Abs (window_real)
    window_maximum = ReduceMax <keepdims = 0> (window_sizes)
    with_window = Greater (window_maximum, nothing)
    window_dims = Shape (window)
    window_size = Slice (window_dims, axis_one, axis_three)
    window_count = Slice (window_dims, axis_zero, axis_one)
    kernel_dims = Concat <axis = 0> (window_count, axis_one, window_size)
    kernel = Reshape (window_real, kernel_dims)
    near_scale = Reshape (window_scale, column)
    near = If (with_window) <
        then_branch = windowed () => (float[?, ?, ?, ?] near_border) {
            near_nearest = Round (ratio)
            near_error = Sub (near_nearest, ratio)
            near_scaled = Mul (near_error, units)
            near_residual = Round (near_scaled)
            near_sum = Conv <auto_pad = "SAME_UPPER", group: int = @channels> (near_residual, kernel)
            near_integer = Round (near_sum)
            near_shift = Mul (near_integer, near_scale)
            near_border = Add (base, near_shift)
        },
        else_branch = unwindowed () => (float[?, ?, ?, ?] far_border) { far_border = Identity (base) }
    >

    left_dims = Shape (left)
    left_rows = Slice (left_dims, axis_zero, axis_one)
    left_row_count = Squeeze (left_rows, axis_zero)
    with_left = Greater (left_row_count, zero)
    left_real = Cast <to = 1> (left)
    right_real = Cast <to = 1> (right)
    left_column = Unsqueeze (left_scale, axis_one)
    right_column = Unsqueeze (right_scale, axis_one)
    point_dims = Constant <value_ints = [0, 0, -1]> ()
    smallest = Constant <value_float = -127.0> ()
    largest = Constant <value_float = 127.0> ()
    limit = If (with_left) <
        then_branch = across () => (float[?, ?, ?, ?] across_border) {
            across_nearest = Round (ratio)
            across_error = Sub (across_nearest, ratio)
            across_scaled = Mul (across_error, units)
            across_residual = Round (across_scaled)
            points = Reshape (across_residual, point_dims)
            left_sum = MatMul (left_real, points)
            left_integer = Round (left_sum)
            left_scaled = Mul (left_integer, left_column)
            left_rounded = Round (left_scaled)
            inner = Clip (left_rounded, smallest, largest)
            right_sum = MatMul (right_real, inner)
            right_integer = Round (right_sum)
            right_shift = Mul (right_integer, right_column)
            ratio_dims = Shape (ratio)
            across_shift = Reshape (right_shift, ratio_dims)
            across_border = Add (near, across_shift)
        },
        else_branch = single () => (float[?, ?, ?, ?] single_border) { single_border = Identity (near) }
    >

    least = Max (limit, nothing)
    is_up = Greater (fraction, least)
    up = Cast <to = 1> (is_up)
    shifted = Add (below, middle)
    code = Add (shifted, up)
    byte = Cast <to = 2> (code)
    y = Reshape (byte, x_dims)
}
"""
