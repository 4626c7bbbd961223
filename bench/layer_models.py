"""Models of one layer, float in and float out, in every form that a runtime offers for it.

All forms hold the same weights, levels of the POST code book times a scale per output channel, so that the outputs of
the integer forms are equal: a comparison of speeds is one of the same computation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from postquant.runtime_ops.code_book import post_table
from postquant.runtime_ops.law_lut import pack_codes
from postquant.runtime_ops.ops import functions_for
from postquant.runtime_ops.schema import DOMAIN, VERSION

Array = npt.NDArray[Any]
_OPSET, _IR = 21, 10
_FLOAT = onnx.TensorProto.FLOAT


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer with random weights.

    Attributes:
        name: For ``--layers`` and the table.
        x_shape: Shape of its input: (N, C, H, W) of a convolution, (rows, K) of a matrix product.
        w_shape: Shape of its weight: (M, C/group, kh, kw), or (outputs, K).
        group: Groups of a convolution.
    """

    name: str
    x_shape: Sequence[int]
    w_shape: Sequence[int]
    group: int = 1

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution with "same" padding, else a matrix product."""
        return len(self.w_shape) > 2

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the convolution."""
        if not self.is_convolution:
            return {}
        kernel = list(self.w_shape[2:])
        pads = [size // 2 for size in kernel] * 2
        return {"group": self.group, "strides": [1] * len(kernel), "dilations": [1] * len(kernel), "pads": pads}


LAYERS = (
    Layer("conv 3x3 64 ch 56x56", (1, 64, 56, 56), (64, 64, 3, 3)),
    Layer("conv 3x3 256 ch 14x14", (1, 256, 14, 14), (256, 256, 3, 3)),
    Layer("conv 1x1 256->1024 14x14", (1, 256, 14, 14), (1024, 256, 1, 1)),
    Layer("depthwise 3x3 144 ch 56x56", (1, 144, 56, 56), (144, 1, 3, 3), group=144),
    Layer("MatMul 128x768x768", (128, 768), (768, 768)),
    Layer("MatMul 1x4096x4096", (1, 4096), (4096, 4096)),
)


class Forms:
    """The forms of a layer.

    Args:
        layer: The layer.
        bits: Bits of its codes, 2 or 4.
    """

    def __init__(self, layer: Layer, bits: int) -> None:
        rng = np.random.default_rng(7)
        self.layer, self.bits = layer, bits
        self.x = np.maximum(rng.normal(0.5, 0.6, tuple(layer.x_shape)), 0).astype(np.float32)
        outputs, terms = layer.w_shape[0], math.prod(layer.w_shape[1:])
        self._table = post_table(bits)
        # Rare large levels, as a bell-shaped weight has them.
        levels = np.rint(rng.normal(0, 0.22, (outputs, terms)) * 2**bits + (2**bits - 1) / 2)
        self._codes = np.clip(levels, 0, 2**bits - 1).astype(np.uint8)
        self._w = self._table[self._codes].reshape(layer.w_shape)
        self._w_scale = rng.uniform(0.8, 1.2, outputs).astype(np.float32) / np.float32(40 * math.sqrt(terms))
        self._bias = rng.integers(-2000, 2000, outputs).astype(np.int32)
        self._x_scale, self._y_scale = np.float32(3 / 255), np.float32(4 / 255)

    @property
    def feeds(self) -> dict[str, Array]:
        """The input."""
        return {"x": self.x}

    def floating(self) -> bytes:
        """Conv or Gemm in float."""
        constants = {"w": self._real_weight(), "b": self._real_bias()}
        return self._model([self._layer_node("x", "w", "b", "y")], constants)

    def qdq(self) -> bytes:
        """Quantize-dequantize pairs around it, u8 activations and s8 weights: QLinearConv, QGemm."""
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xr"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wr"], axis=0),
            helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["br"], axis=0),
            self._layer_node("xr", "wr", "br", "yr"),
            helper.make_node("QuantizeLinear", ["yr", "ys", "yz"], ["yq"]),
            helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
        ]
        constants = {
            **self._numbers(),
            "w": self._w,
            "ws": self._w_scale,
            "wz": np.zeros_like(self._w_scale, np.int8),
            "b": self._bias,
            "bs": self._x_scale * self._w_scale,
            "bz": np.zeros_like(self._bias),
        }
        return self._model(nodes, constants)

    def qdq_matmul(self) -> bytes:
        """The same as MatMul without a bias: QLinearMatMul."""
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xr"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wr"], axis=1),
            helper.make_node("MatMul", ["xr", "wr"], ["yr"]),
            helper.make_node("QuantizeLinear", ["yr", "ys", "yz"], ["yq"]),
            helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
        ]
        constants = {
            **self._numbers(),
            "w": np.ascontiguousarray(self._w.T),
            "ws": self._w_scale,
            "wz": np.zeros_like(self._w_scale, np.int8),
        }
        return self._model(nodes, constants)

    def n_bits(self, block: int, accuracy: int) -> bytes:
        """onnxruntime's MatMulNBits: 4-bit weights in blocks, float activations.

        Args:
            block: Inputs per scale.
            accuracy: 0: products in float; 4: onnxruntime quantizes the activations to 8 bits.
        """
        outputs, terms = self.layer.w_shape
        rng = np.random.default_rng(8)
        constants: dict[str, Array] = {
            "w": rng.integers(0, 256, (outputs, terms // block, block // 2)).astype(np.uint8),
            "ws": np.full((outputs, terms // block), 0.01, np.float32),
        }
        attributes: dict[str, Any] = {"K": terms, "N": outputs, "bits": 4, "block_size": block}
        attributes["accuracy_level"] = accuracy
        node = helper.make_node("MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", **attributes)
        return self._model([node], constants)

    def look_up(self) -> bytes:
        """LutQLinearConv or LutQLinearMatMul between QuantizeLinear and DequantizeLinear."""
        operator = "LutQLinearConv" if self.layer.is_convolution else "LutQLinearMatMul"
        numbers = self._numbers()
        constants: dict[str, Array] = {
            "xs": numbers["xs"],
            "xz": numbers["xz"],
            "codes": pack_codes(self._codes, self.bits),
            "table": self._table,
            "ws": self._w_scale,
            "b": self._bias,
            "ys": numbers["ys"],
            "yz": numbers["yz"],
        }
        attributes = {"bits": self.bits, "w_shape": list(self.layer.w_shape), **self.layer.attributes}
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node(operator, ["xq", *constants], ["yq"], domain=DOMAIN, **attributes),
            helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
        ]
        return self._model(nodes, constants, functions_for([operator], opset=_OPSET))

    def _numbers(self) -> dict[str, Array]:
        return {
            "xs": np.asarray(self._x_scale),
            "xz": np.asarray(0, np.uint8),
            "ys": np.asarray(self._y_scale),
            "yz": np.asarray(128, np.uint8),
        }

    def _real_weight(self) -> Array:
        scale = self._w_scale.reshape(-1, *[1] * (self._w.ndim - 1))
        return np.asarray(self._w * scale, np.float32)

    def _real_bias(self) -> Array:
        return np.asarray(self._bias * self._x_scale * self._w_scale, np.float32)

    def _layer_node(self, x: str, w: str, b: str, y: str) -> onnx.NodeProto:
        if self.layer.is_convolution:
            return helper.make_node("Conv", [x, w, b], [y], **self.layer.attributes)
        return helper.make_node("Gemm", [x, w, b], [y], transB=1)

    def _model(
        self, nodes: list[onnx.NodeProto], constants: dict[str, Array], functions: Sequence[onnx.FunctionProto] = ()
    ) -> bytes:
        x = helper.make_tensor_value_info("x", _FLOAT, self.x.shape)
        y = helper.make_tensor_value_info("y", _FLOAT, None)
        initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
        graph = helper.make_graph(nodes, "layer", [x], [y], initializers)
        domains = {"": _OPSET, DOMAIN: VERSION, "com.microsoft": 1}
        imports = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        model = helper.make_model(graph, opset_imports=imports, ir_version=_IR, functions=functions)
        return bytes(model.SerializeToString())
