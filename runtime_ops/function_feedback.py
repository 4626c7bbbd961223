"""Function body of FeedbackRequantize: standard ONNX operators, from opset 13 on.

The view of x is (n n C, P), so that sums over channels are one matrix product for all positions, wherever the channels
are. An If makes it and another one undoes it, because positions that are single places are of any shape and want no
padding: from 1.17 on onnxruntime takes the branch when it loads the model, and what is left has no trace of the other.

Rows are sorted by groups, and a Loop takes the rows of one group each time, so that all groups together multiply as
often as one that had all channels. Its body stands in the model once: onnxruntime plans the memory of every graph in a
time that grows with the square of its operators, and a network has this body for every layer.

A group may be empty, which no product of matrices need know: every group has one row more than channels, behind them,
whose errors count for nothing and whose levels are forgotten. So it is with the places of cells beyond their planes:
they are padded with a code that there is not, 256, and the errors of all rows are multiplied by what exists.

Integers are in float32, in which their sums are exact. Everything that does not depend on x is computed when
onnxruntime loads the model: the levels of all codes (:mod:`postquant.runtime_ops.function_levels`), the order of the
channels and their coefficients in it. TopK sorts, because onnxruntime folds no NonZero and no Compress. The sums begin
as a single 0, so that the first group's product with them is a column.
"""

from __future__ import annotations

import onnx
import onnx.parser

from postquant.runtime_ops.function_levels import CODES, LEVELS
from postquant.runtime_ops.law_feedback import GROUPS


def feedback_requantize(opset: int) -> onnx.FunctionProto:
    """The body of FeedbackRequantize in operators of ``opset``."""
    reshape = "Reshape <allowzero = 1>" if opset >= _ZEROS_OPSET else "Reshape"
    return onnx.parser.parse_function(_TEXT.replace("OPSET", str(opset)).replace("RESHAPE", reshape))


# Below this version Reshape takes a 0 for the dimension as it is: no positions are a first dimension of 0 only.
_ZEROS_OPSET = 14

# Rows by groups: the channel of each row, whether it is one that counts, the bounds of every group, each channel's row.
_ORDER = f"""
    group_total = Constant <value_int = {GROUPS}> ()
    channel_total = Shape (group)
    channel_count = Squeeze (channel_total, axis_zero)
    row_count = Add (channel_count, group_total)
    row_total = Add (channel_total, group_total)
    wide_group = Cast <to = 7> (group)
    every_group = Range (zero, group_total, one)
    groups = Concat <axis = 0> (wide_group, every_group)
    row = Range (zero, row_count, one)
    group_place = Mul (groups, row_total)
    key = Add (group_place, row)
    sorted_keys, by_group = TopK <axis = 0, largest = 0, sorted = 1> (key, row_total)
    sorted_rows, places = TopK <axis = 0, largest = 0, sorted = 1> (by_group, row_total)
    places_of_channels = Slice (places, axis_zero, channel_total)
    last_places = Slice (places, channel_total, row_total)
    ends = Add (last_places, one)
    flat_bounds = Concat <axis = 0> (axis_zero, ends)
    bounds = Unsqueeze (flat_bounds, axis_one)
    last_group = ReduceMax <keepdims = 0> (wide_group)
    rounds = Add (last_group, one)
    channel = Mod (by_group, channel_total)
    is_channel = Less (by_group, channel_total)
    flat_weight = Cast <to = 1> (is_channel)
    weight = Unsqueeze (flat_weight, axis_one)
"""

