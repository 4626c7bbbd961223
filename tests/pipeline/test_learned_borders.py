"""Learned rounding borders and adaptive steps from the setting to the verified file."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from postquant.passes.adaptive_nodes import is_adaptive
from postquant.passes.border_nodes import is_border
from postquant.passes.emit import emit
from postquant.passes.lut_expansion import with_qdq
from postquant.passes.plan import QuantPlan
from postquant.pipeline import learning_run
from postquant.pipeline.api import quantize
from postquant.pipeline.config import Border, Method, QuantConfig, Weights
from postquant.pipeline.demo.digits import load_digits
from postquant.pipeline.plan_check import differences
from postquant.pipeline.recover import recover_float_model
from postquant.pipeline.verify_folder import verify_folder
from postquant.runtime_ops.errors import ConfigError
from postquant.runtime_ops.quantizer import TensorQuantizer


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning takes a moment."""
    for name in ("recipe_for", "network_recipe"):
        recipe = getattr(learning_run, name)
        monkeypatch.setattr(
            learning_run, name, lambda *a, recipe=recipe: dataclasses.replace(recipe(*a), iterations=30)
        )


@pytest.mark.usefixtures("torch_installed", "few_steps")
@pytest.mark.parametrize("border", [Border.LEARNED_OWN, Border.LEARNED_NEIGHBOURS])
def test_what_was_learned_is_what_the_file_computes(border: Border, tmp_path: pathlib.Path) -> None:
    digits = load_digits()
    feeds = [{"image": digits.calibration[index : index + 1]} for index in range(48)]
    config = QuantConfig(
        wbits=3, abits=2, method=Method.MSE, border=border, weights=Weights.INT, learn=True, verify_samples=4
    )
    result = quantize(digits.model, feeds, config, out=tmp_path / "out")
    assert all(check.passed for check in result.report.checks)
    stages = {stage.name: stage for stage in result.report.stages}
    assert stages["learned rounding borders"].kept
    assert "rounding borders" not in stages  # those of the closed form
    plan = QuantPlan.load(tmp_path / "out" / "plan.safetensors")
    borders = [e.border for e in plan.requants.values() if isinstance(e, TensorQuantizer) and e.border is not None]
    emitted = ir.load(tmp_path / "out" / "model.onnx")
    assert len(borders) == sum(is_border(node) for node in emitted.graph) > 0
    assert any(not np.allclose(border.border, 0.5, atol=1e-3) for border in borders)
    sees = [bool(border.window.any()) or border.rank > 0 for border in borders]
    assert any(sees) == (border is Border.LEARNED_NEIGHBOURS)
    # The receiver's checks: the folder's own, and the float model comes back and gives the same file.
    assert [check for check in verify_folder(tmp_path / "out") if not check.passed] == []
    recovered = recover_float_model(emitted, plan)
    assert not list(differences(recovered, emit(recovered, plan), plan))
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    images = digits.test[:200]
    right = float((session.run(None, {"image": images})[0].argmax(1) == digits.test_labels[:200]).mean())
    assert right > 0.5, right


@pytest.mark.usefixtures("torch_installed", "few_steps")
def test_an_adaptive_step_is_what_the_file_computes(tmp_path: pathlib.Path) -> None:
    digits = load_digits()
    feeds = [{"image": digits.calibration[index : index + 1]} for index in range(48)]
    config = QuantConfig(
        wbits=3, abits=4, method=Method.MSE, adaptive_step=True, weights=Weights.INT, learn=True, verify_samples=4
    )
    result = quantize(digits.model, feeds, config, out=tmp_path / "out")
    assert all(check.passed for check in result.report.checks), result.report.checks
    stages = {stage.name: stage for stage in result.report.stages}
    assert stages["learned adaptive steps"].kept
    plan = QuantPlan.load(tmp_path / "out" / "plan.safetensors")
    modules = [e for e in plan.requants.values() if isinstance(e, TensorQuantizer) and e.adaptive is not None]
    emitted = ir.load(tmp_path / "out" / "model.onnx")
    nodes = [node for node in emitted.graph if is_adaptive(node)]
    assert len(modules) == len(nodes) > 0
    assert any(module.adaptive is not None and module.adaptive.w1.any() for module in modules)
    # Samples of one batch have steps of their own: together they give what each gives alone.
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    images = digits.test[:20]
    alone = np.concatenate([session.run(None, {"image": images[i : i + 1]})[0] for i in range(20)])
    np.testing.assert_allclose(session.run(None, {"image": images})[0], alone, rtol=1e-4, atol=1e-4)
    assert [check for check in verify_folder(tmp_path / "out") if not check.passed] == []
    recovered = recover_float_model(emitted, plan)
    assert not list(differences(recovered, emit(recovered, plan), plan))
    # Another network in the file is found.
    value = nodes[0].inputs[3]
    assert value is not None
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() + np.float32(0.1))
    nodes[0].attributes["qmax"] = ir.AttrInt64("qmax", 14)
    found = [difference.what for difference in differences(recovered, with_qdq(emitted), plan)]
    assert found == [
        "input w1 of the adaptive step differs from the plan's",
        "attribute qmax of the adaptive step differs from the plan's",
    ]


def test_borders_are_learned_with_everything_else_or_not_at_all() -> None:
    for border in (Border.LEARNED_OWN, Border.LEARNED_NEIGHBOURS):
        with pytest.raises(ConfigError, match="learn = true"):
            QuantConfig(border=border)
        with pytest.raises(ConfigError, match="encodings"):
            QuantConfig(border=border, learn=True, encodings="numbers.json")
    with pytest.raises(ConfigError, match="learn = true"):
        QuantConfig(adaptive_step=True)
