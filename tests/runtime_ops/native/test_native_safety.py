"""A malformed model never crashes the process: it fails with a sentence that names operator, node and input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.runtime_ops.native.conftest import Native, Node, Nodes

BIG = 2**31 - 1


def f32(*shape: int, value: float = 1.0) -> Any:
    return np.full(shape, value, np.float32)


# Operator, what is wrong, the changed inputs, words of the sentence.
BAD_INPUTS: list[tuple[str, str, dict[str, Any], str]] = [
    ("conv", "few code bytes", {"codes": np.zeros((5, 13), np.uint8)}, "input 3 (codes) has shape [5, 13]"),
    ("conv", "many code bytes", {"codes": np.zeros((5, 15), np.uint8)}, "expected [5, 14]"),
    ("conv", "few code rows", {"codes": np.zeros((4, 14), np.uint8)}, "(codes)"),
    ("conv", "no codes", {"codes": np.zeros((0, 14), np.uint8)}, "(codes)"),
    ("conv", "flat codes", {"codes": np.zeros(70, np.uint8)}, "(codes)"),
    ("conv", "small table", {"table": np.zeros(15, np.int8)}, "input 4 (table) has shape [15], expected [16]"),
    ("conv", "no table", {"table": np.zeros(0, np.int8)}, "(table)"),
    ("conv", "few scales", {"w_scale": f32(4)}, "input 5 (w_scale) has shape [4], expected [5]"),
    ("conv", "no scales", {"w_scale": f32(0)}, "(w_scale)"),
    ("conv", "NaN scale", {"w_scale": f32(5, value=np.nan)}, "(w_scale) holds nan at position 0"),
    ("conv", "infinite scale", {"w_scale": f32(5, value=np.inf)}, "(w_scale) holds inf"),
    ("conv", "scale of 0", {"w_scale": f32(5, value=0)}, "expected finite numbers above 0"),
    ("conv", "negative scale", {"x_scale": f32(value=-1)}, "(x_scale) holds -1"),
    ("conv", "NaN step", {"y_scale": f32(value=np.nan)}, "(y_scale) holds nan"),
    ("conv", "overflowing multiplier", {"y_scale": f32(value=1e-30), "x_scale": f32(value=1e30)}, "finite"),
    ("conv", "many steps", {"x_scale": f32(2)}, "(x_scale) has shape [2], expected []"),
    ("conv", "many zero points", {"y_zero_point": np.zeros(5, np.uint8)}, "(y_zero_point)"),
    ("conv", "few biases", {"bias": np.zeros(3, np.int32)}, "input 6 (bias)"),
    ("conv", "channels", {"x": np.zeros((1, 4, 7, 6), np.uint8)}, "(x) has shape [1, 4, 7, 6]"),
    ("conv", "no channels", {"x": np.zeros((1, 0, 7, 6), np.uint8)}, "3 channels"),
    ("conv", "small image", {"x": np.zeros((1, 3, 2, 6), np.uint8)}, "does not fit"),
    ("conv", "no image", {"x": np.zeros((1, 3, 0, 0), np.uint8)}, "does not fit"),
    ("conv", "three axes", {"x": np.zeros((1, 3, 7), np.uint8)}, "expected 4 axes"),
    ("conv", "nine axes", {"x": np.zeros((1,) * 9, np.uint8)}, "9 axes"),
    ("conv", "a scalar", {"x": np.zeros((), np.uint8)}, "(x)"),
    ("matmul", "inner size", {"x": np.zeros((2, 8), np.uint8)}, "input 0 (a) has shape [2, 8], expected 7"),
    ("matmul", "a scalar", {"x": np.zeros((), np.uint8)}, "(a) has shape []"),
    ("matmul", "codes", {"codes": np.zeros((7, 5), np.uint8)}, "(codes)"),
    ("matmul", "bias", {"bias": np.zeros((5, 1), np.int32)}, "(bias)"),
    ("floats", "inner size", {"x": np.zeros((2, 8), np.uint8)}, "input 0 (a) has shape [2, 8], expected 7"),
    ("floats", "a scalar", {"x": np.zeros((), np.uint8)}, "(a) has shape []"),
    ("floats", "codes", {"codes": np.zeros((7, 5), np.uint8)}, "(codes)"),
    ("floats", "small table", {"table": np.zeros(4, np.int8)}, "(table)"),
    ("floats", "NaN scale", {"w_scale": f32(5, value=np.nan)}, "(w_scale) holds nan"),
    ("floats", "few biases", {"bias": f32(4)}, "input 6 (bias) has shape [4], expected [5]"),
    ("floats", "no biases", {"bias": f32(0)}, "(bias)"),
    ("floats", "NaN bias", {"bias": f32(5, value=np.nan)}, "(bias) holds nan"),
    ("floats", "overflowing multiplier", {"w_scale": f32(5, value=1e30), "x_scale": f32(value=1e30)}, "finite number"),
    ("adaptive", "NaN step", {"step": f32(value=np.nan)}, "input 1 (step) holds nan"),
    ("adaptive", "step of 0", {"step": f32(value=0)}, "(step)"),
    ("adaptive", "columns", {"w1": f32(3, 8)}, "(w1) has 8 columns, expected 7"),
    ("adaptive", "no hidden", {"w1": f32(0, 7), "b1": f32(0), "w2": f32(1, 0)}, "(w1)"),
    ("adaptive", "flat layer", {"w1": f32(21)}, "(w1)"),
    ("adaptive", "NaN layer", {"w1": f32(3, 7, value=np.nan)}, "(w1) holds nan"),
    ("adaptive", "b1", {"b1": f32(4)}, "(b1)"),
    ("adaptive", "w2", {"w2": f32(2, 3)}, "(w2)"),
    ("adaptive", "b2", {"b2": f32(2)}, "(b2)"),
    ("adaptive", "b2 of nothing", {"b2": f32(0)}, "(b2)"),
    ("adaptive", "no channels", {"x": f32(2, 0, 3)}, "(x)"),
    ("adaptive", "no points", {"x": f32(2, 5, 0)}, "(x)"),
    ("adaptive", "no channel axis", {"x": f32(5)}, "(x)"),
    ("requantize", "x_scale", {"x_scale": f32(value=np.inf)}, "input 1 (x_scale)"),
    ("requantize", "x_zero_point", {"x_zero_point": np.zeros(2, np.uint8)}, "(x_zero_point)"),
    ("border", "scale", {"scale": f32(value=0)}, "input 1 (scale)"),
    ("border", "border columns", {"border": f32(5, 3)}, "(border) has shape [5, 3], expected [5, 16]"),
    ("border", "NaN border", {"border": f32(5, 1, value=np.nan)}, "(border)"),
    ("border", "even window", {"window": np.zeros((5, 2, 3), np.int8)}, "(window)"),
    ("border", "no window", {"window": np.zeros((5, 0, 0), np.int8)}, "(window)"),
    ("border", "window of -128", {"window": np.full((5, 1, 1), -128, np.int8)}, "(window) holds -128"),
    ("border", "heavy window", {"window": np.full((5, 3, 3), 100, np.int8)}, "absolute sum of 900"),
    ("border", "left columns", {"left": np.zeros((2, 4), np.int8)}, "(left)"),
    ("border", "left scales", {"left": np.zeros((2, 5), np.int8)}, "(left_scale)"),
    ("border", "right rows", {"right": np.zeros((4, 3), np.int8)}, "(right)"),
    ("border", "rank", {"left": np.zeros((1041, 5), np.int8)}, "at most 1040"),
    ("border", "right scales", {"right_scale": f32(5, value=np.inf)}, "(right_scale)"),
    ("border", "channels", {"x": f32(2, 4, 6, 7)}, "5 channels"),
    ("border", "five axes", {"x": f32(2, 5, 1, 1, 1)}, "2 to 4 axes"),
    ("border", "a line", {"x": f32(5)}, "2 to 4 axes"),
    ("levels", "x_scale", {"x_scale": f32(value=0)}, "input 1 (x_scale) holds 0"),
    ("levels", "many scales", {"x_scale": f32(5)}, "(x_scale) has shape [5], expected []"),
    ("levels", "x_zero_point", {"x_zero_point": np.zeros(1, np.uint8)}, "(x_zero_point)"),
    ("levels", "infinite scale", {"scale": f32(value=np.inf)}, "input 3 (scale) holds inf"),
    ("levels", "NaN scale", {"scale": f32(value=np.nan)}, "(scale) holds nan"),
    ("levels", "no scale", {"scale": f32(0)}, "(scale) has shape [0]"),
    ("levels", "zero_point", {"zero_point": np.zeros((1, 1), np.uint8)}, "(zero_point)"),
    ("levels", "one level", {"table": np.zeros((5, 1), np.uint8)}, "input 5 (table) has shape [5, 1]"),
    ("levels", "many levels", {"table": np.zeros((5, 17), np.uint8)}, "expected at least 1 row of 2 to 16 levels"),
    ("levels", "no levels", {"table": np.zeros((5, 0), np.uint8)}, "(table)"),
    ("levels", "no rows", {"table": np.zeros((0, 16), np.uint8)}, "(table) has shape [0, 16]"),
    ("levels", "a flat table", {"table": np.zeros(16, np.uint8)}, "(table) has shape [16]"),
    ("levels", "three axes", {"table": np.zeros((5, 4, 4), np.uint8)}, "(table)"),
    (
        "levels",
        "not sorted",
        {"table": np.array([[0, 9]] * 3 + [[9, 8]] * 2, np.uint8)},
        "(table) has levels that are not sorted in row 3",
    ),
    ("levels", "other channels", {"x": np.zeros((2, 6, 5, 5), np.uint8)}, "expected 5 channels on axis -3"),
    ("levels", "no channels", {"x": np.zeros((2, 0, 5, 5), np.uint8)}, "(x) has shape [2, 0, 5, 5]"),
    ("levels", "few axes", {"x": np.zeros((5, 5), np.uint8)}, "input 0 (x) has shape [5, 5], expected 5 channels"),
    ("levels", "a scalar", {"x": np.zeros((), np.uint8)}, "(x) has shape [], expected one axis or more"),
    ("levels", "nine axes", {"x": np.zeros((1,) * 9, np.uint8)}, "9 axes"),
    ("feedback", "x_scale", {"x_scale": f32(value=0)}, "input 1 (x_scale) holds 0"),
    ("feedback", "many levels", {"table": np.zeros((5, 17), np.uint8)}, "expected at least 1 row of 2 to 16 levels"),
    ("feedback", "not sorted", {"table": np.array([[9, 8]], np.uint8)}, "(table) has levels that are not sorted"),
    (
        "feedback",
        "other rows",
        {"table": np.zeros((4, 16), np.uint8)},
        "(table) has shape [4, 16], expected 1 or 5 rows",
    ),
    ("feedback", "one channel", {"group": np.zeros(1, np.uint8)}, "input 6 (group) has shape [1], expected one size"),
    ("feedback", "a square of groups", {"group": np.zeros((5, 1), np.uint8)}, "(group) has shape [5, 1]"),
    ("feedback", "a ninth group", {"group": np.full(5, 8, np.uint8)}, "(group) holds 8 at position 0, expected 0 to 7"),
    ("feedback", "other left", {"left": np.zeros((3, 6), np.int8)}, "input 7 (left) has shape [3, 6]"),
    ("feedback", "no rank", {"left": np.zeros((0, 5), np.int8)}, "expected at least 1 row of 5 numbers"),
    ("feedback", "a flat left", {"left": np.zeros(15, np.int8)}, "(left) has shape [15]"),
    ("feedback", "low left", {"left": np.full((3, 5), -128, np.int8)}, "(left) holds -128 at position 0"),
    ("feedback", "left_scale", {"left_scale": f32(2)}, "input 8 (left_scale) has shape [2], expected [3]"),
    ("feedback", "infinite left_scale", {"left_scale": f32(3, value=np.inf)}, "(left_scale) holds inf"),
    (
        "feedback",
        "other right",
        {"right": np.zeros((3, 5), np.int8)},
        "input 9 (right) has shape [3, 5], expected [5, 3]",
    ),
    ("feedback", "low right", {"right": np.full((5, 3), -128, np.int8)}, "(right) holds -128"),
    ("feedback", "right_scale", {"right_scale": f32(5, 1)}, "input 10 (right_scale) has shape [5, 1], expected [5]"),
    ("feedback", "NaN right_scale", {"right_scale": f32(5, value=np.nan)}, "(right_scale) holds nan"),
    (
        "feedback",
        "large right",
        {
            "left": np.zeros((1041, 5), np.int8),
            "left_scale": f32(1041),
            "right": np.full((5, 1041), 127, np.int8),
        },
        "(right) has an absolute sum beyond 132104 in row 0",
    ),
    (
        "feedback",
        "large left",
        {
            "x": np.zeros((1, 1041, 1, 1), np.uint8),
            "table": np.zeros((1, 2), np.uint8),
            "group": np.zeros(1041, np.uint8),
            "left": np.array([[0] * 1041, [127] * 1041, [0] * 1041], np.int8),
            "right": np.zeros((1041, 3), np.int8),
            "right_scale": f32(1041),
        },
        "(left) has an absolute sum beyond 132104 in row 1",
    ),
    ("feedback", "other channels", {"x": np.zeros((2, 6, 5, 5), np.uint8)}, "expected 5 channels on axis -3"),
    ("feedback", "few axes", {"x": np.zeros((5, 5), np.uint8)}, "input 0 (x) has shape [5, 5], expected 5 channels"),
    ("feedback", "a scalar", {"x": np.zeros((), np.uint8)}, "(x) has shape [], expected one axis or more"),
    (
        "cells",
        "part of a cell",
        {"group": np.zeros(19, np.uint8)},
        "(group) has shape [19], expected a multiple of 4 for cells of 2",
    ),
    ("cells", "few groups", {"group": np.zeros(5, np.uint8)}, "(group) has shape [5], expected a multiple of 4"),
    (
        "cells",
        "other rows",
        {"table": np.zeros((20, 16), np.uint8)},
        "(table) has shape [20, 16], expected 1 or 5 rows",
    ),
    ("cells", "other left", {"left": np.zeros((3, 5), np.int8)}, "expected at least 1 row of 20 numbers"),
    ("cells", "right_scale", {"right_scale": f32(5)}, "input 10 (right_scale) has shape [5], expected [20]"),
    ("cells", "all channels", {"x": np.zeros((2, 20, 5, 5), np.uint8)}, "expected 5 channels on axis -3"),
    ("cells", "few axes", {"x": np.zeros((5, 5), np.uint8)}, "input 0 (x) has shape [5, 5], expected 5 channels"),
]

BAD_ATTRIBUTES: list[tuple[str, dict[str, Any], str]] = [
    ("conv", {"bits": 3}, "attribute 'bits' is 3"),
    ("conv", {"bits": 8}, "attribute 'bits' is 8"),
    ("conv", {"bits": None}, "attribute 'bits' is missing"),
    ("conv", {"bits": "four"}, "attribute 'bits'"),
    ("conv", {"bits": 4.0}, "attribute 'bits'"),
    ("conv", {"group": 0}, "attribute 'group' is 0"),
    ("conv", {"group": 3}, "attribute 'group' is 3"),
    ("conv", {"group": BIG}, "attribute 'group'"),
    ("conv", {"group": None}, "attribute 'group' is missing"),
    ("conv", {"w_shape": [5, 3]}, "attribute 'w_shape' is [5, 3]"),
    ("conv", {"w_shape": [5, 3, 3, 0]}, "attribute 'w_shape'"),
    ("conv", {"w_shape": [5, 3, 3, -3]}, "attribute 'w_shape'"),
    ("conv", {"w_shape": [BIG, BIG, BIG, BIG]}, "too large"),
    ("conv", {"w_shape": [2**62, 3, 3, 3]}, "attribute 'w_shape'"),
    ("conv", {"w_shape": [5, 3, 5, 5]}, "(codes)"),
    ("conv", {"w_shape": None}, "attribute 'w_shape' is missing"),
    ("conv", {"w_shape": 5}, "attribute 'w_shape'"),
    ("conv", {"strides": [1, 0]}, "attribute 'strides' is [1, 0]"),
    ("conv", {"strides": [1]}, "expected 2 numbers"),
    ("conv", {"strides": None}, "attribute 'strides' is missing"),
    ("conv", {"dilations": [1, -1]}, "attribute 'dilations'"),
    ("conv", {"dilations": [BIG, BIG]}, "does not fit"),
    ("conv", {"pads": [0, 0, 0]}, "attribute 'pads'"),
    ("conv", {"pads": [0, 0, 0, -1]}, "attribute 'pads'"),
    ("conv", {"pads": [2**62, 0, 0, 0]}, "attribute 'pads'"),
    ("conv", {"pads": [BIG] * 4}, "too large"),
    ("matmul", {"bits": 0}, "attribute 'bits'"),
    ("matmul", {"w_shape": [5, 7, 1]}, "attribute 'w_shape'"),
    ("matmul", {"w_shape": [5, 0]}, "attribute 'w_shape'"),
    ("matmul", {"w_shape": [5, 9]}, "(codes)"),
    ("floats", {"bits": 3}, "attribute 'bits' is 3"),
    ("floats", {"w_shape": [5, 9]}, "(codes)"),
    ("floats", {"w_shape": [BIG, BIG]}, "LutMatMulIntegerToFloat"),
    ("floats", {"w_shape": None}, "attribute 'w_shape' is missing"),
    ("adaptive", {"features": 0}, "attribute 'features' is 0"),
    ("adaptive", {"features": 8}, "attribute 'features' is 8"),
    ("adaptive", {"features": 1}, "(w1)"),
    ("adaptive", {"beta_min": 0.0}, "beta_min"),
    ("adaptive", {"beta_min": float("nan")}, "beta_min"),
    ("adaptive", {"beta_max": 0.1}, "beta_max"),
    ("adaptive", {"beta_max": float("inf")}, "beta_max"),
    ("adaptive", {"beta_max": None}, "attribute 'beta_max' is missing"),
    ("adaptive", {"qmin": -1}, "attribute 'qmin'"),
    ("adaptive", {"qmin": 9, "qmax": 9}, "attribute 'qmax'"),
    ("adaptive", {"qmax": 256}, "attribute 'qmax'"),
    ("border", {"channels": 0}, "attribute 'channels'"),
    ("border", {"channels": 4}, "expected [4, 16]"),
    ("border", {"channels": BIG}, "BorderQuantize"),
    ("border", {"qmin": 255}, "attribute 'qmin'"),
    ("border", {"qmax": None}, "attribute 'qmax' is missing"),
    ("levels", {"axis": 0}, "attribute 'axis' is 0, expected -8 to -1"),
    ("levels", {"axis": 1}, "attribute 'axis' is 1"),
    ("levels", {"axis": -9}, "attribute 'axis' is -9"),
    ("levels", {"axis": -(2**63)}, "attribute 'axis'"),
    ("levels", {"axis": None}, "attribute 'axis' is missing"),
    ("levels", {"axis": -1.0}, "attribute 'axis'"),
    ("levels", {"axis": -2}, "expected 5 channels on axis -2"),
    ("levels", {"axis": -8}, "expected 5 channels on axis -8"),
    ("feedback", {"axis": 0}, "attribute 'axis' is 0, expected -8 to -1"),
    ("feedback", {"axis": -9}, "attribute 'axis' is -9"),
    ("feedback", {"axis": None}, "attribute 'axis' is missing"),
    ("feedback", {"axis": -8}, "expected 5 channels on axis -8"),
    ("feedback", {"cell": 0}, "attribute 'cell' is 0, expected 1 to 8"),
    ("feedback", {"cell": -1}, "attribute 'cell' is -1"),
    ("feedback", {"cell": BIG}, "attribute 'cell'"),
    ("feedback", {"cell": 2.0}, "attribute 'cell' is missing or not an integer"),
    ("feedback", {"cell": "two"}, "attribute 'cell' is missing or not an integer"),
    ("feedback", {"cell": [2]}, "attribute 'cell' is missing or not an integer"),
    ("feedback", {"cell": 2}, "(group) has shape [5], expected a multiple of 4 for cells of 2"),
    ("cells", {"cell": 9}, "attribute 'cell' is 9, expected 1 to 8"),
    ("cells", {"cell": 1}, "(table) has shape [5, 16], expected 1 or 20 rows"),
    ("cells", {"cell": None}, "(table) has shape [5, 16], expected 1 or 20 rows"),
    ("cells", {"axis": -2}, "attribute 'axis' is -2, expected -3 for cells of 2"),
    ("cells", {"axis": -4}, "attribute 'axis' is -4, expected -3 for cells of 2"),
]


def valid(nodes: Nodes, op: str) -> Node:
    rng = np.random.default_rng(3)
    if op == "conv":
        return nodes.lut_conv(rng)
    if op == "matmul":
        return nodes.lut_matmul(rng)
    if op == "floats":
        return nodes.lut_matmul_to_float(rng)
    if op == "border":
        return nodes.border(rng, window=(3, 3), rank=3, table=True)
    if op == "levels":
        return nodes.levels(rng)
    if op in ("feedback", "cells"):
        return nodes.feedback(rng, cell=2 if op == "cells" else 1)
    return nodes.adaptive(rng, requantize=op == "requantize")


@pytest.mark.parametrize(
    "op", ["conv", "matmul", "floats", "adaptive", "requantize", "border", "levels", "feedback", "cells"]
)
def test_the_unchanged_nodes_run(native: Native, nodes: Nodes, op: str) -> None:
    node = valid(nodes, op)
    for fed in ({"x"}, set(node.inputs)):
        for output, expected in zip(native.run(node.changed(fed=fed)), node.expected(), strict=True):
            np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("fed", [False, True], ids=["constant", "fed"])
@pytest.mark.parametrize(("op", "what", "inputs", "words"), BAD_INPUTS, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_inputs(
    native: Native, nodes: Nodes, op: str, what: str, inputs: dict[str, Any], words: str, fed: bool
) -> None:
    node = valid(nodes, op).changed(**inputs)
    sentence = native.failure(node.changed(fed=set(node.inputs)) if fed else node)
    assert words in sentence, what
    assert node.op in sentence
    assert "the_node" in sentence


@pytest.mark.parametrize(("op", "attributes", "words"), BAD_ATTRIBUTES, ids=str)
def test_bad_attributes(native: Native, nodes: Nodes, op: str, attributes: dict[str, Any], words: str) -> None:
    node = valid(nodes, op).with_attributes(**attributes)
    sentence = native.failure(node)
    assert words in sentence
    assert node.op in sentence


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        ("conv", {"x": np.zeros((1, 3, 7, 6), np.float32)}),
        ("conv", {"x_zero_point": np.zeros((), np.int8)}),
        ("conv", {"y_zero_point": np.zeros((), np.int8)}),
        ("conv", {"codes": np.zeros((5, 14), np.int8)}),
        ("conv", {"table": np.zeros(16, np.uint8)}),
        ("conv", {"bias": np.zeros(5, np.int64)}),
        ("conv", {"w_scale": np.ones(5, np.float64)}),
        ("conv", {"y_zero_point": None}),
        ("floats", {"bias": np.zeros(5, np.int32)}),
        ("floats", {"bias": None}),
        ("floats", {"x_zero_point": np.zeros((), np.int8)}),
        ("adaptive", {"zero_point": np.zeros((), np.int8)}),
        ("border", {"window": np.zeros((5, 3, 3), np.float32)}),
        ("border", {"x": np.zeros((1, 5), np.uint8)}),
        ("levels", {"x": f32(2, 5, 6, 7)}),
        ("levels", {"table": np.zeros((5, 16), np.int8)}),
        ("levels", {"zero_point": np.zeros((), np.int8)}),
        ("levels", {"table": None}),
        ("feedback", {"x": f32(2, 5, 6, 7)}),
        ("feedback", {"group": np.zeros(5, np.int8)}),
        ("feedback", {"left": np.zeros((3, 5), np.uint8)}),
        ("feedback", {"right_scale": np.zeros(5)}),
        ("feedback", {"right_scale": None}),
    ],
)
def test_wrong_types_and_counts_are_refused(native: Native, nodes: Nodes, op: str, inputs: dict[str, Any]) -> None:
    node = valid(nodes, op).changed(**inputs)
    assert node.op in native.failure(node)
