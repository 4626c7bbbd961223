"""Fixtures for what is around the stages: a small network, samples, and quick stages in the real ones' place."""

from __future__ import annotations

import importlib.util
import pathlib
import types

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
