"""``postquant.session``: a plain onnxruntime session, with the library, errors in one sentence."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

import postquant
from postquant.runtime_ops.errors import ConfigError, ModelError

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
double (float[N] x) => (float[N] y) { y = Add(x, x) }
"""


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(MODEL), file)
    return file


@pytest.mark.parametrize("native", [True, False])
def test_runs(path: pathlib.Path, native: bool) -> None:
    session = postquant.session(path, threads=1, native=native)
    assert isinstance(session, ort.InferenceSession)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_session_options().intra_op_num_threads == 1
    np.testing.assert_array_equal(session.run(None, {"x": np.asarray([1, 2], np.float32)})[0], [2, 4])


def test_takes_options(path: pathlib.Path) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    session = postquant.session(str(path), session_options=options, providers=["CPUExecutionProvider"])
    assert session.get_session_options().intra_op_num_threads == 2


def test_mistakes_are_explained(path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="at least one thread"):
        postquant.session(path, threads=0)
    missing = path.with_name("missing.onnx")
    with pytest.raises(ModelError, match=r"cannot open the model .*missing\.onnx"):
        postquant.session(missing)
    path.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"cannot open the model"):
        postquant.session(path)
