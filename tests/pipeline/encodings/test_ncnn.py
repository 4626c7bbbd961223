"""ncnn's table: one line per layer and kind, never a zero or infinite number."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np
import pytest

from postquant.pipeline.encodings.entries import Fidelity, collect_entries
from postquant.pipeline.encodings.ncnn import read_table, write_table
from postquant.runtime_ops.errors import ConfigError
from postquant.runtime_ops.quantizer import SMALLEST_SCALE, TensorQuantizer

GROUPED = """<ir_version: 8, opset_import: ["" : 17]>
net (float[1,4,6,6] x) => (float[1,4,6,6] y)
<float[4,2,3,3] w, float[4] b>
{
   [grouped] c = Conv <pads = [1, 1, 1, 1], group = 2> (x, w, b)
   y = Relu (c)
}
"""


def test_numbers_are_reciprocal_scales(symmetric: tuple[Any, Any], tmp_path: pathlib.Path) -> None:
    model, plan = symmetric
    path = tmp_path / "ncnn.table"
    count, notes = write_table(collect_entries(model, plan), path)
    assert (count, notes) == (5, [])
    lines = [line.split() for line in path.read_text().splitlines()]
    assert [line[0] for line in lines[:5]] == [
        f"{name}_param_0" for name in ("conv1", "depthwise", "project", "reduce", "head")
    ]
    table = {name: [float(number) for number in numbers] for name, *numbers in lines}
    np.testing.assert_allclose(table["depthwise_param_0"], 1 / plan.weights["w2"].scale, rtol=1e-6)
    np.testing.assert_allclose(table["head_param_0"], 1 / plan.weights["w5"].scale, rtol=1e-6)
    np.testing.assert_allclose(table["conv1"], [1 / plan.activations["image"].scale], rtol=1e-6)
    # ncnn rounds the weights of the float model to these codes.
    weight = model.graph.initializers["w1"].const_value.numpy()
    scaled = weight * np.array(table["conv1_param_0"], np.float32).reshape(-1, 1, 1, 1)
    assert (np.clip(np.rint(scaled), -127, 127) == plan.weights["w1"].quantize(weight)).all()
    read = read_table(path)
    np.testing.assert_allclose(read.layer_weights["conv1"].scale, plan.weights["w1"].scale, rtol=1e-6)
    np.testing.assert_allclose(read.layer_inputs["head"].scale, [plan.activation_quantizer("f1").scale], rtol=1e-6)


def test_all_zero_channels_have_a_finite_number(symmetric: tuple[Any, Any], tmp_path: pathlib.Path) -> None:
    model, plan = symmetric
    weight = plan.weights["w1"]
    scale = weight.scale.copy()
    scale[2] = SMALLEST_SCALE
    scale[3] = 2e-39 * 1e10
    changed = plan.with_weight("w1", TensorQuantizer(weight.spec, scale, weight.zero_point))
    path = tmp_path / "ncnn.table"
    write_table(collect_entries(model, changed), path)
    numbers = [float(word) for line in path.read_text().splitlines() for word in line.split()[1:]]
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    assert all(np.isfinite(np.float32(number)) and np.float32(number) > 0 for number in numbers)
    assert read_table(path).skipped == ()
    assert numbers[2] == 1.0


def test_asymmetric_inputs_are_told(asymmetric: tuple[Any, Any], tmp_path: pathlib.Path) -> None:
    _, notes = write_table(collect_entries(*asymmetric), tmp_path / "ncnn.table")
    assert {note.tensor for note in notes} == {"conv1", "depthwise", "project", "reduce", "head"}
    assert all(note.fidelity is Fidelity.APPROXIMATED for note in notes)


def test_a_group_with_several_scales_is_left_out(planned: Any, tmp_path: pathlib.Path) -> None:
    model, plan = planned(GROUPED, activations={"signed": True, "symmetric": True})
    path = tmp_path / "ncnn.table"
    count, (note,) = write_table(collect_entries(model, plan), path)
    assert (count, note.tensor, note.fidelity) == (0, "grouped", Fidelity.LEFT_OUT)
    assert "per group" in note.reason
    weight = plan.weights["w"]
    even = TensorQuantizer(weight.spec, np.repeat(weight.scale[[0, 2]], 2), weight.zero_point)
    assert write_table(collect_entries(model, plan.with_weight("w", even)), path) == (1, [])
    assert len(path.read_text().splitlines()[0].split()) == 3


def test_zero_and_infinite_numbers_are_skipped_and_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ncnn.table"
    path.write_text("conv1_param_0 12.5 inf \nconv1 30.25 \nconv2_param_0 0 1 \nconv2 4 \n")
    read = read_table(path)
    assert list(read.layer_inputs) == ["conv1", "conv2"]
    assert read.layer_weights == {}
    assert [line.split(":")[0] for line in read.skipped] == ["conv1_param_0", "conv2_param_0"]
    assert read.layer_inputs["conv2"].scale.tolist() == [0.25]


@pytest.mark.parametrize("content", ["conv1\n", "conv1 a b\n"])
def test_wrong_tables_are_told(content: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ncnn.table"
    path.write_text(content)
    with pytest.raises(ConfigError, match="line 1"):
        read_table(path)
