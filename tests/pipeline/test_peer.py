"""onnxruntime's own quantizer beside a result: the right numbers, in every form of the report, and no error of ours."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from typer.testing import CliRunner

from postquant.calib.input_spec import input_specs
from postquant.calib.open_source import open_source
from postquant.pipeline.cli import app
from postquant.pipeline.html.folder import folder_page
from postquant.pipeline.load import load_model
from postquant.pipeline.ort_quantizer import quantize_with_onnxruntime
from postquant.pipeline.peer import measure_peer
from postquant.pipeline.report import Report


@pytest.fixture(scope="module")
def network(cnn: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The small network and its samples as files."""
    folder = tmp_path_factory.mktemp("network")
    ir.save(cnn.model, folder / "net.onnx")
    np.savez(folder / "calib.npz", image=np.concatenate([feed["image"] for feed in cnn.samples]))
    return folder


def outputs_of(path: pathlib.Path, samples: list[dict[str, Any]]) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([np.asarray(session.run(None, feed)[0]) for feed in samples]).astype(np.float64)


def test_numbers(network: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = network / "net.onnx"
    source = open_source(network / "calib.npz", input_specs(load_model(model)))
    samples: list[dict[str, Any]] = [dict(sample) for sample in source]
    found = measure_peer(model, source, samples, wbits=4, abits=8)
    assert (found.wbits, found.abits, found.failure) == (4, 8, "")
    quantize_with_onnxruntime(model, tmp_path / "peer.onnx", samples, wbits=4, abits=8)
    assert found.size == (tmp_path / "peer.onnx").stat().st_size
    wanted, got = outputs_of(model, samples), outputs_of(tmp_path / "peer.onnx", samples)
    (output,) = found.outputs
    assert output.sqnr_db == pytest.approx(10 * np.log10(np.square(wanted).sum() / np.square(got - wanted).sum()), 1e-6)
    assert output.agreement == np.mean(got.argmax(1) == wanted.argmax(1))
    assert output.max_abs_error == pytest.approx(np.abs(got - wanted).max(), 1e-6)


def test_it_is_in_the_table_the_report_and_the_page(network: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(network / "net.onnx"), "--calib", str(network / "calib.npz"), "--out", str(out)]
    arguments += ["--method", "minmax", "--no-bundle", "--compare-onnxruntime"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    peer = Report.load(out / "report.json").peer
    assert peer is not None
    (output,) = peer.outputs
    assert output.sqnr_db > 15
    name = f"onnxruntime {onnxruntime.__version__}, min-max"
    assert f"{name} (W8A8): output logits: SQNR {output.sqnr_db:.1f} dB, agreement" in done.output
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count(f'<th scope="row">{name}</th>') == 1
    assert f"{output.sqnr_db:.1f}" in page
    data = json.loads((out / "report.json").read_bytes())
    data["peer"] |= {"failure": "it has <no> idea", "outputs": []}
    (out / "report.json").write_text(json.dumps(data))
    assert "could not quantize this model: it has &lt;no&gt; idea" in folder_page(out).decode()
    del data["peer"]  # a report of an older version
    (out / "report.json").write_text(json.dumps(data))
    assert Report.load(out / "report.json").peer is None


def test_a_model_that_it_cannot_quantize_is_a_line_of_the_report(
    network: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = onnx.load(network / "net.onnx")
    model.graph.node[0].op_type, model.graph.node[0].domain = "Unheard", "of"
    model.opset_import.append(onnx.helper.make_opsetid("of", 1))
    onnx.save(model, tmp_path / "odd.onnx")
    source = open_source(network / "calib.npz", input_specs(load_model(network / "net.onnx")))
    found = measure_peer(pathlib.Path("odd.onnx"), source, [], wbits=8, abits=8)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.onnx"], "onnxruntime left a file behind"
    assert found.failure
    assert "\n" not in found.failure
    assert (found.size, found.outputs) == (0, ())
