"""Sessions over models and parts of them: what can be fed and wanted, where weights lie, what errors say."""

from __future__ import annotations

import pathlib
import threading
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from postquant.passes.session import make_session
from postquant.passes.subgraph import captured_values, extract, find_cut
from postquant.runtime_ops.errors import ModelError

BODY = """
    a = MatMul (x, w)
    b = Add (a, bias)
    c = Relu (b)
    y = Mul (c, b)
"""
INPUTS, OUTPUTS = "float[N,32] x", "float[N,32] y"


@pytest.fixture
def arrays(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "w": rng.standard_normal((32, 32)).astype(np.float32),
        "bias": rng.standard_normal(32).astype(np.float32),
    }


@pytest.fixture
def model(bench: Any, arrays: dict[str, Any]) -> ir.Model:
    result: ir.Model = bench.model(bench.graph(BODY, INPUTS, OUTPUTS), **arrays)
    return result


def test_whole_model_equals_numpy(model: ir.Model, arrays: dict[str, Any], rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 32)).astype(np.float32)
    b = x @ arrays["w"] + arrays["bias"]
    session = make_session(model)
    assert session.input_names == ("x",)
    np.testing.assert_allclose(session.run({"x": x})["y"], np.maximum(b, 0) * b, rtol=1e-5, atol=1e-5)


def test_inner_values_are_outputs_in_the_order_asked_for(model: ir.Model) -> None:
    x = np.ones((1, 32), np.float32)
    results = make_session(model, outputs=["c", "a", "y"], optimize=True).run({"x": x})
    assert list(results) == ["c", "a", "y"]
    np.testing.assert_array_equal(results["c"], np.maximum(make_session(model, outputs=["b"]).run({"x": x})["b"], 0))


def test_run_may_compute_some_outputs_and_ignores_other_feeds(model: ir.Model) -> None:
    session = make_session(model, outputs=["a", "y"])
    feeds: dict[str, Any] = {"x": np.ones((1, 32), np.float32), "other": np.zeros(1)}
    assert list(session.run(feeds, ["a"])) == ["a"]


def test_part_between_values(model: ir.Model, rng: np.random.Generator) -> None:
    b = rng.standard_normal((2, 32)).astype(np.float32)
    session = make_session(model, inputs=["b"], outputs=["y"])
    np.testing.assert_array_equal(session.run({"b": b})["y"], np.maximum(b, 0) * b)


def test_inner_input_takes_any_size_whatever_the_file_says(bench: Any) -> None:
    model = bench.model(bench.graph("a = Relu (x) y = Neg (a)", "float[1,4] x", "float[1,4] y"))
    assert make_session(model, inputs=["a"]).run({"a": np.ones((5, 7), np.float32)})["y"].shape == (5, 7)


def test_type_of_an_inner_input_without_one(bench: Any) -> None:
    model = bench.model(bench.graph("a = Shape (x) y = Neg (a)", "float[N,4] x", "int64[2] y"))
    for value in ir.traversal.RecursiveGraphIterator(model.graph).__next__().outputs:
        value.type = None
    session = make_session(model, inputs=["a"], dtypes={"a": ir.DataType.INT64})
    assert session.run({"a": np.array([1, 2], np.int64)})["y"].tolist() == [-1, -2]


def test_initializer_can_be_fed(model: ir.Model) -> None:
    session = make_session(model, inputs=["x", "w"], outputs=["a"])
    result = session.run({"x": np.ones((1, 32), np.float32), "w": np.zeros((32, 32), np.float32)})["a"]
    assert not result.any()


def test_incomplete_cut_names_what_is_missing(model: ir.Model) -> None:
    with pytest.raises(ModelError, match=r"not complete \(y\): expected the value x among the inputs, found c"):
        make_session(model, inputs=["c"], outputs=["y"])


def test_unknown_value(model: ir.Model) -> None:
    with pytest.raises(ModelError, match=r"no such value in the model \(nowhere\)"):
        make_session(model, outputs=["nowhere"])


def test_reason_of_onnxruntime_is_one_line(model: ir.Model) -> None:
    with pytest.raises(ModelError, match="onnxruntime cannot run the model: found") as caught:
        make_session(model).run({"x": np.ones((1, 3), np.float32)})
    assert "\n" not in str(caught.value)
    assert "[ONNXRuntimeError]" not in str(caught.value)


def test_missing_library_of_custom_operators(model: ir.Model, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelError, match="the library of custom operators cannot be loaded"):
        make_session(model, custom_ops=[tmp_path / "none.so"])


