"""Weighted nodes as matrix products: rows of inputs times a weight matrix.

A Conv, ConvTranspose, Gemm or MatMul with a constant weight computes, for every output position ``p`` and group ``g``,

    o[p, g, :] = x[p, g, :] @ w[g, :, :] + b[g, :]

with ``x`` of shape (P, G, K) (the patch of inputs that the position sees), ``w`` of shape (G, K, M) and ``b`` of shape
(G, M): K = C_in / G * kernel taps, M = C_out / G. Everything that calibration does to a weighted node (second moments,
scale search, bias correction) is written once, on these matrices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.tap_positions import Taps, tap_positions
from postquant.passes import semantics

T = TypeVar("T", bound=np.generic)
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weighted node whose input 0 is the activation and input 1 the constant weight, as matrix products of rows.

    It is for reading only; graph changes see Conv, ConvTranspose and Gemm as :class:`postquant.passes.layer.Layer`.

    Attributes:
        node: The node.
        weight: Name of the weight initializer.
        bias: Name of the bias initializer, for MatMul the vector that the next Add adds; None if there is none.
        shape: Shape of the weight.
    """

    node: ir.Node
    weight: str
    bias: str | None
    shape: tuple[int, ...]

    @classmethod
    def of(cls, node: ir.Node) -> Layer | None:
        """The layer of a node, or None where the weight is not a constant right factor of rank 2 or more."""
        if semantics.weight_index(node) != 1:
            return None
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        assert weight.name is not None
        shape = tuple(weight.const_value.shape.numpy())
        if node.op_type == "MatMul" and len(shape) != 2:
            return None
        if node.op_type == "Gemm" and _attribute(node, "transA", 0):
            return None
        bias = semantics.bias_of(node)
        return cls(node, weight.name, None if bias is None else bias.name, shape)

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name or ""

    @property
    def input(self) -> str:
        """Name of the activation that the node reads."""
        value = self.node.inputs[0]
        assert value is not None
        assert value.name is not None
        return value.name

    @property
    def output(self) -> str:
        """Name of the node's output."""
        name = self.node.outputs[0].name
        assert name is not None
        return name

    @property
    def spatial(self) -> bool:
        """Whether the node is a convolution."""
        return self.node.op_type in ("Conv", "ConvTranspose")

    @property
    def groups(self) -> int:
        """G."""
        return int(_attribute(self.node, "group", 1)) if self.spatial else 1

    @property
    def depthwise(self) -> bool:
        """Whether every group has one input channel."""
        return self.spatial and self.groups > 1 and self.in_channels == self.groups

    @property
    def in_channels(self) -> int:
        """C_in."""
        return semantics.channel_counts(self.node, self.shape)[0]

    @property
    def out_channels(self) -> int:
        """C_out."""
        return semantics.channel_counts(self.node, self.shape)[1]

    @property
    def depth(self) -> int:
        """K, the number of products in one output."""
        taps = math.prod(self.shape[2:]) if self.spatial else 1
        return self.in_channels // self.groups * taps

    @property
    def scale_axis(self) -> int | None:
        """Axis of the weight that has a scale per channel, or None where one scale serves all."""
        return semantics.channel_axis(self.node)

    @property
    def _transposed(self) -> bool:
        return self.node.op_type == "Gemm" and bool(_attribute(self.node, "transB", 0))

    @property
    def gain(self) -> float:
        """Factor of the product (Gemm's alpha)."""
        return float(_attribute(self.node, "alpha", 1.0)) if self.node.op_type == "Gemm" else 1.0

    def matrix(self, weight: npt.NDArray[T]) -> npt.NDArray[T]:
        """The weight tensor as (G, K, M)."""
        if self.node.op_type == "Conv":
            grouped = weight.reshape(self.groups, self.shape[0] // self.groups, -1)
            return np.ascontiguousarray(grouped.transpose(0, 2, 1))
        if self.node.op_type == "ConvTranspose":
            by_tap = weight.reshape(self.groups, self.shape[0] // self.groups, self.shape[1], -1)
            return np.ascontiguousarray(by_tap.transpose(0, 1, 3, 2)).reshape(self.groups, self.depth, self.shape[1])
        return (weight.T if self._transposed else weight)[np.newaxis]

    def tensor(self, matrix: npt.NDArray[T]) -> npt.NDArray[T]:
        """The inverse of :meth:`matrix`."""
        if self.node.op_type == "Conv":
            return np.ascontiguousarray(matrix.transpose(0, 2, 1)).reshape(self.shape)
        if self.node.op_type == "ConvTranspose":
            taps = self.shape[2:]
            grouped = matrix.reshape(self.groups, self.shape[0] // self.groups, math.prod(taps), self.shape[1])
            return np.ascontiguousarray(grouped.transpose(0, 1, 3, 2)).reshape(self.shape)
        return np.ascontiguousarray(matrix[0].T if self._transposed else matrix[0])

    def per_output(self, scale: npt.NDArray[T]) -> npt.NDArray[T]:
        """A weight quantizer's () or (C,) numbers as (G, 1, M), to broadcast over :meth:`matrix`."""
        if scale.ndim == 0:
            return np.broadcast_to(scale, (self.groups, 1, self.out_channels // self.groups))
        return scale.reshape(self.groups, 1, -1)

    def per_scale(self, values: npt.NDArray[T]) -> npt.NDArray[T]:
        """The inverse of :meth:`per_output` for a quantizer with a scale per channel."""
        return values.reshape(-1)

    def channel_of_row(self) -> IntArray:
        """(G, K) input channel that each row of :meth:`matrix` multiplies."""
        taps = self.depth // (self.in_channels // self.groups)
        return np.repeat(np.arange(self.in_channels), taps).reshape(self.groups, self.depth)

    def positions(self, shape: Sequence[int]) -> int:
        """Number of output positions (rows) for an input of this shape."""
        if not self.spatial:
            return math.prod(shape[:-1])
        return int(shape[0]) * math.prod(self._taps(tuple(shape[2:])).out)

    def rows(self, x: FloatArray, chosen: IntArray | None = None) -> FloatArray:
        """The rows of an input.

        Args:
            x: The activation, float32, in the node's own layout.
            chosen: (P,) output positions, each in ``range(positions(x.shape))``; all when None.

        Returns:
            (P, G, K) float32.
        """
        if not self.spatial:
            flat = x.reshape(-1, x.shape[-1])
            return (flat if chosen is None else flat[chosen])[:, np.newaxis]
        taps = self._taps(x.shape[2:])
        count = math.prod(taps.out)
        if chosen is None:
            chosen = np.arange(x.shape[0] * count)
        sample, position = np.divmod(chosen, count)
        channels = x.shape[1]
        if taps.pointwise:
            rows = x.reshape(x.shape[0], channels, -1)[sample, :, position]
        else:
            # One more, zero, position stands for everything outside of the input.
            padded = np.zeros((x.shape[0], channels, math.prod(x.shape[2:]) + 1), np.float32)
            padded[:, :, :-1] = x.reshape(x.shape[0], channels, -1)
            rows = padded[sample[:, np.newaxis], :, taps.source(position)]  # (P, taps, C)
            rows = rows.transpose(0, 2, 1)
        return np.ascontiguousarray(rows).reshape(len(chosen), self.groups, self.depth)

    def _taps(self, size: tuple[int, ...]) -> Taps:
        node = self.node
        kernel = self.shape[2:]
        rank = len(kernel)
        strides = tuple(_attribute(node, "strides", [1] * rank))
        dilations = tuple(_attribute(node, "dilations", [1] * rank))
        pads = tuple(_attribute(node, "pads", [0] * 2 * rank))
        auto = _attribute(node, "auto_pad", "NOTSET")
        extra = tuple(_attribute(node, "output_padding", [0] * rank))
        given = tuple(_attribute(node, "output_shape", []))
        return tap_positions(
            node.op_type == "ConvTranspose", tuple(size), kernel, strides, dilations, pads, str(auto), extra, given
        )


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def layers_of(model: ir.Model) -> list[Layer]:
    """The layers of a model's main graph in topological order."""
    return [layer for node in model.graph if (layer := Layer.of(node)) is not None]
