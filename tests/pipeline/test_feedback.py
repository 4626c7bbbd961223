"""Error feedback from the setting to the verified file."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from postquant.calib import feedback as calib_feedback
from postquant.calib.learn import recipe
from postquant.passes.emit import emit
from postquant.passes.lut_expansion import with_qdq
from postquant.passes.plan import QuantPlan
from postquant.passes.standard import standard_model, without_borders
from postquant.pipeline import feedback, learning_run, stages
from postquant.pipeline.api import quantize
from postquant.pipeline.config import Activations, Method, QuantConfig, Weights
from postquant.pipeline.demo.digits import load_digits
from postquant.pipeline.plan_check import differences
from postquant.pipeline.recover import recover_float_model
from postquant.pipeline.verify_folder import verify_folder
from postquant.runtime_ops.errors import ConfigError, ModelError
from postquant.runtime_ops.library import register
from postquant.runtime_ops.quantizer import TensorQuantizer

CONFIG = QuantConfig(
    wbits=4,
    abits=3,
    method=Method.MSE,
    activations=Activations.LUT,
    weights=Weights.INT,
    learn=True,
    feedback=True,
    verify_samples=4,
)


@pytest.fixture(scope="module")
def few_steps() -> Iterator[None]:
    """Blocks are learned in a moment, and the network not at all."""
    real = recipe.recipe_for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning_run, "recipe_for", lambda *a: dataclasses.replace(real(*a), iterations=8))
        patch.setattr(learning_run, "network_recipe", lambda *_: None)
        # Coefficients of a small network are as large as its weights.
        patch.setattr(calib_feedback, "_PRICE", 0.0)
        yield


@pytest.fixture(scope="module")
def result(
    torch_installed: None, few_steps: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, pathlib.Path]:
    """The digits with feedback, and where they were written."""
    folder = tmp_path_factory.mktemp("feedback") / "out"
    return quantize(load_digits().model, _feeds(), CONFIG, out=folder), folder


def _feeds(count: int = 48) -> list[dict[str, Any]]:
    digits = load_digits()
    return [{"image": digits.calibration[index : index + 1]} for index in range(count)]


def _fed(plan: QuantPlan) -> list[TensorQuantizer]:
    entries = [entry for entry in plan.requants.values() if isinstance(entry, TensorQuantizer)]
    return [entry for entry in entries if entry.feedback is not None]


@pytest.mark.usefixtures("torch_installed")
def test_a_feedback_is_what_the_file_computes(result: tuple[Any, pathlib.Path]) -> None:
    found, folder = result
    assert all(check.passed for check in found.report.checks), found.report.checks
    assert {stage.name: stage for stage in found.report.stages}["error feedback"].kept
    plan = QuantPlan.load(folder / "plan.safetensors")
    emitted = ir.load(folder / "model.onnx")
    nodes = [node for node in emitted.graph if node.op_type == "FeedbackRequantize"]
    assert len(_fed(plan)) == len(nodes) > 0
    # The function body and the kernels give the same bits.
    options = onnxruntime.SessionOptions()
    assert register(options)
    images = load_digits().test[:50]
    path = str(folder / "model.onnx")
    plain, native = (onnxruntime.InferenceSession(path, o).run(None, {"image": images})[0] for o in (None, options))
    np.testing.assert_array_equal(plain, native)
    assert [check for check in verify_folder(folder) if not check.passed] == []
    recovered = recover_float_model(emitted, plan)
    assert not list(differences(recovered, emit(recovered, plan), plan))
    # Other numbers in the file are found, and so is a look-up without them.
    value = nodes[0].inputs[7]
    assert value is not None
    assert value.const_value is not None
    value.const_value = ir.Tensor(-value.const_value.numpy())
    assert [d.what for d in differences(recovered, with_qdq(emitted), plan)] == [
        "the table of its levels differs from the plan's"
    ]
    assert len(list(differences(recovered, emit(recovered, without_borders(plan)), plan))) == len(nodes)


@pytest.mark.usefixtures("torch_installed")
def test_the_standard_form_takes_nearest_levels_and_says_so(result: tuple[Any, pathlib.Path]) -> None:
    plan = QuantPlan.load(result[1] / "plan.safetensors")
    emitted = ir.load(result[1] / "model.onnx")
    standard = standard_model(emitted)
    assert len(standard.changes) == len(_fed(plan))
    assert all("error feedback" in change for change in standard.changes)
    recovered = recover_float_model(emitted, plan)
    images = {"image": load_digits().test[:50]}
    expected = onnxruntime.InferenceSession(
        ir.to_proto(emit(recovered, without_borders(plan))).SerializeToString()
    ).run(None, images)[0]
    session = onnxruntime.InferenceSession(ir.to_proto(standard.model).SerializeToString())
    np.testing.assert_allclose(session.run(None, images)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("torch_installed")
def test_an_interrupted_run_does_not_measure_again(
    result: tuple[Any, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits, (whole, folder) = load_digits(), result
    with monkeypatch.context() as patch:
        patch.setattr(stages, "learn", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(digits.model, _feeds(), CONFIG, out=tmp_path / "out")
    monkeypatch.setattr("postquant.calib.learn.moments.measure_moments", _interrupted)
    again = quantize(digits.model, _feeds(), CONFIG, out=tmp_path / "out")
    assert again.report.stages == whole.report.stages
    assert (folder / "model.onnx").read_bytes() == (tmp_path / "out" / "model.onnx").read_bytes()


@pytest.mark.usefixtures("torch_installed", "few_steps")
def test_readers_of_one_tensor_answer_each_other_in_the_file(tmp_path: pathlib.Path) -> None:
    """A fire module (Iandola et al. 2016), from the model to the folder that its receiver checks."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (8, 3, 3, 3), "w1": (6, 8, 1, 1), "w2": (6, 8, 3, 3), "w3": (4, 12, 1, 1)}
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,3,10,10] x) => (float[N,4] y) {
          a = Conv (x, w0) r = Relu (a) b = Conv (r, w1) c = Conv <pads = [1, 1, 1, 1]> (r, w2)
          d = Concat <axis = 1> (b, c) e = Relu (d) f = Conv (e, w3) p = GlobalAveragePool (f) y = Flatten (p)
        }""")
    for name, shape in shapes.items():
        array = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "fire.onnx")
    feeds = [{"x": rng.standard_normal((1, 3, 10, 10)).astype(np.float32)} for _ in range(32)]
    folder = tmp_path / "out"
    found = quantize(tmp_path / "fire.onnx", feeds, CONFIG, out=folder)
    assert all(check.passed for check in found.report.checks), found.report.checks
    plan, emitted = QuantPlan.load(folder / "plan.safetensors"), ir.load(folder / "model.onnx")
    assert sorted((entry.copies, entry.copy) for entry in _fed(plan)) == [(2, 0), (2, 1)]
    kinds = [node.op_type for node in emitted.graph]
    assert kinds.count("FeedbackRequantize") == kinds.count("Split") == 1
    assert [check for check in verify_folder(folder) if not check.passed] == []
    (change,) = standard_model(emitted).changes
    assert "nearest levels" in change


def _interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_errors_are_fed_back_only_where_blocks_are_learned() -> None:
    with pytest.raises(ConfigError, match="learn = true"):
        QuantConfig(feedback=True)
    with pytest.raises(ConfigError, match="activations"):
        QuantConfig(feedback=True, learn=True, activations=Activations.INT)


@pytest.mark.parametrize(
    ("errors", "asked", "kept"), [((1.0, 1.05), None, True), ((1.0, 1.1), None, False), ((1.0, 1.1), True, True)]
)
def test_without_being_asked_for_it_may_cost_little_in_front_of_learning(
    errors: tuple[float, float], asked: bool | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = QuantPlan("before"), QuantPlan("after")
    monkeypatch.setattr(feedback, "with_feedback", lambda *_, **__: (after, 3))
    outcomes = iter(SimpleNamespace(error=error, sqnr_db=0.0) for error in errors)
    monkeypatch.setattr(feedback, "Trial", lambda *_, **__: SimpleNamespace(measure=lambda *_: next(outcomes)))
    job, log = MagicMock(), MagicMock()
    job.config, job.checkpoint.load.return_value = QuantConfig(learn=True, feedback=asked), None
    found = feedback.decide_feedback(job, Mock(), Mock(), before, log, threads=1)
    assert found is (after if kept else before)
    assert log.add.call_args.kwargs["kept"] is kept


@pytest.mark.parametrize(
    ("budget", "asked", "tried"), [("size=0.2x", None, False), ("size=0.2x", True, True), ("sqnr=30", None, True)]
)
def test_a_budget_of_bytes_has_none_for_coefficients_unless_asked(
    budget: str, asked: bool | None, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Mock(side_effect=ModelError("tried"))
    monkeypatch.setattr(feedback, "with_feedback", seen)
    job, log, plan = MagicMock(), MagicMock(), QuantPlan("plan")
    job.config = QuantConfig(learn=True, feedback=asked, budget=budget)
    job.checkpoint.load.return_value = None
    assert feedback.decide_feedback(job, Mock(), Mock(), plan, log, threads=1) is plan
    assert seen.called is tried
    assert ("budget" in log.note.call_args.args[0]) is not tried


def test_where_torch_does_not_run_the_network_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("torch does not run the network", found="operator Loop")

    monkeypatch.setattr(feedback, "with_feedback", refuse)
    job, log, plan = MagicMock(), MagicMock(), QuantPlan("plan")
    job.config, job.checkpoint.load.return_value = QuantConfig(learn=True), None
    assert feedback.decide_feedback(job, Mock(), Mock(), plan, log, threads=1) is plan
    assert "operator Loop" in log.note.call_args.args[0]
