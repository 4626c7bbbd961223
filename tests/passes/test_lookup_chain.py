"""The chain of standard operators holds the law of the quantizer."""

from __future__ import annotations

import numpy as np
import pytest

from postquant.calib.activation_levels import quantizer_with_levels
from postquant.passes.lookup_chain import chain_constants
from postquant.runtime_ops.integer import Affine
from postquant.runtime_ops.spec import QuantSpec


def test_the_table_holds_the_law_for_every_code() -> None:
    quantizer = quantizer_with_levels(QuantSpec(2, signed=False, symmetric=False), np.array([-1.0, 0.0, 0.5, 3.0]))
    stored = Affine(np.array(0.02, np.float32), np.array(60, np.int32), np.dtype(np.uint8))
    real = (np.arange(256) - 60) * 0.02
    levels = quantizer.dequantize(quantizer.quantize(real.astype(np.float32)))
    found = quantizer.dequantize(chain_constants(quantizer, stored)["levels"])
    np.testing.assert_array_equal(found, levels)
    assert np.abs(levels - real).max() == pytest.approx(1.25, abs=0.03)
