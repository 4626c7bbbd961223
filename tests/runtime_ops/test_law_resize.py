"""Resize against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from postquant.runtime_ops.integer import compare_codes
from postquant.runtime_ops.kernel_laws import Operand, predict
from postquant.runtime_ops.law_resize import resized


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("coordinate", ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"])
@pytest.mark.parametrize("factor", [(2.0, 2.0), (1.5, 3.0), (0.5, 0.4)])
def test_resize(kernels: Any, mode: str, coordinate: str, factor: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    xq = kernels.affine(rng)
    x = kernels.codes(rng, (1, 3, 6, 7))
    attributes = {"mode": mode, "coordinate_transformation_mode": coordinate}
    roi, scales = np.zeros(0, np.float32), np.array([1, 1, *factor], np.float32)
    observed, ran = kernels.group("Resize", [(x, xq)], xq, plain={1: roi, 2: scales}, attributes=attributes)
    assert ("QuantizeLinear" in ran) == (mode == "linear")
    operands = [Operand(x, xq), Operand(plain=roi), Operand(plain=scales)]
    law = predict("Resize", attributes, operands, xq, kernel="Resize", opset=17)
    assert law is not None
    assert compare_codes(law, observed).mismatches == 0


@pytest.mark.parametrize("nearest", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_nearest_modes_and_sizes(kernels: Any, nearest: str) -> None:
    rng = np.random.default_rng(1)
    xq = kernels.affine(rng)
    x = kernels.codes(rng, (1, 2, 5, 8))
    attributes = {"nearest_mode": nearest, "coordinate_transformation_mode": "asymmetric"}
    empty, sizes = np.zeros(0, np.float32), np.array([1, 2, 11, 4])
    plain = {1: empty, 2: empty, 3: sizes}
    observed, _ = kernels.group("Resize", [(x, xq)], xq, plain=plain, attributes=attributes)
    np.testing.assert_array_equal(observed, resized(x, attributes, [empty, empty, sizes]))


def test_other_forms_have_no_law() -> None:
    x = np.zeros((1, 1, 4, 4), np.float32)
    assert resized(x, {"mode": "cubic"}, [None, np.array([1, 1, 2, 2], np.float32), None]) is None
    assert resized(x, {}, [None, None, None]) is None
