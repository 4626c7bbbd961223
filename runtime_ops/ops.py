"""The operators of domain ``ai.postquant``; this is the only place that lists them.

Each has an ONNX schema with shape inference, a reference on the NumPy law (for onnx's ReferenceEvaluator), a function
body of standard operators that every emitted model carries, and a native kernel of the same name in the library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import onnx
from onnx.defs import OpSchema
from onnx.reference.op_run import OpRun

from postquant.runtime_ops import (
    function_adaptive,
    function_border,
    function_feedback,
    function_levels,
    function_lut,
    reference_ops,
    schema_lut,
    schema_quantize,
)
from postquant.runtime_ops.schema import DOMAIN, VERSION

# What bodies are written in unless the model that they go into says otherwise.
_DEFAULT_OPSET = 17


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: Its ``op_type`` and the name of its native kernel.
        since: Version of the domain from which on it exists.
        schema: Makes its ONNX schema, which knows type and shape inference.
        reference: It for ``ReferenceEvaluator(model, new_ops=...)``.
        body: Makes its function body in standard operators of a given opset.
    """

    name: str
    since: int
    schema: Callable[[], OpSchema]
    reference: type[OpRun]
    body: Callable[[int], onnx.FunctionProto]


OPERATORS: tuple[Operator, ...] = (
    Operator(
        "LutQLinearConv",
        1,
        schema_lut.lut_qlinear_conv,
        reference_ops.LutQLinearConv,
        function_lut.lut_qlinear_conv,
    ),
    Operator(
        "LutQLinearMatMul",
        1,
        schema_lut.lut_qlinear_matmul,
        reference_ops.LutQLinearMatMul,
        function_lut.lut_qlinear_matmul,
    ),
    Operator(
        "LutMatMulIntegerToFloat",
        1,
        schema_lut.lut_matmul_integer_to_float,
        reference_ops.LutMatMulIntegerToFloat,
        function_lut.lut_matmul_integer_to_float,
    ),
    Operator(
        "AdaptiveQuantize",
        1,
        schema_quantize.adaptive_quantize,
        reference_ops.AdaptiveQuantize,
        function_adaptive.adaptive_quantize,
    ),
    Operator(
        "AdaptiveRequantize",
        1,
        schema_quantize.adaptive_requantize,
        reference_ops.AdaptiveRequantize,
        function_adaptive.adaptive_requantize,
    ),
    Operator(
        "BorderQuantize",
        1,
        schema_quantize.border_quantize,
        reference_ops.BorderQuantize,
        function_border.border_quantize,
    ),
    Operator(
        "LutRequantize",
        1,
        schema_quantize.lut_requantize,
        reference_ops.LutRequantize,
        function_levels.lut_requantize,
    ),
    Operator(
        "FeedbackRequantize",
        1,
        schema_quantize.feedback_requantize,
        reference_ops.FeedbackRequantize,
        function_feedback.feedback_requantize,
    ),
)


def operator(name: str) -> Operator:
    """The operator of that name.

    Raises:
        KeyError: If there is none.
    """
    for candidate in OPERATORS:
        if candidate.name == name:
            return candidate
    raise KeyError(f"domain {DOMAIN} version {VERSION} has no operator {name}")


def functions_for(names: Iterable[str], *, opset: int = _DEFAULT_OPSET) -> list[onnx.FunctionProto]:
    """The function bodies that a model with nodes of these operators must carry.

    Args:
        names: Operators that occur, in any order, repeated or not.
        opset: Version of the standard operators that the model imports, at least 13.

    Returns:
        One function per operator, in the order of :data:`OPERATORS`.

    Raises:
        KeyError: If one is not an operator of the domain.
    """
    wanted = {operator(name).name for name in names}
    return [op.body(opset) for op in OPERATORS if op.name in wanted]


def reference_classes() -> list[type[OpRun]]:
    """All operators for ``ReferenceEvaluator(model, new_ops=...)``."""
    return [op.reference for op in OPERATORS]
