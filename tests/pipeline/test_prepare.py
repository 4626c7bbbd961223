"""From any file to the simplified model: equal outputs, dynamic axes, fallbacks that are never silent."""

from __future__ import annotations

import functools
import gc
import math
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

from postquant.passes import simplify
from postquant.passes.opset import Raised, opset_of
from postquant.passes.session import make_session
from postquant.passes.spill import settle_lazy_tensors
from postquant.pipeline import prepare as module
from postquant.pipeline.load import load_model
from postquant.pipeline.prepare import Prepared, compare, prepare
from postquant.runtime_ops.errors import ModelError

MODELS = (
    "cifar10/resnet20.onnx",
    "cifar10/resnet56.onnx",
    "cifar10/resnet8_mlperftiny.onnx",
    "imagenet/mobilenetv2_1.0.onnx",
    "imagenet/squeezenet1.1.onnx",
    "denoise/dncnn_s25.onnx",
    "coco/fastestdet.onnx",
    "coco/face_rfb320.onnx",
    "coco/vww_mobilenetv1_0.25_96.onnx",
    "sts/minilm_l6.onnx",
)
Feeds = dict[str, npt.NDArray[Any]]


def feeds(model: ir.Model, batch: int = 1, size: int = 24) -> Feeds:
    """Random inputs; ``size`` stands for unknown sizes other than the batch."""
    rng = np.random.default_rng(batch)
    made: Feeds = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        assert value.shape is not None
        shape = [d if isinstance(d, int) else batch if i == 0 else size for i, d in enumerate(value.shape)]
        whole = value.dtype is not None and value.dtype.is_integer()
        made[value.name or ""] = np.ones(shape, np.int64) if whole else rng.standard_normal(shape).astype(np.float32)
    return made


def parse(text: str, **arrays: npt.NDArray[Any]) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def ops(prepared: Prepared) -> list[str]:
    return [node.op_type for node in prepared.model.graph]


@pytest.mark.parametrize("name", MODELS)
def test_real_models_stay_equal(shared_data: pathlib.Path, name: str) -> None:
    model = load_model(shared_data / name)
    prepared = prepare(model, [feeds(model)])
    assert prepared.sqnr_db > 100
    assert prepared.relative_error < 1e-5
    assert prepared.notes == ()
    assert "BatchNormalization" not in ops(prepared)
    onnx.checker.check_model(ir.to_proto(prepared.model))
    for old, new in zip(
        (*model.graph.inputs, *model.graph.outputs),
        (*prepared.model.graph.inputs, *prepared.model.graph.outputs),
        strict=True,
    ):
        assert (old.name, str(old.shape), old.dtype) == (new.name, str(new.shape), new.dtype)
    # Other batches and sizes than the one that was checked.
    other = feeds(model, batch=2, size=40)
    expected = make_session(model).run(other)
    for output, found in make_session(prepared.model).run(other).items():
        np.testing.assert_allclose(found, expected[output], rtol=1e-3, atol=1e-4 * np.abs(expected[output]).max())


W = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
CNN = """
    <ir_version: %s, opset_import: ["" : %s]>
    g (float[N,3,H,W] x) => (float[N,4,h,w] y) {
        c = Conv (x, w)
        m = Mul (c, k)
        y = Relu (m)
    }
"""
K = np.full((1, 4, 1, 1), 2, np.float32)
X = {"x": np.random.default_rng(3).standard_normal((2, 3, 8, 8)).astype(np.float32)}


def cnn(opset: int = 17, ir_version: int = 8) -> ir.Model:
    return parse(CNN % (ir_version, opset), w=W, k=K)


def test_dynamic_axes_stay() -> None:
    prepared = prepare(cnn(), [X])
    assert str(prepared.model.graph.inputs[0].shape) == "[N,3,H,W]"
    assert str(prepared.model.graph.outputs[0].shape) == "[N,4,h,w]"
    assert ops(prepared) == ["Conv", "Relu"]


def test_the_model_passed_in_stays_as_it_is() -> None:
    model = cnn(13)
    before = onnx.printer.to_text(ir.to_proto(model))
    prepare(model, [X])
    assert onnx.printer.to_text(ir.to_proto(model)) == before


def test_opset_is_raised_with_a_note() -> None:
    prepared = prepare(cnn(11, 6), [X])
    assert opset_of(prepared.model) == 17
    assert "the operator set was raised from 11 to 17" in prepared.notes
    assert opset_of(prepare(cnn(17), [X], opset=21).model) == 21


