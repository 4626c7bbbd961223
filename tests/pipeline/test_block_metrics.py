"""Channels of a block's output are those of its last layer, and the network's own outputs have no metric."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from postquant.passes.blocks import Block
from postquant.pipeline.block_metrics import channel_axes

TEXT = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3, 8, 8] x) => (float[N, 5] y)
    <float[4, 3, 3, 3] w, float[4, 6] u, float[6, 5] v> {
      [conv] c = Conv (x, w)
      r = Relu (c)
      m = ReduceMean <axes = [2], keepdims = 0> (r)
      t = Transpose <perm = [0, 2, 1]> (m)
      [product] h = MatMul (t, u)
      p = ReduceMean <axes = [1], keepdims = 0> (h)
      [last] y = MatMul (p, v)
    }
"""


def _model() -> ir.Model:
    proto = onnx.parser.parse_model(TEXT)
    for name, shape in {"w": (4, 3, 3, 3), "u": (4, 6), "v": (6, 5)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def _block(output: str, *layers: str) -> Block:
    return Block(output, (), (), output, layers)


def test_the_last_layer_tells_where_channels_are() -> None:
    blocks = [_block("r", "conv"), _block("h", "conv", "product"), _block("y", "last")]
    assert channel_axes(_model(), blocks) == {"r": -3, "h": -1}


def test_a_value_of_unknown_shape_has_no_channels() -> None:
    model = _model()
    next(value for node in model.graph for value in node.outputs if value.name == "r").shape = None
    assert channel_axes(model, [_block("r", "conv"), _block("h", "product")]) == {"h": -1}
