"""Function body of FeedbackRequantize: standard ONNX operators, from opset 13 on.

The view of x is (C, P), so that sums over channels are one matrix product for all positions, wherever the channels are.
Every group takes its channels' rows by their numbers, so that all groups together multiply as often as one that had all
channels. A group may be empty, which no product of matrices need know: every group has one channel more, the first one
under the number C, whose errors count for nothing and whose levels are forgotten.

Integers are in float32, in which their sums are exact. A Round of an exact sum changes nothing, but keeps onnxruntime
from merging the scale behind it into the coefficients. Everything that does not depend on x is computed when
onnxruntime loads the model: the levels of all codes (:mod:`postquant.runtime_ops.function_levels`), the channels of
each group and their coefficients. TopK sorts the channels, because onnxruntime folds no NonZero and no Compress.
"""

from __future__ import annotations

import onnx
import onnx.parser

from postquant.runtime_ops.function_levels import CODES, LEVELS
from postquant.runtime_ops.law_feedback import GROUPS


def feedback_requantize(opset: int) -> onnx.FunctionProto:
    """The body of FeedbackRequantize in operators of ``opset``."""
    rounds = _round(_MEMBERS + _FIRST_AIM + _LEVELS + _ERRORS + _FIRST_SUM, 0)
    for group in range(1, GROUPS - 1):
        rounds += _round(_MEMBERS + _AIM + _LEVELS + _ERRORS + _SUM, group)
    rounds += _round(_MEMBERS + _AIM + _LEVELS, GROUPS - 1)
    text = _BEGIN + CODES + _TABLES + LEVELS + _VIEW + rounds + _END
    return onnx.parser.parse_function(text.replace("OPSET", str(opset)))


def _round(text: str, group: int) -> str:
    """What is done for a group, after that before it."""
    return text.replace("#", str(group)).replace("@last", str(group - 1))


_BEGIN = """
<domain: "ai.postquant", opset_import: ["" : OPSET]>
FeedbackRequantize <axis>
    (x, x_scale, x_zero_point, scale, zero_point, table, group, left, left_scale, right, right_scale) => (y) {
"""

_TABLES = """
    real_code = Cast <to = 1> (code)
    wide_code = Cast <to = 6> (all_codes)
"""

# x as rows of channels; channels sorted by groups; coefficients of errors with the additional channel behind the rest.
_VIEW = """
    x_dims = Shape (x)
    rank = Shape (x_dims)
    axis_number = Constant <value_int: int = @axis> ()
    at = Add (rank, axis_number)
    behind = Add (at, axis_one)
    most = Constant <value_ints = [9]> ()
    outer_dims = Slice (x_dims, axis_zero, at)
    some_outer = Concat <axis = 0> (outer_dims, axis_one)
    outer = ReduceProd (some_outer)
    inner_dims = Slice (x_dims, behind, most)
    some_inner = Concat <axis = 0> (inner_dims, axis_one)
    inner = ReduceProd (some_inner)
    channel_total = Shape (group)
    view_dims = Concat <axis = 0> (outer, channel_total, inner)
    turned_dims = Concat <axis = 0> (channel_total, outer, inner)
    points = Mul (outer, inner)
    row_dims = Concat <axis = 0> (channel_total, points)
    view = Reshape (x, view_dims)
    turned = Transpose <perm = [1, 0, 2]> (view)
    index = Cast <to = 6> (turned)
    flat_index = Reshape (index, last)
    flat_x_codes = GatherElements <axis = 0> (real_code, flat_index)
    line = Unsqueeze (flat_x_codes, axis_zero)
    codes = Reshape (line, row_dims)

    group_number = Cast <to = 6> (group)
    wide_group = Cast <to = 7> (group)
    channel_count = Squeeze (channel_total, axis_zero)
    channel = Range (zero, channel_count, one)
    group_place = Mul (wide_group, channel_total)
    key = Add (group_place, channel)
    sorted_keys, by_group = TopK <axis = 0, largest = 0, sorted = 1> (key, channel_total)
    no_offsets = Sub (group_number, group_number)
    all_offsets = Add (flat_offsets, no_offsets)
    offsets = Unsqueeze (all_offsets, axis_one)
    left_real = Cast <to = 1> (left)
    left_column = Unsqueeze (left_scale, axis_one)
    no_left = Sub (left_column, left_column)
    left_more = Concat <axis = 1> (left_real, no_left)
    right_real = Cast <to = 1> (right)
    right_column = Unsqueeze (right_scale, axis_one)
    least = Constant <value_float = -127.0> ()
    largest = Constant <value_float = 127.0> ()
    least_shift = Constant <value_float = -255.0> ()
    largest_shift = Constant <value_float = 255.0> ()
    lowest = Constant <value_float = 0.0> ()
    highest = Constant <value_float = 255.0> ()
"""

