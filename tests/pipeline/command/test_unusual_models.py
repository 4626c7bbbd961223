"""Models and data that are legal but unusual: they work, with a correct result, or one sentence says why not."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime as ort
import pytest

import postquant
from postquant.passes import session
from postquant.passes.target import WeightStorage
from postquant.pipeline.config import Method
from postquant.runtime_ops.errors import ConfigError, ModelError

Arrays = dict[str, npt.NDArray[Any]]

RESIDUAL = """<ir_version: 8, opset_import: ["" : 17]>
residual (float[N,3,8,8] x) => (float[N,5] y)
<float[8,3,3,3] w1, float[8] b1, float[8,8,3,3] w2, float[8] b2, float[8,5] w3, float[5] b3>
{
   [c1] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
   [r1] b = Relu (a)
   [c2] c = Conv <pads = [1, 1, 1, 1]> (b, w2, b2)
   [add] d = Add (c, b)
   [r2] e = Relu (d)
   [pool] f = GlobalAveragePool (e)
   [flat] h = Flatten (f)
   [fc] y = Gemm (h, w3, b3)
}
"""
SHARED = """<ir_version: 8, opset_import: ["" : 17]>
shared (float[N,8,6,6] x) => (float[N,8,6,6] y) <float[8,8,3,3] w, float[8] b1, float[8] b2>
{
   a = Conv <pads = [1, 1, 1, 1]> (x, w, b1)
   b = Relu (a)
   y = Conv <pads = [1, 1, 1, 1]> (b, w, b2)
}
"""
LAYOUTS = """<ir_version: 8, opset_import: ["" : 17]>
layouts (float[N,8] x) => (float[N,8] y, float[N,8] z) <float[8,8] w, float[8] b>
{
   a = Gemm <transB = 1> (x, w, b)
   r = Relu (a)
   c = Gemm (r, w)
   d = Relu (c)
   y = MatMul (d, w)
   t = Transpose <perm = [1, 0]> (w)
   z = MatMul (d, t)
}
"""
CONV_LAYOUTS = """<ir_version: 8, opset_import: ["" : 17]>
layouts (float[N,8,6,6] x) => (float[N,8,6,6] y, float[N,8,6,6] z) <float[8,8,3,3] w, float[8] b>
{
   a = Conv <pads = [1, 1, 1, 1]> (x, w, b)
   r = Relu (a)
   y = ConvTranspose <pads = [1, 1, 1, 1]> (r, w)
   z = Conv <pads = [1, 1, 1, 1]> (r, w)
}
"""
FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
caller (float[N,3,8,8] x) => (float[N,8,8,8] y) <float[8,3,3,3] w1, float[8,8,3,3] w2>
{
   a = local.block (x, w1)
   y = local.block (a, w2)
}
<opset_import: ["" : 17], domain: "local"> block (v, w) => (o)
{
   q = Conv <pads = [1, 1, 1, 1]> (v, w)
   o = Relu (q)
}
"""
CONTROL_FLOW = """<ir_version: 8, opset_import: ["" : 17]>
branches (float[N,3,8,8] x, bool flag) => (float[N,8,8,8] y) <float[8,3,3,3] w1, float[8,8,3,3] w2>
{
   a = Conv <pads = [1, 1, 1, 1]> (x, w1)
   b = Relu (a)
   y = If (flag) <
      then_branch = then () => (float[N,8,8,8] p) { p = Conv <pads = [1, 1, 1, 1]> (b, w2) },
      else_branch = other () => (float[N,8,8,8] q) { q = Sigmoid (b) }
   >
}
"""


def build(text: str) -> onnx.ModelProto:
    """The model of an ONNX text; the values that it declares are random initializers."""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for info in model.graph.value_info:
        shape = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
        size = 1.5 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.2
        model.graph.initializer.append(
            onnx.numpy_helper.from_array((rng.normal(size=shape) * size).astype(np.float32), info.name)
        )
    del model.graph.value_info[:]
    return model


