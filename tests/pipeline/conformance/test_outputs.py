"""What a receiver may write down, and what comes out of the comparison."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

from postquant.pipeline.cli import app
from postquant.pipeline.conformance.arrays import read_array, read_arrays, write_arrays
from postquant.pipeline.conformance.compare import compare_onnxruntime, compare_outputs
from postquant.pipeline.conformance.expected import Conformance, ExpectedSample
from postquant.pipeline.conformance.render import json_values, to_html, to_junit
from postquant.pipeline.conformance.result import Status
from postquant.runtime_ops.errors import ModelError

Codes = dict[str, npt.NDArray[Any]]


@pytest.fixture
def codes(cnn_bundle: Any) -> Codes:
    """The expected codes of the first sample by their names."""
    sample = ExpectedSample.load(cnn_bundle.folder / "conformance", 0)
    return {tensor.codes: sample.codes[tensor.key] for tensor in cnn_bundle.expected.tensors}


def _statuses(cnn_bundle: Any, folder: pathlib.Path) -> dict[str, Status]:
    return {tensor.tensor.codes: tensor.status for tensor in compare_outputs(cnn_bundle.folder, folder).tensors}


def test_every_way_to_write_arrays(cnn_bundle: Any, codes: Codes, tmp_path: pathlib.Path) -> None:
    by_codes = {tensor.codes: tensor for tensor in cnn_bundle.expected.tensors}
    names = list(codes)
    raw: dict[str, str] = {}
    for number, name in enumerate(names):
        array, tensor = codes[name], by_codes[name]
        real = ((array.astype(np.int32) - tensor.zero_point) * np.float32(tensor.scale)).astype(np.float32)
        way = number % 7
        if way == 0:
            np.save(tmp_path / f"{name}.npy", array)
        elif way == 1:
            np.save(tmp_path / f"{tensor.key}.npy", array.astype(np.int32))
        elif way == 2:
            np.save(tmp_path / f"{tensor.name}.npy", real)
        elif way == 3:
            array.tofile(tmp_path / f"{name}.raw")
        elif way == 4:
            real.tofile(tmp_path / f"{number}.bin")
            raw[f"{number}.bin"] = name
        elif way == 5 and array.ndim == 4:
            np.save(tmp_path / f"{name}.npy", array.transpose(0, 2, 3, 1))
        else:
            write_arrays(tmp_path / f"{number}.npz", {name: array.reshape(-1)})
    (tmp_path / "names.json").write_text(json.dumps(raw))
    np.save(tmp_path / "something_else.npy", np.zeros(3))
    result = compare_outputs(cnn_bundle.folder, tmp_path)
    assert result.passed, result.summary
    assert {tensor.status for tensor in result.tensors} == {Status.EQUAL}
    assert result.unknown == ("something_else",)
    assert "channels last" in {tensor.layout for tensor in result.tensors}


def test_flat_arrays_with_channels_last(cnn_bundle: Any, codes: Codes, tmp_path: pathlib.Path) -> None:
    for name, array in codes.items():
        order = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
        np.ascontiguousarray(order).tofile(tmp_path / f"{name}.raw")
    assert compare_outputs(cnn_bundle.folder, tmp_path).passed


def test_some_tensors_only(cnn_bundle: Any, codes: Codes, tmp_path: pathlib.Path) -> None:
    """Without the codes in front of it, a tensor is compared with the expected ones."""
    np.save(tmp_path / "sum_quantized.npy", codes["sum_quantized"])
    assert _statuses(cnn_bundle, tmp_path)["sum_quantized"] is Status.EQUAL
    wrong = codes["sum_quantized"].copy()
    wrong.flat[:3] ^= 1
    np.save(tmp_path / "sum_quantized.npy", wrong)
    assert _statuses(cnn_bundle, tmp_path)["sum_quantized"] is Status.TIES
    np.save(tmp_path / "sum_quantized.npy", codes["sum_quantized"] // 2)
    assert _statuses(cnn_bundle, tmp_path)["sum_quantized"] is Status.DEPARTS


def test_arrays_that_do_not_fit(cnn_bundle: Any, codes: Codes, tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "image_quantized.npy", codes["image_quantized"])
    np.save(tmp_path / "r1_quantized.npy", codes["r1_quantized"][:, 1:])
    np.save(tmp_path / "r2_quantized.npy", codes["r2_quantized"].astype(np.float32) * 0.123)
    np.save(tmp_path / "sum_quantized.npy", np.full(codes["sum_quantized"].shape, np.nan, np.float32))
    (tmp_path / "m1_quantized.raw").write_bytes(b"123")
    result = compare_outputs(cnn_bundle.folder, tmp_path)
    found = {tensor.tensor.codes: tensor for tensor in result.tensors}
    assert found["r1_quantized"].status is Status.UNREADABLE
    assert found["r2_quantized"].status is Status.OFF_GRID
    assert "away from the grid of scale" in found["r2_quantized"].text
    assert "not finite" in found["sum_quantized"].text
    assert "3 bytes, expected" in found["m1_quantized"].text
    assert not result.passed
    assert result.first is found["r1_quantized"]


def test_outputs_of_the_model(cnn_bundle: Any, tmp_path: pathlib.Path) -> None:
    sample = ExpectedSample.load(cnn_bundle.folder / "conformance", 0)
    (output,) = cnn_bundle.expected.outputs
    np.save(tmp_path / "logits.npy", sample.outputs["logits"] + 0.5 * output.tolerance)
    assert compare_outputs(cnn_bundle.folder, tmp_path).passed
    for wrong in (sample.outputs["logits"] + 2 * output.tolerance, np.full((1, 10), np.nan), np.zeros(3)):
        np.save(tmp_path / "logits.npy", wrong)
        result = compare_outputs(cnn_bundle.folder, tmp_path)
        assert not result.passed
        assert "output logits" in result.summary
        json.dumps(json_values(result), allow_nan=False)


def test_nothing_that_is_known(cnn_bundle: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        compare_outputs(cnn_bundle.folder, tmp_path / "absent")
    with pytest.raises(ModelError, match=r"nothing in the folder.*no array files"):
        compare_outputs(cnn_bundle.folder, tmp_path)
    np.save(tmp_path / "other.npy", np.zeros(3))
    with pytest.raises(ModelError, match=r"nothing in the folder.*t0000_image_quantized.npy.*other"):
        compare_outputs(cnn_bundle.folder, tmp_path)
    (tmp_path / "names.json").write_text("[]")
    with pytest.raises(ModelError, match="the file of names is damaged"):
        compare_outputs(cnn_bundle.folder, tmp_path)


def test_damaged_arrays(tmp_path: pathlib.Path) -> None:
    write_arrays(tmp_path / "a.npz", {"file": np.arange(5), "/b": np.zeros((2, 3), np.float32)})
    assert set(read_arrays(tmp_path / "a.npz")) == {"file", "/b"}
    content = (tmp_path / "a.npz").read_bytes()
    for number in range(0, len(content), 7):
        (tmp_path / "b.npz").write_bytes(content[:number])
        with pytest.raises(ModelError, match="array file is damaged"):
            read_arrays(tmp_path / "b.npz")
    np.save(tmp_path / "o.npy", np.asarray([{}]), allow_pickle=True)
    with pytest.raises(ModelError, match="expected numbers"):
        read_array(tmp_path / "o.npy")
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999,), }".ljust(
        117
    )
    (tmp_path / "h.npy").write_bytes(header + b"\n")
    with pytest.raises(ModelError, match="expected at most"):
        read_array(tmp_path / "h.npy")


def test_a_newer_index(cnn_bundle: Any, tmp_path: pathlib.Path) -> None:
    folder = shutil.copytree(cnn_bundle.folder / "conformance", tmp_path / "conformance")
    index = json.loads((folder / "index.json").read_bytes())
    assert Conformance.load(folder) == cnn_bundle.expected
    (folder / "index.json").write_text(json.dumps({**index, "schema_version": 2}))
    with pytest.raises(ModelError, match=r"another format.*found 2"):
        Conformance.load(folder)
    (folder / "index.json").write_text(json.dumps({**index, "tensors": [{}]}))
    with pytest.raises(ModelError, match="index is damaged"):
        Conformance.load(folder)


def test_onnxruntime_itself_conforms(cnn_bundle: Any, tie_bundle: Any) -> None:
    for bundle in (cnn_bundle, tie_bundle):
        result = compare_onnxruntime(bundle.folder)
        assert result.passed
        assert all(tensor.status is Status.EQUAL for tensor in result.tensors)


def test_the_formats(cnn_bundle: Any, receivers: Any, tmp_path: pathlib.Path) -> None:
    fault = receivers.Fault.PER_TENSOR
    receivers.dump(cnn_bundle.folder / "model.qdq.onnx", fault, cnn_bundle.samples, cnn_bundle.codes[:5], tmp_path)
    result = compare_outputs(cnn_bundle.folder, tmp_path)
    values = json_values(result)
    assert values["rule"] == "per_tensor"
    assert values["first_departure"]["tensor"] == "r1_quantized"
    suite = ElementTree.fromstring(to_junit(result))
    assert int(suite.attrib["tests"]) == len(suite.findall("testcase"))
    assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure")) > 0
    assert int(suite.attrib["skipped"]) == len(suite.findall("testcase/skipped")) > 0
    page = to_html(result)
    assert "per-tensor instead of per-channel" in page
    assert "http" not in page


def test_the_command(made: pathlib.Path, receivers: Any, tmp_path: pathlib.Path) -> None:
    expected = Conformance.load(made / "conformance")
    samples = [ExpectedSample.load(made / "conformance", index).inputs for index in range(expected.samples)]
    names = [tensor.codes for tensor in expected.tensors]
    runner = CliRunner()
    for fault, code in ((None, 0), (receivers.Fault.TRUNCATION, 3)):
        place = tmp_path / str(code)
        receivers.dump(made / "model.qdq.onnx", fault, samples, names, place)
        files = ["--junit", str(tmp_path / "c.xml"), "--html", str(tmp_path / "c.html")]
        done = runner.invoke(app, ["conformance", str(made), "--outputs", str(place), *files])
        assert done.exit_code == code, done.output
        assert ("truncation" in done.stderr) == (code == 3)
        ElementTree.parse(tmp_path / "c.xml")
        listed = runner.invoke(app, ["conformance", str(made), "--outputs", str(place), "--json"])
        assert json.loads(listed.stdout)["passed"] == (code == 0)
    assert runner.invoke(app, ["conformance", str(made), "--outputs", str(tmp_path / "absent")]).exit_code == 2
