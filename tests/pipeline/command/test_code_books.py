"""Weights of 4 and 2 bits through the real stages: what is chosen, packed, verified and read back."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

import postquant
from postquant.passes.emit import emit
from postquant.passes.plan import QuantPlan
from postquant.passes.target import WeightStorage, load_target
from postquant.pipeline.cli import app
from postquant.pipeline.config import Method, QuantConfig, Weights
from postquant.pipeline.demo import load_digits
from postquant.pipeline.load import load_model, save_model
from postquant.pipeline.methods import code_books
from postquant.pipeline.recover import recover_float_model
from postquant.pipeline.verify import verify_model
from postquant.runtime_ops.code_book import CodeBook
from postquant.runtime_ops.errors import ConfigError

PACKED = {"LutQLinearConv", "LutQLinearMatMul"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Model and data of the demo's network, as arguments."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    (folder / "digits.onnx").write_bytes(data.model)
    np.savez(folder / "calib.npz", image=data.calibration[:12])
    return [str(folder / "digits.onnx"), "--calib", str(folder / "calib.npz")]


def quantize(digits: list[str], out: pathlib.Path, *options: str) -> postquant.Report:
    result = CliRunner().invoke(app, ["quantize", *digits, "--out", str(out), "--quiet", *options])
    assert result.exit_code == 0, result.output
    return postquant.Report.load(out / "report.json")


@pytest.fixture(scope="module")
def auto(digits: list[str], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("auto") / "out"
    quantize(digits, out, "--wbits", "4")
    return out


def packed_nodes(out: pathlib.Path) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(out / "model.onnx").graph.node if node.op_type in PACKED]


def test_every_narrow_layer_is_packed_and_says_why(auto: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = postquant.Report.load(auto / "report.json")
    assert report.passed
    narrow = [layer for layer in report.layers if layer.wbits == 4]
    assert narrow
    assert {node.name for node in packed_nodes(auto)} == {layer.node for layer in narrow}
    for layer in narrow:
        assert layer.weights is not None
        measured = {name: layer.code_books[name] for name in ("int", "post", "lut")}
        assert measured[layer.weights] > max(measured.values()) - 0.1
        assert {f"{name} nearest" for name in measured} < set(layer.code_books)
    for layer in report.layers:
        assert layer.wbits == 4 or (layer.weights == "int" and not layer.code_books)
    capfd.readouterr()
    ort.InferenceSession(auto / "model.onnx")
    assert capfd.readouterr() == ("", ""), "onnxruntime has nothing to warn of"


def test_verify_inspect_and_compare_read_it(auto: pathlib.Path, digits: list[str]) -> None:
    model, _, data = digits
    for arguments in (
        ["verify", str(auto)],
        ["verify", str(auto), "--data", data],
        ["inspect", str(auto)],
        ["inspect", str(auto / "plan.safetensors")],
        ["compare", model, str(auto / "model.onnx"), "--data", data],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output


def test_a_changed_table_is_found(auto: pathlib.Path) -> None:
    proto, plan = onnx.load(auto / "model.onnx"), QuantPlan.load(auto / "plan.safetensors")
    before = recover_float_model(load_model(auto / "model.onnx"), plan)
    name = packed_nodes(auto)[0].input[4]
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    table = onnx.numpy_helper.to_array(tensor).copy()
    table[8] += 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(table, name))
    changed = auto.parent / "changed.onnx"
    onnx.save(proto, changed)
    samples = [{"image": load_digits().calibration[:1]}]
    result = verify_model(before, changed, plan, samples, strict=False)
    failed = {check.name for check in result.checks if not check.passed}
    assert {"the file holds the plan", "integers equal the simulation"} <= failed


def tiny() -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """Four convolutions, one of them depthwise, and samples."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]> net (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
          [first] a = Conv <pads = [1, 1, 1, 1]> (x, w1) r = Relu (a)
          [deep] b = Conv <pads = [1, 1, 1, 1], group = 8> (r, w2) s = Relu (b)
          [point] c = Conv (s, w3) t = Relu (c)
          [last] y = Conv (t, w4)
        }""")
    for name, shape in (("w1", (8, 3, 3, 3)), ("w2", (8, 1, 3, 3)), ("w3", (6, 8, 1, 1)), ("w4", (4, 6, 1, 1))):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        )
    return model, [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(6)]


@pytest.mark.parametrize("book", ["int", "post", "lut"])
@pytest.mark.parametrize("bits", [4, 2])
def test_a_wanted_book_is_taken(tmp_path: pathlib.Path, book: str, bits: int) -> None:
    model, feeds = tiny()
    config = QuantConfig(wbits=bits, weights=Weights(book), threads=1)
    report = postquant.quantize(model, feeds, config, out=tmp_path / "out").report
    assert {layer.node: layer.weights for layer in report.layers if layer.wbits == bits} == {
        "deep": book,
        "point": book,
    }
    nodes = packed_nodes(tmp_path / "out")
    assert {attribute.i for node in nodes for attribute in node.attribute if attribute.name == "bits"} == {bits}


def test_int8_storage_computes_the_same(auto: pathlib.Path, tmp_path: pathlib.Path) -> None:
    plan, model = QuantPlan.load(auto / "plan.safetensors"), load_model(auto / "model.onnx")
    plain = emit(recover_float_model(model, plan), plan)
    save_model(plain, tmp_path / "plain.onnx")
    assert not {node.op_type for node in plain.graph} & PACKED
    assert (tmp_path / "plain.onnx").stat().st_size > (auto / "model.onnx").stat().st_size
    image = {"image": load_digits().calibration[:3]}
    files = (auto / "model.onnx", tmp_path / "plain.onnx")
    one, two = (ort.InferenceSession(file).run(None, image) for file in files)
    for left, right in zip(one, two, strict=True):
        np.testing.assert_array_equal(left, right)


def test_depthwise_bits() -> None:
    model, feeds = tiny()
    result = postquant.quantize(model, feeds, QuantConfig(wbits=4, depthwise_bits=8, threads=1))
    assert {layer.node: layer.wbits for layer in result.report.layers} == {"first": 8, "deep": 8, "point": 4, "last": 8}
    assert any("depthwise" in note for note in result.report.notes)


@pytest.mark.parametrize("book", ["post", "lut"])
def test_books_need_easyquant(book: str) -> None:
    with pytest.raises(ConfigError, match="EasyQuant only"):
        QuantConfig(wbits=4, weights=Weights(book), method=Method.MINMAX)


def test_what_storage_and_target_allow() -> None:
    plain, narrow = load_target("onnxruntime"), load_target("onnxruntime-avx2")
    assert code_books(QuantConfig(), plain).allowed == frozenset(CodeBook)
    assert code_books(QuantConfig(weight_storage=WeightStorage.INT4), plain).allowed == {CodeBook.UNIFORM}
    assert code_books(QuantConfig(weights=Weights.LUT), narrow).largest == 63
    assert not code_books(QuantConfig(), narrow).allow(CodeBook.POST, 4)
    for config, target, said in (
        (QuantConfig(weights=Weights.LUT, weight_storage=WeightStorage.INT4), plain, "INT4"),
        (QuantConfig(weights=Weights.POST), narrow, "largest level is 63"),
    ):
        with pytest.raises(ConfigError, match=said):
            code_books(config, target)