def test_weights_that_are_inputs_become_constants_with_a_note() -> None:
    proto = onnx.parser.parse_model(CNN % (3, 9))
    for name, array in (("w", W), ("k", K)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, 1, array.shape))
    onnx.checker.check_model(proto)
    prepared = prepare(ir.from_proto(proto), [X])
    assert ops(prepared) == ["Conv", "Relu"]
    assert prepared.notes[0] == "initializers that are also graph inputs in the file, and are constants now: 2"
    assert [value.name for value in prepared.model.graph.inputs] == ["x"]


def test_without_simplification_there_is_only_the_normal_form() -> None:
    prepared = prepare(cnn(), [X], simplify=False)
    assert ops(prepared) == ["Conv", "Mul", "Relu"]
    assert prepared.max_abs_error == 0
    assert prepared.sqnr_db == math.inf


def test_without_samples_it_says_that_nothing_was_compared() -> None:
    assert prepare(cnn(), []).notes == ("the simplified model is not compared with the original: there is no sample",)


CONTROL = """
    <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[N,3,H,W] x, bool c) => (float[a,b,d,e] y) <int64 n = {2}, bool yes = {1}> {
        h = own.Block <slope = 0.5> (x, w)
        i = If (c) <
            then_branch = t () => (float[a,b,d,e] p) { p1 = Identity (h) p = Relu (p1) },
            else_branch = f () => (float[a,b,d,e] q) { q = own.Block <slope = 0.25> (x, w) }
        >
        y = Loop (n, yes, i) <
            body = l (int64 it, bool go, float[a,b,d,e] s) => (bool go2, float[a,b,d,e] s2) {
                go2 = Identity (go)
                s2 = Add (s, h)
            }
        >
    }
    <domain: "own", opset_import: ["" : 17]>
    Block <slope> (a, v) => (b) { o = Conv (a, v) b = LeakyRelu <alpha: float = @slope> (o) }
"""


def test_control_flow_and_functions() -> None:
    model = parse(CONTROL, w=W)
    samples = [X | {"c": np.array(choice)} for choice in (True, False)]
    prepared = prepare(model, samples)
    assert "Conv" in ops(prepared)
    assert "LeakyRelu" in ops(prepared)
    assert not prepared.model.functions
    assert "model-local functions that were inlined: 1" in prepared.notes
    assert any(note.startswith("nodes inside If, Loop that stay in float: ") for note in prepared.notes)


def test_function_over_another_opset_stays_a_call() -> None:
    text = CONTROL.replace("Block <slope>", "Block <slope>").replace(
        '"own", opset_import: ["" : 17]', '"own", opset_import: ["" : 16]'
    )
    prepared = prepare(parse(text, w=W), [X | {"c": np.array(False)}])
    assert "Block" in ops(prepared)
    assert "calls of model-local functions stay in float: own::Block" in prepared.notes


def test_operators_of_onnxruntime_load_and_stay() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 13, "com.microsoft" : 1]>
        g (float[N,3,H,W] x) => (float[a,b,c,d] y) { g1 = com.microsoft.Gelu (x) c = Conv (g1, w) y = Relu (c) }
    """
    prepared = prepare(parse(text, w=W), [X])
    assert ops(prepared) == ["Gelu", "Conv", "Relu"]
    assert opset_of(prepared.model) == 17


def test_random_models_are_not_compared() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N,3,H,W] x) => (float[a,b,c,d] y) { c = Conv (x, w) r = RandomNormalLike (c) y = Add (c, r) }
    """
    assert "it draws random numbers" in prepare(parse(text, w=W), [X]).notes[0]


SHAPES = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2,3,8,8] x) => (float[2,n] y) <int64[1] zero = {0}, int64[1] rest = {-1}> {
        c = Conv (x, w)
        m = Mul (c, k)
        s = Shape (m)
        b = Slice (s, zero, one)
        t = Concat <axis = 0> (b, rest)
        y = Reshape (m, t)
    }
