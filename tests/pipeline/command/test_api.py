"""postquant.quantize: every form of model and data, published whole, kept aside when it fails."""

from __future__ import annotations

import errno
import gc
import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import postquant
from postquant.pipeline import api
from postquant.pipeline.output import WORK_DIRECTORY
from postquant.runtime_ops.errors import ConfigError, ModelError, OutputError, VerificationError

RESULT = ("model.onnx", "plan.safetensors", "report.json", "report.html", "statistics.json")
BUNDLE = ("manifest.json", "model.qdq.onnx", "quant.toml", "README.md", "encodings", "conformance")


pytestmark = pytest.mark.usefixtures("quick_stages")


class Reader:
    """An onnxruntime calibration data reader."""

    def __init__(self, feeds: list[dict[str, npt.NDArray[np.float32]]]) -> None:
        self._feeds: Iterator[dict[str, npt.NDArray[np.float32]]] = iter(feeds)

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        return next(self._feeds, None)


def test_the_folder_holds_a_whole_result(network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = postquant.quantize(network, samples, out=tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == sorted((*RESULT, *BUNDLE, "run.json"))
    for name, digest in result.report.files.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert set(result.report.files) == set(RESULT) - {"report.json"}
    assert result.report.size_after == (out / "model.onnx").stat().st_size
    assert result.report.size_before == network.stat().st_size
    assert result.report.samples == 6
    assert result.report == postquant.Report.load(out / "report.json")
    session = ort.InferenceSession(out / "model.onnx")
    assert session.run(None, {"x": np.zeros((2, 2, 4, 4), np.float32)})[0].shape == (2, 3)
    assert any(node.op_type == "QuantizeLinear" for node in result.model.graph)


def test_runs_are_equal_to_the_byte(network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path) -> None:
    one = postquant.quantize(network, samples, postquant.QuantConfig(threads=1), out=tmp_path / "one")
    two = postquant.quantize(network, samples, postquant.QuantConfig(threads=2))
    two.save(tmp_path / "two")
    for name in RESULT:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert one.report == two.report


def test_every_form_of_model(network: pathlib.Path, samples: pathlib.Path) -> None:
    proto = onnx.load(network)
    in_memory = ir.load(network)
    before = proto.SerializeToString(), [n.op_type for n in in_memory.graph]
    plans = [
        postquant.quantize(form, samples).plan.weights["w1"]
        for form in (network, str(network), network.read_bytes(), proto, in_memory)
    ]
    for plan in plans[1:]:
        np.testing.assert_array_equal(plan.scale, plans[0].scale)  # type: ignore[union-attr]
    assert before == (proto.SerializeToString(), [n.op_type for n in in_memory.graph])


def test_every_form_of_data(network: pathlib.Path, samples: pathlib.Path) -> None:
    array = np.load(samples)["x"]
    feeds = [{"x": array[i : i + 1]} for i in range(len(array))]
    digests = {
        postquant.quantize(network, data).report.data_sha256
        for data in (samples, array, {"x": array}, feeds, iter(feeds), Reader(feeds))
    }
    assert len(digests) == 1


def test_a_limited_number_of_samples(network: pathlib.Path, samples: pathlib.Path) -> None:
    few = postquant.quantize(network, samples, postquant.QuantConfig(samples=3)).report
    other = postquant.quantize(network, samples, postquant.QuantConfig(samples=3, seed=5)).report
    assert (few.samples, other.samples) == (3, 3)
    assert few.data_sha256 != other.data_sha256
    assert postquant.quantize(network, samples, postquant.QuantConfig(samples=100)).report.samples == 6


def test_ranges_of_the_inputs_are_recorded(network: pathlib.Path, samples: pathlib.Path) -> None:
    (x,) = postquant.quantize(network, samples).report.inputs
    array = np.load(samples)["x"]
    assert (x.name, x.dtype, x.shape, x.sample_shape) == ("x", "float32", (None, 2, 4, 4), (1, 2, 4, 4))
    assert x.low == pytest.approx(array.min(), rel=1e-5)
    assert x.high == pytest.approx(array.max(), rel=1e-5)


def test_a_temporary_result_goes_with_its_object(network: pathlib.Path, samples: pathlib.Path) -> None:
    result = postquant.quantize(network, samples)
    folder = result.folder
    assert (folder / "model.onnx").exists()
    del result
    gc.collect()
    assert not folder.exists()


def test_a_failed_verification_is_kept_aside(
    network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    postquant.quantize(network, samples, out=out)
    good = (out / "report.json").read_bytes()
    monkeypatch.setenv("FAIL_VERIFICATION", "1")
    with pytest.raises(VerificationError, match=r"the simulation differs.*kept aside in .*failed-verification"):
        postquant.quantize(network, samples, out=out)
    assert (out / "report.json").read_bytes() == good
    assert sorted(p.name for p in (out / "failed-verification").iterdir()) == sorted((*RESULT, "README.txt"))
    assert not (out / WORK_DIRECTORY).exists()
    with pytest.raises(VerificationError):
        postquant.quantize(network, samples)
    monkeypatch.delenv("FAIL_VERIFICATION")
    postquant.quantize(network, samples, out=out)
    assert not (out / "failed-verification").exists()


def test_an_error_leaves_no_folder(samples: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelError, match="there is no such model file"):
        postquant.quantize(tmp_path / "absent.onnx", samples, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_while_working(
    network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(api, "write_atomically", full)
    with pytest.raises(OutputError, match="the disk of the output folder is full"):
        postquant.quantize(network, samples, out=tmp_path / "out")


def test_the_source_model_is_not_replaced(network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").mkdir()
    model = tmp_path / "out" / "model.onnx"
    content = network.read_bytes()
    model.write_bytes(content)
    with pytest.raises(OutputError, match="would replace a file that the run reads"):
        postquant.quantize(model, samples, out=tmp_path / "out")
    assert model.read_bytes() == content


def test_external_data_of_the_source_are_not_replaced(
    network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "out").mkdir()
    model = tmp_path / "out" / "net.onnx"
    proto = onnx.load(network)
    onnx.save_model(proto, model, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    with pytest.raises(OutputError, match=r"would replace a file that the run reads .*model\.onnx\.data"):
        postquant.quantize(model, samples, out=tmp_path / "out")
    result = postquant.quantize(model, samples, out=tmp_path / "other")
    assert result.report.size_before == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())


def test_messages_without_their_weights(network: pathlib.Path, samples: pathlib.Path, tmp_path: pathlib.Path) -> None:
    external = tmp_path / "external.onnx"
    onnx.save_model(onnx.load(network), external, save_as_external_data=True, location="w", size_threshold=0)
    with pytest.raises(ModelError, match=r"weights of the model are not in it.*give the path"):
        postquant.quantize(onnx.load(external, load_external_data=False), samples)


def test_wrong_arguments(network: pathlib.Path, samples: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"the model is not usable.*found int"):
        postquant.quantize(3, samples)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there is no such target"):
        postquant.quantize(network, samples, postquant.QuantConfig(target="toaster"))
    with pytest.raises(ConfigError, match=r"no such library of custom operators.*absent\.so"):
        postquant.quantize(network, samples, postquant.QuantConfig(custom_ops=("absent.so",)))
    with pytest.raises(ModelError, match=r"not an ONNX model|truncated"):
        postquant.quantize(b"nonsense", samples)


def test_public_names() -> None:
    assert set(postquant.__all__) <= set(dir(postquant))
    for name in postquant.__all__:
        assert getattr(postquant, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = postquant.nothing
