"""The Python examples of docs/running.md run; those of other languages at least parse where a parser is at hand."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from postquant.runtime_ops import library
from postquant.runtime_ops.law_lut import pack_codes
from postquant.runtime_ops.ops import functions_for

PAGE = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "running.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The page's code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def write_model(path: pathlib.Path) -> None:
    """A model with the inputs that the page feeds, and one operator of ours."""
    codes = np.random.default_rng(0).integers(0, 16, (4, 27))
    constants = {
        "scale": np.float32(0.1),
        "zero": np.uint8(128),
        "codes": pack_codes(codes, 4),
        "table": np.arange(-64, 64, 8).astype(np.int8),
        "weight_scale": np.full(4, 0.01, np.float32),
        "bias": np.zeros(4, np.int32),
    }
    attributes: dict[str, Any] = {
        "bits": 4,
        "group": 1,
        "w_shape": [4, 3, 3, 3],
        "strides": [1, 1],
        "dilations": [1, 1],
        "pads": [1, 1, 1, 1],
    }
    inputs = ["x", "scale", "zero", "codes", "table", "weight_scale", "bias", "scale", "zero"]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["x"]),
            helper.make_node("LutQLinearConv", inputs, ["y"], domain="ai.postquant", **attributes),
            helper.make_node("DequantizeLinear", ["y", "scale", "zero"], ["logits"]),
        ],
        "page",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.postquant", 1)]
    functions = functions_for(["LutQLinearConv"], opset=17)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=imports, functions=functions), path)


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python(index: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = blocks("python")[index]
    if "library_path()" in example and library.library_path() is None:
        pytest.skip("postquant was installed without the native library")
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model.onnx")
    exec(compile(example, "running.md", "exec"), {"__name__": "example"})


def test_every_language_has_its_example() -> None:
    assert len(blocks("python")) == 3
    for language in ("cpp", "csharp", "java", "js"):
        (example,) = blocks(language)
        assert "model.onnx" in example


def test_javascript_parses(tmp_path: pathlib.Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    script = tmp_path / "example.js"
    script.write_text(blocks("js")[0], encoding="utf-8")
    result = subprocess.run([node, "--check", script], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
