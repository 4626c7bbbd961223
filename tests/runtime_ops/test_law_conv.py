"""The convolution laws against onnxruntime's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postquant.runtime_ops.integer import Affine, compare_codes
from postquant.runtime_ops.law_conv import ConvAttributes, float_conv, float_conv_transpose, qlinear_conv

U8, I8 = np.dtype(np.uint8), np.dtype(np.int8)


def one(scale: float, zero: int, dtype: np.dtype[Any]) -> Affine:
    return Affine(np.asarray(scale, np.float32), np.asarray(zero, np.int32), dtype)


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(1, 2))
    group = draw(st.sampled_from([1, 1, 2, 3]))
    inner, outer = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kernel = [draw(st.integers(1, 4)) for _ in range(rank)]
    attributes: dict[str, Any] = {"strides": [draw(st.integers(1, 3)) for _ in range(rank)], "group": group}
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    reach = kernel
    if auto == "NOTSET":
        dilations = [draw(st.integers(1, 2)) for _ in range(rank)]
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        pads = [draw(st.integers(0, r - 1)) for r in (*reach, *reach)]
        attributes |= {"pads": pads, "dilations": dilations}
    else:
        attributes["auto_pad"] = auto
    return {
        "attributes": attributes,
        "x": (draw(st.integers(1, 2)), group * inner, *[draw(st.integers(r, r + 6)) for r in reach]),
        "w": (group * outer, inner, *kernel),
        "signed": draw(st.booleans()),
        "per_channel": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(convolutions())
def test_qlinear_conv_to_the_bit(kernels: Any, case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["seed"])
    dtype = I8 if case["signed"] else U8
    xq, yq = kernels.affine(rng, dtype), kernels.affine(rng, dtype)
    channels = case["w"][0]
    wq = kernels.affine(rng, I8, channels) if case["per_channel"] else one(0.003, 0, I8)
    x, w = kernels.codes(rng, case["x"], dtype), kernels.codes(rng, case["w"], I8)
    bias = kernels.bias(rng, xq, wq, channels) if case["bias"] else None
    observed = kernels.qlinear_conv((x, xq), (w, wq), bias, yq, case["attributes"])
    law = qlinear_conv(x, w, None if bias is None else bias[0], xq, wq, yq, case["attributes"])
    agreement = compare_codes(law, observed)
    assert (agreement.mismatches, agreement.ties) == (0, 0), agreement


@pytest.mark.parametrize(
    "attributes", [{"group": 64, "pads": [1, 1, 1, 1]}, {"group": 32, "strides": [2, 2]}, {"group": 1}]
)
def test_quantize_dequantize_group_is_the_same_kernel(kernels: Any, attributes: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    group = attributes["group"]
    channels = max(group, 6)
    inner = channels // group
    xq, yq, wq = kernels.affine(rng), kernels.affine(rng), kernels.affine(rng, I8, 64)
    x, w = kernels.codes(rng, (2, channels, 9, 11)), kernels.codes(rng, (64, inner, 3, 3), I8)
    bias, numbers = kernels.bias(rng, xq, wq, 64)
    constants = {1: (w, wq), 2: (bias, numbers)}
    observed, ran = kernels.group("Conv", [(x, xq)], yq, constants=constants, attributes=attributes)
    assert "QLinearConv" in ran
    agreement = compare_codes(qlinear_conv(x, w, bias, xq, wq, yq, attributes), observed)
    assert (agreement.mismatches, agreement.ties) == (0, 0)


def test_sums_beyond_float32_stay_exact(kernels: Any) -> None:
    rng = np.random.default_rng(2)
    xq, yq, wq = one(0.01, 0, U8), one(0.5, 0, U8), one(0.0001, 0, I8)
    x = rng.integers(200, 256, (1, 1024, 3, 3)).astype(np.uint8)
    w = rng.integers(100, 128, (4, 1024, 3, 3)).astype(np.int8)
    attributes = {"pads": [1, 1, 1, 1]}
    observed = kernels.qlinear_conv((x, xq), (w, wq), None, yq, attributes)
    law = qlinear_conv(x, w, None, xq, wq, yq, attributes)
    assert 0 < law.codes.min() < law.codes.max() <= 255
    agreement = compare_codes(law, observed)
    assert (agreement.codes, agreement.mismatches, agreement.ties) == (36, 0, 0)


def test_one_wrong_weight_code_is_seen(kernels: Any) -> None:
    rng = np.random.default_rng(5)
    xq, yq, wq = one(0.02, 128, U8), one(0.05, 128, U8), one(0.01, 0, I8)
    x, w = kernels.codes(rng, (1, 8, 12, 12)), kernels.codes(rng, (4, 8, 3, 3), I8)
    wrong = w.copy()
    wrong[2, 3, 1, 1] ^= 1
    observed = kernels.qlinear_conv((x, xq), (wrong, wq), None, yq, {})
    agreement = compare_codes(qlinear_conv(x, w, None, xq, wq, yq, {}), observed)
    assert agreement.mismatches > 0
    assert agreement.first is not None
    assert agreement.first[0][1] == 2


def test_float_convolution_differs_at_ties_only(kernels: Any) -> None:
    rng = np.random.default_rng(3)
    # Sums are multiples of 0.15 and steps 9.6 wide: one value in 64 is a tie, which float sums decide by chance.
    xq, yq, wq = one(0.5, 128, U8), one(9.6, 128, U8), one(0.3, 0, I8)
    x, w = kernels.codes(rng, (1, 16, 20, 20)), rng.integers(-9, 10, (8, 16, 3, 3)).astype(np.int8)
    observed, ran = kernels.group("Conv", [(x, xq)], yq, constants={1: (w, wq)}, optimize=False)
    assert "Conv" in ran
    agreement = compare_codes(float_conv(x, w, None, xq, wq, yq, {}), observed)
    assert agreement.mismatches == 0
    assert 0 < agreement.ties < agreement.codes / 32


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 2]},
        {"strides": [2, 3], "pads": [1, 0, 1, 2], "output_padding": [1, 1]},
        {"strides": [2, 2], "dilations": [2, 1], "group": 2},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
        {"strides": [2, 2], "output_shape": [13, 12]},
    ],
)
def test_conv_transpose(kernels: Any, attributes: dict[str, Any]) -> None:
    rng = np.random.default_rng(4)
    xq, yq, wq = kernels.affine(rng), one(0.7, 100, U8), one(0.02, 0, I8)
    x, w = kernels.codes(rng, (2, 6, 6, 5)), kernels.codes(rng, (6, 4, 3, 3), I8)
    observed, _ = kernels.group("ConvTranspose", [(x, xq)], yq, constants={1: (w, wq)}, attributes=attributes)
    agreement = compare_codes(float_conv_transpose(x, w, None, xq, wq, yq, attributes), observed)
    assert agreement.mismatches == 0
    assert agreement.ties <= agreement.codes * 0.01


def test_auto_pad() -> None:
    assert ConvAttributes.of({"auto_pad": "SAME_UPPER", "strides": [2]}, [4], [7]).pads == ((1, 2),)
    assert ConvAttributes.of({"auto_pad": "SAME_LOWER", "strides": [2]}, [4], [7]).pads == ((2, 1),)
    assert ConvAttributes.of({"auto_pad": "VALID", "pads": [9, 9]}, [4], [7]).pads == ((0, 0),)