def change(model: onnx.ModelProto, name: str, how: Callable[[npt.NDArray[Any]], Any]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(how(np.array(onnx.numpy_helper.to_array(tensor)))), name))


def add_outputs(model: onnx.ModelProto, *names: str, channels: int = 8) -> None:
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, ["N", channels, 8, 8]))


def samples(model: onnx.ModelProto, count: int = 16) -> Arrays:
    rng = np.random.default_rng(1)
    found: Arrays = {}
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        kind = value.type.tensor_type
        if value.name in weights:
            continue
        if kind.elem_type == onnx.TensorProto.BOOL:
            found[value.name] = np.arange(count) % 2 == 0
        else:
            shape = [count, *(dim.dim_value for dim in kind.shape.dim[1:])]
            found[value.name] = rng.normal(size=shape).astype(np.float32)
    return found


def sqnr(model: onnx.ModelProto, result: postquant.QuantizationResult, data: Mapping[str, npt.NDArray[Any]]) -> float:
    """The smallest SQNR of an output in dB, by onnxruntime on both files; outputs are the same in name and shape."""
    float_session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session = ort.InferenceSession(str(result.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    described = [[(v.name, v.shape) for v in s.get_outputs()] for s in (float_session, session)]
    assert described[0] == described[1]
    signal = noise = np.full(len(described[0]), 1e-30)
    for index in range(8):
        feed = {k: v[index : index + 1] if v.ndim > 1 else np.asarray(v[index]) for k, v in data.items()}
        for at, (a, b) in enumerate(zip(float_session.run(None, feed), session.run(None, feed), strict=True)):
            unit = np.eye(len(signal))[at]
            signal = signal + unit * np.sum(np.square(a, dtype=np.float64))
            noise = noise + unit * np.sum(np.square(a.astype(np.float64) - b))
    return float(np.min(10 * np.log10(signal / noise)))


def zero_channel(model: onnx.ModelProto) -> None:
    change(model, "w1", lambda w: w * (np.arange(8) != 2)[:, None, None, None].astype(np.float32))
    change(model, "b1", lambda b: b * (np.arange(8) != 2).astype(np.float32))


def unused_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "nobody_reads_it"))


def initializer_as_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("w2", 1, [8, 8, 3, 3]))


CHANGES: dict[str, Callable[[onnx.ModelProto], object]] = {
    "an all-zero channel": zero_channel,
    "an all-zero weight": lambda model: change(model, "w2", np.zeros_like),
    "a constant activation": lambda model: change(model, "w1", np.zeros_like),
    "a Relu that never opens": lambda model: change(model, "b1", lambda b: b - np.float32(1000)),
    "an unused initializer": unused_initializer,
    "an initializer that is also an input": initializer_as_input,
    "an inner tensor as output": lambda model: add_outputs(model, "b"),
    "a convolution's output in front of its Relu as output": lambda model: add_outputs(model, "a"),
    "both": lambda model: add_outputs(model, "a", "b"),
    "the input as output": lambda model: add_outputs(model, "x", channels=3),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("bits", [8, 5])
def test_unusual_graphs(what: str, bits: int) -> None:
    model = build(RESIDUAL)
    CHANGES[what](model)
    data = samples(model)
    result = postquant.quantize(model, data, postquant.QuantConfig(wbits=bits, abits=bits))
    found = sqnr(model, result, data) if what != "an initializer that is also an input" else _free(model, result, data)
    assert found > (30 if bits == 8 else 12)


def _free(model: onnx.ModelProto, result: postquant.QuantizationResult, data: Arrays) -> float:
    assert any("also graph inputs" in note for note in result.report.notes)
    return sqnr(model, result, data)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-30])
def test_constant_data(value: float) -> None:
    model = build(RESIDUAL)
    data = {"x": np.full((16, 3, 8, 8), value, np.float32)}
    assert sqnr(model, postquant.quantize(model, data), data) > 40


