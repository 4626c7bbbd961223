"""Layers of few bits whose output stays in float, through the real stages: packed, verified, read back, exact POST."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

import postquant
from postquant.passes.target import WeightStorage, load_target
from postquant.pipeline.cli import app
from postquant.pipeline.config import QuantConfig, Weights
from postquant.pipeline.methods import code_books
from postquant.runtime_ops.errors import ConfigError

FLOAT = "LutMatMulIntegerToFloat"


def block(rng: np.random.Generator) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """Products in front of a Softmax, a residual sum with a LayerNormalization, and the end; and samples."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]> net (float[N, 5, 16] x) => (float[N, 5, 6] y) {
          [first] a = MatMul (x, w1) [first_bias] b = Add (a, b1)
          [scores] c = MatMul (b, w2) [scores_bias] d = Add (c, b2) [soft] e = Softmax (d)
          [back] f = MatMul (e, w3) [sum] g = Add (f, b) [norm] h = LayerNormalization (g, s4)
          [last] y = MatMul (h, w4)
        }""")
    shapes = {"w1": (16, 12), "b1": (12,), "w2": (12, 20), "b2": (20,), "w3": (20, 12), "s4": (12,), "w4": (12, 6)}
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model, [{"x": rng.standard_normal((1, 5, 16)).astype(np.float32)} for _ in range(12)]


def quantized(tmp_path: pathlib.Path, config: QuantConfig) -> tuple[postquant.Report, pathlib.Path]:
    model, feeds = block(np.random.default_rng(4))
    np.savez(tmp_path / "data.npz", x=np.concatenate([feed["x"] for feed in feeds]))
    out = tmp_path / "out"
    report = postquant.quantize(model, feeds, config, out=out).report
    assert report.passed
    return report, out


def verified(tmp_path: pathlib.Path, out: pathlib.Path) -> None:
    """The folder verifies without the float model, and can be inspected."""
    for arguments in (["verify", str(out)], ["verify", str(out), "--data", str(tmp_path / "data.npz")]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, ["inspect", str(out)]).exit_code == 0


def packed(out: pathlib.Path) -> dict[str, str]:
    nodes = onnx.load(out / "model.onnx").graph.node
    return {node.name: node.op_type for node in nodes if node.domain == "ai.postquant"}


def test_float_outputs_are_packed(tmp_path: pathlib.Path) -> None:
    report, out = quantized(tmp_path, QuantConfig(wbits=4, first_last_bits=None))
    operators = packed(out)
    assert {operators[name] for name in ("scores", "back", "last")} == {FLOAT}
    assert set(operators) == {layer.node for layer in report.layers if layer.wbits == 4}
    assert not any("stored as int8" in note for note in report.notes)
    verified(tmp_path, out)
    feed = {"x": np.load(tmp_path / "data.npz")["x"][:3]}
    stock = ort.InferenceSession(out / "model.onnx").run(None, feed)[0]
    found = postquant.session(out / "model.onnx").run(None, feed)[0]
    np.testing.assert_allclose(found, stock, rtol=0, atol=1e-5 * np.abs(stock).max())


def test_exact_post(tmp_path: pathlib.Path) -> None:
    config = QuantConfig(wbits=4, first_last_bits=None, weights=Weights.POST, post_exact=True)
    report, out = quantized(tmp_path, config)
    assert "post_exact: 4 matrix products have exact powers of sqrt(2)" in report.notes
    assert list(packed(out).values()) == [FLOAT] * 8
    verified(tmp_path, out)


def test_what_exact_post_needs() -> None:
    with pytest.raises(ConfigError, match="no POST weights"):
        QuantConfig(wbits=4, weights=Weights.LUT, post_exact=True)
    config = QuantConfig(wbits=4, post_exact=True, weight_storage=WeightStorage.INT8)
    with pytest.raises(ConfigError, match="packed"):
        code_books(config, load_target("onnxruntime"))
