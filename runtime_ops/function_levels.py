"""Function body of LutRequantize: standard ONNX operators, from opset 13 on.

Everything that does not depend on x is one table of 256 levels for each channel, one behind the other: onnxruntime
(from 1.17 on) computes it when it loads the model. What is left for a run is Cast, Add, Reshape, GatherElements, Shape
and Reshape. GatherElements wants one flat tensor of places; a Gather would not, but onnxruntime's takes four times as
long. What codes stand for is not computed with DequantizeLinear, nor are sums compared by LessOrEqual (at opset 13 to
15), because onnxruntime does not fold these.
"""

from __future__ import annotations

import onnx
import onnx.parser


def lut_requantize(opset: int) -> onnx.FunctionProto:
    """The body of LutRequantize in operators of ``opset``."""
    return onnx.parser.parse_function(_TEXT.replace("OPSET", str(opset)))


# The code on the levels' grid of every code of x. Reads x_scale, x_zero_point, scale and zero_point.
CODES = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    code_count = Constant <value_int = 256> ()
    axis_zero = Constant <value_ints = [0]> ()
    axis_one = Constant <value_ints = [1]> ()
    axis_two = Constant <value_ints = [2]> ()
    last = Constant <value_ints = [-1]> ()
    end = Constant <value_ints = [16]> ()

    all_codes = Range (zero, code_count, one)
    middle = Cast <to = 7> (x_zero_point)
    centered = Sub (all_codes, middle)
    centered_real = Cast <to = 1> (centered)
    real = Mul (centered_real, x_scale)
    code = QuantizeLinear (real, scale, zero_point)
"""

# The nearest levels of the 256 codes wide_code in each row of table; the number of rows.
LEVELS = """
    doubled = Add (wide_code, wide_code)
    small_one = Cast <to = 6> (one)
    beyond = Add (doubled, small_one)

    wide_table = Cast <to = 6> (table)
    lower = Slice (wide_table, axis_zero, last, axis_one)
    upper = Slice (wide_table, axis_one, end, axis_one)
    sums = Add (lower, upper)
    columns = Unsqueeze (sums, axis_two)
    reached = Less (columns, beyond)
    ones = Cast <to = 6> (reached)
    counts = ReduceSum <keepdims = 0> (ones, axis_one)
    levels = GatherElements <axis = 1> (table, counts)
    table_dims = Shape (table)
    table_total = Slice (table_dims, axis_zero, axis_one)
"""

_TEXT = (
    """
<domain: "ai.postquant", opset_import: ["" : OPSET]>
LutRequantize <axis> (x, x_scale, x_zero_point, scale, zero_point, table) => (y) {
"""
    + CODES
    + """
    wide_code = Cast <to = 6> (code)
"""
    + LEVELS
    + """
    flat_levels = Reshape (levels, last)
    channels = Squeeze (table_total, axis_zero)
    level_count = Mul (channels, code_count)
    wide_offsets = Range (zero, level_count, code_count)
    flat_offsets = Cast <to = 6> (wide_offsets)
    axis_number = Constant <value_int: int = @axis> ()
    axis_dims = Reshape (axis_number, axis_one)
    behind = Sub (last, axis_dims)
    behind_dims = ConstantOfShape <value = int64[1] {1}> (behind)
    offset_dims = Concat <axis = 0> (last, behind_dims)
    offsets = Reshape (flat_offsets, offset_dims)

    x_dims = Shape (x)
    index = Cast <to = 6> (x)
    places = Add (index, offsets)
    flat_places = Reshape (places, last)
    flat = GatherElements <axis = 0> (flat_levels, flat_places)
    y = Reshape (flat, x_dims)
}"""
)
