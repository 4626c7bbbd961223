"""The native library: found, loaded by onnxruntime, its entry point clean under sanitizers."""

import os
import pathlib
import shutil
import subprocess

import numpy as np
import onnx.parser
import onnxruntime
import pytest

from postquant.runtime_ops import library

CSRC = pathlib.Path(__file__).resolve().parents[2] / "runtime_ops" / "csrc"

# An operator of our domain that the library does not implement, with its definition.
MODEL = """
<ir_version: 8, opset_import: ["" : 17, "ai.postquant" : 1]>
agraph (float[N] x) => (float[N] y)
{
   y = ai.postquant.Twice(x)
}
<domain: "ai.postquant", opset_import: ["" : 17]>
Twice (a) => (b)
{
   b = Add(a, a)
}
"""


@pytest.fixture
def built_library() -> pathlib.Path:
    path = library.library_path()
    if path is None:
        reason = "postquant was installed without the native library"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def test_path_is_a_file_with_the_documented_name(built_library: pathlib.Path) -> None:
    assert built_library.is_absolute()
    assert built_library.name == library.FILE_NAME


def test_exports_the_entry_points_only(built_library: pathlib.Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    listing = subprocess.run(
        [nm, "--dynamic", "--defined-only", str(built_library)], check=True, capture_output=True, text=True
    )
    names = sorted(line.split()[-1] for line in listing.stdout.splitlines())
    assert names == ["RegisterCustomOps", "postquant_simulate_levels", "postquant_simulate_levels_back"]


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_function_body_runs_with_the_library_registered(built_library: pathlib.Path, level: str) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    assert library.register(options)
    model = onnx.parser.parse_model(MODEL).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x + x)


def test_one_process_registers_any_number_of_times(built_library: pathlib.Path) -> None:
    model = onnx.parser.parse_model(MODEL).SerializeToString()
    sessions = []
    for _ in range(3):
        options = onnxruntime.SessionOptions()
        assert library.register(options)
        sessions.append(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]))
    x = np.array([1.5], np.float32)
    assert [session.run(None, {"x": x})[0].tolist() for session in sessions] == [[3.0]] * 3


def test_nothing_is_registered_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Options:
        def register_custom_ops_library(self, path: str) -> None:
            raise AssertionError(f"registered {path}")

    monkeypatch.setattr(library, "FILE_NAME", "libpostquant_absent.so")
    assert library.library_path() is None
    assert not library.register(Options())


def test_entry_point_is_clean_under_sanitizers(tmp_path: pathlib.Path) -> None:
    """A small driver plays onnxruntime: old version, failing calls, two sessions (register_driver.cc)."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = tmp_path / "driver"
    flags = ["-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [str(CSRC / "register.cc"), str(pathlib.Path(__file__).parent / "register_driver.cc")]
    build = subprocess.run(
        [compiler, *flags, f"-I{CSRC}", *sources, "-o", str(program)], check=False, capture_output=True, text=True
    )
    if "cannot find" in build.stderr and "asan" in build.stderr:
        pytest.skip("g++ has no sanitizer runtime")
    assert build.returncode == 0, build.stderr
    run = subprocess.run([str(program)], check=False, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "ok\n"), run.stderr
