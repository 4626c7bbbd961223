"""Removes the mean error that quantized weights cause, from float input statistics.

    b' = b - (w~ - w)' E[x]

with ``E[x]`` the mean of the layer's float input rows (patches, so that zero padding counts), over all samples. Most of
the error of 8-bit weights is such a bias. The error of *activations* is left alone on purpose: what clipping rare
outliers does to a mean sits in few samples and positions, and correcting it everywhere is harmful.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.layers import Layer, layers_of
from postquant.passes.free_memory import release_tensor
from postquant.passes.plan import QuantPlan
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
    error = layer.matrix(quantizer.simulate(weight)).astype(np.float64) - layer.matrix(weight).astype(np.float64)
    shift = np.einsum("gk,gkm->gm", mean.astype(np.float64), error).reshape(-1)
    corrected: FloatArray = (bias - layer.gain * shift).astype(np.float32)
    return corrected


def correct_biases(model: ir.Model, plan: QuantPlan, means: Mapping[str, FloatArray]) -> QuantPlan:
    """Corrects the bias of every layer with a decided weight.

    Args:
        model: The simplified float model.
        plan: Its weights are decided.
        means: Node name -> (G, K) mean of the layer's float input rows.
    """
    biases = dict(plan.biases)
    for layer in layers_of(model):
        entry = plan.weights.get(layer.weight)
        if layer.bias is None or layer.name not in means or not isinstance(entry, TensorQuantizer):
            continue
        weight, bias = (model.graph.initializers[name].const_value for name in (layer.weight, layer.bias))
        assert weight is not None
        assert bias is not None
        array = weight.numpy().astype(np.float32, copy=False)
        biases[layer.bias] = corrected_bias(layer, array, bias.numpy(), entry, means[layer.name])
        del array
        release_tensor(weight)
    return dataclasses.replace(plan, biases=biases)
