"""Damaged files of encodings: an error of one sentence or other numbers, never another exception."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postquant.passes.place import PlacementSettings, place
from postquant.pipeline.encodings.apply import apply_encodings
from postquant.pipeline.encodings.formats import write_encodings
from postquant.pipeline.encodings.read import read_encodings
from postquant.runtime_ops.errors import ConfigError

FILES = ("aimet-0.6.1.encodings", "aimet-1.0.0.encodings", "aimet-2.0.0.encodings", "tensorrt.cache", "ncnn.table")
# What is put in place of a few bytes: numbers, types and structure that do not belong there.
PIECES = st.sampled_from(
    [
        b"",
        b"-",
        b"9e99",
        b"1e-320",
        b"null",
        b"true",
        b"[",
        b"]",
        b"{}",
        b'"',
        b"\xff",
        b"NaN",
        b"-1",
        b"0",
        b":",
        b"\n",
    ]
)


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, symmetric: tuple[Any, Any], target: Any
) -> tuple[pathlib.Path, Any, Any]:
    """A folder of encodings, the model and its placed plan."""
    folder = tmp_path_factory.mktemp("damaged")
    write_encodings(folder, *symmetric, target)
    return folder, symmetric[0], place(symmetric[0], target, PlacementSettings())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_told_or_read_as_other_numbers(
    data: st.DataObject, written: tuple[pathlib.Path, Any, Any], target: Any
) -> None:
    folder, model, plan = written
    content = (folder / data.draw(st.sampled_from(FILES))).read_bytes()
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = min(len(content), start + data.draw(st.integers(0, 40)))
        content = content[:start] + data.draw(PIECES) + content[end:]
    path = folder / "damaged"
    path.write_bytes(content)
    try:
        vendor = read_encodings(path)
    except ConfigError:
        return
    applied = apply_encodings(model, plan, vendor, target)
    assert len(applied.notes(vendor)) >= 1
