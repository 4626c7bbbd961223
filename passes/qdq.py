"""Builds the QuantizeLinear, Clip and DequantizeLinear nodes of one tensor: :class:`Builder`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.weight_codes import codes_tensor
from postquant.runtime_ops.quantizer import TensorQuantizer


class Builder:
    """Adds nodes and initializers with systematic, unique names to a graph.

    Args:
        graph: Changed in place.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._shared: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._names = set(graph.initializers)
        self._names.update(v.name for v in graph.inputs if v.name)
        for node in graph.all_nodes():  # nested graphs see the names of the outer one
            self._names.add(node.name or "")
            self._names.update(v.name for v in node.outputs if v.name)
            self._names.update(v.name for v in node.inputs if v is not None and v.name)

    def unique(self, name: str) -> str:
        """``name``, or ``name_1``, ``name_2`` ... where the graph has it already; it is taken from now on."""
        result, number = name, 0
        while result in self._names:
            number += 1
            result = f"{name}_{number}"
        self._names.add(result)
        return result

    def initializer(self, name: str, tensor: ir.TensorProtocol | npt.NDArray[np.generic]) -> ir.Value:
        """A new initializer."""
        name = self.unique(name)
        if isinstance(tensor, np.ndarray | np.generic):
            tensor = ir.Tensor(np.asarray(tensor), name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value

    def shared_initializer(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """An initializer with these values: a new one, or the one that an earlier call made."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._shared:
            self._shared[key] = self.initializer(name, array)
        return self._shared[key]

    def quantize_dequantize(
        self,
        source: ir.Value,
        quantizer: TensorQuantizer,
        name: str,
        *,
        low: int,
        high: int,
        saturate: bool,
        output: str | None = None,
        packed: bool = False,
    ) -> ir.Value:
        """Appends ``source -> QuantizeLinear [-> Clip] -> DequantizeLinear`` behind the source's producer.

        Args:
            source: float32 value to quantize.
            quantizer: Scale and zero point, one each.
            name: Prefix of names.
            low: Smallest code that may occur.
            high: Largest code that may occur.
            saturate: Whether a Clip is added where the container holds more than ``[low, high]``.
            output: Name of the dequantized value, else ``<name>_dequantized``.
            packed: Whether 4-bit codes are stored as ONNX UINT4 / INT4.

        Returns:
            The dequantized value.
        """
        spec = quantizer.spec
        dtype = np.dtype(spec.container)
        container = ir.DataType[spec.container.upper()]
        limits = np.iinfo(dtype)
        smallest, largest = int(limits.min), int(limits.max)
        full = (spec.qmin, spec.qmax) == (low, high) and not spec.narrow
        if packed and spec.bits == 4 and (full or not saturate):
            container = ir.DataType.INT4 if spec.signed else ir.DataType.UINT4
            zero = quantizer.zero_point.astype(container.numpy())
            smallest, largest = low, high
        else:
            zero = quantizer.zero_point.astype(dtype)
        scale = self.initializer(f"{name}_scale", quantizer.scale)
        zero_point = self.initializer(f"{name}_zero_point", ir.Tensor(zero))
        after = source.producer()
        codes = self._append(
            "QuantizeLinear", [source, scale, zero_point], f"{name}_quantized", container, source, after
        )
        if saturate and (low > smallest or high < largest):
            bounds = [
                self.initializer(f"{name}_low", np.asarray(low, dtype)),
                self.initializer(f"{name}_high", np.asarray(high, dtype)),
            ]
            codes = self._append("Clip", [codes, *bounds], f"{name}_saturated", container, source, codes.producer())
        return self._append(
            "DequantizeLinear",
            [codes, scale, zero_point],
            output or f"{name}_dequantized",
            ir.DataType.FLOAT,
            source,
            codes.producer(),
            exact=output is not None,
        )

    def saturate_fully(self, codes: ir.Value) -> None:
        """Puts a Clip that changes nothing between 8-bit codes and their readers."""
        dtype = codes.dtype
        assert dtype is not None
        limits = np.iinfo(dtype.numpy())
        name = (codes.name or "").removesuffix("_quantized")
        uses = tuple(codes.uses())
        bounds = [
            self.initializer(f"{name}_low", np.asarray(limits.min, dtype.numpy())),
            self.initializer(f"{name}_high", np.asarray(limits.max, dtype.numpy())),
        ]
        result = self._append("Clip", [codes, *bounds], f"{name}_saturated", dtype, codes, codes.producer())
        for use in uses:
            use.node.replace_input_with(use.idx, result)

    def barrier(self, value: ir.Value) -> ir.Value:
        """A copy of a float value behind a Max of one value, which onnxruntime does not look through."""
        dtype = value.dtype or ir.DataType.FLOAT
        return self._append("Max", [value], f"{value.name}_barrier", dtype, value, value.producer())

    def dequantize_weight(
        self, weight: ir.Value, quantizer: TensorQuantizer, *, scale: npt.NDArray[np.float32], packed: bool
    ) -> None:
        """Replaces a float initializer by its codes and a DequantizeLinear.

        Args:
            weight: The initializer; it disappears.
            quantizer: Its quantizer, which makes the codes.
            scale: What one code step stands for in the graph.
            packed: Whether codes of at most 4 bits are stored as ONNX INT4.
        """
        name = weight.name
        tensor = weight.const_value
        assert name is not None
        assert tensor is not None
        spec = quantizer.spec
        packed = packed and spec.bits <= 4 and spec.signed and not spec.has_table
        codes = self.initializer(
            f"{name}_quantized", codes_tensor(tensor, quantizer, f"{name}_quantized", packed=packed)
        )
        zero = quantizer.zero_point.astype(codes.dtype.numpy() if codes.dtype is not None else spec.container)
        self._dequantize(weight, codes, scale, zero, spec.axis)

    def dequantize_bias(self, bias: ir.Value, codes: npt.NDArray[np.int32], scale: npt.NDArray[np.float32]) -> None:
        """Replaces a float initializer by int32 codes and a DequantizeLinear.

        Args:
            bias: The initializer; it disappears.
            codes: Its codes.
            scale: () or (C,), along the last axis of the bias.
        """
        name = bias.name
        assert name is not None
        axis = codes.ndim - 1 if scale.ndim else None
        self._dequantize(
            bias, self.initializer(f"{name}_quantized", codes), scale, np.zeros(scale.shape, np.int32), axis
        )

    def _dequantize(
        self,
        value: ir.Value,
        codes: ir.Value,
        scale: npt.NDArray[np.float32],
        zero: npt.NDArray[np.generic],
        axis: int | None,
    ) -> None:
        name = value.name
        inputs = [
            codes,
            self.initializer(f"{name}_scale", scale),
            self.initializer(f"{name}_zero_point", ir.Tensor(zero)),
        ]
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        result = self._append(
            "DequantizeLinear", inputs, f"{name}_dequantized", ir.DataType.FLOAT, value, None, attributes=attributes
        )
        for use in tuple(value.uses()):
            use.node.replace_input_with(use.idx, result)
        del self._graph.initializers[name or ""]

    def _append(
        self,
        op_type: str,
        inputs: list[ir.Value],
        name: str,
        dtype: ir.DataType,
        like: ir.Value,
        after: ir.Node | None,
        *,
        attributes: list[ir.Attr] | None = None,
        exact: bool = False,
    ) -> ir.Value:
        """A node whose only output has the given name, type, and the shape of ``like``."""
        if not exact:
            name = self.unique(name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=like.shape)
        node = ir.Node("", op_type, inputs, attributes or [], outputs=[value], name=name)
        if after is None:
            first = next(iter(self._graph), None)
            if first is None:
                self._graph.append(node)
            else:
                self._graph.insert_before(first, node)
        else:
            self._graph.insert_after(after, node)
        return value
