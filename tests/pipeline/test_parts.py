"""Which parts of the search are kept: those with which a network that is really run is best."""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from postquant.calib.trial import Outcome, Trial
from postquant.passes.plan import QuantPlan
from postquant.pipeline.parts import keep_parts
from postquant.pipeline.progress import NullProgress
from postquant.pipeline.stage_log import StageLog
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

WEIGHT = QuantSpec(8, True, True, axis=0, narrow=True)
ACTIVATION = QuantSpec(8, False, False)


@dataclasses.dataclass
class Errors:
    """Stands for a :class:`Trial`: the error of a plan is a function of its parts."""

    weights: float
    activations: float
    biases: float

    def measure(self, _model: ir.Model, plan: QuantPlan) -> Outcome:
        weight, activation = plan.weights["w"], plan.activations["x"]
        assert isinstance(weight, TensorQuantizer)
        assert isinstance(activation, TensorQuantizer)
        error = 1.0
        error += self.weights * (float(weight.scale[0]) != 1.0)
        error += self.activations * (float(activation.scale) != 1.0)
        error += self.biases * ("b" in plan.biases)
        return Outcome(error, -error)


@pytest.fixture
def model() -> ir.Model:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    m (float[N,2,4,4] x) => (float[N,2,4,4] y) { [c] y = Conv <kernel_shape = [1, 1]> (x, w, b) }""")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full((2, 2, 1, 1), 0.7, np.float32), "w"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(2, np.float32), "b"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def plan_with(scale: float) -> QuantPlan:
    weight = TensorQuantizer(WEIGHT, np.full(2, scale, np.float32), np.zeros(2, np.int64))
    activation = TensorQuantizer(ACTIVATION, np.asarray(scale, np.float32), np.asarray(0))
    return QuantPlan("", activations={"x": activation}, weights={"w": weight})


@pytest.mark.parametrize("correcting", [True, False])
@pytest.mark.parametrize(
    ("errors", "weights", "activations", "biases"),
    [
        (Errors(-0.1, -0.1, -0.1), True, True, True),
        (Errors(-0.1, 0.1, -0.1), True, False, True),
        (Errors(0.1, -0.1, -0.1), False, True, True),
        (Errors(0.1, 0.1, -0.1), False, False, True),
        (Errors(0.1, 0.1, 0.1), False, False, False),
        (Errors(-0.1, -0.1, 0.5), True, True, False),
    ],
)
def test_each_part_on_its_own_merit(
    model: ir.Model, errors: Errors, weights: bool, activations: bool, biases: bool, correcting: bool
) -> None:
    log = StageLog(NullProgress())
    start, searched = plan_with(1.0), plan_with(2.0)
    trial = cast(Trial, errors)
    means = {"c": np.full((1, 2), 0.5, np.float32)} if correcting else None
    kept = keep_parts(model, start, searched, trial, errors.measure(model, start), means, log)
    assert (kept.weights == searched.weights) == weights
    assert (kept.activations == searched.activations) == activations
    assert ("b" in kept.biases) == (biases and correcting)
    said = {stage.name: stage.kept for stage in log.stages}
    assert said["scale search, weights"] == weights
    assert said["scale search, activations"] == activations
    assert said.get("bias correction", False) == (biases and correcting)


def test_nothing_searched(model: ir.Model) -> None:
    log = StageLog(NullProgress())
    start, errors = plan_with(1.0), Errors(0, 0, -0.1)
    means = {"c": np.full((1, 2), 0.5, np.float32)}
    kept = keep_parts(model, start, start, cast(Trial, errors), errors.measure(model, start), means, log)
    assert "b" in kept.biases
    assert [stage.name for stage in log.stages] == ["bias correction"]
