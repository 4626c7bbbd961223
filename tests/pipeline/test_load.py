"""Reading and writing model files: wrong files, external data, reproducible bytes, nothing half-written."""

from __future__ import annotations

import errno
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

from postquant.passes.session import make_session
from postquant.pipeline.load import load_model
from postquant.pipeline.save import save_model
from postquant.runtime_ops.errors import ModelError, OutputError

GRAPH = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N,64] x) => (float[N,32] y) {
        a = MatMul (x, w)
        y = Add (a, b)
    }
"""


def proto() -> onnx.ModelProto:
    model = onnx.parser.parse_model(GRAPH)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (64, 32)), ("b", (32,))):
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "m.onnx"
    onnx.save(proto(), path)
    return path


@pytest.fixture
def external(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "e.onnx"
    onnx.save(proto(), path, save_as_external_data=True, location="e.bin", size_threshold=1024)
    return path


def outputs(path: pathlib.Path) -> np.ndarray:
    x = np.ones((2, 64), np.float32)
    return make_session(load_model(path)).run({"x": x})["y"]


def test_load(file: pathlib.Path) -> None:
    model = load_model(str(file))
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]
    assert load_model(file, check=False).graph.num_nodes() == 2


@pytest.mark.parametrize("keep", [0.2, 0.9, 0.999])
def test_truncated(file: pathlib.Path, keep: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ModelError, match=r"the model file is truncated or damaged \(.*m.onnx\); copy or download"):
        load_model(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the model file is empty"),
        (b"hello, this is a text file\n", "the file is not an ONNX model"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 99, "the file is not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "found a Git LFS pointer; fetch"),
        (b"PK\x03\x04" + b"\0" * 50, "found a zip archive or a PyTorch checkpoint"),
        (b"\x08\x08", "the model file is truncated or damaged"),
    ],
)
def test_not_onnx(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert str(caught.value).count("\n") == 0


def test_no_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelError, match="there is no such model file"):
        load_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="the model is a folder"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("field", "message"),
    [("node", "the graph is empty"), ("output", "the graph has no outputs"), ("opset", "names no operator set")],
)
def test_incomplete_graph(file: pathlib.Path, field: str, message: str) -> None:
    model = proto()
    del (model.opset_import if field == "opset" else getattr(model.graph, field))[:]
    onnx.save(model, file)
    with pytest.raises(ModelError, match=message):
        load_model(file)


@pytest.mark.parametrize("domain", ["", "somewhere"])
def test_unknown_operator(file: pathlib.Path, domain: str) -> None:
    model = proto()
    model.graph.node[0].op_type = "MatMool"
    model.graph.node[0].domain = domain
    if domain:
        model.opset_import.add(domain=domain, version=1)
    onnx.save(model, file)
    with pytest.raises(ModelError, match=r"onnxruntime cannot load the model .*MatMool") as caught:
        load_model(file)
    assert "\n" not in str(caught.value)
    assert load_model(file, check=False).graph.num_nodes() == 2


def test_wrong_types_are_found(file: pathlib.Path) -> None:
    model = proto()
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    onnx.save(model, file)
    with pytest.raises(ModelError, match="onnxruntime cannot load the model"):
        load_model(file)


def test_missing_value(file: pathlib.Path) -> None:
    model = proto()
    model.graph.node[1].input[1] = "nowhere"
    onnx.save(model, file)
    with pytest.raises(ModelError, match="nowhere"):
        load_model(file)


def test_sparse_initializer_becomes_dense(file: pathlib.Path) -> None:
    model = proto()
    dense = onnx.numpy_helper.to_array(model.graph.initializer[1])
    expected = np.where(np.arange(32) < 3, dense, 0)
    values = onnx.numpy_helper.from_array(dense[:3], "b")
    indices = onnx.numpy_helper.from_array(np.arange(3), "b_indices")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [32]))
    del model.graph.initializer[1]
    onnx.save(model, file)
    tensor = load_model(file).graph.initializers["b"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), expected)


def test_external_data_stay_in_their_file(external: pathlib.Path, file: pathlib.Path) -> None:
    tensor = load_model(external).graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None
    np.testing.assert_allclose(outputs(external), outputs(file), rtol=1e-5)


def test_external_data_from_another_working_folder(
    external: pathlib.Path, file: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outputs(file)
    monkeypatch.chdir(external.parent)
    np.testing.assert_allclose(outputs(pathlib.Path(external.name)), expected, rtol=1e-5)
    monkeypatch.chdir("/")
    np.testing.assert_allclose(outputs(external), expected, rtol=1e-5)


def test_external_data_missing(external: pathlib.Path) -> None:
    (external.parent / "e.bin").unlink()
    with pytest.raises(ModelError, match=r"an external data file of the model is missing \(.*e.bin\).*copy it beside"):
        load_model(external)


def test_external_data_truncated(external: pathlib.Path) -> None:
    os.truncate(external.parent / "e.bin", 100)
    with pytest.raises(ModelError, match=r"an external data file of the model is truncated .* expected at least 8192"):
        load_model(external)


@pytest.mark.parametrize("location", ["../e.bin", "/etc/passwd", ""])
def test_external_data_outside_of_the_folder(external: pathlib.Path, location: str) -> None:
    model = onnx.load(external, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    external.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="external data must lie in the model's folder"):
        load_model(external)


def test_external_data_of_another_size(external: pathlib.Path) -> None:
    model = onnx.load(external, load_external_data=False)
    model.graph.initializer[0].dims[0] = 65
    external.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"the size of an external tensor does not fit its shape .*8320 bytes.*8192"):
        load_model(external)


@pytest.mark.parametrize("as_external", [False, True])
def test_save_is_the_same_model_in_the_same_bytes(file: pathlib.Path, as_external: bool) -> None:
    first, second = file.with_name("1.onnx"), file.with_name("2.onnx")
    save_model(load_model(file), first, external=as_external)
    onnx.checker.check_model(str(first), full_check=True)
    np.testing.assert_allclose(outputs(first), outputs(file), rtol=1e-5)
    save_model(load_model(first), second, external=as_external)
    assert first.read_bytes().replace(b"1.onnx", b"2.onnx") == second.read_bytes()
    assert (file.parent / "1.onnx.data").exists() == as_external
    assert oct(first.stat().st_mode)[-3:] == "644"


def test_everything_in_a_file_survives(tmp_path: pathlib.Path) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 21, "own" : 1], producer_name: "p", metadata_props: ["k" : "v"]>
        g (float[N] x, bool c) => (float[N] y) <float[N] z, string[2] words = {"a", "b"}, int4[3] q = {1, -2, 3}> {
            z = own.Twice <by = 3.0> (x)
            y = If (c) <then_branch = t () => (float[N] p) { p = Neg (z) },
                        else_branch = e () => (float[N] r) { r = Abs (z) }>
        }
        <domain: "own", opset_import: ["" : 21]>
        Twice <by> (a) => (b) { f = Constant <value_float: float = @by> () b = Mul (a, f) }
    """
    before = onnx.parser.parse_model(text)
    onnx.save(before, tmp_path / "a.onnx")
    save_model(load_model(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    after = onnx.load(tmp_path / "b.onnx")
    for field in ("ir_version", "producer_name", "opset_import", "metadata_props"):
        assert getattr(after, field) == getattr(before, field), field
    written = [re.sub(r'\s*domain: ""', "", str(node)) for node in before.graph.node]
    assert [str(node) for node in after.graph.node] == written
    assert [node.op_type for node in after.functions[0].node] == ["Constant", "Mul"]
    assert list(after.functions[0].attribute) == ["by"]
    assert after.graph.input == before.graph.input
    arrays = [{t.name: onnx.numpy_helper.to_array(t).tolist() for t in m.graph.initializer} for m in (before, after)]
    assert arrays[0] == arrays[1]


def test_lazy_tensors_are_evaluated_one_at_a_time(tmp_path: pathlib.Path, file: pathlib.Path) -> None:
    model = load_model(file)
    alive: list[str] = []

    def lazy(value: ir.Value) -> ir.LazyTensor:
        old = value.const_value
        assert old is not None

        def evaluate() -> ir.TensorProtocol:
            alive.append(value.name or "")
            return ir.Tensor(old.numpy() + 1)

        return ir.LazyTensor(evaluate, dtype=old.dtype, shape=ir.Shape(old.shape.numpy()))

    weight = model.graph.initializers["w"]
    before = weight.const_value
    assert before is not None
    weight.const_value = lazy(weight)
    save_model(model, tmp_path / "l.onnx")
    assert alive == ["w"]
    found = onnx.numpy_helper.to_array(
        next(t for t in onnx.load(tmp_path / "l.onnx").graph.initializer if t.name == "w")
    )
    np.testing.assert_array_equal(found, before.numpy() + 1)


def test_data_file_of_an_older_model_goes(file: pathlib.Path) -> None:
    target = file.with_name("t.onnx")
    save_model(load_model(file), target, external=True)
    save_model(load_model(file), target)
    assert sorted(p.name for p in file.parent.iterdir()) == ["m.onnx", "t.onnx"]


def test_model_may_replace_the_file_that_it_came_from(external: pathlib.Path) -> None:
    expected = outputs(external)
    model = load_model(external)
    save_model(model, external, external=True)
    np.testing.assert_array_equal(outputs(external), expected)


@pytest.mark.parametrize("as_external", [False, True])
def test_no_folder(file: pathlib.Path, as_external: bool) -> None:
    with pytest.raises(OutputError, match=r"the model cannot be written .*No such file or directory"):
        save_model(load_model(file), file.parent / "none" / "m.onnx", external=as_external)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_not_writable(file: pathlib.Path) -> None:
    model = load_model(file)
    file.parent.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            save_model(model, file.parent / "new.onnx")
    finally:
        file.parent.chmod(0o700)


@pytest.mark.parametrize("as_external", [False, True])
def test_full_disk_leaves_the_old_file(file: pathlib.Path, as_external: bool) -> None:
    target = file.with_name("t.onnx")
    target.write_bytes(b"old")
    # A limit on the size of files is what a process can do to itself that comes closest to a full disk.
    program = f"""
        import resource, signal, pathlib
        from postquant.pipeline.load import load_model, save_model
        from postquant.runtime_ops.errors import OutputError
        model = load_model({str(file)!r})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_model(model, {str(target)!r}, external={as_external})
        except OutputError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith(f"the model cannot be written ({target}): found File too large")
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in file.parent.iterdir()) == ["m.onnx", "t.onnx"]


def test_a_full_disk_is_called_one(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="found a full disk; free some space there and run the same command again"):
        save_model(load_model(file), file)


def test_tensor_that_fails_leaves_the_old_file(file: pathlib.Path) -> None:
    model = load_model(file)
    value = model.graph.initializers["w"]
    assert value.const_value is not None

    def fail() -> ir.TensorProtocol:
        raise KeyboardInterrupt

    value.const_value = ir.LazyTensor(fail, dtype=ir.DataType.FLOAT, shape=ir.Shape([64, 32]))
    old = file.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        save_model(model, file)
    assert file.read_bytes() == old
    assert list(file.parent.iterdir()) == [file]