def test_external_data_are_neither_read_nor_copied_into_the_message(
    bench: Any, arrays: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    model = bench.model(bench.graph(BODY, INPUTS, OUTPUTS), **arrays)
    onnx.save(ir.to_proto(model), tmp_path / "m.onnx", save_as_external_data=True, location="d", size_threshold=16)
    lazy = ir.load(tmp_path / "m.onnx")
    x = {"x": np.ones((1, 32), np.float32)}
    expected = make_session(model, prepack=False).run(x)["y"]
    np.testing.assert_array_equal(make_session(lazy, prepack=False).run(x)["y"], expected)
    tensor = lazy.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None  # not even mapped on our side


def test_external_data_in_two_folders(bench: Any, arrays: dict[str, Any], tmp_path: pathlib.Path) -> None:
    arrays["bias"] = np.tile(arrays["bias"], (40, 1))
    model = bench.model(bench.graph(BODY, INPUTS, OUTPUTS), **arrays)
    x = {"x": np.ones((40, 32), np.float32)}
    expected = make_session(model).run(x)["y"]
    for name in ("w", "bias"):
        folder = tmp_path / name
        folder.mkdir()
        arrays[name].tofile(folder / "d")
        value = model.graph.initializers[name]
        value.const_value = ir.ExternalTensor(
            "d", 0, None, ir.DataType.FLOAT, shape=ir.Shape(arrays[name].shape), name=name, base_dir=folder
        )
    np.testing.assert_array_equal(make_session(model).run(x)["y"], expected)


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.DOUBLE])
def test_types_of_large_initializers(bench: Any, rng: np.random.Generator, dtype: ir.DataType) -> None:
    array = rng.integers(-8, 8, (32, 32)).astype(np.float32)
    model = bench.model(bench.graph("a = Cast <to = 1> (w) y = Add (x, a)", INPUTS, OUTPUTS), w=array)
    value = model.graph.initializers["w"]
    value.const_value = ir.Tensor(array.astype(dtype.numpy()), dtype=dtype)
    value.dtype = dtype
    result = make_session(model, optimize=False).run({"x": np.zeros((32, 32), np.float32)})["y"]
    np.testing.assert_array_equal(result, array)


def test_old_file_whose_weights_are_inputs(bench: Any, arrays: dict[str, Any]) -> None:
    model = bench.model(bench.graph(BODY, INPUTS, OUTPUTS), **arrays)
    for name in ("w", "bias"):
        model.graph.inputs.append(model.graph.initializers[name])
    model.ir_version = 3
    assert make_session(model).input_names == ("x",)


LOOP = """
    <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[4] x, bool c) => (float[4] y) {
        h = own.Twice (x)
        z = Relu (h)
        y = If (c) <
            then_branch = t () => (float[4] p) { p = Add (h, z) },
            else_branch = e () => (float[4] q) { q = own.Twice (z) }
        >
    }
    <domain: "own", opset_import: ["" : 17]>
    Twice (a) => (b) { b = Add (a, a) }
"""


def test_subgraphs_capture_values_and_functions_travel(bench: Any) -> None:
    model = ir.from_onnx_text(LOOP)
    x = np.array([1, -1, 2, 0], np.float32)
    for choice, expected in ((True, [4, -2, 8, 0]), (False, [4, 0, 8, 0])):
        assert make_session(model).run({"x": x, "c": np.array(choice)})["y"].tolist() == expected
    branch = next(node for node in model.graph if node.op_type == "If")
    assert [value.name for value in captured_values(branch)] == ["h", "z"]
    cut = find_cut(model.graph, ["h", "c"], ["y"])
    assert [node.op_type for node in cut.nodes] == ["Relu", "If"]
    part = make_session(model, inputs=["h", "c"], outputs=["y"])
    assert part.run({"h": x, "c": np.array(False)})["y"].tolist() == [2, 0, 4, 0]


def test_extract_shares_tensors_and_runs(model: ir.Model, rng: np.random.Generator) -> None:
    part = extract(model, ["x"], ["c"])
    onnx.checker.check_model(ir.to_proto(part))
    assert [node.op_type for node in part.graph] == ["MatMul", "Add", "Relu"]
    assert part.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value
    x = {"x": rng.standard_normal((2, 32)).astype(np.float32)}
    np.testing.assert_array_equal(make_session(part).run(x)["c"], make_session(model, outputs=["c"]).run(x)["c"])
    assert len(model.graph) == 4  # the old model is as it was


def test_sessions_live_without_the_model(bench: Any, arrays: dict[str, Any]) -> None:
    session = make_session(bench.model(bench.graph(BODY, INPUTS, OUTPUTS), **arrays), prepack=False)
    results: list[Any] = []
    x = {"x": np.ones((1, 32), np.float32)}
    thread = threading.Thread(target=lambda: results.append(session.run(x)["y"]))
    thread.start()
    thread.join()
    b = x["x"] @ arrays["w"] + arrays["bias"]
    np.testing.assert_allclose(results[0], np.maximum(b, 0) * b, rtol=1e-5, atol=1e-5)
