"""Packed codes, and the laws of the look-up-table operators against sums that are written out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.integer import Affine
from postquant.runtime_ops.law_lut import (
    LutWeight,
    lut_matmul_integer_to_float,
    lut_qlinear_conv,
    lut_qlinear_matmul,
    pack_codes,
    row_bytes,
    scalar_numbers,
    unpack_codes,
)


def weight(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> LutWeight:
    codes = rng.integers(0, 1 << bits, (shape[0], int(np.prod(shape[1:]))))
    table = rng.integers(-128, 128, 1 << bits).astype(np.int8)
    return LutWeight(
        pack_codes(codes, bits), table, np.exp(rng.uniform(-7, -4, shape[0])).astype(np.float32), bits, shape
    )


def activation(rng: np.random.Generator, dtype: Any) -> Affine:
    info = np.iinfo(dtype)
    zero = np.asarray(rng.integers(info.min, info.max + 1), np.int32)
    return Affine(np.asarray(rng.uniform(0.01, 0.1), np.float32), zero, np.dtype(dtype))


@given(st.sampled_from([2, 4]), st.integers(0, 5), st.integers(0, 19), st.integers(0, 2**32 - 1))
def test_packing_keeps_codes_and_unused_bits_are_zero(bits: int, rows: int, terms: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, terms)).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, row_bytes(terms, bits))
    np.testing.assert_array_equal(unpack_codes(packed, terms, bits), codes)
    # An independent reading: a row is one little-endian number.
    for row, bytes_ in zip(codes, packed, strict=True):
        number = sum(int(c) << (bits * i) for i, c in enumerate(row))
        assert int.from_bytes(bytes_.tobytes(), "little") == number


@pytest.mark.parametrize(("codes", "bits"), [([[16]], 4), ([[-1]], 4), ([[4]], 2), ([[1]], 3), ([1, 2], 4)], ids=str)
def test_what_cannot_be_packed_is_refused(codes: Any, bits: int) -> None:
    with pytest.raises(ValueError, match=r"bit"):
        pack_codes(np.asarray(codes), bits)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_convolution_is_the_written_out_sum(bits: int, dtype: Any) -> None:
    rng = np.random.default_rng(bits)
    w = weight(rng, (4, 2, 3, 2), bits)
    xq, yq = activation(rng, dtype), activation(rng, dtype)
    info = np.iinfo(dtype)
    x = rng.integers(info.min, info.max + 1, (2, 4, 6, 5)).astype(dtype)
    bias = rng.integers(-999, 999, 4).astype(np.int32)
    law = lut_qlinear_conv(x, xq, w, bias, yq, group=2, strides=(2, 1), dilations=(1, 2), pads=(1, 0, 2, 1))
    decoded = w.decoded().astype(int)
    for n, m, i, j in itertools.product(*(range(d) for d in law.codes.shape)):
        total = int(bias[m])
        for c, a, b in itertools.product(range(2), range(3), range(2)):
            y, z = 2 * i + a - 1, j + 2 * b
            if 0 <= y < 6 and 0 <= z < 5:
                total += (int(x[n, c + 2 * (m // 2), y, z]) - int(xq.zero_point)) * int(decoded[m, c, a, b])
        assert law.codes[n, m, i, j] == requantized(total, float(xq.scale), w.scale[m], yq, info)


@pytest.mark.parametrize("shape", [(5, 7), (7,), (2, 3, 7), (0, 7)], ids=str)
def test_matrix_product_is_the_written_out_sum(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(7)
    w = weight(rng, (3, 7), 4)
    xq, yq = activation(rng, np.uint8), activation(rng, np.uint8)
    a = rng.integers(0, 256, shape).astype(np.uint8)
    bias = rng.integers(-999, 999, 3).astype(np.int32)
    law = lut_qlinear_matmul(a, xq, w, bias, yq)
    assert law.codes.shape == (*shape[:-1], 3)
    rows = a.reshape(-1, 7).astype(int) - int(xq.zero_point)
    sums = rows @ w.decoded().astype(int).T + bias
    expected = [
        [requantized(int(s), float(xq.scale), w.scale[n], yq, np.iinfo(np.uint8)) for n, s in enumerate(row)]
        for row in sums
    ]
    np.testing.assert_array_equal(law.codes.reshape(-1, 3), np.asarray(expected, int).reshape(-1, 3))


def requantized(total: int, x_scale: float, w_scale: np.float32, yq: Affine, info: Any) -> int:
    factor = np.float32(np.float32(np.float32(x_scale) * w_scale) / np.float32(yq.scale))
    return int(np.clip(round(float(np.float32(total) * factor)) + int(yq.zero_point), info.min, info.max))


def test_a_float_output_is_the_product_and_the_bias() -> None:
    rng = np.random.default_rng(5)
    codes = pack_codes(rng.integers(0, 16, (7, 33)), 4)
    table = rng.integers(-128, 128, 16).astype(np.int8)
    weight = LutWeight(codes, table, rng.uniform(0.1, 1, 7).astype(np.float32), 4, (7, 33))
    q = Affine(np.asarray(0.3, np.float32), np.asarray(-9, np.int32), np.dtype(np.int8))
    a = rng.integers(-128, 128, (2, 3, 33)).astype(np.int8)
    bias = rng.normal(0, 5, 7).astype(np.float32)
    found = lut_matmul_integer_to_float(a, q, weight, bias)
    real = (a.astype(np.float64) + 9) * float(q.scale) @ (weight.decoded().T * weight.scale.astype(np.float64)) + bias
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, real, rtol=1e-6, atol=1e-4)
    arguments: dict[str, Any] = {"a": a, "aq": q, "weight": weight, "bias": bias}
    for wrong in (
        {"a": a[..., :5]},
        {"a": np.zeros((), np.int8)},
        {"a": a.astype(np.uint8)},
        {"bias": bias[:3]},
        {"bias": bias.astype(np.float64)},
        {"bias": np.full(7, np.nan, np.float32)},
    ):
        with pytest.raises(ModelError):
            lut_matmul_integer_to_float(**(arguments | wrong))


def parts() -> dict[str, Any]:
    return {
        "codes": np.zeros((2, 3), np.uint8),
        "table": np.zeros(16, np.int8),
        "scale": np.ones(2, np.float32),
        "bits": 4,
        "shape": (2, 5),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": np.zeros((2, 2), np.uint8)}, "codes .* do not fit"),
        ({"codes": np.zeros((2, 3), np.int8)}, "codes .* do not fit"),
        ({"table": np.zeros(4, np.int8)}, "table .* do not fit"),
        ({"scale": np.ones(1, np.float32)}, "w_scale .* do not fit"),
        ({"scale": np.array([1, np.nan], np.float32)}, "finite and positive"),
        ({"scale": np.array([1, 0], np.float32)}, "finite and positive"),
        ({"bits": 3}, "2 or 4 bits"),
        ({"shape": (2,)}, "shape of a weight"),
        ({"shape": (2, 0)}, "shape of a weight"),
    ],
)
def test_parts_that_do_not_fit_are_explained(changes: dict[str, Any], message: str) -> None:
    LutWeight(**parts())
    with pytest.raises(ModelError, match=message):
        LutWeight(**(parts() | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"x": np.zeros((1, 3, 4), np.uint8)},
        {"x": np.zeros((1, 4, 4, 4), np.uint8)},
        {"x": np.zeros((1, 2, 4), np.int8)},
        {"bias": np.zeros(1, np.int32)},
        {"bias": np.zeros(2, np.float32)},
        {"strides": [0]},
        {"strides": [1, 1]},
        {"dilations": [0]},
        {"pads": [0]},
        {"pads": [-1, 0]},
        {"group": 2},
    ],
    ids=str,
)
def test_convolutions_that_do_not_fit_are_explained(changes: dict[str, Any]) -> None:
    q = Affine(np.asarray(1, np.float32), np.asarray(0, np.int32), np.dtype(np.uint8))
    w = LutWeight(np.zeros((2, 3), np.uint8), np.zeros(16, np.int8), np.ones(2, np.float32), 4, (2, 2, 3))
    arguments: dict[str, Any] = {
        "x": np.zeros((1, 2, 4), np.uint8),
        "xq": q,
        "weight": w,
        "bias": np.zeros(2, np.int32),
        "yq": q,
        "group": 1,
        "strides": [1],
        "dilations": [1],
        "pads": [0, 0],
    }
    assert lut_qlinear_conv(**arguments).codes.shape == (1, 2, 2)
    with pytest.raises(ModelError):
        lut_qlinear_conv(**(arguments | changes))


@pytest.mark.parametrize(
    ("scale", "zero"),
    [
        (np.float32(0), np.uint8(0)),
        (np.float32(np.inf), np.uint8(0)),
        (np.float64(1), np.uint8(0)),
        (np.array([1], np.float32), np.uint8(0)),
        (np.float32(1), np.int32(0)),
        (np.float32(1), np.array([0], np.uint8)),
    ],
    ids=str,
)
def test_numbers_of_activations_are_checked(scale: npt.NDArray[Any], zero: npt.NDArray[Any]) -> None:
    with pytest.raises(ModelError, match="x_"):
        scalar_numbers(np.asarray(scale), np.asarray(zero), "x")
