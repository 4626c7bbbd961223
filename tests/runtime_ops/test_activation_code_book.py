"""Activations with code books: the law of the quantizer, and which formats exist."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.code_book import CodeBook, nearest_codes
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

SPEC = QuantSpec(2, signed=False, symmetric=False, code_book=CodeBook.LEARNED)


def quantizer(levels: list[int], scale: float = 0.5, zero_point: int = 0) -> TensorQuantizer:
    """One of 2 bits."""
    return TensorQuantizer(
        SPEC, np.array(scale, np.float32), np.array(zero_point, np.int32), table=np.array(levels, np.uint8)
    )


@given(
    levels=st.lists(st.integers(0, 255), min_size=4, max_size=4).map(sorted),
    zero=st.integers(0, 255),
    exponent=st.integers(-4, 4),
    values=st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=20),
)
def test_every_value_gets_the_nearest_level_of_its_code(
    levels: list[int], zero: int, exponent: int, values: list[float]
) -> None:
    entry = quantizer(levels, 2.0**exponent, zero)
    x = np.array(values, np.float32)
    expected = []
    for value in x:
        code = min(max(int(np.rint(np.float64(value) / 2.0**exponent)) + zero, 0), 255)
        # The upper one of two that are equally near.
        expected.append(min((abs(level - code), -level, level) for level in levels)[2])
    np.testing.assert_array_equal(entry.quantize(x), expected)
    assert entry.quantize(x).dtype == np.uint8
    np.testing.assert_array_equal(entry.simulate(x), (np.array(expected) - zero) * np.float32(2.0**exponent))


def test_a_level_stays_and_a_middle_goes_up() -> None:
    table = np.array([0, 7, 8, 200], np.uint8)
    np.testing.assert_array_equal(nearest_codes(table)[table], table)
    assert nearest_codes(table)[104] == 200
    assert nearest_codes(table)[103] == 8


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4, 5), -3), ((7, 3), -1), ((2, 3, 4), -2), ((2, 4, 5, 3), -1)])
def test_channels_with_levels_of_their_own(shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(0)
    tables = np.sort(rng.integers(0, 256, (3, 4)), axis=1).astype(np.uint8)
    entry = TensorQuantizer(SPEC, np.array(0.1, np.float32), np.array(100, np.int32), table=tables, table_axis=axis)
    x = rng.uniform(-12, 18, shape).astype(np.float32)
    for channel, table in enumerate(tables):
        alone = quantizer(table.tolist(), 0.1, 100)
        part = np.take(x, [channel], axis)
        np.testing.assert_array_equal(np.take(entry.quantize(x), [channel], axis), alone.quantize(part))
        np.testing.assert_array_equal(np.take(entry.simulate(x), [channel], axis), alone.simulate(part))
    assert [float(end) for end in entry.range()] == [
        pytest.approx((int(code) - 100) * 0.1) for code in (tables.min(), tables.max())
    ]
    with pytest.raises(ValueError, match="no 3 channels on axis"):
        entry.quantize(np.zeros((4, 2, 2, 2), np.float32))


def test_the_range_ends_at_the_levels() -> None:
    low, high = quantizer([3, 10, 20, 99], 0.5, 10).range()
    assert (float(low), float(high)) == (-3.5, 44.5)
    assert low.shape == high.shape == ()


def test_a_plan_keeps_the_levels(tmp_path: pathlib.Path) -> None:
    QuantPlan("onnxruntime", requants={"n:0": quantizer([1, 2, 3, 4], 0.1, 2)}).save(tmp_path / "plan")
    entry = QuantPlan.load(tmp_path / "plan").requants["n:0"]
    assert isinstance(entry, TensorQuantizer)
    assert entry.spec == SPEC
    assert entry.table is not None
    assert entry.table.dtype == np.uint8
    assert entry.table.tolist() == [1, 2, 3, 4]
    assert entry.table_axis is None


def test_a_plan_keeps_the_levels_of_channels(tmp_path: pathlib.Path) -> None:
    tables = np.array([[1, 2, 3, 4], [0, 2, 2, 9]], np.uint8)
    entry = TensorQuantizer(SPEC, np.array(0.1, np.float32), np.array(2, np.int32), table=tables, table_axis=-2)
    QuantPlan("onnxruntime", requants={"n:0": entry}).save(tmp_path / "plan")
    found = QuantPlan.load(tmp_path / "plan").requants["n:0"]
    assert isinstance(found, TensorQuantizer)
    np.testing.assert_array_equal(found.table, tables)
    assert found.table_axis == -2


@pytest.mark.parametrize(
    "changed",
    [
        {"bits": 5},
        {"code_book": CodeBook.POST},
        {"symmetric": True},
        {"power_of_two": True},
        {"axis": 0, "symmetric": True},
        {"signed": True},
    ],
)
def test_formats_that_do_not_exist(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="code book"):
        dataclasses.replace(SPEC, **changed)


def test_tables_that_do_not_exist() -> None:
    for table in (np.array([0, 1, 2], np.uint8), np.array([0, 1, 2, 3], np.int8)):
        with pytest.raises(ValueError, match="4 uint8 levels"):
            TensorQuantizer(SPEC, np.ones((), np.float32), np.zeros((), np.int32), table=table)
    with pytest.raises(ValueError, match="sorted"):
        quantizer([0, 3, 2, 9])
    for axis, message in ((1, "negative"), (-1, "4 uint8 levels for each")):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(quantizer([0, 1, 2, 3]), table_axis=axis)
    with pytest.raises(ValueError, match="rows for channels"):
        dataclasses.replace(TensorQuantizer.from_range(QuantSpec(4, False, False), 0.0, 1.0), table_axis=-1)
