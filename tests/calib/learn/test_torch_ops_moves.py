"""Operators that move elements in torch equal onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from postquant.calib.learn.executor import run_nodes

Same = Callable[..., Any]


def numbers(*shape: int) -> Any:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def ints(*items: int) -> Any:
    return np.array(items, np.int64)


def test_concat(same_as_onnxruntime: Same) -> None:
    for axis in (1, -1):
        same_as_onnxruntime("Concat", [numbers(2, 3), numbers(2, 3) + 10], axis=axis)


@pytest.mark.parametrize(
    ("opset", "inputs", "attributes", "outputs"),
    [
        (11, [], {"axis": 1, "split": [2, 4]}, 2),
        (11, [], {"axis": 1}, 3),
        (13, [ints(1, 5)], {"axis": 1}, 2),
        (13, [], {"axis": -1}, 2),
        (18, [], {"axis": 1, "num_outputs": 4}, 4),
    ],
)
def test_split(same_as_onnxruntime: Same, opset: int, inputs: list[Any], attributes: Any, outputs: int) -> None:
    shape = (2, 7, 4) if "num_outputs" in attributes else (2, 6, 4)
    same_as_onnxruntime("Split", [numbers(*shape), *inputs], opset=opset, outputs=outputs, fed=1, **attributes)


@pytest.mark.parametrize(
    "inputs",
    [
        [ints(1), ints(4)],
        [ints(0, 1), ints(2, 9), ints(2, 1)],
        [ints(-3), ints(2**62), ints(1)],
        [ints(0), ints(-1), ints(-1), ints(2)],
        [ints(-1), ints(-(2**62)), ints(1), ints(-1)],
        [ints(4), ints(0), ints(1), ints(-2)],
        [ints(3), ints(1), ints(1)],
    ],
)
def test_slice(same_as_onnxruntime: Same, inputs: list[Any]) -> None:
    same_as_onnxruntime("Slice", [numbers(5, 6, 4), *inputs], fed=1)


def test_slice_with_attributes(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("Slice", [numbers(5, 6)], opset=9, starts=[1, -4], ends=[3, 100], axes=[0, 1])


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
@pytest.mark.parametrize("opset", [2, 13])
def test_pad(same_as_onnxruntime: Same, mode: str, opset: int) -> None:
    pads = [0, 1, 2, 0, 0, 3]
    if opset < 11:
        same_as_onnxruntime("Pad", [numbers(2, 3, 4)], opset=opset, mode=mode, pads=pads)
    else:
        same_as_onnxruntime("Pad", [numbers(2, 3, 4), ints(*pads)], opset=opset, fed=1, mode=mode)


def test_pad_with_a_value_axes_and_cuts(same_as_onnxruntime: Same) -> None:
    value = np.array(-5.0, np.float32)
    same_as_onnxruntime("Pad", [numbers(2, 3, 4), ints(1, 2), value, ints(-1)], opset=18, fed=1)
    same_as_onnxruntime("Pad", [numbers(2, 3, 4), ints(0, -1, 1, 0, 0, -2), value], fed=1)
    same_as_onnxruntime("Pad", [numbers(2, 3), ints(0, 4, 0, 5)], opset=19, fed=1, mode="wrap")


def test_transpose(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("Transpose", [numbers(2, 3, 4)])
    same_as_onnxruntime("Transpose", [numbers(2, 3, 4)], perm=[1, 2, 0])


@pytest.mark.parametrize("shape", [(4, 6), (0, -1), (2, 0, 2, 2), (-1,), (1, 24)])
def test_reshape(same_as_onnxruntime: Same, shape: tuple[int, ...]) -> None:
    same_as_onnxruntime("Reshape", [numbers(2, 3, 4), ints(*shape)], fed=1)


def test_reshape_that_names_the_sizes_of_one_sample_takes_several(op_node: Callable[..., ir.Node]) -> None:
    node = op_node("Reshape", [numbers(1, 6, 4), ints(3, 2, 4)])
    x = numbers(2, 6, 4)
    values = {"x0": torch.from_numpy(x), "x1": torch.tensor([3, 2, 4])}
    run_nodes([node], values)
    assert np.array_equal(values["y0"].numpy(), np.concatenate([part.reshape(3, 2, 4) for part in x]))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_flatten(same_as_onnxruntime: Same, axis: int) -> None:
    same_as_onnxruntime("Flatten", [numbers(2, 3, 4)], axis=axis)


def test_squeeze_and_unsqueeze(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("Squeeze", [numbers(1, 3, 1, 4)])
    same_as_onnxruntime("Squeeze", [numbers(1, 3, 1, 4)], opset=11, axes=[-2])
    same_as_onnxruntime("Squeeze", [numbers(1, 3, 1, 4), ints(0, 2)], fed=1)
    same_as_onnxruntime("Unsqueeze", [numbers(3, 4)], opset=11, axes=[0, 3])
    same_as_onnxruntime("Unsqueeze", [numbers(3, 4), ints(-1, 1)], fed=1)


@pytest.mark.parametrize("index", [np.array(-1, np.int64), ints(0, -2, 1), np.array([[1, 0], [2, 2]], np.int32)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather(same_as_onnxruntime: Same, index: Any, axis: int) -> None:
    same_as_onnxruntime("Gather", [numbers(3, 4, 5), index], axis=axis)


def test_gather_elements(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("GatherElements", [numbers(3, 4), np.array([[0, -1], [2, 1]], np.int64)], axis=1)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1,), (3, 1), (5, 2, 3, 1)])
def test_expand(same_as_onnxruntime: Same, shape: tuple[int, ...]) -> None:
    same_as_onnxruntime("Expand", [numbers(3, 1), ints(*shape)], fed=1)


def test_tile(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("Tile", [numbers(2, 3), ints(2, 3)], fed=1)


def test_shapes(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("Shape", [numbers(2, 3, 4)])
    same_as_onnxruntime("Shape", [numbers(2, 3, 4)], start=1)
    same_as_onnxruntime("Shape", [numbers(2, 3, 4)], start=-2, end=-1)
    same_as_onnxruntime("Size", [numbers(2, 3, 4)])


def test_constants(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("ConstantOfShape", [ints(2, 3)])
    same_as_onnxruntime("ConstantOfShape", [ints(2, 3)], value=onnx.numpy_helper.from_array(ints(7)))
    same_as_onnxruntime("Constant", [], value=onnx.numpy_helper.from_array(numbers(2, 3)))
    same_as_onnxruntime("Constant", [], value_ints=[1, 2])
    same_as_onnxruntime("Constant", [], value_float=0.5)


def test_range(same_as_onnxruntime: Same) -> None:
    same_as_onnxruntime("Range", [np.array(2, np.int64), np.array(9, np.int64), np.array(3, np.int64)])
    same_as_onnxruntime("Range", [np.array(x, np.float32) for x in (1.0, -2.0, -0.5)])


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_and_space(same_as_onnxruntime: Same, mode: str) -> None:
    same_as_onnxruntime("DepthToSpace", [numbers(2, 12, 3, 4)], blocksize=2, mode=mode)
    same_as_onnxruntime("SpaceToDepth", [numbers(2, 3, 4, 6)], blocksize=2)
