"""Bias correction removes exactly the mean error of quantized weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from postquant.calib.bias_correction import corrected_bias

KINDS = ("Conv", "grouped", "depthwise", "ConvTranspose", "transposed groups", "Gemm", "MatMul")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 8])
def test_mean_outputs_are_those_of_the_float_weights(layer_case: Any, kind: str, bits: int) -> None:
    case = layer_case(kind)
    quantizer = case.start(bits)
    bias = np.random.default_rng(3).standard_normal(case.layer.out_channels).astype(np.float32)
    mean = case.rows.mean(0, dtype=np.float64).astype(np.float32)
    found = corrected_bias(case.layer, case.weight, bias, quantizer, mean)
    assert found.dtype == np.float32
    quantized, wanted = (case.outputs(w).mean(0).reshape(-1) for w in (quantizer.simulate(case.weight), case.weight))
    np.testing.assert_allclose(quantized + found, wanted + bias, rtol=1e-4, atol=1e-4)
    # The mean error alone goes; what is left is what centred moments judge.
    after = np.square(
        case.outputs(quantizer.simulate(case.weight) - case.weight).reshape(len(case.rows), -1) + found - bias
    )
    np.testing.assert_allclose(after.mean(0), case.errors(quantizer, centred=True).reshape(-1), rtol=1e-3, atol=1e-7)


def test_exact_weights_change_nothing(layer_case: Any) -> None:
    case = layer_case("Conv")
    quantizer = case.start(8)
    exact = dataclasses.replace(case, weight=quantizer.simulate(case.weight))
    bias = np.arange(case.layer.out_channels, dtype=np.float32)
    found = corrected_bias(exact.layer, exact.weight, bias, quantizer, exact.rows.mean(0))
    np.testing.assert_array_equal(found, bias)


def test_chosen_codes_count(layer_case: Any) -> None:
    case = layer_case("MatMul")
    chosen = dataclasses.replace(case.start(8), codes=np.zeros(case.weight.shape, np.int8))
    mean = case.rows.mean(0)
    found = corrected_bias(case.layer, case.weight, np.zeros(5, np.float32), chosen, mean)
    np.testing.assert_allclose(found, (mean[0] @ case.weight), rtol=1e-4, atol=1e-5)
