"""The element-wise laws against onnxruntime's kernels, over all 65536 pairs of codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postquant.runtime_ops.integer import Affine, compare_codes
from postquant.runtime_ops.law_elementwise import (
    qlinear_add,
    qlinear_concat,
    qlinear_leaky_relu,
    qlinear_mul,
    qlinear_sigmoid,
)

U8, I8 = np.dtype(np.uint8), np.dtype(np.int8)


def every_pair(dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    info = np.iinfo(dtype)
    every = np.arange(info.min, info.max + 1).astype(dtype)
    return np.repeat(every, 256).reshape(1, 4, 128, 128), np.tile(every, 256).reshape(1, 4, 128, 128)


scales = st.floats(-5, 1).map(lambda v: np.asarray(np.exp(v), np.float32))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([U8, I8]), scales, scales, scales)
def test_add_and_mul_to_the_bit(
    kernels: Any, data: st.DataObject, dtype: np.dtype[Any], sa: np.ndarray, sb: np.ndarray, sy: np.ndarray
) -> None:
    if data.draw(st.booleans()):
        sb, sy = sa, np.asarray(sa * np.float32(2))  # every second sum is a tie
    info = np.iinfo(dtype)
    aq, bq, yq = (
        Affine(s, np.asarray(data.draw(st.integers(int(info.min), int(info.max))), np.int32), dtype)
        for s in (sa, sb, sy)
    )
    a, b = every_pair(dtype)
    for op_type, kernel, law in (("Add", "QLinearAdd", qlinear_add), ("Mul", "QLinearMul", qlinear_mul)):
        observed, ran = kernels.group(op_type, [(a, aq), (b, bq)], yq)
        assert ran == {kernel}
        agreement = compare_codes(law(a, b, aq, bq, yq), observed)
        assert (agreement.mismatches, agreement.ties) == (0, 0), agreement


@pytest.mark.parametrize("shapes", [((2, 3, 4, 5), (3, 1, 1)), ((1, 7), (2, 1)), ((2, 3, 4, 5), (1,)), ((1,), (6, 7))])
def test_broadcasting(kernels: Any, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        aq, bq, yq = kernels.affine(rng), kernels.affine(rng), kernels.affine(rng)
        a, b = (kernels.codes(rng, shape) for shape in shapes)
        for op_type, law in (("Add", qlinear_add), ("Mul", qlinear_mul)):
            observed, _ = kernels.group(op_type, [(a, aq), (b, bq)], yq)
            assert compare_codes(law(a, b, aq, bq, yq), observed).mismatches == 0


def test_concat(kernels: Any) -> None:
    rng = np.random.default_rng(1)
    yq = kernels.affine(rng)
    parts = [(kernels.codes(rng, (2, n, 5)), kernels.affine(rng)) for n in (3, 1, 4)]
    observed, ran = kernels.group("Concat", parts, yq, attributes={"axis": 1})
    assert ran == {"QLinearConcat"}
    agreement = compare_codes(qlinear_concat(parts, yq, 1), observed)
    assert (agreement.mismatches, agreement.ties) == (0, 0)


@pytest.mark.parametrize("dtype", [U8, I8])
@pytest.mark.parametrize("seed", range(5))
def test_tables(kernels: Any, dtype: np.dtype[Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    xq, yq = kernels.affine(rng, dtype), kernels.affine(rng, dtype)
    x = every_pair(dtype)[1]
    observed, ran = kernels.group("LeakyRelu", [(x, xq)], yq, attributes={"alpha": 0.2})
    assert ran == {"QLinearLeakyRelu"}
    agreement = compare_codes(qlinear_leaky_relu(x, xq, yq, 0.2), observed)
    assert (agreement.mismatches, agreement.ties) == (0, 0)
    yq = Affine(np.asarray(1 / 256, np.float32), np.asarray(np.iinfo(dtype).min, np.int32), dtype)
    observed, ran = kernels.group("Sigmoid", [(x, xq)], yq)
    assert ran == {"QLinearSigmoid"}
    assert compare_codes(qlinear_sigmoid(x, xq, yq), observed).mismatches == 0
