"""Layers with explicit rows; property tests have no deadline: a busy machine is no failure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from postquant.calib.layers import Layer
from postquant.calib.moments import Moments, MomentSums
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

hypothesis.settings.register_profile("postquant", deadline=None)
hypothesis.settings.load_profile("postquant")

Array = np.ndarray[Any, np.dtype[np.float32]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A layer, its weight, and everything that it ever reads.

    Attributes:
        layer: The layer.
        weight: Its weight tensor.
        rows: (P, G, K) inputs.
    """

    layer: Layer
    weight: Array
    rows: Array

    def moments(self) -> Moments:
        """Of all rows."""
        sums = MomentSums(self.layer.groups, self.layer.depth)
        sums.update(self.rows)
        return sums.result()

    def start(self, bits: int, *, per_channel: bool = True) -> TensorQuantizer:
        """The quantizer with the largest magnitude at the end of the code range."""
        axis = self.layer.scale_axis if per_channel else None
        others = None if axis is None else tuple(i for i in range(self.weight.ndim) if i != axis)
        top = np.abs(self.weight).max(axis=others)
        return TensorQuantizer.from_range(QuantSpec(bits, True, True, axis=axis, narrow=True), -top, top)

    def outputs(self, weight: Array, *, centred: bool = False) -> Doubles:
        """(P, G, M) products of the rows with a weight tensor, in double precision."""
        rows = self.rows.astype(np.float64)
        if centred:
            rows = rows - rows.mean(0)
        products: Doubles = np.einsum("pgk,gkm->pgm", rows, self.layer.matrix(weight).astype(np.float64))
        return products

    def errors(self, quantizer: TensorQuantizer, *, centred: bool = False) -> Doubles:
        """(G, M) mean squared error of the outputs."""
        difference = self.outputs(quantizer.simulate(self.weight) - self.weight, centred=centred)
        errors: Doubles = np.square(difference).mean(0)
        return errors


def make_layer_case(kind: str, seed: int = 0, *, count: int = 200, inputs: int = 6, outputs: int = 5) -> LayerCase:
    """A layer of a kind: Conv, grouped, depthwise, ConvTranspose, transposed groups, Gemm, MatMul.

    Its inputs are correlated, some channels are much larger than others, and their mean is not zero.
    """
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
        "Conv": ("Conv", (outputs, inputs, 2, 2), {}),
        "grouped": ("Conv", (2 * outputs, inputs, 2, 2), {"group": 2}),
        "depthwise": ("Conv", (inputs, 1, 3, 3), {"group": inputs}),
        "ConvTranspose": ("ConvTranspose", (inputs, outputs, 2, 2), {}),
        "transposed groups": ("ConvTranspose", (2 * inputs, outputs, 2, 2), {"group": 2}),
        "Gemm": ("Gemm", (outputs, inputs), {"transB": 1}),
        "MatMul": ("MatMul", (inputs, outputs), {}),
    }
    op_type, shape, attributes = shapes[kind]
    weight = rng.standard_normal(shape).astype(np.float32)
    node = onnx.helper.make_node(op_type, ["x", "w"], ["y"], name="node", **attributes)
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([node], "g", [x], [y], [onnx.numpy_helper.from_array(weight, "w")])
    layer = Layer.of(next(iter(ir.from_proto(onnx.helper.make_model(graph)).graph)))
    assert layer is not None
    mixing = rng.standard_normal((layer.groups, layer.depth, layer.depth)) / np.sqrt(layer.depth)
    sizes = np.exp(rng.standard_normal((layer.groups, layer.depth)))
    rows = np.einsum("pgk,gkl->pgl", rng.standard_normal((count, layer.groups, layer.depth)), mixing)
    rows = (rows + 0.5 * rng.standard_normal((layer.groups, layer.depth))) * sizes
    return LayerCase(layer, weight, rows.astype(np.float32))


@pytest.fixture(scope="session")
def layer_case() -> Callable[..., LayerCase]:
    """Makes layers with explicit rows."""
    return make_layer_case