# Constants of all rows.
_SORTED = """
    table_row = Mod (by_group, table_total)
    row_levels = Gather <axis = 0> (levels, table_row)
    code_dims = Concat <axis = 0> (row_total, axis_one)
    some_code = Slice (code, axis_zero, axis_one)
    every_code = Concat <axis = 0> (code, some_code)
    row_codes = Expand (every_code, code_dims)
    left_real = Cast <to = 1> (left)
    left_turned = Transpose <perm = [1, 0]> (left_real)
    row_left = Gather <axis = 0> (left_turned, channel)
    left_column = Unsqueeze (left_scale, axis_one)
    right_real = Cast <to = 1> (right)
    row_right = Gather <axis = 0> (right_real, channel)
    right_column = Unsqueeze (right_scale, axis_one)
    row_scale = Gather <axis = 0> (right_column, channel)
    least = Constant <value_float = -127.0> ()
    largest = Constant <value_float = 127.0> ()
    least_shift = Constant <value_float = -255.0> ()
    largest_shift = Constant <value_float = 255.0> ()
    lowest = Constant <value_float = 0.0> ()
    highest = Constant <value_float = 255.0> ()
"""

# x as rows in the order of the groups, what of them exists, and their codes. Dimensions are taken from x wherever they
# can be, so that the shapes of the branch that is not taken fit together as well.
_VIEW = """
    cell = Constant <value_int: int = @cell> ()
    is_place = Equal (cell, one)
    x_dims = Shape (x)
    axis_number = Constant <value_int: int = @axis> ()
    at = Unsqueeze (axis_number, axis_zero)
    outer_dims = Slice (x_dims, axis_zero, at)
    some_outer = Concat <axis = 0> (outer_dims, axis_one)
    outer = ReduceProd (some_outer)
    x_index, exists, turned_dims, whole_dims = If (is_place) <
        then_branch = places () => (int32[?, ?] place_index, float[?, ?] place_exists,
                                    int64[3] place_dims, int64[3] view_dims) {
            last_dims = Slice (x_dims, at, end)
            behind = ReduceProd (last_dims)
            inner = Div (behind, channel_total)
            view_dims = Concat <axis = 0> (outer, channel_total, inner)
            view = RESHAPE (x, view_dims)
            turned = Transpose <perm = [1, 0, 2]> (view)
            place_dims = Shape (turned)
            sorted_x = Gather <axis = 0> (turned, channel)
            x_rows = Flatten <axis = 1> (sorted_x)
            place_index = Cast <to = 6> (x_rows)
            place_exists = Identity (weight)
        },
        else_branch = cells () => (int32[?, ?] cell_index, float[?, ?] cell_exists,
                                   int64[6] cell_dims, int64[4] padded_dims) {
            no_code = Cast <to = 6> (code_count)
            wide_x = Cast <to = 6> (x)
            any_dims = Concat <axis = 0> (axis_one, axis_one, x_dims)
            plane_axes = Constant <value_ints = [-3]> ()
            plane_dims = Slice (any_dims, plane_axes, end)
            flat_dims = Concat <axis = 0> (outer, plane_dims)
            view = RESHAPE (wide_x, flat_dims)

            sides = Constant <value_ints = [-2]> ()
            sizes = Slice (plane_dims, sides, end)
            below = Neg (sizes)
            missing = Mod (below, cell)
            no_pads = Constant <value_ints = [0, 0, 0, 0, 0, 0]> ()
            pads = Concat <axis = 0> (no_pads, missing)
            padded = Pad (view, pads, no_code)
            padded_dims = Shape (padded)

            padded_sizes = Slice (padded_dims, axis_two, end)
            square_counts = Div (padded_sizes, cell)
            count_column = Unsqueeze (square_counts, axis_one)
            column_dims = Constant <value_ints = [2, 1]> ()
            cell_column = Expand (cell, column_dims)
            pairs = Concat <axis = 1> (count_column, cell_column)
            pair_dims = Reshape (pairs, last)
            first_dims = Slice (padded_dims, axis_zero, axis_two)
            split_dims = Concat <axis = 0> (first_dims, pair_dims)
            split = RESHAPE (padded, split_dims)
            turned = Transpose <perm = [3, 5, 1, 0, 2, 4]> (split)
            cell_dims = Shape (turned)
            rows = Flatten <axis = 3> (turned)

            cell_index = Gather <axis = 0> (rows, channel)
            is_code = Less (cell_index, no_code)
            real_code = Cast <to = 1> (is_code)
            cell_exists = Mul (real_code, weight)
        }
    >
    small_codes = GatherElements <axis = 1> (row_codes, x_index)
    codes = Cast <to = 1> (small_codes)
"""

