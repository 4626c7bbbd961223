"""Function bodies of the look-up-table operators: standard ONNX operators, from opset 13 on.

Everything up to the weight ``w`` depends on constants only: onnxruntime computes it while it loads the model and fuses
the rest to QLinearConv, QGemm or MatMulIntegerToFloat. One body serves all nodes of a model, so it takes bits and
shapes from attributes. QGemm wants a zero point of the weight, which is why there is one; the bias scale is never read
by the fused kernels. The float bias is subtracted after a change of its sign: onnxruntime would join MatMul and Add to
a Gemm, which, with a float bias, it does not run on integers.
"""

from __future__ import annotations

import onnx
import onnx.parser

# From this version on Shape takes a range of dimensions, which saves a node at run time.
_SHAPE_RANGE_OPSET = 15

# A table of what each of the 256 bytes decodes to; bytes of packed codes are its indices.
_DECODE = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    eight = Constant <value_int = 8> ()
    byte_count = Constant <value_int = 256> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    minus_one = Constant <value_ints = [-1]> ()
    column = Constant <value_ints = [-1, 1]> ()
    w_dims = Constant <value_ints: ints = @w_shape> ()
    code_bits = Constant <value_int: int = @bits> ()
    row_dims = Slice (w_dims, second, end)
    columns = Slice (w_dims, first, second)
    terms = ReduceProd <keepdims = 1> (row_dims)
    per_byte = Div (eight, code_bits)
    slot = Range (zero, per_byte, one)
    offset = Mul (slot, code_bits)
    shift = Cast <to = 2> (offset)
    number = Range (zero, byte_count, one)
    byte_row = Cast <to = 2> (number)
    byte = Reshape (byte_row, column)
    shifted = BitShift <direction = "RIGHT"> (byte, shift)
    unit = Cast <to = 2> (one)
    width = Cast <to = 2> (code_bits)
    radix = BitShift <direction = "LEFT"> (unit, width)
    code = Mod (shifted, radix)
    code_index = Cast <to = 6> (code)
    byte_levels = Gather <axis = 0> (table, code_index)
    packed = Cast <to = 6> (codes)
    level_groups = Gather <axis = 0> (byte_levels, packed)
    level_dims = Concat <axis = 0> (columns, minus_one)
    level_rows = Reshape (level_groups, level_dims)
    levels = Slice (level_rows, first, terms, second)
    w_codes = Reshape (levels, w_dims)
    w_channels = Shape (w_scale)
    w_zero_point = ConstantOfShape <value = int8[1] {0}> (w_channels)
"""
_WEIGHT = f"""{_DECODE}
    w = DequantizeLinear <axis = 0> (w_codes, w_scale, w_zero_point)
"""


def lut_qlinear_conv(opset: int) -> onnx.FunctionProto:
    """The body of LutQLinearConv in operators of ``opset``."""
    return onnx.parser.parse_function(f"""
<domain: "ai.postquant", opset_import: ["" : {opset}]>
LutQLinearConv <bits, group, w_shape, strides, dilations, pads>
    (x, x_scale, x_zero_point, codes, table, w_scale, bias, y_scale, y_zero_point) => (y) {{
{_WEIGHT}
    b_scale = Mul (x_scale, w_scale)
    b = DequantizeLinear <axis = 0> (bias, b_scale)
    x_real = DequantizeLinear (x, x_scale, x_zero_point)
    y_real = Conv <group: int = @group, strides: ints = @strides, dilations: ints = @dilations, pads: ints = @pads>
        (x_real, w, b)
    y = QuantizeLinear (y_real, y_scale, y_zero_point)
}}""")


def lut_qlinear_matmul(opset: int) -> onnx.FunctionProto:
    """The body of LutQLinearMatMul in operators of ``opset``."""
    if opset >= _SHAPE_RANGE_OPSET:
        outer = "outer_dims = Shape <end = -1> (a)"
    else:
        outer = "a_dims = Shape (a)\n    outer_dims = Slice (a_dims, first, minus_one)"
    return onnx.parser.parse_function(f"""
<domain: "ai.postquant", opset_import: ["" : {opset}]>
LutQLinearMatMul <bits, w_shape>
    (a, a_scale, a_zero_point, codes, table, w_scale, bias, y_scale, y_zero_point) => (y) {{
{_WEIGHT}
    matrix_dims = Concat <axis = 0> (minus_one, row_dims)
    {outer}
    y_dims = Concat <axis = 0> (outer_dims, columns)
    matrix = Reshape (a, matrix_dims)
    b_scale = Mul (a_scale, w_scale)
    b = DequantizeLinear <axis = 0> (bias, b_scale)
    a_real = DequantizeLinear (matrix, a_scale, a_zero_point)
    y_real = Gemm <transB = 1> (a_real, w, b)
    y_matrix = QuantizeLinear (y_real, y_scale, y_zero_point)
    y = Reshape (y_matrix, y_dims)
}}""")


def lut_matmul_integer_to_float(opset: int) -> onnx.FunctionProto:
    """The body of LutMatMulIntegerToFloat in operators of ``opset``."""
    return onnx.parser.parse_function(f"""
<domain: "ai.postquant", opset_import: ["" : {opset}]>
LutMatMulIntegerToFloat <bits, w_shape>
    (a, a_scale, a_zero_point, codes, table, w_scale, bias) => (y) {{
{_DECODE}
    w_matrix = Transpose <perm = [1, 0]> (w_codes)
    w = DequantizeLinear <axis = 1> (w_matrix, w_scale, w_zero_point)
    a_real = DequantizeLinear (a, a_scale, a_zero_point)
    product = MatMul (a_real, w)
    less = Neg (bias)
    y = Sub (product, less)
}}""")
