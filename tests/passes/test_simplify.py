"""onnxsim at a distance: what it does, that it never sees weights, and every way in which it may fail."""

from __future__ import annotations

import subprocess
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir
import pytest

from postquant.passes import simplify
from postquant.passes.simplify import needs_onnxsim, run_onnxscript, run_onnxsim
from postquant.runtime_ops.errors import ModelError

W = np.random.default_rng(1).standard_normal((512, 4)).astype(np.float32)
# What exporters write for x.view(2, -1): Shape, Gather, Concat, Reshape.
SHAPES = """
    s = Shape (x)
    b = Gather (s, zero)
    t = Concat <axis = 0> (b, rest)
    r = Reshape (x, t)
    y = MatMul (r, w)
"""


def model(bench: Any, inputs: str = "float[2,8,64] x") -> ir.Model:
    result: ir.Model = bench.model(
        bench.graph(SHAPES, inputs, "float[a,b] y"), w=W, zero=np.array([0], np.int64), rest=np.array([-1], np.int64)
    )
    return result


def test_plain_graphs_do_not_need_it(bench: Any) -> None:
    assert not needs_onnxsim(bench.model(bench.graph("a = Relu (x) y = Add (a, x)")))
    assert needs_onnxsim(model(bench))


@pytest.mark.parametrize("tool", ["onnxsim", "onnxscript"])
def test_shape_arithmetic_goes_and_weights_stay(bench: Any, tool: str) -> None:
    before = model(bench)
    weight = before.graph.initializers["w"].const_value
    after = before.clone()
    if tool == "onnxsim":
        after = run_onnxsim(after)
    else:
        run_onnxscript(after)
    assert set(bench.ops(after)) - {"Constant"} == {"Reshape", "MatMul"}
    assert after.graph.initializers["w"].const_value is weight
    x = {"x": np.ones((2, 8, 64), np.float32)}
    np.testing.assert_array_equal(bench.run(after, x)["y"], bench.run(before, x)["y"])


def test_dynamic_axes_stay(bench: Any) -> None:
    after = run_onnxsim(model(bench, "float[N,8,64] x"))
    assert str(after.graph.inputs[0].shape) == "[N,8,64]"
    assert str(after.graph.outputs[0].shape) == "[a,4]"
    for batch in (1, 3):
        assert bench.run(after, {"x": np.ones((batch, 8, 64), np.float32)})["y"].shape == (batch, 4)


def test_crash(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify, "_PROGRAM", "import os; os.abort()")
    with pytest.raises(ModelError, match="onnxsim failed: found a crash with signal 6"):
        run_onnxsim(model(bench))


def test_exception(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify, "_PROGRAM", "import onnxsim_that_is_not_there")
    with pytest.raises(ModelError, match="found ModuleNotFoundError: No module named 'onnxsim_that_is_not_there'"):
        run_onnxsim(model(bench))


def test_too_slow(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify, "_PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(simplify, "_SECONDS", 0.2)
    with pytest.raises(ModelError, match="no result after 0 s"):
        run_onnxsim(model(bench))


def test_no_interpreter(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(ModelError, match="found No such file"):
        run_onnxsim(model(bench))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("m.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7", "a frozen size, at input x"),
        ("del m.graph.input[0]", "at input x"),
        ("m.graph.output[0].name = 'z'", "other inputs or outputs"),
    ],
)
def test_other_signature(bench: Any, monkeypatch: pytest.MonkeyPatch, change: str, message: str) -> None:
    program = f"import sys, onnx\nm = onnx.load(sys.argv[1])\n{change}\nonnx.save(m, sys.argv[2])"
    monkeypatch.setattr(simplify, "_PROGRAM", program)
    with pytest.raises(ModelError, match=message):
        run_onnxsim(model(bench))


def test_damaged_result(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify, "_PROGRAM", "import sys; open(sys.argv[2], 'wb').write(b'nonsense')")
    with pytest.raises(ModelError, match="a damaged result"):
        run_onnxsim(model(bench))


def test_weights_are_not_written(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[onnx.ModelProto] = []
    real = subprocess.run

    def spy(command: list[str], **options: Any) -> Any:
        seen.append(onnx.load(command[-2]))
        return real(command, **options)

    monkeypatch.setattr("subprocess.run", spy)
    run_onnxsim(model(bench))
    assert [tensor.name for tensor in seen[0].graph.initializer] == ["zero", "rest"]
    assert seen[0].ByteSize() < 1000
