"""What Conv, ConvTranspose and Gemm with constant weights have in common: y = A x + b.

A per-channel scale or shift of the outputs or inputs of such a layer is a change of its numbers alone:

    s * (A x + b) + t  =  (s A) x + (s b + t)          rows of A, exact always
    A (s * x + t) + b  =  (A s) x + (A t + b)          columns of A; t only where every output sees every tap

Weight layouts (g groups, k taps):

| op            | weight            | outputs, axis     | inputs, axis    |
|---------------|-------------------|-------------------|-----------------|
| Conv          | (M, C/g, k...)    | M: 0              | C/g: 1, group of M |
| ConvTranspose | (C, M/g, k...)    | M/g: 1, group of C | C: 0           |
| Gemm          | (K, N), or (N, K) with transB | N     | K               |

Zero padding puts zeros, not ``t``, beside the input, and a transposed convolution shows each output only some
of its taps: there a shift of the inputs is not a shift of the outputs, and only ``t = 0`` folds.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.rewiring import Initializers, constant_tensor, derive, is_float_constant, is_op
from postquant.passes.semantics import channel_counts

Vector = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A Conv, ConvTranspose or Gemm whose numbers can be changed: how graph changes see it.

    Calibration sees the same nodes, and MatMul, as matrix products of rows: :class:`postquant.calib.layers.Layer`.

    Attributes:
        node: The node; its weight is a float constant, its bias one too (a vector per output) or absent.
    """

    node: ir.Node

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(constant_tensor(self.node.inputs[1]).shape.numpy())

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.node.attributes.get_int("group", 1)

    @property
    def rank(self) -> int:
        """Rank of the input and output."""
        return len(self.shape)

    @property
    def outputs(self) -> int:
        """Number of output channels (axis 1 of the output)."""
        return channel_counts(self.node, self.shape)[1]

    @property
    def inputs(self) -> int:
        """Number of input channels (axis 1 of the input)."""
        return channel_counts(self.node, self.shape)[0]

    @property
    def _transposed(self) -> bool:
        return bool(self.node.attributes.get_int("transB", 0))

    def sees_shift(self) -> bool:
        """Whether a shift of the inputs is a shift of the outputs: no zero padding, all taps everywhere."""
        node = self.node
        if node.op_type == "Gemm":
            return True
        if any(node.attributes.get_ints("pads", ())) or node.attributes.get_string("auto_pad", "NOTSET") not in (
            "NOTSET",
            "VALID",
        ):
            return False
        if node.op_type == "Conv":
            return True
        one_tap = all(size == 1 for size in self.shape[2:])
        dense = all(step == 1 for step in node.attributes.get_ints("strides", ()))
        grown = any(node.attributes.get_ints("output_padding", ())) or "output_shape" in node.attributes
        return one_tap and dense and not grown

    def fold_after(self, scale: Vector, shift: Vector, initializers: Initializers) -> None:
        """Makes the layer compute ``scale * y + shift``.

        Args:
            scale: () or (outputs,) float64.
            shift: () or (outputs,) float64.
            initializers: Of the layer's graph.
        """
        view, rows, _ = self._view()
        self._set_bias(self._bias() * scale + shift, initializers)
        self._scale(np.broadcast_to(scale, (self.outputs,)), view, rows, initializers)

    def fold_before(self, scale: Vector, shift: Vector, initializers: Initializers) -> None:
        """Makes the layer compute ``A (scale * x + shift) + b``; a shift only where :meth:`sees_shift`.

        Args:
            scale: () or (inputs,) float64.
            shift: () or (inputs,) float64.
            initializers: Of the layer's graph.
        """
        view, _, columns = self._view()
        if np.any(shift):
            weight = constant_tensor(self.node.inputs[1]).numpy().astype(np.float64).reshape(view)
            per_input = _along(np.broadcast_to(shift, (self.inputs,)), view, columns)
            seen = (weight * per_input).sum(axis=(columns, 3), keepdims=True)
            self._set_bias(self._bias() + seen.reshape(-1), initializers)
        self._scale(np.broadcast_to(scale, (self.inputs,)), view, columns, initializers)

    def complete(self, initializers: Initializers) -> bool:
        """Gives the layer a bias vector of zeros if it has none; whether it had none."""
        if len(self.node.inputs) > 2 and self.node.inputs[2] is not None:
            return False
        self._set_bias(np.zeros(()), initializers)
        return True

    def _view(self) -> tuple[tuple[int, int, int, int], int, int]:
        """The weight as (groups, a, b, taps), and which of a (1) and b (2) are outputs and which inputs."""
        groups, shape = self.groups, self.shape
        if self.node.op_type == "Gemm":
            view = (1, shape[0], shape[1], 1)
            return (view, 1, 2) if self._transposed else (view, 2, 1)
        view = (groups, shape[0] // groups, shape[1], math.prod(shape[2:]))
        return (view, 1, 2) if self.node.op_type == "Conv" else (view, 2, 1)

    def _bias(self) -> Vector:
        bias = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        if bias is None:
            return np.zeros(self.outputs)
        return np.broadcast_to(constant_tensor(bias).numpy().astype(np.float64).reshape(-1), (self.outputs,))

    def _set_bias(self, values: Vector, initializers: Initializers) -> None:
        dtype = constant_tensor(self.node.inputs[1]).dtype
        full = np.ascontiguousarray(np.broadcast_to(values, (self.outputs,)), dtype=dtype.numpy())
        initializers.set_input(self.node, 2, ir.Tensor(full, dtype=dtype), f"{self.node.name}.bias")

    def _scale(self, factors: Vector, view: tuple[int, ...], axis: int, initializers: Initializers) -> None:
        if np.all(factors == 1):
            return
        shape = self.shape
        aligned = _along(factors, view, axis)
        tensor = derive(
            constant_tensor(self.node.inputs[1]), lambda w: (w.reshape(view) * aligned).reshape(shape), shape
        )
        initializers.replace(self.node, 1, tensor)


def as_layer(node: ir.Node | None) -> Layer | None:
    """The layer that a node is, or None if its numbers are no constants or have another form."""
    if node is None or not is_op(node, "Conv", "ConvTranspose", "Gemm") or not is_float_constant(node.inputs[1]):
        return None
    layer = Layer(node)
    if node.op_type == "Gemm" and (
        node.attributes.get_float("alpha", 1.0) != 1.0 or node.attributes.get_float("beta", 1.0) != 1.0
    ):
        return None  # NormalizeGemmPass removes these
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return layer
    if not is_float_constant(bias):
        return None
    shape = constant_tensor(bias).shape.numpy()
    vector = math.prod(shape) in (1, layer.outputs) and math.prod(shape[:-1]) == 1
    return layer if vector else None


def _along(values: Vector, view: tuple[int, ...], axis: int) -> Vector:
    """(groups * n,) values in a shape that broadcasts over ``view``, where ``axis`` has n entries per group."""
    shape = [1, 1, 1, 1]
    shape[0], shape[axis] = view[0], view[axis]
    return values.reshape(shape)
