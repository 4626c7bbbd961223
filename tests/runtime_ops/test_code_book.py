"""Tables of int8 levels: the law of the nearest level, the POST lattice, and quantizers that have a table."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postquant.runtime_ops.code_book import (
    CodeBook,
    nearest_levels,
    post_table,
    table_indices,
    uniform_table,
)
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec


def f32(values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def i32(values: npt.ArrayLike) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)


def i8(values: npt.ArrayLike) -> npt.NDArray[np.int8]:
    return np.array(values, np.int8)


TABLES = st.integers(1, 16).flatmap(lambda n: st.lists(st.integers(-128, 127), min_size=n, max_size=n).map(sorted))
WEIGHT = QuantSpec(4, signed=True, symmetric=True, axis=0, code_book=CodeBook.LEARNED)


def learned(table: npt.NDArray[np.int8], scale: list[float]) -> TensorQuantizer:
    return TensorQuantizer(WEIGHT, f32(scale), np.zeros(len(scale), np.int32), table=table)


@given(TABLES, st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_nearest_level_is_the_nearest(levels: list[int], values: list[float]) -> None:
    table, ratio = np.array(levels, np.int8), np.array(values, np.float32)
    found = nearest_levels(ratio, table)
    distances = np.abs(ratio.astype(np.float64)[:, np.newaxis] - np.array(levels))
    # Of equally near ones the largest: the last in a sorted table.
    expected = table[len(levels) - 1 - distances[:, ::-1].argmin(1)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 3e38, -3e38])
def test_huge_values_take_the_ends(value: float) -> None:
    assert nearest_levels(f32([value]), post_table(4))[0] == np.copysign(96, value)


@given(TABLES)
def test_codes_give_their_levels_back(levels: list[int]) -> None:
    table = np.array(levels, np.int8)
    codes = table_indices(table, table)
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(table[codes], table)


@pytest.mark.parametrize("level", [-97, 1, 97])
def test_a_level_that_is_not_in_the_table_is_refused(level: int) -> None:
    with pytest.raises(ValueError, match="not in the table"):
        table_indices(i8([level]), post_table(4))


@pytest.mark.parametrize("bits", [2, 4])
def test_the_lattice_stands_for_powers_of_the_root_of_two(bits: int) -> None:
    table = post_table(bits).astype(np.float64)
    assert len(table) == 1 << bits
    assert (np.diff(table) >= 0).all()
    magnitudes = np.unique(np.abs(table[table != 0]))
    np.testing.assert_allclose(magnitudes[1:] / magnitudes[:-1], np.sqrt(2), rtol=0.0018)
    assert uniform_table(bits).tolist() == list(range(-(1 << (bits - 1)), 1 << (bits - 1)))


def test_a_quantizer_with_a_table() -> None:
    table = i8([-100, -50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100, 127])
    quantizer = learned(table, [0.5, 0.25])
    x = f32([[1.0, -24.0, 1e9], [1.0, -24.0, np.nextafter(np.float32(0.875), np.float32(0))]])
    levels = quantizer.quantize(x)
    assert levels.dtype == np.int8
    assert levels.tolist() == [[2, -50, 127], [5, -100, 2]]
    np.testing.assert_array_equal(quantizer.simulate(x), quantizer.dequantize(levels))
    np.testing.assert_array_equal(quantizer.dequantize(levels), levels * f32([[0.5], [0.25]]))
    chosen = dataclasses.replace(quantizer, codes=np.zeros((2, 3), np.int8))
    assert not chosen.simulate(x).any()


def test_post_fills_its_table_in() -> None:
    spec = dataclasses.replace(WEIGHT, code_book=CodeBook.POST, bits=2)
    quantizer = TensorQuantizer(spec, f32([1]), i32([0]))
    assert quantizer.table is not None
    assert quantizer.table.tolist() == [-96, 0, 68, 96]
    with pytest.raises(ValueError, match="table of its own"):
        TensorQuantizer(spec, f32([1]), i32([0]), table=i8([0, 1, 2, 3]))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (None, "needs 16 int8 levels"),
        (np.zeros(16, np.int16), "needs 16 int8 levels"),
        (np.zeros(4, np.int8), "needs 16 int8 levels"),
        (np.arange(16, 0, -1).astype(np.int8), "sorted"),
    ],
)
def test_wrong_tables_are_refused(table: npt.NDArray[np.int8], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        learned(table, [1.0])


def test_uniform_codes_have_no_table_and_tables_no_zero_point() -> None:
    with pytest.raises(ValueError, match="no table"):
        TensorQuantizer(QuantSpec(4, True, True), f32(1), i32(0), table=post_table(4))
    with pytest.raises(ValueError, match="zero point 0"):
        TensorQuantizer(WEIGHT, f32([1]), i32([3]), table=post_table(4))


@pytest.mark.parametrize("wrong", [{"bits": 8}, {"bits": 3}, {"signed": False}, {"symmetric": False, "axis": None}])
def test_formats_that_have_no_table(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="code book"):
        dataclasses.replace(WEIGHT, **wrong)  # type: ignore[arg-type]


def test_specs_survive_json_and_old_ones_are_uniform() -> None:
    data = WEIGHT.to_json()
    assert QuantSpec.from_json(data) == WEIGHT
    del data["code_book"]
    assert QuantSpec.from_json(data).code_book is CodeBook.UNIFORM
    assert (WEIGHT.qmin, WEIGHT.qmax, WEIGHT.container, WEIGHT.fills_container) == (-128, 127, "int8", True)
