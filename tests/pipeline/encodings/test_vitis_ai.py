"""Positions of the binary point for Vitis AI."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from postquant.pipeline.encodings.entries import collect_entries
from postquant.pipeline.encodings.vitis_ai import graph_inputs, position, read_positions, write_positions
from postquant.runtime_ops.errors import ConfigError
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

SPEC = QuantSpec(8, signed=True, symmetric=True)


def quantizer(spec: QuantSpec, scale: Any, zero: Any = 0) -> TensorQuantizer:
    return TensorQuantizer(spec, np.array(scale, np.float32), np.array(zero, np.int32))


@pytest.mark.parametrize("place", [-3, 0, 5, 12])
def test_a_position_is_the_negative_power(place: int) -> None:
    assert position(quantizer(SPEC, 2.0**-place)) == place


def test_what_has_no_position_says_why() -> None:
    assert "no power of two" in str(position(quantizer(SPEC, 0.3)))
    unsigned = QuantSpec(8, signed=False, symmetric=False)
    assert "signed" in str(position(quantizer(unsigned, 0.5, 3)))
    channels = QuantSpec(8, signed=True, symmetric=True, axis=0)
    assert "different" in str(position(quantizer(channels, [0.5, 0.25], [0, 0])))


def test_a_plan_of_powers_of_two_is_said_whole(planned: Any, tmp_path: pathlib.Path) -> None:
    whole = {"signed": True, "symmetric": True, "power_of_two": True, "narrow": False}
    model, plan = planned(activations=whole, weights={**whole, "per_channel": False})
    path = tmp_path / "vitis-ai.json"
    count, notes = write_positions(collect_entries(model, plan), path, graph_inputs(model))
    assert count == len({*plan.activations, *plan.shared}) + len(plan.weights)
    assert {note.tensor for note in notes} == set(plan.int_biases)
    content = json.loads(path.read_text())
    assert list(content["input"]) == ["image"]
    ((bits, place),) = content["param"]["w1"]
    assert bits == 8
    assert 2.0**-place == plan.weights["w1"].scale
    read = read_positions(path)
    for name, tensor in read.tensors.items():
        assert tensor.scale[0] == (plan.weights.get(name) or plan.activation_quantizer(name)).scale


def test_other_plans_are_not_rounded_to_powers_of_two(asymmetric: tuple[Any, Any], tmp_path: pathlib.Path) -> None:
    model, plan = asymmetric
    count, notes = write_positions(collect_entries(model, plan), tmp_path / "v.json", graph_inputs(model))
    assert count == 0
    assert {*plan.activations, *plan.weights} <= {note.tensor for note in notes}


def test_another_file_is_told(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "v.json"
    path.write_text('{"param": {}}')
    with pytest.raises(ConfigError, match="output"):
        read_positions(path)
