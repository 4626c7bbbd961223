"""The function bodies of the look-up-table operators, on onnxruntime and in onnx's evaluator, against the law."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from postquant.runtime_ops.code_book import post_table
from postquant.runtime_ops.integer import Affine, Prediction, compare_codes
from postquant.runtime_ops.law import dequantize, quantize
from postquant.runtime_ops.law_lut import (
    LutWeight,
    lut_matmul_integer_to_float,
    lut_qlinear_conv,
    lut_qlinear_matmul,
    pack_codes,
)
from postquant.runtime_ops.schema import DOMAIN

Constants = dict[str, npt.NDArray[Any]]

# Name -> shape of x, shape of w, group, strides, dilations, pads.
GEOMETRIES: dict[str, tuple[Any, ...]] = {
    "3x3": ((2, 3, 9, 7), (5, 3, 3, 3), 1, (1, 1), (1, 1), (1, 1, 1, 1)),
    "1x1": ((2, 5, 4, 3), (6, 5, 1, 1), 1, (1, 1), (1, 1), (0, 0, 0, 0)),
    "strided": ((2, 4, 9, 8), (3, 4, 3, 2), 1, (2, 3), (1, 1), (0, 1, 2, 0)),
    "dilated": ((1, 2, 11, 10), (4, 2, 3, 3), 1, (1, 1), (2, 3), (2, 3, 2, 3)),
    "grouped": ((2, 6, 5, 5), (4, 3, 3, 3), 2, (1, 1), (1, 1), (1, 1, 1, 1)),
    "depthwise": ((2, 7, 6, 6), (7, 1, 3, 3), 7, (1, 1), (1, 1), (1, 1, 1, 1)),
    "1-D": ((3, 3, 17), (5, 3, 5), 1, (2,), (1,), (2, 1)),
    "1-D depthwise": ((2, 4, 12), (4, 1, 3), 4, (1,), (2,), (2, 2)),
}


class Case:
    """Random numbers of one node, with or without scales that are powers of two."""

    def __init__(self, seed: int, channels: int, terms: int, bits: int, dtype: Any, powers: bool) -> None:
        rng = np.random.default_rng(seed)
        info = np.iinfo(dtype)
        zeros = rng.integers(info.min, info.max + 1, 2)
        self.table = post_table(4) if bits == 4 else rng.integers(-128, 128, 4).astype(np.int8)
        self.packed = pack_codes(rng.integers(0, 1 << bits, (channels, terms)), bits)
        exponents = rng.integers(-7, -4, channels) if powers else rng.uniform(-7, -4, channels)
        self.w_scale = np.exp2(exponents).astype(np.float32)
        x_scale = np.float32(0.0625 if powers else 0.071)
        y_scale = np.float32(2.0**-3 if powers else 0.11) * np.float32(np.sqrt(terms) if not powers else 4)
        self.x = Affine(np.asarray(x_scale), np.asarray(zeros[0], np.int32), np.dtype(dtype))
        self.y = Affine(np.asarray(y_scale, np.float32), np.asarray(zeros[1], np.int32), np.dtype(dtype))
        self.bias = rng.integers(-2000, 2000, channels).astype(np.int32)
        self.rng, self.bits = rng, bits

    def codes(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        return self.rng.integers(self.x.low, self.x.high + 1, shape).astype(self.x.dtype)

    def weight(self, shape: tuple[int, ...]) -> LutWeight:
        return LutWeight(self.packed, self.table, self.w_scale, self.bits, shape)

    def constants(self, x: str) -> Constants:
        return {
            f"{x}_scale": self.x.scale,
            f"{x}_zero_point": self.x.zero_point.astype(self.x.dtype),
            "codes": self.packed,
            "table": self.table,
            "w_scale": self.w_scale,
            "bias": self.bias,
            "y_scale": self.y.scale,
            "y_zero_point": self.y.zero_point.astype(self.y.dtype),
        }


def conv_case(
    geometry: str, bits: int, dtype: Any, *, powers: bool = False
) -> tuple[Case, npt.NDArray[Any], dict[str, Any], Prediction]:
    x_shape, w_shape, group, strides, dilations, pads = GEOMETRIES[geometry]
    case = Case(len(geometry) + bits, w_shape[0], int(np.prod(w_shape[1:])), bits, dtype, powers)
    x = case.codes(x_shape)
    settings = {"group": group, "strides": strides, "dilations": dilations, "pads": pads}
    law = lut_qlinear_conv(x, case.x, case.weight(w_shape), case.bias, case.y, **settings)
    return case, x, {"bits": bits, "w_shape": w_shape, **settings}, law


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_convolution_fuses_and_equals_the_law(operators: Any, geometry: str, bits: int) -> None:
    case, x, attributes, law = conv_case(geometry, bits, np.uint8)
    model = operators.model("LutQLinearConv", x, case.constants("x"), attributes)
    (observed,), kernels = operators.on_onnxruntime(model, x)
    assert "QLinearConv" in kernels
    assert not kernels & {"Conv", "Gather", "DequantizeLinear", "LutQLinearConv"}
    np.testing.assert_array_equal(observed, law.codes)
    assert len(np.unique(observed)) > 20
    # Any batch size.
    half = x[: len(x) // 2]
    np.testing.assert_array_equal(operators.on_onnxruntime(model, half)[0][0], law.codes[: len(half)])


@pytest.mark.parametrize("optimize", [True, False], ids=["optimized", "as it is"])
@pytest.mark.parametrize("geometry", ["3x3", "depthwise", "1-D"])
def test_int8_activations_fuse_between_other_operators(operators: Any, geometry: str, optimize: bool) -> None:
    case, codes, attributes, law = conv_case(geometry, 4, np.int8)
    real = dequantize(codes, case.x.scale, case.x.zero_point)
    np.testing.assert_array_equal(quantize(real, case.x.scale, case.x.zero_point, qmin=-128, qmax=127), codes)
    model = operators.model("LutQLinearConv", real, case.constants("x"), attributes, stored=True)
    (observed,), kernels = operators.on_onnxruntime(model, real, optimize=optimize)
    assert ("QLinearConv" in kernels) == optimize
    agreement = compare_codes(law, np.rint(observed / case.y.scale).astype(np.int32) + case.y.zero_point)
    assert agreement.mismatches == 0
    assert agreement.ties <= (0 if optimize else 2)


@pytest.mark.parametrize("powers", [True, False], ids=["powers of two", "any scales"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_convolution_in_the_evaluator(operators: Any, geometry: str, dtype: Any, powers: bool) -> None:
    case, x, attributes, law = conv_case(geometry, 4, dtype, powers=powers)
    model = operators.model("LutQLinearConv", x, case.constants("x"), attributes)
    (reference,) = operators.on_evaluator(model, x, reference=True)
    assert reference.dtype == dtype
    np.testing.assert_array_equal(reference, law.codes)
    (body,) = operators.on_evaluator(model, x)
    assert body.dtype == dtype
    # The body computes in float32, which is exact for powers of two; otherwise it may fall off a tie.
    agreement = compare_codes(law, body)
    assert agreement.mismatches == 0
    assert agreement.ties <= (0 if powers else 2)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("shape", [(6, 37), (1, 37), (2, 3, 37), (2, 2, 3, 37)], ids=str)
def test_matrix_product_fuses_and_equals_the_law(operators: Any, shape: tuple[int, ...], bits: int) -> None:
    case = Case(len(shape), 5, 37, bits, np.uint8, powers=False)
    a = case.codes(shape)
    law = lut_qlinear_matmul(a, case.x, case.weight((5, 37)), case.bias, case.y)
    model = operators.model("LutQLinearMatMul", a, case.constants("a"), {"bits": bits, "w_shape": (5, 37)})
    (observed,), kernels = operators.on_onnxruntime(model, a)
    assert "QGemm" in kernels
    assert not kernels & {"Gemm", "MatMul", "Gather", "DequantizeLinear"}
    np.testing.assert_array_equal(observed, law.codes)
    np.testing.assert_array_equal(operators.on_evaluator(model, a, reference=True)[0], law.codes)
    agreement = compare_codes(law, operators.on_evaluator(model, a)[0])
    assert agreement.mismatches == 0
    assert agreement.ties <= 2


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("shape", [(6, 37), (1, 37), (37,), (2, 3, 37), (2, 2, 3, 37)], ids=str)
def test_a_float_output_fuses_and_equals_the_law(operators: Any, shape: tuple[int, ...], bits: int, dtype: Any) -> None:
    model, real, codes, law = float_case(operators, shape, bits, dtype)
    (observed,), kernels = operators.on_onnxruntime(model, real)
    assert kernels == {"QuantizeLinear", "MatMulIntegerToFloat", "Sub"}
    # onnxruntime's kernel makes the same three float operations, and Sub the last one: equal to the bit.
    np.testing.assert_array_equal(observed, law)
    assert len(np.unique(observed)) > 3
    (unfused,) = operators.on_onnxruntime(model, real, optimize=False)[0]
    np.testing.assert_allclose(unfused, law, rtol=0, atol=2.0**-18 * float(np.abs(law).max()))
    if codes.ndim > 1:  # any batch size
        np.testing.assert_array_equal(operators.on_onnxruntime(model, real[:1])[0][0], law[:1])


@pytest.mark.parametrize("shape", [(6, 37), (2, 3, 37)], ids=str)
def test_a_float_output_in_the_evaluator(operators: Any, shape: tuple[int, ...]) -> None:
    model, real, _, law = float_case(operators, shape, 4, np.int8)
    (reference,) = operators.on_evaluator(model, real, reference=True)
    assert reference.dtype == np.float32
    np.testing.assert_array_equal(reference, law)
    (body,) = operators.on_evaluator(model, real)
    assert body.dtype == np.float32
    # The body sums float products.
    np.testing.assert_allclose(body, law, rtol=0, atol=2.0**-18 * float(np.abs(law).max()))


def float_case(
    operators: Any, shape: tuple[int, ...], bits: int, dtype: Any
) -> tuple[onnx.ModelProto, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.float32]]:
    """A LutMatMulIntegerToFloat behind a quantizer, a float input, its codes, and what the law makes of them."""
    case = Case(len(shape) + bits, 5, 37, bits, dtype, powers=False)
    codes = case.codes(shape)
    bias = case.rng.normal(0, 3, 5).astype(np.float32)
    law = lut_matmul_integer_to_float(codes, case.x, case.weight((5, 37)), bias)
    constants = case.constants("a") | {"bias": bias}
    del constants["y_scale"], constants["y_zero_point"]
    real = dequantize(codes, case.x.scale, case.x.zero_point)
    model = operators.model("LutMatMulIntegerToFloat", real, constants, {"bits": bits, "w_shape": (5, 37)}, stored=True)
    return model, real, codes, law


def test_int8_matrix_product_fuses_between_other_operators(operators: Any) -> None:
    case = Case(1, 5, 37, 4, np.int8, powers=False)
    codes = case.codes((4, 37))
    law = lut_qlinear_matmul(codes, case.x, case.weight((5, 37)), case.bias, case.y)
    real = dequantize(codes, case.x.scale, case.x.zero_point)
    attributes = {"bits": 4, "w_shape": (5, 37)}
    model = operators.model("LutQLinearMatMul", real, case.constants("a"), attributes, stored=True)
    (observed,), kernels = operators.on_onnxruntime(model, real)
    assert "QGemm" in kernels
    np.testing.assert_array_equal(np.rint(observed / case.y.scale) + case.y.zero_point, law.codes)


@pytest.mark.parametrize("opset", [13, 14, 15, 17, 18, 19, 22])
def test_every_opset_from_13_on(operators: Any, opset: int) -> None:
    case, x, attributes, law = conv_case("3x3", 4, np.uint8)
    model = operators.model("LutQLinearConv", x, case.constants("x"), attributes, opset=opset)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    (observed,), kernels = operators.on_onnxruntime(model, x)
    assert "QLinearConv" in kernels
    np.testing.assert_array_equal(observed, law.codes)
    matmul = Case(3, 5, 9, 4, np.uint8, powers=False)
    a = matmul.codes((2, 3, 9))
    attributes = {"bits": 4, "w_shape": (5, 9)}
    model = operators.model("LutQLinearMatMul", a, matmul.constants("a"), attributes, opset=opset)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    (observed,), kernels = operators.on_onnxruntime(model, a)
    assert "QGemm" in kernels
    law = lut_qlinear_matmul(a, matmul.x, matmul.weight((5, 9)), matmul.bias, matmul.y)
    np.testing.assert_array_equal(observed, law.codes)


def test_a_tensor_without_samples(operators: Any) -> None:
    case, x, attributes, _ = conv_case("3x3", 4, np.uint8)
    model = operators.model("LutQLinearConv", x, case.constants("x"), attributes)
    assert operators.on_onnxruntime(model, x[:0])[0][0].shape == (0, 5, 9, 7)


def test_nodes_of_different_bits_share_a_function(operators: Any) -> None:
    first, x, attributes, law = conv_case("3x3", 4, np.uint8)
    second = Case(9, 6, 5, 2, np.uint8, powers=False)
    second.x = first.y
    model = operators.model("LutQLinearConv", x, first.constants("x"), attributes)
    more = {f"second_{name}": value for name, value in second.constants("x").items()}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in more.items())
    other = attributes | {"bits": 2, "w_shape": (6, 5, 1, 1), "pads": (0, 0, 0, 0)}
    model.graph.node.append(helper.make_node("LutQLinearConv", ["y", *more], ["z"], domain=DOMAIN, **other))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", TensorProto.UINT8, ["N", 6, 9, 7]))
    onnx.checker.check_model(model, full_check=True)
    settings = {name: other[name] for name in ("group", "strides", "dilations", "pads")}
    hidden = law.codes.astype(np.uint8)
    expected = lut_qlinear_conv(hidden, second.x, second.weight((6, 5, 1, 1)), second.bias, second.y, **settings)
    (observed,), kernels = operators.on_onnxruntime(model, x)
    assert "Conv" not in kernels
    np.testing.assert_array_equal(observed, expected.codes)


def test_the_input_scale_and_the_bias_may_be_computed(operators: Any) -> None:
    """Behind an adaptive step the scale of the input, and with it the bias, is known at run time only."""
    case, x, attributes, law = conv_case("3x3", 4, np.uint8)
    model = operators.model("LutQLinearConv", x, case.constants("x"), attributes)
    kept = [t for t in model.graph.initializer if t.name not in ("x_scale", "bias")]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.append(helper.make_tensor_value_info("x_scale", TensorProto.FLOAT, []))
    model.graph.input.append(helper.make_tensor_value_info("bias", TensorProto.INT32, [5]))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (observed,) = session.run(None, {"x": x, "x_scale": case.x.scale, "bias": case.bias})
    np.testing.assert_array_equal(observed, law.codes)
