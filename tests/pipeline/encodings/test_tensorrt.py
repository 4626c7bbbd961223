"""TensorRT's calibration cache, and the advice for explicit quantization."""

from __future__ import annotations

import dataclasses
import pathlib
import struct
from typing import Any

import numpy as np
import pytest

from postquant.pipeline.encodings.entries import Fidelity, collect_entries
from postquant.pipeline.encodings.tensorrt import read_cache, write_cache, write_explicit_advice
from postquant.runtime_ops.errors import ConfigError


def test_a_line_is_a_name_and_the_bits_of_a_float(symmetric: tuple[Any, Any], tmp_path: pathlib.Path) -> None:
    model, plan = symmetric
    path = tmp_path / "tensorrt.cache"
    count, notes = write_cache(collect_entries(model, plan), path)
    header, *lines = path.read_text().splitlines()
    assert header == "TRT-8601-EntropyCalibration2"
    assert count == len(lines) == len({*plan.activations, *plan.shared})
    found = dict(line.split(": ") for line in lines)
    for name, digits in found.items():
        quantizer = plan.activation_quantizer(name)
        assert len(digits) == 8
        assert np.uint32(int(digits, 16)).view(np.float32) == quantizer.scale
    assert {note.tensor for note in notes} == set(plan.weights)
    assert all(note.fidelity is Fidelity.LEFT_OUT for note in notes)


def test_asymmetric_tensors_keep_their_reach_and_are_told(asymmetric: tuple[Any, Any], tmp_path: pathlib.Path) -> None:
    model, plan = asymmetric
    path = tmp_path / "tensorrt.cache"
    _, notes = write_cache(collect_entries(model, plan), path)
    read = read_cache(path).tensors
    told = {note.tensor for note in notes if note.fidelity is Fidelity.APPROXIMATED}
    for name, tensor in read.items():
        low, high = plan.activation_quantizer(name).range()
        assert float(tensor.scale[0]) * 127 == pytest.approx(max(-low, high))
        assert (name in told) == (int(plan.activation_quantizer(name).zero_point) != 128)


def test_a_cache_from_elsewhere_is_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "calib.bin"
    path.write_text(
        "TRT-7134-EntropyCalibration2\n000_net: 3c010a14\n(Unnamed Layer* 3) [Convolution]_output: 3d2f1b5c\n"
    )
    read = read_cache(path)
    assert list(read.tensors) == ["000_net", "(Unnamed Layer* 3) [Convolution]_output"]
    (expected,) = struct.unpack(">f", bytes.fromhex("3c010a14"))
    tensor = read.tensors["000_net"]
    assert (float(tensor.scale[0]), tensor.bits, tensor.signed) == (expected, 8, True)


@pytest.mark.parametrize(
    ("content", "told"), [("", "a first line"), ("x: 3c010a14\n", "a first line"), ("TRT-8-A\nx = 1\n", "line 2")]
)
def test_wrong_caches_are_told(content: str, told: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "calib.cache"
    path.write_text(content)
    with pytest.raises(ConfigError, match=told):
        read_cache(path)


def test_advice_names_what_tensorrt_refuses(
    symmetric: tuple[Any, Any], asymmetric: tuple[Any, Any], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "advice.txt"
    assert write_explicit_advice(collect_entries(*symmetric), path) == (0, [])
    text = path.read_text()
    assert "cannot hold: 5" in text
    assert "w1  axis 0, 8 scales" in text
    count, notes = write_explicit_advice(collect_entries(*asymmetric), path)
    assert count == len(notes) > 5
    assert "image: TensorRT reads signed codes with zero point 0 only" in path.read_text()


def test_names_that_a_reader_would_split_are_left_out(symmetric: tuple[Any, Any], tmp_path: pathlib.Path) -> None:
    entries = collect_entries(*symmetric)
    first = dataclasses.replace(entries.activations[0], name="a: b")
    changed = dataclasses.replace(entries, activations=(first, *entries.activations[1:]))
    count, notes = write_cache(changed, tmp_path / "tensorrt.cache")
    assert count == len(entries.activations) - 1
    assert ("a: b", Fidelity.LEFT_OUT) in {(note.tensor, note.fidelity) for note in notes}
