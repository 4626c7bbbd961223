"""The matrix product laws against onnxruntime's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from postquant.runtime_ops.integer import Affine, compare_codes
from postquant.runtime_ops.law_matmul import gemm_to_float, matmul_to_float, qgemm, qlinear_matmul

U8, I8 = np.dtype(np.uint8), np.dtype(np.int8)


def columns(rng: np.random.Generator, count: int, axis: int) -> Affine:
    scale = np.exp(rng.uniform(-7, -4, count)).astype(np.float32)
    return Affine(scale, np.zeros(count, np.int32), I8, axis)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 300, 17), (64, 1, 33)])
def test_qlinear_matmul_with_weights_per_column(kernels: Any, shape: tuple[int, int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, inner, wide = shape
    aq, yq, bq = kernels.affine(rng), kernels.affine(rng), columns(rng, wide, 1)
    a, b = kernels.codes(rng, (2, rows, inner)), kernels.codes(rng, (inner, wide), I8)
    observed, ran = kernels.group("MatMul", [(a, aq)], yq, constants={1: (b, bq)})
    assert ran == {"QLinearMatMul"}
    agreement = compare_codes(qlinear_matmul(a, b, aq, bq, yq), observed)
    assert (agreement.mismatches, agreement.ties) == (0, 0)


def test_qlinear_matmul_of_two_activations(kernels: Any) -> None:
    rng = np.random.default_rng(1)
    aq, bq, yq = kernels.affine(rng), kernels.affine(rng), kernels.affine(rng)
    a, b = kernels.codes(rng, (2, 3, 5, 8)), kernels.codes(rng, (2, 3, 8, 6))
    observed, ran = kernels.group("MatMul", [(a, aq), (b, bq)], yq)
    assert ran == {"QLinearMatMul"}
    agreement = compare_codes(qlinear_matmul(a, b, aq, bq, yq), observed)
    assert (agreement.mismatches, agreement.ties) == (0, 0)


def test_matmul_integer_to_float(kernels: Any) -> None:
    rng = np.random.default_rng(2)
    aq, bq = kernels.affine(rng), columns(rng, 9, 1)
    a, b = kernels.codes(rng, (4, 40)), kernels.codes(rng, (40, 9), I8)
    observed, ran = kernels.group("MatMul", [(a, aq)], None, constants={1: (b, bq)})
    assert ran == {"MatMulIntegerToFloat"}
    np.testing.assert_allclose(observed, matmul_to_float(a, b, aq, bq), rtol=3e-7)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_qgemm(kernels: Any, transposed: bool, with_bias: bool) -> None:
    rng = np.random.default_rng(3)
    aq, yq, bq = kernels.affine(rng), kernels.affine(rng), columns(rng, 10, 0 if transposed else 1)
    a = kernels.codes(rng, (6, 50))
    b = kernels.codes(rng, (10, 50) if transposed else (50, 10), I8)
    # A Gemm with alpha and a bias stays in float.
    attributes = {"transB": int(transposed), "alpha": 1.0 if with_bias else 0.75}
    constants = {1: (b, bq)}
    if with_bias:
        constants[2] = kernels.bias(rng, aq, bq, 10)
    bias = constants[2][0] if with_bias else None
    observed, ran = kernels.group("Gemm", [(a, aq)], yq, constants=constants, attributes=attributes)
    assert "QGemm" in ran
    agreement = compare_codes(qgemm(a, b, bias, aq, bq, yq, attributes), observed)
    assert (agreement.mismatches, agreement.ties) == (0, 0)
    observed, ran = kernels.group("Gemm", [(a, aq)], None, constants=constants, attributes=attributes)
    assert "QGemm" in ran
    np.testing.assert_allclose(observed, gemm_to_float(a, b, bias, aq, bq, attributes), rtol=3e-7)
