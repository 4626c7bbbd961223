"""The operators for onnx's ReferenceEvaluator (``new_ops=``): thin wrappers of the NumPy laws."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from onnx.reference.op_run import OpRun

from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.law_adaptive import AdaptiveStep, Feature, adaptive_quantize, adaptive_requantize
from postquant.runtime_ops.law_border import Border, border_quantize
from postquant.runtime_ops.law_feedback import Feedback, feedback_requantize
from postquant.runtime_ops.law_levels import lut_requantize
from postquant.runtime_ops.law_lut import (
    LutWeight,
    lut_matmul_integer_to_float,
    lut_qlinear_conv,
    lut_qlinear_matmul,
    scalar_numbers,
)
from postquant.runtime_ops.schema import DOMAIN

Array = npt.NDArray[Any]


class LutQLinearConv(OpRun):
    """See :func:`postquant.runtime_ops.law_lut.lut_qlinear_conv`."""

    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        x_scale: Array,
        x_zero_point: Array,
        codes: Array,
        table: Array,
        w_scale: Array,
        bias: Array,
        y_scale: Array,
        y_zero_point: Array,
        bits: int,
        group: int,
        w_shape: list[int],
        strides: list[int],
        dilations: list[int],
        pads: list[int],
    ) -> tuple[Array]:
        weight = LutWeight(codes, table, w_scale, bits, tuple(w_shape))
        y = scalar_numbers(y_scale, y_zero_point, "y")
        result = lut_qlinear_conv(
            x,
            scalar_numbers(x_scale, x_zero_point, "x"),
            weight,
            bias,
            y,
            group=group,
            strides=strides,
            dilations=dilations,
            pads=pads,
        )
        return (result.codes.astype(y.dtype),)


class LutQLinearMatMul(OpRun):
    """See :func:`postquant.runtime_ops.law_lut.lut_qlinear_matmul`."""

    op_domain = DOMAIN

    def _run(
        self,
        a: Array,
        a_scale: Array,
        a_zero_point: Array,
        codes: Array,
        table: Array,
        w_scale: Array,
        bias: Array,
        y_scale: Array,
        y_zero_point: Array,
        bits: int,
        w_shape: list[int],
    ) -> tuple[Array]:
        weight = LutWeight(codes, table, w_scale, bits, tuple(w_shape))
        y = scalar_numbers(y_scale, y_zero_point, "y")
        result = lut_qlinear_matmul(a, scalar_numbers(a_scale, a_zero_point, "a"), weight, bias, y)
        return (result.codes.astype(y.dtype),)


class LutMatMulIntegerToFloat(OpRun):
    """See :func:`postquant.runtime_ops.law_lut.lut_matmul_integer_to_float`."""

    op_domain = DOMAIN

    def _run(
        self,
        a: Array,
        a_scale: Array,
        a_zero_point: Array,
        codes: Array,
        table: Array,
        w_scale: Array,
        bias: Array,
        bits: int,
        w_shape: list[int],
    ) -> tuple[Array]:
        weight = LutWeight(codes, table, w_scale, bits, tuple(w_shape))
        return (lut_matmul_integer_to_float(a, scalar_numbers(a_scale, a_zero_point, "a"), weight, bias),)


class AdaptiveQuantize(OpRun):
    """See :func:`postquant.runtime_ops.law_adaptive.adaptive_quantize`."""

    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        step: Array,
        zero_point: Array,
        w1: Array,
        b1: Array,
        w2: Array,
        b2: Array,
        features: int,
        beta_min: float,
        beta_max: float,
        qmin: int,
        qmax: int,
    ) -> tuple[Array, Array]:
        settings = AdaptiveStep(step, zero_point, w1, b1, w2, b2, Feature(features), beta_min, beta_max, qmin, qmax)
        return adaptive_quantize(x, settings)


class AdaptiveRequantize(OpRun):
    """See :func:`postquant.runtime_ops.law_adaptive.adaptive_requantize`."""

    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        x_scale: Array,
        x_zero_point: Array,
        step: Array,
        zero_point: Array,
        w1: Array,
        b1: Array,
        w2: Array,
        b2: Array,
        features: int,
        beta_min: float,
        beta_max: float,
        qmin: int,
        qmax: int,
    ) -> tuple[Array, Array]:
        settings = AdaptiveStep(step, zero_point, w1, b1, w2, b2, Feature(features), beta_min, beta_max, qmin, qmax)
        return adaptive_requantize(x, x_scale, x_zero_point, settings)


class BorderQuantize(OpRun):
    """See :func:`postquant.runtime_ops.law_border.border_quantize`."""

    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        scale: Array,
        zero_point: Array,
        border: Array,
        window: Array,
        window_scale: Array,
        left: Array,
        left_scale: Array,
        right: Array,
        right_scale: Array,
        channels: int,
        qmin: int,
        qmax: int,
    ) -> tuple[Array]:
        settings = Border(
            scale, zero_point, border, window, window_scale, left, left_scale, right, right_scale, qmin, qmax
        )
        if channels != len(window):
            raise ModelError(
                "the number of channels is wrong",
                where="attribute channels",
                expected=str(len(window)),
                found=str(channels),
            )
        return (border_quantize(x, settings),)


class LutRequantize(OpRun):
    """See :func:`postquant.runtime_ops.law_levels.lut_requantize`."""

    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        x_scale: Array,
        x_zero_point: Array,
        scale: Array,
        zero_point: Array,
        table: Array,
        axis: int,
    ) -> tuple[Array]:
        return (lut_requantize(x, x_scale, x_zero_point, scale, zero_point, table, axis),)


class FeedbackRequantize(OpRun):
    """See :func:`postquant.runtime_ops.law_feedback.feedback_requantize`."""

    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        x_scale: Array,
        x_zero_point: Array,
        scale: Array,
        zero_point: Array,
        table: Array,
        group: Array,
        left: Array,
        left_scale: Array,
        right: Array,
        right_scale: Array,
        axis: int,
        cell: int = 1,
    ) -> tuple[Array]:
        feedback = Feedback(group, left, left_scale, right, right_scale, cell)
        return (feedback_requantize(x, x_scale, x_zero_point, scale, zero_point, table, feedback, axis),)