# Opset 13 takes a dimension of 0 from its place in what it reshapes: the last one of the rows has to be the fourth.
_BACK = """
    y_rows = Gather <axis = 0> (all_levels, places_of_channels)
    y = If (is_place) <
        then_branch = of_places () => (uint8[] y_places) {
            y_turned = RESHAPE (y_rows, turned_dims)
            y_view = Transpose <perm = [1, 0, 2]> (y_turned)
            y_places = RESHAPE (y_view, x_dims)
        },
        else_branch = of_cells () => (uint8[] y_cells) {
            front_axes = Constant <value_ints = [0, 1]> ()
            y_row_planes = Unsqueeze (y_rows, front_axes)
            y_turned = RESHAPE (y_row_planes, turned_dims)
            y_split = Transpose <perm = [3, 2, 4, 0, 5, 1]> (y_turned)
            y_padded = RESHAPE (y_split, whole_dims)
            corner = Constant <value_ints = [0, 0]> ()
            last_axes = Constant <value_ints = [-2]> ()
            all_sizes = Slice (x_dims, last_axes, end)
            size_axes = Constant <value_ints = [2, 3]> ()
            y_view = Slice (y_padded, corner, all_sizes, size_axes)
            y_cells = RESHAPE (y_view, x_dims)
        }
    >
"""

_ROUNDS = """
    no_sum = Constant <value = float[1, 1] {0.0}> ()
    no_levels = Slice (small_codes, axis_zero, axis_zero)
    always = Less (zero, one)
    last_sum, all_levels = Loop (rounds, always, no_sum, no_levels) <
        body = round (int64 i, bool go, float[?, ?] sum, uint8[?, ?] found)
            => (bool go_on, float[?, ?] sum_after, uint8[?, ?] found_after) {
            go_on = Identity (go)
            next = Add (i, one)
            from = Gather <axis = 0> (bounds, i)
            to = Gather <axis = 0> (bounds, next)
            its_codes = Slice (codes, from, to)
            its_levels = Slice (row_levels, from, to)
            its_left = Slice (row_left, from, to)
            its_right = Slice (row_right, from, to)
            its_scale = Slice (row_scale, from, to)
            its_weight = Slice (exists, from, to)

            scaled = Mul (sum, left_column)
            rounded = Round (scaled)
            number = Clip (rounded, least, largest)
            across = MatMul (its_right, number)
            shifted = Mul (across, its_scale)
            shift = Round (shifted)
            limited = Clip (shift, least_shift, largest_shift)
            moved = Sub (its_codes, limited)
            aim = Clip (moved, lowest, highest)
            index = Cast <to = 6> (aim)
            level = GatherElements <axis = 1> (its_levels, index)
            found_after = Concat <axis = 0> (found, level)
            real_level = Cast <to = 1> (level)
            difference = Sub (real_level, its_codes)
            any_errors = Clip (difference, least, largest)
            errors = Mul (any_errors, its_weight)
            sum_after = Gemm <transA = 1> (its_left, errors, sum)
        }
    >
"""

_TEXT = (
    """
<domain: "ai.postquant", opset_import: ["" : OPSET]>
FeedbackRequantize <axis, cell>
    (x, x_scale, x_zero_point, scale, zero_point, table, group, left, left_scale, right, right_scale) => (y) {
"""
    + CODES
    + """
    wide_code = Cast <to = 6> (all_codes)
"""
    + LEVELS
    + _ORDER
    + _SORTED
    + _VIEW
    + _ROUNDS
    + _BACK
    + "}"
)
