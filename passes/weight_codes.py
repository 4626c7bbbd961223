"""Integer codes of weights as tensors that are computed when they are written: :func:`codes_tensor`.

A weight of a big model is read, quantized and written one at a time. Calibration emits the same weights again and
again, so codes of small weights are kept for as long as their quantizer lives.
"""

from __future__ import annotations

import weakref

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.runtime_ops.quantizer import TensorQuantizer

# Codes above this size are computed anew each time: a big model must not hold all of them.
_CACHED_BYTES = 1 << 22
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
    codes = quantizer.quantize(weight.numpy())
    if codes.nbytes <= _CACHED_BYTES:
        codes.flags.writeable = False
        _cache[quantizer] = (weight, codes)
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