"""


def shapes() -> ir.Model:
    return parse(SHAPES, w=W, k=K, one=np.array([1], np.int64))


def test_onnxsim_that_crashes_is_replaced_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops(prepare(shapes(), [X])) == ["Conv", "Reshape"]
    monkeypatch.setattr(simplify, "_PROGRAM", "import os; os.abort()")
    prepared = prepare(shapes(), [X])
    assert ops(prepared) == ["Conv", "Reshape"]
    assert prepared.notes == ("onnxsim is not used: a crash with signal 6",)


def spoil(model: ir.Model) -> None:
    """Doubles a weight: what a wrong simplifier would do."""
    value = model.graph.initializers["w"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01))


def test_wrong_onnxsim_is_dropped_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: ir.Model) -> ir.Model:
        spoil(model)
        return model

    monkeypatch.setattr(module, "run_onnxsim", wrong)
    prepared = prepare(shapes(), [X])
    assert prepared.sqnr_db > 100
    assert "Mul" not in ops(prepared)
    assert prepared.notes[0].startswith("onnxsim is not used, its result differs from the original: y is only 40.0 dB")


def test_wrong_folds_are_dropped_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: ir.Model) -> tuple[str, ...]:
        spoil(model)
        return ()

    monkeypatch.setattr(module, "fold", wrong)
    prepared = prepare(cnn(), [X])
    assert ops(prepared) == ["Conv", "Mul", "Relu"]
    assert prepared.sqnr_db == math.inf
    assert prepared.notes[0].startswith("the folds are not used, their result differs from the original: y is only")


def wrong_conversion(model: ir.Model, wanted: int, *, custom_ops: tuple[str, ...]) -> Raised:
    spoil(model)
    return Raised(model, converted=True, note=None)


def test_wrong_conversion_is_dropped_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "raise_opset", wrong_conversion)
    prepared = prepare(cnn(13), [X])
    assert opset_of(prepared.model) == 13
    assert prepared.sqnr_db == math.inf
    assert any(n.startswith("the operator set stays at 13, the conversion changes") for n in prepared.notes)


def test_wrong_conversion_of_an_opset_without_quantization_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "raise_opset", wrong_conversion)
    with pytest.raises(ModelError, match="cannot be brought into the form that quantization needs"):
        prepare(cnn(11), [X])


def test_samples_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ModelError, match="onnxruntime cannot run the model"):
        prepare(cnn(), [{"x": np.zeros((1, 5, 8, 8), np.float32)}])


def y(*values: float, dtype: Any = np.float32) -> list[dict[str, npt.NDArray[Any]]]:
    return [{"y": np.array(values, dtype)}]


@pytest.mark.parametrize(
    ("reference", "result", "failure"),
    [
        (y(1, 2), y(1, 2), None),
        (y(0, 0), y(0, 0), None),
        (y(1, 2), y(1, 2.000002), None),
        (y(1, 2), y(1, 2.001), "y is only 67.0 dB above the difference, 80 dB are needed"),
        (y(1, 2, dtype=np.float16), y(1, 2.002, dtype=np.float16), None),
        (y(1, math.inf, math.nan), y(1, math.inf, math.nan), None),
        (y(1, math.inf), y(1, 3), "y is not finite at other places"),
        (y(1, 3), y(1, math.nan), "y is not finite at other places"),
        (y(0, 0), y(0, 1e-9), "y is only -inf dB above the difference, 80 dB are needed"),
        (y(1, 2), y(1, 2, 3), "y has another shape"),
        (y(1, 2, dtype=np.int64), y(1, 2, dtype=np.int64), None),
        (y(1, 2, dtype=np.int64), y(1, 3, dtype=np.int64), "only 50.0% of y agree"),
    ],
)
def test_compare(reference: Any, result: Any, failure: str | None) -> None:
    assert compare(reference, result).failure == failure


def test_compare_reports_the_worst_output() -> None:
    reference = [{"a": np.array([4.0], np.float32), "b": np.array([1.0], np.float32)}]
    difference = compare(reference, [{"a": np.array([4.00004], np.float32), "b": np.array([1.0], np.float32)}])
    assert difference.max_abs == pytest.approx(4e-5, rel=0.02)
    assert difference.relative == pytest.approx(1e-5, rel=0.02)
    assert difference.sqnr_db == pytest.approx(100, abs=0.2)


def test_large_folded_weights_go_to_a_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postquant.passes.spill.KEEP_BYTES", 1000)
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,8] x) => (float[N,64] y) { y = MatMul (x, w) }'
    for folder in (tmp_path, None):
        model = parse(text, w=np.ones((8, 64), np.float32))
        value = model.graph.initializers["w"]
        array = np.arange(512, dtype=np.float32).reshape(8, 64)
        value.const_value = ir.LazyTensor(
            functools.partial(ir.Tensor, array), dtype=ir.DataType.FLOAT, shape=ir.Shape([8, 64])
        )
        settle_lazy_tensors(model, folder)
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        found = make_session(model.clone()).run({"x": np.eye(8, dtype=np.float32)})["y"]
        np.testing.assert_array_equal(found, array)
        place = pathlib.Path(tensor.path)
        del model, value, tensor
        gc.collect()
        assert place.exists() == (folder is not None)
