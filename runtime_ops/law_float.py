"""Operators that onnxruntime runs in float32 between DequantizeLinear and QuantizeLinear, and those that move codes.

    code = quantize(f(dequantize(x_1), ...))

``f`` is the operator's definition in the ONNX standard (onnx's reference evaluator), in float32. onnxruntime may sum
or approximate in another way, so the slack is a few units in the last place of the largest value involved.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference

from postquant.runtime_ops.integer import FLOAT_SLACK, Affine, Prediction, quantized

# The result holds values of the first input (or of any, for Concat), unchanged: codes move like floats.
MOVING_OPS = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)

# One float32 result from each element or from one short reduction.
FLOAT_OPS = frozenset(
    {
        "Abs",
        "Add",
        "AveragePool",
        "Clip",
        "Div",
        "GlobalAveragePool",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Max",
        "Mean",
        "Min",
        "Mul",
        "Neg",
        "Pad",
        "PRelu",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "Relu",
        "Sigmoid",
        "Sqrt",
        "Sub",
        "Sum",
        "Tanh",
    }
)

# Error of a float32 result relative to the largest input or output, in units of 2^-24: rounding of sums over a pooling
# window and the polynomials behind Sigmoid and Tanh.
_UNITS = 32


def evaluate(
    op_type: str,
    attributes: Mapping[str, Any],
    inputs: Sequence[npt.NDArray[Any] | None],
    opset: int,
    outputs: int = 1,
) -> list[npt.NDArray[Any]]:
    """Results of one standard operator by its definition.

    Args:
        op_type: Operator of the standard domain.
        attributes: Attributes as Python values.
        inputs: Arrays, None where an optional input is absent.
        opset: Version of the standard operators.
        outputs: Number of outputs.
    """
    names = ["" if a is None else f"x{i}" for i, a in enumerate(inputs)]
    types = tuple((name, a.dtype.str) for name, a in zip(names, inputs, strict=True) if a is not None)
    frozen = tuple(
        sorted((k, tuple(v) if isinstance(v, (list, tuple, np.ndarray)) else v) for k, v in attributes.items())
    )
    evaluator = _evaluator(op_type, frozen, tuple(names), types, opset, outputs)
    feeds = {name: a for name, a in zip(names, inputs, strict=True) if a is not None}
    return [np.asarray(value) for value in evaluator.run(None, feeds)]


@functools.lru_cache(maxsize=256)
def _evaluator(
    op_type: str,
    attributes: tuple[tuple[str, Any], ...],
    names: tuple[str, ...],
    types: tuple[tuple[str, str], ...],
    opset: int,
    outputs: int,
) -> onnx.reference.ReferenceEvaluator:
    results = [f"y{i}" for i in range(outputs)]
    plain: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in attributes}
    node = onnx.helper.make_node(op_type, list(names), results, **plain)
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)
        for name, kind in types
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in results]
    graph = onnx.helper.make_graph([node], "law", infos, ends)
    return onnx.reference.ReferenceEvaluator(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    )


def float_op(
    op_type: str,
    attributes: Mapping[str, Any],
    inputs: Sequence[npt.NDArray[Any] | None],
    out: Affine,
    opset: int,
    *,
    output: int = 0,
) -> Prediction:
    """QuantizeLinear of an operator's float32 result.

    Args:
        op_type: One of :data:`FLOAT_OPS` or :data:`MOVING_OPS`.
        attributes: Attributes as Python values.
        inputs: Arrays as the operator reads them: dequantized values, and integers such as shapes or axes.
        out: Numbers of the output.
        opset: Version of the standard operators.
        output: Index of the operator's output.
    """
    count = int(attributes.get("num_outputs", output + 1)) if op_type == "Split" else output + 1
    if op_type == "Split" and len(inputs) > 1 and inputs[1] is not None:
        count = inputs[1].size
    real = evaluate(op_type, attributes, inputs, opset, count)[output]
    if op_type in MOVING_OPS:
        return quantized(real, out)
    floats = [a for a in inputs if a is not None and a.dtype == np.float32 and a.size]
    largest = max(float(np.abs(a[np.isfinite(a)]).max(initial=0.0)) for a in (*floats, real))
    return quantized(real, out, FLOAT_SLACK + _UNITS * 2.0**-24 * largest / float(np.min(out.scale)))
