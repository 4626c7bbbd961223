"""Fixtures for what is around the stages: a small network, samples, and quick stages in the real ones' place."""

from __future__ import annotations

import importlib.util
import pathlib
import types
from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import pytest

_FILE = pathlib.Path(__file__).with_name("small_pipeline.py")


@pytest.fixture(scope="session")
def small_pipeline() -> types.ModuleType:
    """The module ``small_pipeline.py``, which is no test and therefore not imported by pytest."""
    spec = importlib.util.spec_from_file_location("small_pipeline", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quick_stages(small_pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the quick stages where the API finds the real ones."""
    monkeypatch.setattr("postquant.pipeline.api.run_pipeline", small_pipeline.run_pipeline)


@pytest.fixture
def network(small_pipeline: types.ModuleType, tmp_path: pathlib.Path) -> pathlib.Path:
    """File of the small network."""
    path: pathlib.Path = small_pipeline.write_network(tmp_path / "net.onnx")
    return path


@pytest.fixture
def samples(small_pipeline: types.ModuleType, tmp_path: pathlib.Path) -> pathlib.Path:
    """File of six calibration samples for it."""
    path: pathlib.Path = small_pipeline.write_samples(tmp_path / "calib.npz")
    return path


# A stem, a residual block of two convolutions, a classifier; all layers that get bits or are learned.
_RESIDUAL = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, I, 5, 5] x) => (float[N, 4] y)
    <float[C, I, 3, 3] w0, float[C] b0, float[C, C, 3, 3] w1, float[C] b1, float[C, C, 3, 3] w2, float[C] b2,
     float[4, C] w3, float[4] b3> {
      [stem] c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
      [relu0] r0 = Relu (c0)
      [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (r0, w1, b1)
      [relu1] r1 = Relu (c1)
      [conv2] c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2, b2)
      [sum] a = Add (c2, r0)
      [relu2] r2 = Relu (a)
      [pool] p = GlobalAveragePool (r2)
      [flat] f = Flatten (p)
      [head] y = Gemm <transB = 1> (f, w3, b3)
    }
"""


@pytest.fixture(scope="session")
def residual_network() -> Callable[..., pathlib.Path]:
    """Writes ``net.onnx``, a small residual network with seeded weights, and ``calib.npz`` to a folder."""

    def write(folder: pathlib.Path, *, inputs: int, channels: int, samples: int, size: float) -> pathlib.Path:
        text = _RESIDUAL
        for letter, number in (("I", inputs), ("C", channels)):
            text = text.replace(f" {letter},", f" {number},").replace(f"[{letter}", f"[{number}")
            text = text.replace(f" {letter}]", f" {number}]")
        model = onnx.parser.parse_model(text)
        rng = np.random.default_rng(0)
        for value in model.graph.value_info:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            array = rng.standard_normal(shape).astype(np.float32) * np.float32(size)
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        onnx.save_model(model, folder / "net.onnx")
        np.savez(folder / "calib.npz", x=rng.standard_normal((samples, inputs, 5, 5)).astype(np.float32))
        return folder

    return write
