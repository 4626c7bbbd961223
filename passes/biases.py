"""int32 biases: ``q = round(b / (s_x * s_w))``, in the units of an integer kernel's accumulator.

A channel whose weights are tiny or all zero has a tiny ``s_w``, and then its bias overflows int32, which ruins the
channel. :func:`fit_biases` raises ``s_w`` of such channels until ``|q| <= 2^30``: their weights lose precision that
the bias, a thousand million times larger than their step, hides anyway.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.quantizer import TensorQuantizer

# Half of int32, so that the products have the other half of the accumulator.
LARGEST_BIAS = 2**30
# A smaller product s_x * s_w is nearly a denormal number; the step of an all-zero channel may be as small.
SMALLEST_PRODUCT = 2.0**-120


def weight_scale(node: ir.Node, weight: TensorQuantizer) -> npt.NDArray[np.float32]:
    """What one step of a weight's codes stands for in the emitted graph: ``alpha * s_w``.

    onnxruntime fuses a Gemm only if its alpha and beta are 1, so emission moves alpha here and beta into the bias.

    Args:
        node: The weighted node.
        weight: Quantizer of its weight.

    Returns:
        () or (C,) float32.
    """
    if node.op_type != "Gemm":
        return weight.scale
    return np.asarray(weight.scale * np.float32(semantics.attribute(node, "alpha", 1.0)), np.float32)


def bias_scale(node: ir.Node, source: TensorQuantizer, weight: TensorQuantizer) -> npt.NDArray[np.float32]:
    """Units of a node's accumulator; onnxruntime fuses a bias only if its scale is this float32 product.

    Args:
        node: Conv, ConvTranspose, Gemm or MatMul.
        source: Quantizer of input 0.
        weight: Quantizer of input 1.

    Returns:
        () or (C,) float32 ``s_x * (alpha * s_w)``.
    """
    return np.asarray(source.scale * weight_scale(node, weight), np.float32)


def bias_values(node: ir.Node, bias: ir.Value, plan: QuantPlan) -> npt.NDArray[np.float32]:
    """What is added to the node's products: the plan's correction or the model's bias, times Gemm's beta.

    Args:
        node: The weighted node.
        bias: Its bias initializer.
        plan: May hold other values for the bias.

    Returns:
        float32, shape of the bias.
    """
    assert bias.name is not None
    assert bias.const_value is not None
    corrected = plan.biases.get(bias.name)
    values = np.asarray(bias.const_value.numpy() if corrected is None else corrected, np.float32)
    beta = np.float32(semantics.attribute(node, "beta", 1.0)) if node.op_type == "Gemm" else np.float32(1)
    return np.asarray(values * beta, np.float32)


def integer_bias(values: npt.NDArray[np.float32], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.int32] | None:
    """Codes of a bias.

    Args:
        values: (..., C) float32.
        scale: () or (C,) float32.

    Returns:
        int32 codes of the shape of ``values``; None where they do not fit (:func:`fit_biases` prevents that).

    >>> integer_bias(np.float32([1, -1]), np.float32([0.5, 0.25])).tolist()
    [2, -4]
    """
    if not (scale > 0).all():
        return None
    codes = np.rint(values.astype(np.float64) / scale.astype(np.float64))
    if (np.abs(codes) > np.iinfo(np.int32).max).any():
        return None
    return codes.astype(np.int32)


def fit_biases(model: ir.Model, plan: QuantPlan) -> QuantPlan:
    """Raises weight scales where an int32 bias would not fit.

    Args:
        model: The simplified model.
        plan: A plan; biases whose input or weight is not decided yet are left alone.

    Returns:
        The plan in which every decided bias fits, with a note for each weight that was changed. Chosen codes of
        raised channels are replaced by the nearest ones.
    """
    nodes = {semantics.bias_of(node): node for node in model.graph if node.op_type in semantics.WEIGHTED}
    by_name = {bias.name: (bias, node) for bias, node in nodes.items() if bias is not None}
    for name, (source_key, weight_name) in plan.int_biases.items():
        source = plan.input_quantizer(source_key)
        weight = plan.weights.get(weight_name)
        if source is None or not isinstance(weight, TensorQuantizer) or name not in by_name:
            continue
        bias, node = by_name[name]
        values = np.abs(bias_values(node, bias, plan).astype(np.float64))
        # The largest bias of each channel; several biases share the one scale of a weight without channels.
        values = values.reshape(-1) if weight.scale.ndim and values.size == weight.scale.size else values.max(initial=0)
        alpha = float(semantics.attribute(node, "alpha", 1.0)) if node.op_type == "Gemm" else 1.0
        needed = np.maximum(values / LARGEST_BIAS, SMALLEST_PRODUCT) / (float(source.scale) * alpha)
        raised = np.broadcast_to(needed > weight.scale.astype(np.float64), weight.scale.shape)
        if not raised.any():
            continue
        # One float32 step up, so that rounding never takes the quotient back over the limit.
        larger = np.nextafter(needed.astype(np.float32), np.float32(np.inf))
        if weight.spec.power_of_two:
            larger = np.exp2(np.ceil(np.log2(larger)))
        scale = np.where(raised, larger, weight.scale).astype(np.float32)
        plan = plan.with_weight(weight_name, _with_scale(model, weight_name, weight, scale, raised))
        count = int(np.count_nonzero(raised))
        plan = plan.with_note(
            f"{count} of {raised.size} scales of {weight_name} were raised so that the bias fits int32"
        )
    return plan


def _with_scale(
    model: ir.Model,
    name: str,
    weight: TensorQuantizer,
    scale: npt.NDArray[np.float32],
    raised: npt.NDArray[np.bool_],
) -> TensorQuantizer:
    changed = dataclasses.replace(weight, scale=scale, codes=None)
    if weight.codes is None:
        return changed
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    nearest = changed.quantize(tensor.numpy())
    axis = weight.spec.axis
    shape = [1] * nearest.ndim
    if axis is not None:
        shape[axis] = -1
    return dataclasses.replace(changed, codes=np.where(raised.reshape(shape), nearest, weight.codes))
