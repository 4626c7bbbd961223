"""Small quantized models in formats that a vendor's file can and cannot say exactly."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from postquant.passes.place import PlacementSettings, place
from postquant.passes.plan import QuantPlan
from postquant.passes.target import load_target

TARGET = load_target(pathlib.Path(__file__).resolve().parents[3] / "pipeline" / "targets" / "onnxruntime.toml")


@pytest.fixture(scope="session")
def planned(cases: Any) -> Callable[..., tuple[Any, QuantPlan]]:
    """Makes (model, decided plan) of an ONNX text, for changed formats of activations and weights."""

    def build(text: str = cases.cnn, *, wbits: int = 8, abits: int = 8, **formats: Any) -> tuple[Any, QuantPlan]:
        activations = dataclasses.replace(TARGET.activations, **formats.get("activations", {}))
        weights = dataclasses.replace(TARGET.weights, **formats.get("weights", {}))
        target = dataclasses.replace(TARGET, activations=activations, weights=weights)
        model = cases.float_model(text)
        value = model.graph.inputs[0]
        shape = [d if isinstance(d, int) else 2 for d in value.shape]
        rng = np.random.default_rng(1)
        samples = [{value.name: rng.normal(size=shape).astype(np.float32)} for _ in range(2)]
        plan = place(model, target, PlacementSettings(wbits=wbits, abits=abits, first_last_bits=None))
        return model, cases.ranged(model, plan, samples)

    return build


@pytest.fixture(scope="session")
def symmetric(planned: Callable[..., tuple[Any, QuantPlan]]) -> tuple[Any, QuantPlan]:
    """The small network with signed symmetric activations; tests must not change it."""
    return planned(activations={"signed": True, "symmetric": True})


@pytest.fixture(scope="session")
def asymmetric(planned: Callable[..., tuple[Any, QuantPlan]]) -> tuple[Any, QuantPlan]:
    """The small network with unsigned asymmetric activations; tests must not change it."""
    return planned()


@pytest.fixture(scope="session")
def target() -> Any:
    """The target that plans were placed for."""
    return TARGET
