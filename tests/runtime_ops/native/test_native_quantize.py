"""Adaptive*, BorderQuantize, LutRequantize and FeedbackRequantize equal the NumPy law on every instruction set."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime as ort
import pytest

if TYPE_CHECKING:
    from tests.runtime_ops.native.conftest import Native, Node, Nodes

SETS = ["baseline", "neondot", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx", ""]


def adaptive_nodes(nodes: Nodes) -> dict[str, Node]:
    """Cases of both adaptive operators: sets of statistics, sizes around vectors, one point per channel."""
    rng = np.random.default_rng(1)
    made = {}
    for requantize in (False, True):
        tag = "requantize" if requantize else "quantize"
        for features in range(1, 8):
            made[f"{tag}_{features}"] = nodes.adaptive(rng, features=features, requantize=requantize)
        for index, shape in enumerate([(3, 4), (1, 1, 1), (2, 3, 31), (2, 3, 33), (1, 2, 257, 129), (4, 65, 5, 5, 2)]):
            made[f"{tag}_shape{index}"] = nodes.adaptive(rng, shape=shape, requantize=requantize)
        made[f"{tag}_narrow"] = nodes.adaptive(rng, requantize=requantize, qmin=3, qmax=18)
    return made


def border_nodes(nodes: Nodes) -> dict[str, Node]:
    """Cases of BorderQuantize: with and without table, window, channels; planes around vectors and strips."""
    rng = np.random.default_rng(2)
    made = {}
    shapes = {
        "point": (3, 7),
        "line": (2, 5, 37),
        "small": (2, 3, 1, 2),
        "plane": (2, 5, 19, 23),
        "tall": (1, 2, 301, 257),
    }
    for name, shape in shapes.items():
        for table in (False, True):
            made[f"{name}_alone_{table}"] = nodes.border(rng, shape=shape, table=table)
        made[f"{name}_window"] = nodes.border(rng, shape=shape, window=(3, 3))
        made[f"{name}_wide"] = nodes.border(rng, shape=shape, window=(5, 3), zero_point=4, table=True)
        made[f"{name}_flat"] = nodes.border(rng, shape=shape, window=(1, 5))
        made[f"{name}_across"] = nodes.border(rng, shape=shape, rank=3)
        made[f"{name}_both"] = nodes.border(rng, shape=shape, window=(5, 5), rank=2, zero_point=7, table=True)
    made["wide_codes"] = nodes.border(rng, window=(3, 3), zero_point=128, qmax=255, table=True)
    for rank in (1, 8, 11, 13):
        made[f"rank{rank}"] = nodes.border(rng, shape=(2, 6 + rank % 2, 9, 19), rank=rank)
    return made | near_nodes(nodes, rng)


def near_nodes(nodes: Nodes, rng: np.random.Generator) -> dict[str, Node]:
    """Values next to borders and integers, where a product with a reciprocal is on the other side of them."""
    made = {}
    for name, (zero_point, qmin, qmax) in {"few": (0, 0, 15), "signed": (9, 2, 17), "many": (128, 0, 255)}.items():
        for table in (False, True):
            node = nodes.border(rng, shape=(1, 8, 1), zero_point=zero_point, qmin=qmin, qmax=qmax, table=table)
            border = node.inputs["border"].copy()
            border[4:] = np.array([[0], [1], [-0.25], [1e-5]], np.float32)  # divided all along
            border[7, 1:] = 0.999995
            scale = np.float32(np.exp(rng.uniform(-9, 9)))
            whole = rng.integers(qmin - zero_point - 1, qmax - zero_point + 2, (8, 1001))
            level = np.clip(whole + zero_point - qmin, 0, border.shape[1] - 1)
            part = np.where(rng.random(whole.shape) < 0.6, np.take_along_axis(border, level, axis=1), 0)
            x = ((whole + part.astype(np.float64)) * scale).astype(np.float32)
            for _ in range(2):
                beside = np.nextafter(x, rng.choice(np.array([-np.inf, np.inf], np.float32), x.shape))
                x = np.where(rng.random(x.shape) < 0.7, beside, x)
            x[:, ::50] = rng.choice(np.array([0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 1e30, -1e30], np.float32), (8, 21))
            made[f"near_{name}_{table}"] = node.changed(x=x[None], border=border, scale=np.asarray(scale))
    return made


def level_nodes(nodes: Nodes) -> dict[str, Node]:
    """Cases of LutRequantize: planes and rows around blocks, every rank, few and many levels, a table for all."""
    rng = np.random.default_rng(3)
    made = {}
    for count in (2, 4, 5, 8, 9, 16):
        for points in (1, 15, 16, 31, 49, 63, 64, 65, 127, 128, 300):
            made[f"levels{count}_points{points}"] = nodes.levels(rng, shape=(2, 3, points), axis=-2, count=count)
            made[f"levels{count}_last{points}"] = nodes.levels(rng, shape=(2, 3, points), axis=-1, count=count)
    places = {"line": ((7,), -1), "rows": ((5, 33), -1), "first": ((5, 33), -2), "three": ((2, 4, 70), -2)}
    places |= {"last": ((2, 3, 5, 6), -1), "four": ((2, 3, 9, 11), -3), "five": ((2, 3, 4, 5, 13), -4)}
    places |= {"start": ((3, 2, 4, 5, 13), -5), "eight": ((3, 1, 2, 1, 2, 1, 9, 5), -8)}
    for name, (shape, axis) in places.items():
        made[name] = nodes.levels(rng, shape=shape, axis=axis)
        made[f"{name}_all"] = nodes.levels(rng, shape=shape, axis=axis, channels=1)
        made[f"{name}_odd_axis"] = nodes.levels(rng, shape=shape, axis=-8, channels=1)
    # Planes that tasks begin and end within.
    made["large"] = nodes.levels(rng, shape=(1, 3, 157, 163))
    made["large_all"] = nodes.levels(rng, shape=(40013,), axis=-1, channels=1, count=4)
    made["many"] = nodes.levels(rng, shape=(2, 4099, 7), axis=-2)
    made["many_rows"] = nodes.levels(rng, shape=(1301, 49), axis=-1)
    made["long_rows"] = nodes.levels(rng, shape=(3, 17001), axis=-1)
    duplicates = nodes.levels(rng, shape=(2, 6, 130), axis=-2)
    rows = [[0] * 16, [255] * 16, [7] * 15 + [255], [0] + [200] * 15, [3, 3, 4, 4, 9, 9] + [80] * 10]
    rows.append(list(range(120, 136)))
    made["duplicates"] = duplicates.changed(table=np.array(rows, np.uint8))
    made["duplicate_rows"] = nodes.levels(rng, shape=(2, 24), axis=-1).changed(table=np.array(rows * 4, np.uint8))
    every = np.tile(np.arange(256, dtype=np.uint8), (1, 3, 1))
    for zero, zero_x in ((0, 0), (255, 255), (0, 255), (255, 0), (128, 3)):
        numbers = {"zero_point": np.asarray(zero, np.uint8), "x_zero_point": np.asarray(zero_x, np.uint8)}
        for index, (x_scale, scale) in enumerate([(0.02, 0.02), (0.5, 1.0), (0.013, 0.2), (1.0, 0.0131), (7.0, 3.0)]):
            node = nodes.levels(rng, shape=every.shape, axis=-2, x_scale=x_scale, scale=scale)
            made[f"zeros_{zero}_{zero_x}_{index}"] = node.changed(x=every, **numbers)
    for index, (x_scale, scale) in enumerate([(1e-45, 1e-45), (3e38, 1e-38), (1e-38, 3e38), (3e38, 3e38), (1, 1e-40)]):
        made[f"extreme_{index}"] = nodes.levels(rng, shape=(1, 3, 65), axis=-2, x_scale=x_scale, scale=scale)
    return made


def feedback_nodes(nodes: Nodes) -> dict[str, Node]:
    """Cases of FeedbackRequantize: positions around tiles, channels and ranks around registers, every axis."""
    rng = np.random.default_rng(5)
    made = {}
    for points in (1, 2, 31, 32, 33, 49, 63, 64, 65, 127, 128, 200):
        made[f"points{points}"] = nodes.feedback(rng, shape=(1, 13, points), axis=-2, rank=5)
        made[f"samples{points}"] = nodes.feedback(rng, shape=(3, 13, points), axis=-2, rank=4)
        made[f"last{points}"] = nodes.feedback(rng, shape=(1, points, 13), axis=-1, rank=3, count=4)
    for rank in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 64, 65):
        made[f"rank{rank}"] = nodes.feedback(rng, shape=(1, 21, 70), axis=-2, rank=rank, count=4)
    for channels in (2, 3, 7, 8, 9, 31, 64, 100, 257, 515):
        made[f"channels{channels}"] = nodes.feedback(rng, shape=(2, channels, 5, 9), rank=6, count=4)
        made[f"tokens{channels}"] = nodes.feedback(rng, shape=(2, 41, channels), axis=-1, rank=6)
    for axis in range(-8, 0):
        shape = [3, 1, 2, 3, 1, 2, 5, 2]
        shape[axis] = 11
        made[f"axis{axis}"] = nodes.feedback(rng, shape=shape, axis=axis)
    made["line"] = nodes.feedback(rng, shape=(9,), axis=-1)
    made["pair"] = nodes.feedback(rng, shape=(2, 3), axis=-2, rank=1)
    for groups in ((0,), (7,), (0, 1), (3, 5), (0, 7), (1, 2, 3)):
        name = "".join(map(str, groups))
        made[f"groups{name}"] = nodes.feedback(rng, shape=(1, 19, 150), axis=-2, groups=groups)
    for count in (2, 4, 8, 16):
        made[f"levels{count}"] = nodes.feedback(rng, shape=(2, 9, 130), axis=-2, count=count)
        made[f"levels{count}_all"] = nodes.feedback(rng, shape=(2, 9, 130), axis=-2, count=count, rows=1)
    # Codes that are the same, products, and divisions.
    numbers = {"zero_point": np.asarray(7, np.uint8), "x_zero_point": np.asarray(7, np.uint8)}
    same = nodes.feedback(rng, shape=(1, 9, 200), axis=-2, x_scale=0.02, scale=0.02)
    made["same"] = same.changed(**numbers)
    for index, (x_scale, scale) in enumerate([(0.5, 1.0), (1.0, 0.0131), (0.3, 0.2), (0.7, 0.1), (0.07, 0.14)]):
        made[f"scales{index}"] = nodes.feedback(rng, shape=(1, 9, 200), axis=-2, x_scale=x_scale, scale=scale)
    for index, (x_scale, scale) in enumerate([(1e-45, 1e-45), (3e38, 1e-38), (1e-38, 3e38), (3e38, 3e38), (1, 1e-40)]):
        made[f"extreme{index}"] = nodes.feedback(rng, shape=(1, 9, 65), axis=-2, x_scale=x_scale, scale=scale)
    return made | hard_feedback(nodes, rng) | cell_nodes(nodes, rng)


def hard_feedback(nodes: Nodes, rng: np.random.Generator) -> dict[str, Node]:
    """The largest sums, ties, and products beyond float32 and below it."""
    made = {}
    node = nodes.feedback(rng, shape=(1, 1042, 40), axis=-2, rank=3, groups=(0, 1))
    most = np.full((3, 1042), 127, np.int8)
    most[:, 1040:] = [24, 0]
    most[1] = -most[1]
    ends = np.array([[0, 255]], np.uint8)
    made["largest"] = node.changed(left=most, left_scale=np.full(3, 1e-7, np.float32), table=ends)
    deep = nodes.feedback(rng, shape=(1, 3, 40), axis=-2, rank=1042, groups=(0, 1, 2))
    made["deepest"] = deep.changed(right=most, left_scale=np.full(1042, 1.0, np.float32))
    node = nodes.feedback(rng, shape=(2, 33, 70), axis=-2, rank=5)
    for name, size in {"huge": 3e38, "tiny": 1e-45, "ties": 0.5, "units": 1.0, "zero": 0.0}.items():
        scale = np.full(33, size, np.float32)
        made[f"left_{name}"] = node.changed(left_scale=-scale[:5])
        made[f"right_{name}"] = node.changed(right_scale=scale)
        made[f"both_{name}"] = node.changed(right_scale=-scale, left_scale=scale[:5])
    few = node.changed(left=np.sign(node.inputs["left"]), right=np.sign(node.inputs["right"]))
    halves = np.full(33, 0.5, np.float32)
    made["halves"] = few.changed(left_scale=halves[:5], right_scale=halves)
    return made


def cell_nodes(nodes: Nodes, rng: np.random.Generator) -> dict[str, Node]:
    """Cells: planes that they fill and planes that they do not, around tiles; every side."""
    made = {}
    for cell in (2, 3):
        for plane in ((1, 1), (2, 2), (5, 7), (13, 13), (16, 16), (33, 9), (3, 130)):
            name = f"cell{cell}_{plane[0]}x{plane[1]}"
            made[name] = nodes.feedback(rng, shape=(3, 5, *plane), rank=4, cell=cell, count=4)
            made[f"{name}_all"] = nodes.feedback(rng, shape=(5, *plane), rank=5, rows=1, cell=cell)
            made[f"{name}_many"] = nodes.feedback(rng, shape=(2, 2, 2, *plane), rank=9, groups=(0, 3), cell=cell)
        made[f"cell{cell}_channels"] = nodes.feedback(rng, shape=(1, 129, 18, 17), rank=6, cell=cell)
        made[f"cell{cell}_one_channel"] = nodes.feedback(rng, shape=(2, 1, 21, 17), rank=2, cell=cell)
        made[f"cell{cell}_one_group"] = nodes.feedback(rng, shape=(2, 3, 9, 8), groups=(5,), cell=cell)
        made[f"cell{cell}_none"] = nodes.feedback(rng, shape=(2, 3, 0, 8), cell=cell)
        same = nodes.feedback(rng, shape=(2, 3, 19, 23), cell=cell, x_scale=0.02, scale=0.02)
        zero = np.asarray(7, np.uint8)
        made[f"cell{cell}_same"] = same.changed(zero_point=zero, x_zero_point=zero)
    for cell in range(4, 9):
        made[f"cell{cell}"] = nodes.feedback(rng, shape=(2, 3, 37, 83), rank=5, cell=cell)
        made[f"cell{cell}_filled"] = nodes.feedback(rng, shape=(2, 2, 2 * cell, 9 * cell), rank=5, cell=cell)
    # Nodes of older files.
    for shape, axis in (((2, 5, 6, 7), -3), ((2, 5, 6), -2)):
        made[f"no_cell{axis}"] = nodes.feedback(rng, shape=shape, axis=axis).with_attributes(cell=None)
    return made


@pytest.mark.parametrize("isa", SETS)
def test_adaptive_equals_the_law(native: Native, nodes: Nodes, isa: str, tmp_path: pathlib.Path) -> None:
    made = adaptive_nodes(nodes)
    native.check(native.run_apart(made, tmp_path, isa=isa, threads=(1, 2))[0], made)


@pytest.mark.parametrize("isa", SETS)
def test_border_equals_the_law(native: Native, nodes: Nodes, isa: str, tmp_path: pathlib.Path) -> None:
    made = border_nodes(nodes)
    native.check(native.run_apart(made, tmp_path, isa=isa, threads=(1, 2))[0], made)


@pytest.mark.parametrize("isa", SETS)
def test_levels_equal_the_law(native: Native, nodes: Nodes, isa: str, tmp_path: pathlib.Path) -> None:
    made = level_nodes(nodes)
    native.check(native.run_apart(made, tmp_path, isa=isa, threads=(1, 2))[0], made)


@pytest.mark.parametrize("isa", SETS)
def test_feedback_equals_the_law(native: Native, nodes: Nodes, isa: str, tmp_path: pathlib.Path) -> None:
    made = feedback_nodes(nodes)
    native.check(native.run_apart(made, tmp_path, isa=isa, threads=(1, 2))[0], made)


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("op", ["lut_conv", "lut_matmul", "adaptive", "border", "levels", "feedback"])
def test_native_kernel_runs_not_the_body(
    native: Native, nodes: Nodes, rng: np.random.Generator, tmp_path: pathlib.Path, op: str, optimize: bool
) -> None:
    node: Node = getattr(nodes, op)(rng)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.path))
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    ort.InferenceSession(node.model().SerializeToString(), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    assert [n.op_type for n in graph.node] == [node.op]


def test_more_channels_than_one_task_holds(native: Native, nodes: Nodes, rng: np.random.Generator) -> None:
    for shape in ((2, 300, 17, 13), (1, 2064, 3, 3)):
        for node in (
            nodes.adaptive(rng, shape=shape, features=1),
            nodes.border(rng, shape=shape, window=(3, 5), rank=5),
            nodes.border(rng, shape=shape, window=(5, 1)),
        ):
            for output, expected in zip(native.run(node, threads=2), node.expected(), strict=True):
                np.testing.assert_array_equal(output, expected)


def test_quotients_next_to_ties(native: Native, nodes: Nodes, rng: np.random.Generator) -> None:
    """Products with a reciprocal would round these differently: they are divided."""
    node = nodes.adaptive(rng, shape=(1, 1, 64, 128), features=4).with_attributes(beta_min=1.0, beta_max=1.0)
    for step in np.exp(rng.uniform(-9, 9, 40)).astype(np.float32):
        ties = (np.arange(8192) % 255 + 0.5 - float(node.inputs["zero_point"])) * np.float64(step)
        x = ties.astype(np.float32)
        x = np.where(np.arange(8192) % 3 == 0, x, np.nextafter(x, np.float32(np.inf) * np.sign(rng.normal(size=8192))))
        near = node.changed(x=x.astype(np.float32).reshape(1, 1, 64, 128), step=np.asarray(step, np.float32))
        np.testing.assert_array_equal(native.run(near)[0], near.expected()[0])


def test_steps_beyond_ordinary_floats(native: Native, nodes: Nodes, rng: np.random.Generator) -> None:
    for step in (1e-45, 1e-38, 3e38):
        for node in (nodes.adaptive(rng), nodes.adaptive(rng, requantize=True)):
            odd = node.changed(step=np.asarray(step, np.float32)).with_attributes(beta_min=1.0, beta_max=1.0)
            with np.errstate(over="ignore"):
                law = odd.expected()
            for output, expected in zip(native.run(odd), law, strict=True):
                np.testing.assert_array_equal(output, expected)


def test_values_that_are_not_finite(native: Native, nodes: Nodes, rng: np.random.Generator) -> None:
    """Infinities saturate; what is not a number gives some code, not a crash."""
    node = nodes.border(rng, shape=(1, 1, 1, 130), table=True)
    x = node.inputs["x"].copy()
    x[..., ::2], x[..., 1::4], x[..., 3::4] = np.nan, np.inf, -np.inf
    codes = native.run(node.changed(x=x))[0]
    assert codes[..., 1::4].min() == 15
    assert codes[..., 3::4].max() == 0
    adaptive = nodes.adaptive(rng, shape=(1, 1, 1, 130))
    assert native.run(adaptive.changed(x=x))[0].shape == x.shape


def test_levels_computed_at_run_time(native: Native, nodes: Nodes, rng: np.random.Generator) -> None:
    """Maps are made on every run, of tables of any number of channels and levels."""
    node = nodes.levels(rng)
    session = native.session(node.changed(fed=set(node.inputs)).model(), threads=2)
    for channels, count in ((5, 16), (1, 3), (200, 2), (5, 9)):
        shape = (2, max(channels, 5), 6, 7)
        each = nodes.levels(rng, shape=shape, channels=channels, count=count)
        each = each.changed(fed=set(each.inputs))
        np.testing.assert_array_equal(session.run(None, each.feeds)[0], each.expected()[0])


def test_feedback_computed_at_run_time(native: Native, nodes: Nodes, rng: np.random.Generator) -> None:
    """Groups and coefficients are read on every run, of any number of channels and any rank."""
    node = nodes.feedback(rng)
    session = native.session(node.changed(fed=set(node.inputs)).model(), threads=2)
    for channels, rank, rows in ((5, 3, 5), (2, 1, 1), (200, 9, 200), (5, 70, 1)):
        each = nodes.feedback(rng, shape=(2, channels, 6, 7), rank=rank, rows=rows)
        each = each.changed(fed=set(each.inputs))
        np.testing.assert_array_equal(session.run(None, each.feeds)[0], each.expected()[0])
    node = nodes.feedback(rng, cell=3)
    session = native.session(node.changed(fed=set(node.inputs)).model(), threads=2)
    for shape, rows in (((2, 5, 6, 7), 5), ((1, 1, 1, 1), 1), ((3, 40, 31, 29), 1)):
        each = nodes.feedback(rng, shape=shape, rows=rows, cell=3)
        each = each.changed(fed=set(each.inputs))
        np.testing.assert_array_equal(session.run(None, each.feeds)[0], each.expected()[0])
