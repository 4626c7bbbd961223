"""Comparison of a float and a quantized model, ours and onnxruntime's own."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime import quantization
from rich.console import Console

from postquant.pipeline import chunks
from postquant.pipeline.api import quantize
from postquant.pipeline.compare import compare_models, worst_layers
from postquant.pipeline.config import Method, QuantConfig
from postquant.pipeline.save import save_model
from postquant.pipeline.tables import print_comparison
from postquant.runtime_ops.errors import CalibrationError, ModelError


@pytest.fixture
def files(cnn: Any, tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    paths = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    save_model(cnn.model, paths[0])
    save_model(cnn.emitted, paths[1])
    return paths


def test_our_own_model(cnn: Any, files: tuple[pathlib.Path, pathlib.Path]) -> None:
    result = compare_models(*files, cnn.samples)
    names = [layer.name for layer in result.layers]
    assert names[0] == "image"
    assert {"r1", "r2", "c3", "sum", "l4", "s1", "cat", "p1"} <= set(names)
    assert all(layer.quantized for layer in result.layers)
    assert result.unmatched == ()
    assert result.samples == 3
    assert result.outputs[0].name == "logits"
    assert result.outputs[0].sqnr_db > 20
    assert min(layer.sqnr_db for layer in result.layers) > 15
    assert worst_layers(result, 1)[0].sqnr_db == min(layer.sqnr_db for layer in result.layers)
    json.dumps(result.to_json(), allow_nan=False)


def test_chunks_change_nothing(
    cnn: Any, files: tuple[pathlib.Path, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare_models(*files, cnn.samples)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 20_000)
    parts = compare_models(*files, cnn.samples)
    assert [layer.name for layer in parts.layers] == [layer.name for layer in whole.layers]
    # The float model is cut elsewhere, so onnxruntime may fuse, and thus round, another way.
    measured = [[entry.sqnr_db for entry in c.layers] + [c.outputs[0].sqnr_db] for c in (parts, whole)]
    assert measured[0] == pytest.approx(measured[1], abs=1e-3)


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, samples: Any) -> None:
        self._samples = iter(samples)

    def get_next(self) -> Any:
        return next(self._samples, None)


def test_onnxruntimes_own_quantizer(cnn: Any, files: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path) -> None:
    theirs = tmp_path / "theirs.onnx"
    quantization.quantize_static(
        files[0], theirs, Reader(cnn.samples), weight_type=quantization.QuantType.QInt8, per_channel=True
    )
    result = compare_models(files[0], theirs, cnn.samples)
    assert {"image", "r1", "sum", "cat"} <= {layer.name for layer in result.layers}
    assert result.unmatched == ()
    assert result.outputs[0].sqnr_db > 10


def test_two_float_models_are_equal(cnn: Any, files: tuple[pathlib.Path, pathlib.Path]) -> None:
    result = compare_models(files[0], files[0], cnn.samples)
    assert result.outputs[0].sqnr_db == 200
    assert result.outputs[0].max_abs_error == 0
    assert not any(layer.quantized for layer in result.layers)


def test_models_that_do_not_belong_together(
    cases: Any, cnn: Any, files: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    other = cases.build(
        """<ir_version: 8, opset_import: ["" : 17]>
        m (float[N,3,8,8] x) => (float[N,8,8,8] y, float[N,8,8,8] z) <float[8,3,1,1] w, float[8] b> {
            [only] y = Conv (x, w, b)
            [more] z = Relu (y)
        }"""
    )
    path = tmp_path / "other.onnx"
    save_model(other.emitted, path)
    with pytest.raises(ModelError, match="different inputs"):
        compare_models(files[0], path, cnn.samples)
    with pytest.raises(CalibrationError, match="no sample"):
        compare_models(*files, [])


def test_the_table(cnn: Any, files: tuple[pathlib.Path, pathlib.Path]) -> None:
    console = Console(width=100)
    with console.capture() as captured:
        print_comparison(compare_models(*files, cnn.samples), console)
    text = captured.get()
    assert "logits" in text
    assert "codes" in text
    assert "3 samples" in text


def test_shapes_that_differ_are_said(cnn: Any, files: tuple[pathlib.Path, pathlib.Path]) -> None:
    batch = [{"image": np.zeros((n, 3, 16, 16), np.float32)} for n in (1, 4)]
    assert compare_models(*files, batch).notes == ()


def test_factors_of_channels_are_said(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,3,8,8] x) => (float[N,8,8,8] y) <float[8,3,1,1] w, float[8,1,3,3] d, float[8,8,1,1] p> {
            [first] a = Conv (x, w)
            b = Relu (a)
            [depthwise] c = Conv <group = 8, pads = [1, 1, 1, 1]> (b, d)
            r = Relu (c)
            [last] y = Conv (r, p)
        }"""
    )
    spread = np.logspace(-2, 1, 8)[:, None, None, None]
    arrays = {"w": (8, 3, 1, 1), "d": (8, 1, 3, 3), "p": (8, 8, 1, 1)}
    weights = {name: rng.normal(size=shape) for name, shape in arrays.items()}
    weights["w"] *= spread
    weights["p"] /= spread[:, 0][None]
    model.graph.initializer.extend(numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items())
    onnx.save(model, tmp_path / "net.onnx")
    samples = [{"x": rng.random((1, 3, 8, 8), np.float32)} for _ in range(4)]
    quantize(tmp_path / "net.onnx", samples, QuantConfig(method=Method.MINMAX, equalize=True), out=tmp_path / "out")
    quantized, scaled = tmp_path / "out" / "model.onnx", tmp_path / "out" / "encodings" / "model.float.onnx"
    result = compare_models(tmp_path / "net.onnx", quantized, samples)
    assert len(result.notes) == 1
    assert "equalize depthwise inputs" in result.notes[0]
    assert str(scaled) in result.notes[0]
    alike = compare_models(scaled, quantized, samples)
    assert alike.notes == ()
    # What the note is about: errors are small, factors are not.
    assert min(layer.sqnr_db for layer in result.layers) < 10 < 15 < min(layer.sqnr_db for layer in alike.layers)