_MEMBERS = """
    number# = Constant <value_int = #> ()
    small# = Cast <to = 6> (number#)
    earlier# = Less (group_number, small#)
    earlier_ones# = Cast <to = 7> (earlier#)
    begin# = ReduceSum <keepdims = 1> (earlier_ones#, axis_zero)
    equal# = Equal (group_number, small#)
    equal_ones# = Cast <to = 7> (equal#)
    count# = ReduceSum <keepdims = 1> (equal_ones#, axis_zero)
    end# = Add (begin#, count#)
    some# = Slice (by_group, begin#, end#)
    members# = Concat <axis = 0> (some#, channel_total)
    rows# = Concat <axis = 0> (some#, axis_zero)
    codes# = Gather <axis = 0> (codes, rows#)
    offsets# = Gather <axis = 0> (offsets, rows#)
    left# = Gather <axis = 1> (left_more, members#)
"""

_LEVELS = """
    index# = Cast <to = 6> (aim#)
    places# = Add (index#, offsets#)
    flat_places# = Reshape (places#, last)
    flat# = GatherElements <axis = 0> (levels, flat_places#)
    line# = Unsqueeze (flat#, axis_zero)
    place_dims# = Shape (places#)
    levels# = Reshape (line#, place_dims#)
"""

_ERRORS = """
    real_levels# = Cast <to = 1> (levels#)
    difference# = Sub (real_levels#, codes#)
    errors# = Clip (difference#, least, largest)
    product# = MatMul (left#, errors#)
"""

_FIRST_AIM = """
    aim# = Identity (codes#)
"""

_FIRST_SUM = """
    sum# = Round (product#)
"""

_AIM = """
    right# = Gather <axis = 0> (right_real, rows#)
    right_column# = Gather <axis = 0> (right_column, rows#)
    scaled# = Mul (sum@last, left_column)
    rounded# = Round (scaled#)
    inner# = Clip (rounded#, least, largest)
    across# = MatMul (right#, inner#)
    integers# = Round (across#)
    shifted# = Mul (integers#, right_column#)
    shift# = Round (shifted#)
    limited# = Clip (shift#, least_shift, largest_shift)
    moved# = Sub (codes#, limited#)
    aim# = Clip (moved#, lowest, highest)
"""

_SUM = """
    total# = Add (sum@last, product#)
    sum# = Round (total#)
"""

_NAMES = {part: ", ".join(f"{part}{group}" for group in range(GROUPS)) for part in ("members", "levels")}

# Rows in the order of the channels: where each of them is among the rows of all groups.
_END = f"""
    order = Concat <axis = 0> ({_NAMES["members"]})
    sorted_order, rows_of_channels = TopK <axis = 0, largest = 0, sorted = 1> (order, channel_total)
    all_levels = Concat <axis = 0> ({_NAMES["levels"]})
    y_rows = Gather <axis = 0> (all_levels, rows_of_channels)
    y_turned = Reshape (y_rows, turned_dims)
    y_view = Transpose <perm = [1, 0, 2]> (y_turned)
    y = Reshape (y_view, x_dims)
}}"""
