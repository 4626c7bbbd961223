"""Models with operators that only a library of the user brings: verified, compared and inspected with it."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from postquant.passes.emit import emit
from postquant.passes.place import PlacementSettings, place
from postquant.passes.session import custom_operators, make_session
from postquant.passes.target import load_target
from postquant.pipeline.compare import compare_models
from postquant.pipeline.inspection import inspect_model
from postquant.pipeline.load import load_model
from postquant.pipeline.save import save_model
from postquant.pipeline.verify import verify_model
from postquant.runtime_ops.errors import ModelError

NETWORK = """<ir_version: 8, opset_import: ["" : 17, "example.ops" : 1]>
m (float[N,3,8,8] x) => (float[N,4,8,8] y) <float[4,3,3,3] w1, float[4] b1, float[4,4,1,1] w2, float[4] b2> {
    [first] c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    [cube] t = example.ops.Cube (c)
    [second] y = Conv (t, w2, b2)
}"""
HINT = "name it: --custom-ops, custom_ops"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    compiler = shutil.which("c++")
    if compiler is None:
        if os.environ.get("CI") == "true":
            pytest.fail("there is no C++ compiler")
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp("library") / "libcube.so"
    source = pathlib.Path(__file__).parent / "custom_op.cc"
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", "-O1", str(source), "-o", str(path)], check=True)
    return path


class Result:
    """A quantized network with the operator, in files."""

    def __init__(self, cases: Any, library: pathlib.Path, folder: pathlib.Path) -> None:
        self.model: ir.Model = cases.float_model(NETWORK)
        rng = np.random.default_rng(3)
        self.samples = [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(2)]
        with custom_operators([library]):
            plan = place(self.model, load_target("onnxruntime"), PlacementSettings())
            self.plan = cases.ranged(self.model, plan, self.samples)
        self.fp32, self.quantized = folder / "fp32.onnx", folder / "quantized.onnx"
        save_model(self.model, self.fp32)
        save_model(emit(self.model, self.plan), self.quantized)


@pytest.fixture
def result(cases: Any, library: pathlib.Path, tmp_path: pathlib.Path) -> Result:
    return Result(cases, library, tmp_path)


def test_verified_with_the_library(result: Result, library: pathlib.Path) -> None:
    verified = verify_model(result.model, result.quantized, result.plan, result.samples, custom_ops=[library])
    assert set(verified.coverage.integer) == {"first", "second"}
    assert {t.name: t.law for t in verified.tensors} == {"x": "kernel", "c": "kernel", "t": "quantize", "y": "kernel"}
    assert verified.outputs[0].sqnr_db > 20


def test_without_it_the_check_says_what_is_missing(result: Result) -> None:
    verified = verify_model(result.model, result.quantized, result.plan, result.samples, strict=False)
    failed = [check for check in verified.checks if not check.passed]
    assert [check.name for check in failed] == ["onnxruntime loads it"]
    assert "example.ops:Cube" in failed[0].detail
    assert HINT in failed[0].detail


def test_compared(result: Result, library: pathlib.Path) -> None:
    comparison = compare_models(result.fp32, result.quantized, result.samples, custom_ops=[library])
    assert {layer.name for layer in comparison.layers} >= {"x", "c", "t"}
    with pytest.raises(ModelError, match="Cube") as caught:
        compare_models(result.fp32, result.quantized, result.samples)
    assert HINT in str(caught.value)


def test_inspected(result: Result, library: pathlib.Path) -> None:
    inspection = inspect_model(result.quantized, custom_ops=[library])
    assert inspection.kernels is not None
    assert inspection.kernels["QLinearConv"] == 2
    without = inspect_model(result.quantized)
    assert without.kernels is None
    assert any(HINT in note for note in without.notes)


def test_loading_says_what_is_missing(result: Result, library: pathlib.Path) -> None:
    assert load_model(result.fp32, custom_ops=[library]).graph.num_nodes() == 3
    with pytest.raises(ModelError, match="Cube") as caught:
        load_model(result.fp32)
    assert HINT in str(caught.value)


def test_a_bare_file_name_is_a_file(result: Result, library: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(library.parent)
    assert make_session(result.model, custom_ops=[library.name]).output_names == ("y",)
    with custom_operators([library.name]):
        monkeypatch.chdir(library.parent.parent)
        assert make_session(result.model).output_names == ("y",)


def test_blocks_nest_and_end(result: Result, library: pathlib.Path) -> None:
    with custom_operators([]), custom_operators([library]), custom_operators([str(library)]):
        x = result.samples[0]
        values = make_session(result.model, outputs=["c", "t"]).run(x)
        np.testing.assert_allclose(values["t"], values["c"] ** 3, rtol=1e-6)
    with pytest.raises(ModelError, match="Cube"):
        make_session(result.model)
