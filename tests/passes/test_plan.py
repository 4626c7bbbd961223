"""What plans tell of themselves."""

from __future__ import annotations

import numpy as np

from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec


def test_the_narrowest_of_weights_and_activations() -> None:
    three = TensorQuantizer(QuantSpec(3, False, False), np.array(0.5, np.float32), np.array(0, np.int32))
    plan = QuantPlan("onnxruntime", activations={"a": QuantSpec(8, False, False)})
    assert plan.narrowest_bits == 8
    assert plan.with_weight("w", QuantSpec(4, True, True, 0)).narrowest_bits == 4
    assert plan.with_weight("w", QuantSpec(4, True, True, 0)).with_requant("conv:0", three).narrowest_bits == 3
    assert QuantPlan("onnxruntime", weights={"w": QuantSpec(16, True, True)}).narrowest_bits == 8
    assert QuantPlan("onnxruntime").narrowest_bits == 8
