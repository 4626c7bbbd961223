"""Starting scales of weights: the largest magnitude, or the smallest Lp error of the weight itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.free_memory import release_tensor
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.quantizer import SMALLEST_SCALE, TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

# Shrink factors of the largest magnitude that the Lp search tries.
_SHRINKS = np.linspace(1.0, 0.2, 81)


def max_abs(spec: QuantSpec, weight: npt.NDArray[np.floating]) -> TensorQuantizer:
    """The quantizer that represents everything: scale = max |w| / qmax per channel."""
    columns = _columns(spec, weight)
    top = np.abs(columns).max(axis=1, initial=0.0)
    return TensorQuantizer.from_range(spec, *_range(spec, top))


def least_error(spec: QuantSpec, weight: npt.NDArray[np.floating], p: float = 2.4) -> TensorQuantizer:
    """The quantizer with the smallest ``sum |w~ - w|^p`` per channel, over shrunken ranges.

    Args:
        spec: The format.
        weight: Any shape.
        p: Exponent; 2.4 is BRECQ's.
    """
    columns = _columns(spec, weight).astype(np.float32)
    top = np.abs(columns).max(axis=1, initial=0.0)
    best = np.full(len(top), np.inf)
    best_top = top.copy()
    for shrink in _SHRINKS:
        scale = np.maximum(top * shrink / spec.qmax, SMALLEST_SCALE).astype(np.float32)[:, np.newaxis]
        codes = np.clip(np.rint(columns / scale), spec.qmin, spec.qmax)
        error = (np.abs(codes * scale - columns) ** p).sum(axis=1, dtype=np.float64)
        better = error < best
        best = np.where(better, error, best)
        best_top = np.where(better, top * shrink, best_top)
    return TensorQuantizer.from_range(spec, *_range(spec, best_top))


def start_weights(model: ir.Model, plan: QuantPlan, *, p: float | None = None) -> QuantPlan:
    """Decides every weight of a plan that is still a format.

    Args:
        model: The simplified model.
        plan: A plan.
        p: Exponent of the Lp error; None takes the largest magnitude.
    """
    weights = dict(plan.weights)
    for name, entry in plan.weights.items():
        if isinstance(entry, TensorQuantizer):
            continue
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        weight = tensor.numpy()
        # u8 weights (the constant left factor of a MatMul) have their zero point in the middle: no Lp search there.
        weights[name] = least_error(entry, weight, p) if p is not None and entry.signed else max_abs(entry, weight)
        del weight
        release_tensor(tensor)
    return dataclasses.replace(plan, weights=weights)


def _columns(spec: QuantSpec, weight: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """(C, n): one row per scale."""
    if spec.axis is None:
        return weight.reshape(1, -1)
    return np.moveaxis(weight, spec.axis, 0).reshape(weight.shape[spec.axis], -1)


def _range(spec: QuantSpec, top: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
    top = top[0] if spec.axis is None else top
    return -top, top
