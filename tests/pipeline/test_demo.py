"""The embedded demo: honest data, a trained model, and a table that says what was measured."""

import importlib.resources
import io
import json
import pathlib

import numpy as np
import onnx
import pytest
import sklearn.datasets
from rich.console import Console

from postquant.pipeline.demo import load_digits, run_demo
from postquant.pipeline.demo.measure import logits, measure
from postquant.pipeline.ort_quantizer import OFFERED, PeerMethod, quantize_with_onnxruntime

FOLDER = importlib.resources.files("postquant.pipeline.demo")


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "digits.onnx"
    path.write_bytes(load_digits().model)
    return path


def test_data_are_the_published_scans_and_disjoint() -> None:
    published = sklearn.datasets.load_digits()
    with FOLDER.joinpath("digits.npz").open("rb") as file:
        arrays = dict(np.load(file))
    for part, count in (("calibration", 256), ("test", 900)):
        index = arrays[f"{part}_index"]
        assert len(np.unique(index)) == count
        np.testing.assert_array_equal(arrays[f"{part}_x"][:, 0], published.images[index])
        np.testing.assert_array_equal(arrays[f"{part}_y"], published.target[index])
    assert not set(arrays["calibration_index"]) & set(arrays["test_index"])


def test_model_is_small_and_has_what_makes_quantization_interesting() -> None:
    digits = load_digits()
    assert len(digits.model) < 500_000
    proto = onnx.load_from_string(digits.model)
    onnx.checker.check_model(proto, full_check=True)
    nodes = proto.graph.node
    groups = [a.i for n in nodes if n.op_type == "Conv" for a in n.attribute if a.name == "group"]
    assert max(groups) > 1, "depthwise convolutions"
    assert {"Add", "BatchNormalization", "Clip", "Relu"} <= {node.op_type for node in nodes}
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_float_accuracy_is_the_documented_one(model: pathlib.Path) -> None:
    digits = load_digits()
    reference = logits(model, digits.test)
    row = measure(model, digits, reference, bits="float", quantizer="-")
    assert row.accuracy is not None
    assert row.accuracy == pytest.approx(0.9789, abs=0.0012)  # one image may tie on another processor
    assert (row.agreement, row.sqnr_db) == (1.0, None)


@pytest.mark.parametrize("method", PeerMethod)
@pytest.mark.parametrize(("wbits", "abits"), OFFERED)
def test_peer_quantizes_silently(
    model: pathlib.Path, capfd: pytest.CaptureFixture[str], method: PeerMethod, wbits: int, abits: int
) -> None:
    digits = load_digits()
    result = model.with_name("peer.onnx")
    feeds = [{"image": image[np.newaxis]} for image in digits.calibration[:64]]
    quantize_with_onnxruntime(model, result, feeds, wbits=wbits, abits=abits, method=method)
    row = measure(result, digits, logits(model, digits.test), bits="", quantizer="")
    assert row.accuracy is not None
    assert row.accuracy > (0.97 if wbits == 8 else 0.7)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_demo_prints_one_table_and_writes_it(tmp_path: pathlib.Path) -> None:
    output = io.StringIO()
    assert run_demo(tmp_path / "out", Console(file=output, width=120)) == 0
    out = tmp_path / "out"
    document = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    assert document["schema_version"] == 1
    rows = {(row["bits"], row["quantizer"]): row for row in document["rows"]}
    assert {bits for bits, _ in rows} == {"float", "8/8", "7/7", "4/8", "4/4"}
    assert rows["7/7", "onnxruntime, min-max"]["accuracy"] is None
    assert rows["8/8", "postquant"]["agreement"] >= 0.995
    for bits in ("8/8", "4/8", "4/4"):
        assert rows[bits, "postquant"]["accuracy"] >= rows[bits, "onnxruntime, min-max"]["accuracy"] - 2 / 900
    report = (out / "report.md").read_text(encoding="utf-8")
    for text in (output.getvalue(), report):
        assert "not offered" in text
        assert f"{rows['4/4', 'postquant']['accuracy']:.4f}" in text
    assert (out / "w4a8" / "model.onnx").is_file()
