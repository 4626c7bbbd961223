"""Removes the mean error that quantized weights cause, from float input statistics.

    b' = b - (w~ - w)' E[x]

with ``E[x]`` the mean of the layer's float input rows (patches, so that zero padding counts), over all samples. Most of
the error of 8-bit weights is such a bias. The error of *activations* is left alone on purpose: what clipping rare
outliers does to a mean sits in few samples and positions, and correcting it everywhere is harmful.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from postquant.calib.layers import Layer
from postquant.runtime_ops.quantizer import TensorQuantizer

FloatArray = npt.NDArray[np.float32]


def corrected_bias(
    layer: Layer, weight: FloatArray, bias: FloatArray, quantizer: TensorQuantizer, mean: FloatArray
) -> FloatArray:
    """The corrected bias.

    Args:
        layer: The layer.
        weight: Float weight tensor.
        bias: (C_out,) float bias.
        quantizer: Of the weight.
        mean: (G, K) mean of the float input rows.

    Returns:
        (C_out,) float32.
    """
    error = layer.matrix(quantizer.simulate(weight)).astype(np.float64) - layer.matrix(weight)
    shift = np.einsum("gk,gkm->gm", mean.astype(np.float64), error).reshape(-1)
    return (bias - layer.gain * shift).astype(np.float32)
