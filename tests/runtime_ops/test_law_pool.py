"""The pooling laws against onnxruntime's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postquant.runtime_ops.integer import compare_codes
from postquant.runtime_ops.law_pool import max_pool, qlinear_average_pool, qlinear_global_average_pool


@st.composite
def windows(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, ...]]:
    rank = draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 4)) for _ in range(rank)]
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": [draw(st.integers(1, 3)) for _ in range(rank)],
        "ceil_mode": draw(st.integers(0, 1)),
    }
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER"]))
    if auto == "NOTSET":
        attributes["pads"] = [draw(st.integers(0, k - 1)) for k in (*kernel, *kernel)]
    else:
        attributes |= {"auto_pad": auto, "ceil_mode": 0}
    return attributes, (2, draw(st.integers(1, 5)), *[draw(st.integers(k, k + 7)) for k in kernel])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(windows(), st.integers(0, 2**32 - 1), st.booleans())
def test_average_and_max_pool(
    kernels: Any, window: tuple[dict[str, Any], tuple[int, ...]], seed: int, include: bool
) -> None:
    attributes, shape = window
    rng = np.random.default_rng(seed)
    xq, yq = kernels.affine(rng), kernels.affine(rng)
    x = kernels.codes(rng, shape)
    observed, ran = kernels.group("MaxPool", [(x, xq)], xq, attributes=attributes)
    assert "QuantizeLinear" not in ran
    np.testing.assert_array_equal(observed, max_pool(x, attributes))
    if attributes["ceil_mode"] and include:
        return  # onnxruntime counts the padding beyond the input in a way of its own
    averaged = {**attributes, "count_include_pad": int(include)}
    observed, ran = kernels.group("AveragePool", [(x, xq)], yq, attributes=averaged)
    assert "QLinearAveragePool" in ran
    agreement = compare_codes(qlinear_average_pool(x, xq, yq, averaged), observed)
    assert agreement.mismatches == 0, agreement
    assert agreement.ties == 0


@pytest.mark.parametrize("spatial", [(1, 1), (7, 7), (5, 9), (33,), (56, 56)])
def test_global_average_pool(kernels: Any, spatial: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        xq, yq = kernels.affine(rng), kernels.affine(rng)
        x = kernels.codes(rng, (2, 19, *spatial))
        observed, ran = kernels.group("GlobalAveragePool", [(x, xq)], yq)
        assert ran == {"QLinearGlobalAveragePool"}
        agreement = compare_codes(qlinear_global_average_pool(x, xq, yq), observed)
        assert (agreement.mismatches, agreement.ties) == (0, 0)
