"""The float model that encodings are about: :func:`float_model`.

Encodings say scales, not codes: their reader rounds the weights of a float model itself, to the nearest code. So that
it gets the plan's codes, whatever rounding or code book they came from, this model holds the *decoded* weights::

    w = (code - zero_point) * scale             round(w / scale) + zero_point = code, exactly

and corrected biases. It is the simplified model, whose names the encodings use, and it computes in float; run as it
is, only its weights are quantized.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from postquant.passes.plan import QuantPlan
from postquant.passes.weight_codes import weight_codes
from postquant.runtime_ops.quantizer import TensorQuantizer


def float_model(model: ir.Model, plan: QuantPlan) -> ir.Model:
    """A copy with the plan's decoded weights and corrected biases.

    Args:
        model: The simplified model; not changed.
        plan: A decided plan of it.

    Returns:
        The copy; weights are computed when they are written.
    """
    copy = model.clone()
    for name, entry in plan.weights.items():
        value = copy.graph.initializers[name]
        if isinstance(entry, TensorQuantizer) and value.const_value is not None:
            value.const_value = _decoded(value.const_value, entry, name)
    for name, values in plan.biases.items():
        bias = copy.graph.initializers[name]
        assert bias.const_value is not None
        shape = tuple(bias.const_value.shape.numpy())
        bias.const_value = ir.Tensor(np.asarray(values, np.float32).reshape(shape), name=name)
    return copy


def _decoded(weight: ir.TensorProtocol, quantizer: TensorQuantizer, name: str) -> ir.TensorProtocol:
    def compute() -> ir.TensorProtocol:
        return ir.Tensor(quantizer.dequantize(weight_codes(weight, quantizer)), name=name)

    return ir.LazyTensor(compute, dtype=ir.DataType.FLOAT, shape=ir.Shape(weight.shape.numpy()), name=name)
