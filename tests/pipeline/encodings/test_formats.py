"""All formats at once: the folder, its index, and what the files together with the float model mean."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from postquant.passes.emit import emit
from postquant.passes.place import PlacementSettings, place
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.pipeline.encodings.apply import apply_encodings
from postquant.pipeline.encodings.formats import FORMATS, INDEX_FILE, MODEL_FILE, write_encodings
from postquant.pipeline.encodings.read import read_encodings
from postquant.pipeline.load import load_model
from postquant.pipeline.recover import recover_float_model
from postquant.runtime_ops.code_book import CodeBook
from postquant.runtime_ops.quantizer import TensorQuantizer


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_index_lists_every_format_and_file(
    asymmetric: tuple[Any, QuantPlan], target: Any, tmp_path: pathlib.Path
) -> None:
    written = write_encodings(tmp_path, *asymmetric, target)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert [form["name"] for form in index["formats"]] == [form.name for form in FORMATS]
    assert (index["schema_version"], index["target"], index["model"]) == (1, "onnxruntime", MODEL_FILE)
    files = {form["file"] for form in index["formats"]} - {None}
    assert {*files, INDEX_FILE, MODEL_FILE, "fixed_point_layer.c"} == {path.name for path in tmp_path.iterdir()}
    by_name = {form.name: form for form in written}
    assert by_name["vitis-ai"].file is None
    assert by_name["aimet-1.0.0"].notes == ()
    assert by_name["vitis-ai"].summary().startswith("vitis-ai: 0 said, ")
    assert by_name["vitis-ai"].summary().endswith("left out; no file")
    onnx.checker.check_model(tmp_path / MODEL_FILE, full_check=True)


def test_equal_plans_give_equal_bytes(asymmetric: tuple[Any, QuantPlan], target: Any, tmp_path: pathlib.Path) -> None:
    model, plan = asymmetric
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_encodings(tmp_path / name, model, plan, target)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_files_of_an_earlier_plan_do_not_stay(
    planned: Any, asymmetric: tuple[Any, QuantPlan], target: Any, tmp_path: pathlib.Path
) -> None:
    whole = {"signed": True, "symmetric": True, "power_of_two": True, "narrow": False}
    model, plan = planned(activations=whole, weights={**whole, "per_channel": False})
    write_encodings(tmp_path, model, plan, target)
    assert (tmp_path / "vitis-ai.json").exists()
    write_encodings(tmp_path, *asymmetric, target)
    assert not (tmp_path / "vitis-ai.json").exists()


def with_odd_rounding(model: Any, plan: QuantPlan) -> QuantPlan:
    """Weights with codes that are not the nearest ones, and a corrected bias."""
    rng = np.random.default_rng(3)
    for name, entry in plan.weights.items():
        assert isinstance(entry, TensorQuantizer)
        nearest = entry.quantize(model.graph.initializers[name].const_value.numpy()).astype(np.int16)
        codes = np.clip(nearest + rng.integers(-1, 2, nearest.shape), entry.spec.qmin, entry.spec.qmax)
        plan = plan.with_weight(name, dataclasses.replace(entry, codes=codes.astype(np.int8)))
    return plan.with_bias("b2", model.graph.initializers["b2"].const_value.numpy() + np.float32(0.125))


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
@pytest.mark.parametrize(("wbits", "recovered"), [(8, False), (4, False), (4, True)])
def test_float_model_and_encodings_say_the_whole_quantized_model(
    version: str, wbits: int, recovered: bool, planned: Any, target: Any, tmp_path: pathlib.Path
) -> None:
    """A receiver who places quantizers like us, and rounds weights to the nearest code, gets the same outputs."""
    model, plan = planned(wbits=wbits)
    plan = with_odd_rounding(model, plan)
    # A result folder has no float model: there it is put together from the quantized one.
    write_encodings(tmp_path, recover_float_model(emit(model, plan), plan) if recovered else model, plan, target)
    received = load_model(tmp_path / MODEL_FILE)
    placed = place(received, target, PlacementSettings(wbits=wbits, first_last_bits=None))
    vendor = read_encodings(tmp_path / f"aimet-{version}.encodings")
    applied = apply_encodings(received, placed, vendor, target)
    assert {conflict.reason for conflict in applied.conflicts} <= {"biases have the step of input times weight"}
    assert applied.names == {*plan.activations, *plan.weights}
    image = {"image": np.random.default_rng(5).normal(size=(2, 3, 16, 16)).astype(np.float32)}
    wanted = make_session(emit(model, plan)).run(image)["logits"]
    found = make_session(emit(received, applied.plan)).run(image)["logits"]
    np.testing.assert_array_equal(found, wanted)


def test_code_books_are_said_as_eight_bits(planned: Any, target: Any, tmp_path: pathlib.Path) -> None:
    model, plan = planned()
    weight = plan.weights["w4"]
    assert isinstance(weight, TensorQuantizer)
    spec = dataclasses.replace(weight.spec, bits=4, code_book=CodeBook.POST)
    book = TensorQuantizer(spec, weight.scale * np.float32(127 / 96), weight.zero_point)
    written = write_encodings(tmp_path, model, plan.with_weight("w4", book), target)
    (note,) = next(form for form in written if form.name == "aimet-1.0.0").notes
    assert (note.tensor, note.reason) == ("w4", "levels of its code book are said as 8-bit codes")
    tensor = read_encodings(tmp_path / "aimet-1.0.0.encodings").tensors["w4"]
    stored = load_model(tmp_path / MODEL_FILE).graph.initializers["w4"].const_value
    assert stored is not None
    codes = np.rint(stored.numpy() / tensor.scale.reshape(-1, 1, 1, 1))
    levels = book.quantize(model.graph.initializers["w4"].const_value.numpy())
    np.testing.assert_array_equal(codes, levels)


def test_the_float_model_runs_and_has_the_same_interface(
    asymmetric: tuple[Any, QuantPlan], target: Any, tmp_path: pathlib.Path
) -> None:
    write_encodings(tmp_path, *asymmetric, target)
    session = ort.InferenceSession(tmp_path / MODEL_FILE, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["image"]
    assert session.get_outputs()[0].shape == ["N", 10]
