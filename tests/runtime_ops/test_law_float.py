"""Operators that stay in float between quantized tensors, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from postquant.runtime_ops.integer import Affine, Prediction, compare_codes
from postquant.runtime_ops.law_float import float_op


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("HardSigmoid", {"alpha": 0.2, "beta": 0.5}),
        ("HardSwish", {}),
        ("Relu", {}),
        ("Sigmoid", {}),
        ("Tanh", {}),
        ("GlobalAveragePool", {}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("Transpose", {"perm": [0, 2, 3, 1]}),
        ("DepthToSpace", {"blocksize": 2}),
        ("Neg", {}),
    ],
)
def test_unary(kernels: Any, op_type: str, attributes: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    xq, yq = kernels.affine(rng), Affine(np.asarray(0.021, np.float32), np.asarray(40, np.int32), np.dtype(np.uint8))
    x = kernels.codes(rng, (2, 8, 12, 10))
    observed, _ = kernels.group(op_type, [(x, xq)], yq, attributes=attributes, optimize=False)
    agreement = compare_codes(float_op(op_type, attributes, [xq.real(x)], yq, 17), observed)
    assert agreement.mismatches == 0
    assert agreement.ties <= agreement.codes / 1000


@pytest.mark.parametrize("op_type", ["Sub", "Div", "Max", "Min", "PRelu"])
def test_binary(kernels: Any, op_type: str) -> None:
    rng = np.random.default_rng(1)
    aq, bq, yq = kernels.affine(rng), kernels.affine(rng), kernels.affine(rng)
    a, b = kernels.codes(rng, (2, 8, 5, 5)), kernels.codes(rng, (8, 1, 1))
    b[b == bq.zero_point] += 1  # no division by zero
    observed, ran = kernels.group(op_type, [(a, aq), (b, bq)], yq)
    assert "QuantizeLinear" in ran
    agreement = compare_codes(float_op(op_type, {}, [aq.real(a), bq.real(b)], yq, 17), observed)
    assert agreement.mismatches == 0


def test_inputs_that_are_not_numbers_of_a_tensor(kernels: Any) -> None:
    rng = np.random.default_rng(2)
    xq = kernels.affine(rng)
    x = kernels.codes(rng, (2, 6, 4))
    shape = np.array([2, -1])
    observed, _ = kernels.group("Reshape", [(x, xq)], xq, plain={1: shape})
    law = float_op("Reshape", {}, [xq.real(x), shape], xq, 17)
    assert compare_codes(law, observed).mismatches == 0
    np.testing.assert_array_equal(observed, x.reshape(2, -1))


def test_a_mismatch_is_a_tie_only_next_to_a_boundary() -> None:
    law = Prediction(np.full(4, 4, np.int32), np.array([4.49999, 4.4, 4.49999, 3.500001]), 1e-4)
    agreement = compare_codes(law, np.array([5, 5, 6, 3], np.uint8))
    assert (agreement.ties, agreement.mismatches, agreement.worst) == (2, 2, 2)
    assert agreement.first == ((1,), 4, 5)
    with pytest.raises(ValueError, match="shape"):
        compare_codes(law, np.zeros(3, np.uint8))
