"""What one sample costs and shows, against shapes counted by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from postquant.calib.input_spec import input_specs
from postquant.calib.open_source import open_source
from postquant.calib.work import ForwardWork, forward_work


def work_of(text: str, weights: dict[str, tuple[int, ...]], samples: np.ndarray) -> ForwardWork:
    """Of a graph with random weights of these shapes."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.random(shape, np.float32), name))
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type} {index}"
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    return forward_work(model, open_source(samples, input_specs(model)))


def test_an_image_out_shows_its_pixels() -> None:
    # 12 x 8 pixels; strides of two leave 6 x 4, which a transposed convolution doubles again.
    text = """m (float[N,3,H,W] x) => (float[N,2,H,W] y) {
        a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w)
        b = Relu(a)
        y = ConvTranspose <strides = [2, 2]> (b, v) }"""
    found = work_of(text, {"w": (5, 3, 3, 3), "v": (5, 2, 2, 2)}, np.ones((4, 3, 12, 8), np.float32))
    assert found.positions == 6 * 4
    assert found.products == 6 * 4 * 5 * (3 * 9) + 12 * 8 * 2 * (5 * 4)


def test_groups_count_their_own_channels() -> None:
    text = """m (float[N,6,H,W] x) => (float[N,6,H,W] y) { y = Conv <pads = [1, 1, 1, 1], group = 6> (x, w) }"""
    found = work_of(text, {"w": (6, 1, 3, 3)}, np.ones((4, 6, 7, 5), np.float32))
    assert found == ForwardWork(7 * 5 * 6 * 9, 7 * 5, {"Conv 0": 35})


def test_a_classifier_s_last_layer_shows_one_position() -> None:
    text = """m (float[N,3,8,8] x) => (float[N,10] y) {
        a = Conv (x, w)
        b = GlobalAveragePool(a)
        c = Flatten(b)
        y = Gemm <transB = 1> (c, v) }"""
    found = work_of(text, {"w": (4, 3, 1, 1), "v": (10, 4)}, np.ones((4, 3, 8, 8), np.float32))
    assert found == ForwardWork(64 * 4 * 3 + 10 * 4, 1, {"Conv 0": 64, "Gemm 3": 1})


def test_a_matrix_product_shows_its_rows() -> None:
    text = "m (float[N,L,16] x) => (float[N,L,32] y) { y = MatMul(x, w) }"
    found = work_of(text, {"w": (16, 32)}, np.ones((4, 9, 16), np.float32))
    assert found == ForwardWork(9 * 32 * 16, 9, {"MatMul 0": 9})


def test_a_network_without_layers_is_no_work() -> None:
    text = "m (float[N,4] x) => (float[N,4] y) { y = Relu(x) }"
    assert work_of(text, {}, np.ones((4, 4), np.float32)) == ForwardWork(0.0, 1)
