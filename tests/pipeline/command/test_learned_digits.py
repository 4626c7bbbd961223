"""Learning pays on a real network: the demo's at W2A4, on digits that were not learned from."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from postquant.calib.learn.recipe import Effort, recipe_for
from postquant.passes.target import WeightStorage
from postquant.pipeline import learning_run
from postquant.pipeline.api import quantize
from postquant.pipeline.config import Border, Method, QuantConfig, Weights
from postquant.pipeline.demo.digits import load_digits

# Few steps at higher rates.
FEW: dict[str, Any] = {
    "iterations": 60,
    "rounding_rate": 6e-3,
    "bias_rate": 4e-3,
    "weight_scale_rate": 4e-3,
    "step_rate": 4e-3,
}


def _sqnr(exact: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - other).sum()))


@pytest.mark.slow
@pytest.mark.usefixtures("torch_installed")
def test_learned_digits(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_run, "recipe_for", lambda *a: dataclasses.replace(recipe_for(*a), **FEW))
    monkeypatch.setattr(learning_run, "network_recipe", lambda *a: None)
    digits = load_digits()
    feeds = [{"image": digits.calibration[index : index + 1]} for index in range(96)]
    config = QuantConfig(
        wbits=2,
        abits=4,
        method=Method.MSE,
        border=Border.OFF,
        weights=Weights.INT,
        weight_storage=WeightStorage.INT8,
        effort=Effort.FAST,
    )
    images = digits.test[:300]
    exact = ort.InferenceSession(digits.model).run(None, {"image": images})[0]
    sqnr, right = [], []
    for learn in (False, True):
        folder = tmp_path / str(learn)
        result = quantize(digits.model, feeds, dataclasses.replace(config, learn=learn), out=folder)
        assert result.report.passed
        session = ort.InferenceSession(str(folder / "model.onnx"))
        outputs = session.run(None, {"image": images})[0]
        sqnr.append(_sqnr(exact, outputs))
        right.append(float((outputs.argmax(1) == digits.test_labels[:300]).mean()))
    assert sqnr[1] > sqnr[0] + 2.5
    assert right[1] > max(right[0], 0.5)
