"""int32 biases that fit, whatever the weights are."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from postquant.passes.biases import LARGEST_BIAS, fit_biases
from postquant.passes.emit import emit
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

KEEP = "<pads = [1, 1, 1, 1]>"
BLOCK = f"a = Conv {KEEP} (x, w1, b1) r = Relu (a) y = Conv {KEEP} (r, w2, b2)"


class TestBiases:
    def make(self, bench: Any, rng: np.random.Generator, tiny: float, bias: float) -> tuple[ir.Model, Any]:
        extra = bench.arrays(rng)
        extra["w1"][0] *= tiny
        extra["b1"][:] = bias
        model = bench.model(bench.graph(BLOCK), **extra)
        return model, bench.calibrate(model, bench.place(model), bench.feeds(rng))

    @pytest.mark.parametrize("tiny", [0.0, 1e-12])
    @pytest.mark.parametrize("bias", [0.0, 3.0])
    def test_a_channel_of_tiny_weights_keeps_its_bias(
        self, bench: Any, rng: np.random.Generator, tiny: float, bias: float
    ) -> None:
        model, plan = self.make(bench, rng, tiny, bias)
        result = emit(model, plan)
        assert np.abs(bench.array(result, "b1_quantized").astype(np.int64)).max() <= LARGEST_BIAS
        assert any("w1" in note for note in plan.notes) is (bias > 0)
        feed = bench.feeds(rng)[0]
        for optimize in (False, True):
            got = bench.run(result, feed, optimize=optimize)["y"]
            expected = bench.run(model, feed)["y"]
            assert np.square(got - expected).mean() < 1e-3 * np.square(expected).mean()

    def test_normal_channels_are_not_touched(self, bench: Any, rng: np.random.Generator) -> None:
        model, plan = self.make(bench, rng, 1.0, 3.0)
        assert plan.notes == ()
        assert fit_biases(model, plan) is plan

    def test_constant_zero_input_and_zero_weights(self, bench: Any, rng: np.random.Generator) -> None:
        model, plan = self.make(bench, rng, 0.0, 0.0)
        zero = TensorQuantizer.from_range(QuantSpec(8, False, False), 0, 0)
        result = emit(model, fit_biases(model, plan.with_activation("x", zero)))
        assert np.isfinite(bench.run(result, bench.feeds(rng)[0])["y"]).all()

    def test_chosen_codes_survive_in_the_other_channels(self, bench: Any, rng: np.random.Generator) -> None:
        model, plan = self.make(bench, rng, 1.0, 3.0)
        codes = rng.integers(-127, 128, (4, 4, 3, 3)).astype(np.int8)
        scale = plan.weights["w1"].scale.copy()
        scale[1] = 1e-15
        plan = plan.with_weight("w1", dataclasses.replace(plan.weights["w1"], scale=scale, codes=codes))
        fitted = fit_biases(model, plan).weights["w1"]
        assert isinstance(fitted, TensorQuantizer)
        assert fitted.codes is not None
        assert fitted.scale[1] > 1e-10
        np.testing.assert_array_equal(fitted.codes[[0, 2, 3]], codes[[0, 2, 3]])
        assert (fitted.codes[1] != codes[1]).any()