@pytest.mark.parametrize("text", [SHARED, LAYOUTS, CONV_LAYOUTS, FUNCTION, CONTROL_FLOW])
@pytest.mark.parametrize("simplify", [True, False])
def test_shared_weights_functions_and_control_flow(text: str, simplify: bool) -> None:
    model = build(text)
    data = samples(model, 32)
    config = postquant.QuantConfig(method=Method.MINMAX, simplify=simplify)
    result = postquant.quantize(model, data, config)
    assert sqnr(model, result, data) > 28
    if text is CONTROL_FLOW:
        inside = {entry.op_type for entry in result.report.floats if "subgraph" in entry.reason}
        assert inside == {"If", "Conv", "Sigmoid"}


@pytest.mark.parametrize("simplify", [True, False])
def test_an_output_keeps_its_shape_where_nothing_inferred_one(simplify: bool) -> None:
    model = build(RESIDUAL)
    add_outputs(model, "b")
    data = samples(model)
    config = postquant.QuantConfig(method=Method.MINMAX, simplify=simplify)
    assert sqnr(model, postquant.quantize(model, data, config), data) > 30


@pytest.mark.parametrize("text", [RESIDUAL, FUNCTION])
def test_int4_storage_raises_the_operator_set(text: str) -> None:
    model = build(text)
    data = samples(model)
    config = postquant.QuantConfig(wbits=4, weight_storage=WeightStorage.INT4, method=Method.MINMAX)
    result = postquant.quantize(model, data, config)
    assert result.model.graph.opset_imports[""] >= 21
    assert sqnr(model, result, data) > 10


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_inputs_of_any_size(size: float, cases: Any) -> None:
    """No warning reaches the user (here warnings are errors), and the numbers are those of inputs of size one."""
    rng = np.random.default_rng(0)
    samples = [{"image": (rng.normal(size=(1, 3, 16, 16)) * size).astype(np.float32)} for _ in range(4)]
    model = cases.float_model(cases.cnn.replace("(image, w1, b1)", "(image, w1)"))
    result = postquant.quantize(model, samples, postquant.QuantConfig(candidates=10))
    assert result.report.outputs[0].sqnr_db > 15


def test_nan_in_a_weight_is_the_models_fault() -> None:
    model = build(RESIDUAL)

    def spoil(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
        weight[0, 0, 0, 0] = np.nan
        return weight

    change(model, "w1", spoil)
    with pytest.raises(ModelError, match=r"holds NaN or infinity \(w1\): found 1 NaN and 0 infinite of 216 values"):
        postquant.quantize(model, samples(model))


def test_a_graph_without_nodes(tmp_path: pathlib.Path) -> None:
    model = build(RESIDUAL)
    del model.graph.node[:]
    path = tmp_path / "empty.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelError, match="the graph is empty"):
        postquant.quantize(path, samples(model), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            {"node": "nothing*", "wbits": 4},
            r"selects no node \(nothing\*\): expected a pattern that fits a node: c1, r1",
        ),
        ({"op_type": "Convv", "wbits": 4}, r"expected an operator type of the model: Add, Conv, Flatten"),
        ({"op_type": "Relu", "wbits": 4}, r"nodes that have no weights \(Relu\).*found Relu r1, Relu r2"),
    ],
)
def test_overrides_that_cannot_do_anything(override: dict[str, Any], sentence: str, tmp_path: pathlib.Path) -> None:
    model = build(RESIDUAL)
    file = tmp_path / "quant.toml"
    lines = [f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}" for key, value in override.items()]
    file.write_text("\n".join(["[[override]]", *lines]), encoding="utf-8")
    config = postquant.QuantConfig.from_toml(file)
    with pytest.raises(ConfigError, match=sentence):
        postquant.quantize(model, samples(model), config)


def test_sessions_that_decide_have_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime's float sums depend on the number of threads (docs/design-notes.md)."""
    asked: set[int] = set()
    real = session.session_options

    def options(*, threads: int = 1, **others: Any) -> ort.SessionOptions:
        asked.add(threads)
        return real(threads=threads, **others)

    monkeypatch.setattr(session, "session_options", options)
    model = build(RESIDUAL)
    postquant.quantize(model, samples(model), postquant.QuantConfig(threads=2))
    assert asked == {1}
