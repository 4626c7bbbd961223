"""Integer codes of weights as tensors that are computed when they are written: :func:`codes_tensor`.

A weight of a big model is read, quantized and written one at a time. Calibration emits the same weights again and
again, so codes are kept for as long as their quantizer lives, up to a limit that a big model exceeds at once.
"""

from __future__ import annotations

import dataclasses
import weakref

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.free_memory import release_tensor
from postquant.runtime_ops.quantizer import TensorQuantizer

_PART = 1 << 22  # elements that are quantized at a time
_CACHED_BYTES = 1 << 25  # of all cached codes together
_cache: weakref.WeakKeyDictionary[TensorQuantizer, tuple[object, npt.NDArray[np.integer]]] = weakref.WeakKeyDictionary()


def weight_codes(weight: ir.TensorProtocol, quantizer: TensorQuantizer) -> npt.NDArray[np.integer]:
    """Codes of a weight: the quantizer's chosen ones, else the nearest.

    Args:
        weight: Float values.
        quantizer: Its quantizer.

    Returns:
        int8 (or uint8) codes of the weight's shape; not to be written to.
    """
    if quantizer.codes is not None:
        return quantizer.codes
    held = _cache.get(quantizer)
    if held is not None and held[0] is weight:
        return held[1]
    mapped = isinstance(weight, ir.ExternalTensor) and weight.raw is None
    codes = _quantize_in_parts(weight.numpy(), quantizer)
    if mapped:
        release_tensor(weight)  # its pages need not stay: the file is still there
    if codes.nbytes + sum(other.nbytes for _, other in _cache.values()) <= _CACHED_BYTES:
        codes.flags.writeable = False
        _cache[quantizer] = (weight, codes)
    return codes


def _quantize_in_parts(values: npt.NDArray[np.floating], quantizer: TensorQuantizer) -> npt.NDArray[np.integer]:
    """``quantizer.quantize``, whose float32 and int32 intermediate results are several times as large, row by row."""
    if values.size <= _PART or values.ndim < 2:
        return quantizer.quantize(values)
    codes = np.empty(values.shape, quantizer.spec.container)
    rows = max(1, _PART * len(values) // values.size)
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        own = quantizer
        if quantizer.spec.axis == 0:
            own = dataclasses.replace(quantizer, scale=quantizer.scale[part], zero_point=quantizer.zero_point[part])
        codes[part] = own.quantize(values[part])
    return codes


def codes_tensor(
    weight: ir.TensorProtocol, quantizer: TensorQuantizer, name: str, *, packed: bool
) -> ir.TensorProtocol:
    """The initializer that holds a weight's codes.

    Args:
        weight: Float values.
        quantizer: Its quantizer.
        name: Name of the tensor.
        packed: Whether codes are stored as ONNX INT4, two per byte; only for at most 4 bits.

    Returns:
        A lazy tensor: codes are computed when its bytes are asked for.
    """
    dtype = ir.DataType.INT4 if packed else ir.DataType[quantizer.spec.container.upper()]

    def compute() -> ir.TensorProtocol:
        codes = weight_codes(weight, quantizer)
        return ir.Tensor(codes.astype(ml_dtypes.int4) if packed else codes, name=name)

    return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(weight.shape.numpy()), name=name)
