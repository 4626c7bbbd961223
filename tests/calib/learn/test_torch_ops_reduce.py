"""Pools, reductions and Softmax in torch equal onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from postquant.calib.learn.executor import supported

Same = Callable[..., Any]


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def valid(op_type: str, *shape: int) -> Any:
    """Logarithms want positive numbers."""
    return np.abs(normal(*shape)) if op_type == "ReduceLogSum" else normal(*shape)


POOLS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, 8, 9), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ((2, 3, 8, 9), {"kernel_shape": [3, 3]}),
    ((2, 3, 8, 9), {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
    ((2, 3, 8, 9), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ((2, 3, 8, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 0], "ceil_mode": 1}),
    ((2, 3, 7, 7), {"kernel_shape": [2, 2], "strides": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
    ((2, 3, 6, 6), {"kernel_shape": [1, 1], "strides": [4, 3], "ceil_mode": 1}),
    ((2, 3, 7, 9), {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ((2, 3, 7, 8), {"kernel_shape": [2, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ((2, 3, 7, 8), {"kernel_shape": [2, 3], "strides": [2, 2], "auto_pad": "VALID"}),
    ((2, 3, 11), {"kernel_shape": [4], "strides": [3], "pads": [1, 2]}),
    ((1, 2, 5, 6, 7), {"kernel_shape": [2, 3, 2], "strides": [1, 2, 2]}),
]


@pytest.mark.parametrize(("shape", "attributes"), POOLS)
def test_max_pool(same_as_onnxruntime: Same, shape: tuple[int, ...], attributes: dict[str, Any]) -> None:
    # Far from zero: padding must not win.
    same_as_onnxruntime("MaxPool", [normal(*shape) - 5], **attributes)


def test_max_pool_with_gaps_between_taps(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("MaxPool", [normal(2, 3, 9, 9)], kernel_shape=[3, 2], dilations=[2, 3], pads=[1, 0, 2, 1])


@pytest.mark.parametrize(("shape", "attributes"), POOLS)
@pytest.mark.parametrize("include", [0, 1])
def test_average_pool(
    same_as_onnxruntime: Same, shape: tuple[int, ...], attributes: dict[str, Any], include: int
) -> None:
    same_as_onnxruntime("AveragePool", [normal(*shape) + 3], opset=19, count_include_pad=include, **attributes)


@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 7)])
def test_global_pools(same_as_onnxruntime: Same, op_type: str, shape: tuple[int, ...]) -> None:
    same_as_onnxruntime(op_type, [normal(*shape)])


REDUCTIONS = [
    *("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
    *("ReduceLogSum", "ReduceLogSumExp"),
]


@pytest.mark.parametrize("op_type", REDUCTIONS)
@pytest.mark.parametrize("attributes", [{}, {"axes": [1]}, {"axes": [0, -1], "keepdims": 0}])
def test_reductions_with_attributes(same_as_onnxruntime: Same, op_type: str, attributes: dict[str, Any]) -> None:
    same_as_onnxruntime(op_type, [valid(op_type, 3, 4, 5)], opset=13, **attributes)


@pytest.mark.parametrize("op_type", [*REDUCTIONS, "ReduceSum"])
@pytest.mark.parametrize(
    ("axes", "attributes"),
    [(None, {}), ([1], {}), ([0, -1], {"keepdims": 0}), (None, {"noop_with_empty_axes": 1}), ([], {"keepdims": 0})],
)
def test_reductions_with_inputs(
    same_as_onnxruntime: Same, op_type: str, axes: list[int] | None, attributes: dict[str, Any]
) -> None:
    inputs = [valid(op_type, 3, 4, 5), *([] if axes is None else [np.array(axes, np.int64)])]
    same_as_onnxruntime(op_type, inputs, opset=18, fed=1, **attributes)


def test_sum_keeps_whole_numbers(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("ReduceSum", [np.array([[1, 2], [3, 4]], np.int32), np.array([0], np.int64)], fed=1)


@pytest.mark.parametrize("op_type", ["ArgMax", "ArgMin"])
def test_positions_of_extremes(same_as_onnxruntime: Same, op_type: str) -> None:
    same_as_onnxruntime(op_type, [normal(3, 4, 5)], axis=1)
    same_as_onnxruntime(op_type, [normal(3, 4, 5)], axis=-1, keepdims=0)


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(("opset", "attributes"), [(11, {}), (11, {"axis": 2}), (13, {}), (13, {"axis": 1})])
def test_softmax(same_as_onnxruntime: Same, op_type: str, opset: int, attributes: dict[str, int]) -> None:
    same_as_onnxruntime(op_type, [3 * normal(2, 3, 4, 5)], opset=opset, **attributes)


def test_cumulative_sum(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("CumSum", [normal(3, 4), np.array(1, np.int64)], fed=1)


@pytest.mark.parametrize(
    ("op_type", "arrays", "settings", "reason"),
    [
        ("AveragePool", [normal(1, 1, 9)], {"opset": 19, "kernel_shape": [2], "dilations": [2]}, "dilations"),
        ("CumSum", [normal(3), np.array(0, np.int64)], {"reverse": 1}, "reverse"),
        ("ArgMax", [normal(3, 3)], {"select_last_index": 1}, "select_last_index"),
        ("MaxPool", [normal(1, 1, 9)], {"kernel_shape": [2], "outputs": 2}, "more than one"),
        ("LpPool", [normal(1, 1, 9)], {"kernel_shape": [2]}, "operator LpPool"),
    ],
)
def test_what_is_left_out_is_said(
    op_node: Callable[..., ir.Node], op_type: str, arrays: list[Any], settings: dict[str, Any], reason: str
) -> None:
    found = supported(op_node(op_type, arrays, **settings))
    assert found is not None
    assert reason in found
