"""Rows times matrix equals the operator, for every attribute, against onnxruntime."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from postquant.calib.layers import Layer, layers_of
from postquant.passes import semantics

Array = np.ndarray[Any, np.dtype[np.float32]]


def node_model(op_type: str, x: Array, weight: Array, bias: Array | None, **attributes: Any) -> onnx.ModelProto:
    inputs = ["x", "w", *([] if bias is None else ["b"])]
    node = onnx.helper.make_node(op_type, inputs, ["y"], name="node", **attributes)
    constants = {"w": weight} | ({} if bias is None else {"b": bias})
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto, x: Array) -> Array:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": x})[0]
    return result


def check(op_type: str, x: Array, weight: Array, bias: Array | None, **attributes: Any) -> Layer:
    """Everything that a layer promises; returns it."""
    model = node_model(op_type, x, weight, bias, **attributes)
    try:
        expected = run(model, x)
    except Exception:  # noqa: BLE001 - onnxruntime's exceptions have no base class of their own
        assume(False)
    (layer,) = layers_of(ir.from_proto(model))
    matrix = layer.matrix(weight)
    assert matrix.shape == (layer.groups, layer.depth, layer.out_channels // layer.groups)
    np.testing.assert_array_equal(layer.tensor(matrix), weight)
    rows = layer.rows(x)
    assert rows.dtype == np.float32
    assert rows.shape == (layer.positions(x.shape), layer.groups, layer.depth)
    product = layer.gain * np.einsum("pgk,gkm->pgm", rows.astype(np.float64), matrix.astype(np.float64))
    flat = product.reshape(len(rows), layer.out_channels) + (0 if bias is None else bias)
    # The operator's own layout, positions first and channels last.
    spatial = op_type in ("Conv", "ConvTranspose")
    theirs = np.moveaxis(expected, 1, -1) if spatial else expected
    assert theirs.size == flat.size
    np.testing.assert_allclose(flat, theirs.reshape(flat.shape), rtol=1e-4, atol=1e-4)
    if len(rows):
        chosen = np.arange(0, len(rows), 2)
        np.testing.assert_array_equal(layer.rows(x, chosen), rows[chosen])
    # A row multiplies the input channel that it says.
    channels = layer.channel_of_row()
    assert channels.shape == (layer.groups, layer.depth)
    marked = np.broadcast_to(np.arange(layer.in_channels, dtype=np.float32) + 1, (*x.shape[:1], layer.in_channels))
    if spatial:
        marked = np.broadcast_to(marked.reshape(*marked.shape, *[1] * (x.ndim - 2)), x.shape)
        seen = layer.rows(np.ascontiguousarray(marked))
        assert (((seen == channels + 1) | (seen == 0)).all()) if len(seen) else True
    return layer


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes and attributes of a convolution of any rank."""
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    kernel = each(1, 3)
    attributes: dict[str, Any] = {"kernel_shape": kernel, "group": draw(st.integers(1, 3))}
    if draw(st.booleans()):
        attributes["strides"] = each(1, 3)
    if draw(st.booleans()):
        attributes["dilations"] = each(1, 2)
    padding = draw(st.sampled_from(["none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if padding == "pads":
        attributes["pads"] = [*each(0, 2), *each(0, 2)]
    elif padding != "none":
        attributes["auto_pad"] = padding
    return {
        "attributes": attributes,
        "size": each(1, 7 if rank < 3 else 4),
        "batch": draw(st.integers(1, 2)),
        "inputs": draw(st.integers(1, 2)),
        "outputs": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=150)
@given(windows())
def test_conv(case: dict[str, Any]) -> None:
    attributes, seed = case["attributes"], case["seed"]
    groups, kernel = attributes["group"], attributes["kernel_shape"]
    x = numbers(seed, case["batch"], groups * case["inputs"], *case["size"])
    weight = numbers(seed + 1, groups * case["outputs"], case["inputs"], *kernel)
    layer = check("Conv", x, weight, numbers(seed + 2, groups * case["outputs"]), **attributes)
    assert layer.depth == case["inputs"] * math.prod(kernel)
    assert layer.depthwise == (groups > 1 and case["inputs"] == 1)
    assert layer.scale_axis == 0


@settings(max_examples=150)
@given(windows(), st.booleans(), st.sampled_from(["nothing", "output_padding", "output_shape"]))
def test_conv_transpose(case: dict[str, Any], with_bias: bool, extra: str) -> None:
    attributes, seed = dict(case["attributes"]), case["seed"]
    groups, kernel = attributes["group"], attributes["kernel_shape"]
    strides = attributes.get("strides", [1] * len(kernel))
    if extra == "output_padding":
        attributes["output_padding"] = [stride - 1 for stride in strides]
    if extra == "output_shape":
        attributes.pop("pads", None)
        dilations = attributes.get("dilations", [1] * len(kernel))
        attributes["output_shape"] = [
            (size - 1) * stride + (taps - 1) * dilation + 1 - (1 if taps > 1 and size > 1 else 0)
            for size, stride, taps, dilation in zip(case["size"], strides, kernel, dilations, strict=True)
        ]
    x = numbers(seed, case["batch"], groups * case["inputs"], *case["size"])
    weight = numbers(seed + 1, groups * case["inputs"], case["outputs"], *kernel)
    bias = numbers(seed + 2, groups * case["outputs"]) if with_bias else None
    layer = check("ConvTranspose", x, weight, bias, **attributes)
    assert layer.scale_axis == (1 if groups == 1 else None)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_gemm(transposed: int, alpha: float, rows: int) -> None:
    weight = numbers(1, 4, 6)
    x = numbers(2, rows, 6 if transposed else 4)
    layer = check("Gemm", x, weight, numbers(3, 4 if transposed else 6), transB=transposed, alpha=alpha)
    assert layer.gain == alpha
    assert layer.scale_axis == (0 if transposed else 1)


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (2, 1, 3, 4)])
def test_matmul(shape: tuple[int, ...]) -> None:
    layer = check("MatMul", numbers(1, *shape), numbers(2, 4, 6), None)
    assert not layer.spatial
    assert not layer.depthwise
    assert (layer.in_channels, layer.out_channels, layer.depth) == (4, 6, 4)


def test_numbers_of_a_quantizer_fit_the_matrix() -> None:
    """Scales per channel, as the (G, 1, M) that broadcast over the matrix, scale the channels that they belong to."""
    for op_type, shape, group in (("Conv", (6, 2, 3, 3), 3), ("ConvTranspose", (4, 6, 2, 2), 1), ("MatMul", (4, 6), 1)):
        weight = numbers(0, *shape)
        x = numbers(1, 1, 6 if group == 3 else 4, 5, 5) if op_type != "MatMul" else numbers(1, 5, 4)
        attributes = {"group": group} if op_type != "MatMul" else {}
        (layer,) = layers_of(ir.from_proto(node_model(op_type, x, weight, None, **attributes)))
        scale = np.arange(1, 7, dtype=np.float32)
        axis = layer.scale_axis
        assert axis is not None
        wide = scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        np.testing.assert_array_equal(layer.matrix(weight * wide), layer.matrix(weight) * layer.per_output(scale))
        np.testing.assert_array_equal(layer.per_scale(layer.per_output(scale)), scale)
        assert layer.per_output(np.ones((), np.float32)).shape == (group, 1, 6 // group)


def test_what_is_no_layer() -> None:
    def layer(op_type: str, weight: Array, x: Array, **attributes: Any) -> Layer | None:
        model = ir.from_proto(node_model(op_type, x, weight, None, **attributes))
        return Layer.of(next(iter(model.graph)))

    assert layer("Gemm", numbers(0, 4, 6), numbers(1, 4, 3), transA=1) is None
    assert layer("MatMul", numbers(0, 2, 4, 6), numbers(1, 2, 3, 4)) is None
    assert layer("MatMul", numbers(0, 4), numbers(1, 3, 4)) is None
    assert layer("Add", numbers(0, 4), numbers(1, 3, 4)) is None
    head = '<ir_version: 8, opset_import: ["" : 17]>'
    text = head + "g (float[4,4] a, float[4,4] b) => (float[4,4] y) { y = MatMul (a, b) }"
    assert layers_of(ir.from_onnx_text(text)) == []
    left = onnx.parser.parse_model(text.replace("float[4,4] a, ", "").replace("MatMul (a", "MatMul (w"))
    left.graph.initializer.append(onnx.numpy_helper.from_array(numbers(0, 4, 4), "w"))
    model = ir.from_proto(left)
    assert semantics.weight_index(next(iter(model.graph))) == 0
    assert layers_of(model) == []
