"""Rounding borders from the setting to the verified file."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from postquant.calib.border import BorderOptions, borders_of, choose_borders, densities, with_borders
from postquant.calib.source import CalibrationSource
from postquant.calib.trial import Outcome
from postquant.passes.biases import fit_biases
from postquant.passes.border_nodes import is_border
from postquant.passes.border_plan import border_sites
from postquant.passes.emit import emit
from postquant.passes.place import PlacementSettings
from postquant.passes.plan import QuantPlan
from postquant.pipeline.api import quantize
from postquant.pipeline.config import Border, Method, QuantConfig
from postquant.pipeline.inputs import open_calibration
from postquant.pipeline.plan_check import differences
from postquant.pipeline.recover import recover_float_model
from postquant.pipeline.verify import verify_model
from postquant.runtime_ops.quantizer import TensorQuantizer

OPTIONS = BorderOptions(least_gain=0.0)


@pytest.fixture(scope="module")
def narrow(cases: Any) -> Any:
    """The small network at W8A4."""
    return cases.build(settings=PlacementSettings(abits=4))


@pytest.fixture(scope="module")
def source(narrow: Any) -> CalibrationSource:
    return open_calibration(list(narrow.samples), narrow.model, QuantConfig())


@pytest.fixture(scope="module")
def plan(narrow: Any, source: CalibrationSource) -> QuantPlan:
    """Its plan with all borders that there are."""
    sites, _ = border_sites(narrow.model, narrow.plan, bits=4)
    borders = borders_of(narrow.model, narrow.plan, sites, source, OPTIONS)
    assert set(borders) == {site.node.name for site in sites}
    return fit_biases(narrow.model, with_borders(narrow.plan, sites, borders, 1.0))


def test_a_bordered_model_passes_its_verification(narrow: Any, plan: QuantPlan) -> None:
    emitted = emit(narrow.model, plan)
    verification = verify_model(narrow.model, emitted, plan, narrow.samples)
    assert verification.passed
    bordered = {node.name for node in emitted.graph if is_border(node)}
    seen = {tensor.codes_name for tensor in verification.tensors if tensor.law == "kernel"}
    assert bordered <= seen, "the law of the border is compared"
    assert all(t.ties == t.mismatches == 0 for t in verification.tensors if t.codes_name in bordered)


def test_another_border_in_the_file_is_found(narrow: Any, plan: QuantPlan) -> None:
    key = next(key for key, entry in plan.requants.items() if getattr(entry, "border", None) is not None)
    entry = plan.requants[key]
    assert isinstance(entry, TensorQuantizer)
    assert entry.border is not None
    window_scale = entry.border.window_scale + np.float32(1e-4)
    other = dataclasses.replace(entry, border=dataclasses.replace(entry.border, window_scale=window_scale))
    for changed, text in ((other, "window_scale"), (dataclasses.replace(entry, border=None), "rounding")):
        emitted = emit(narrow.model, plan.with_requant(key, changed))
        found = list(differences(narrow.model, emitted, plan))
        assert found
        assert all(text in difference.what for difference in found)
    emitted = emit(narrow.model, plan)
    node = next(node for node in emitted.graph if is_border(node))
    node.attributes["qmax"] = ir.AttrInt64("qmax", 14)
    assert [d.what for d in differences(narrow.model, emitted, plan)] == ["attribute qmax of the border: expected 15"]


def test_the_float_model_is_recovered(narrow: Any, plan: QuantPlan) -> None:
    emitted = emit(narrow.model, plan)
    recovered = recover_float_model(emitted, plan)
    again = emit(recovered, plan)
    assert not list(differences(recovered, again, plan))
    assert [n.op_type for n in again.graph if is_border(n)] == [n.op_type for n in emitted.graph if is_border(n)]


def test_densities_count_values_with_residuals(narrow: Any, source: CalibrationSource) -> None:
    sites, _ = border_sites(narrow.model, narrow.plan, bits=4)
    found = densities(narrow.model, narrow.plan, sites, source)
    assert set(found) == {site.key for site in sites}
    assert all(0 < density <= 1 for density in found.values())
    # Half of the values behind a Relu are 0.
    assert found["depthwise:0"] < 0.8


class FakeTrial:
    """Errors by the step of one tensor and by borders, noted as they are asked for."""

    def __init__(self, best: float, gain: float) -> None:
        self.best, self.gain, self.start = best, gain, 0.0
        self.asked: list[tuple[float, bool]] = []

    def measure(self, model: ir.Model, plan: QuantPlan) -> Outcome:
        quantizer = plan.input_quantizer("depthwise:0") or plan.activation_quantizer("r1")
        assert quantizer is not None
        self.start = self.start or float(quantizer.scale)
        factor = float(quantizer.scale) / self.start
        bordered = any(getattr(entry, "border", None) is not None for entry in plan.requants.values())
        self.asked.append((round(factor, 3), bordered))
        error = 1 + abs(np.log(factor / self.best)) - (self.gain if bordered else 0)
        return Outcome(float(error), 0.0)


@pytest.mark.parametrize(
    ("best", "gain", "margin", "kept", "power"),
    [(1.0, 0.2, 0.0, True, 0), (1.13, 0.2, 0.0, True, 2), (0.89, 0.0, 0.0, False, -2), (1.3, 0.05, 1.0, False, 3)],
)
def test_steps_and_borders_are_chosen_together(
    narrow: Any, source: CalibrationSource, best: float, gain: float, margin: float, kept: bool, power: int
) -> None:
    trial = FakeTrial(best, gain)
    options = dataclasses.replace(OPTIONS, margin_db=margin)
    choice = choose_borders(narrow.model, narrow.plan, source, trial, options)  # type: ignore[arg-type]
    assert choice is not None
    assert (choice.kept, round(choice.factor, 6)) == (kept, round(options.ratio**power, 6))
    assert any(getattr(entry, "border", None) is not None for entry in choice.plan.requants.values()) == kept
    # Both kinds were tried at the best step.
    assert {(round(options.ratio**power, 3), False), (round(options.ratio**power, 3), True)} <= set(trial.asked)


def test_the_setting(narrow: Any, cases: Any, tmp_path: pathlib.Path) -> None:
    proto = ir.to_proto(cases.float_model(cases.cnn))
    rng = np.random.default_rng(5)
    feeds = [{"image": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(8)]
    found = {}
    for border in (Border.AUTO, Border.ON, Border.OFF):
        config = QuantConfig(abits=4, first_last_bits=None, border=border, method=Method.MSE, verify_samples=2)
        result = quantize(proto, feeds, config)
        stages = {stage.name: stage for stage in result.report.stages}
        assert all(check.passed for check in result.report.checks)
        found[border] = sum(is_border(node) for node in result.model.graph)
        if border is Border.OFF:
            assert "rounding borders" not in stages
        else:
            assert stages["rounding borders"].kept == bool(found[border])
    assert found[Border.OFF] == 0
    wide = quantize(proto, feeds, QuantConfig(border=Border.ON, method=Method.MSE, verify_samples=2))
    assert any("can have a rounding border" in note for note in wide.report.notes)
