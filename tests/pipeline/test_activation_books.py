"""Code books of activations from the setting to the verified file."""

from __future__ import annotations

import dataclasses
import pathlib
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from postquant.passes.emit import emit
from postquant.passes.level_plan import level_sites
from postquant.passes.lookup_nodes import is_lookup, lookup_of
from postquant.passes.lut_expansion import with_qdq
from postquant.passes.plan import QuantPlan
from postquant.passes.standard import standard_model, without_borders
from postquant.passes.target import load_target
from postquant.pipeline import activation_books, learning_run, stages
from postquant.pipeline.activation_books import with_code_books
from postquant.pipeline.api import quantize
from postquant.pipeline.config import Activations, Border, Method, QuantConfig, Weights
from postquant.pipeline.demo.digits import load_digits
from postquant.pipeline.encodings.entries import collect_entries
from postquant.pipeline.inputs import open_calibration
from postquant.pipeline.job import Job
from postquant.pipeline.plan_check import differences
from postquant.pipeline.recover import recover_float_model
from postquant.pipeline.verify_folder import verify_folder
from postquant.runtime_ops.errors import ConfigError
from postquant.runtime_ops.quantizer import TensorQuantizer

CONFIG = QuantConfig(
    wbits=4, abits=3, method=Method.MSE, activations=Activations.LUT, weights=Weights.INT, verify_samples=4
)


@pytest.fixture(scope="module")
def digits() -> Any:
    """The demo's data."""
    return load_digits()


@pytest.fixture(scope="module")
def result(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, pathlib.Path]:
    """The digits with code books, and where they were written."""
    folder = tmp_path_factory.mktemp("books") / "out"
    feeds = [{"image": digits.calibration[index : index + 1]} for index in range(48)]
    return quantize(digits.model, feeds, CONFIG, out=folder), folder


def outputs(model: pathlib.Path | bytes, images: Any) -> Any:
    """Of a file, on onnxruntime."""
    session = onnxruntime.InferenceSession(str(model) if isinstance(model, pathlib.Path) else model)
    return session.run(None, {"image": images})[0]


def books(plan: QuantPlan) -> list[TensorQuantizer]:
    """All that a plan has."""
    return [e for e in plan.requants.values() if isinstance(e, TensorQuantizer) and e.table is not None]


def test_better_than_equal_gaps_and_checked(
    digits: Any, result: tuple[Any, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    outcome, folder = result
    assert all(check.passed for check in outcome.report.checks), outcome.report.checks
    stage = next(stage for stage in outcome.report.stages if stage.name == "code books of activations")
    assert stage.kept
    emitted, plan = ir.load(folder / "model.onnx"), QuantPlan.load(folder / "plan.safetensors")
    assert books(plan)
    assert len(books(plan)) >= sum(is_lookup(node) for node in emitted.graph) > 0
    assert {entry.spec.bits for entry in books(plan)} == {3}
    feeds = [{"image": digits.calibration[index : index + 1]} for index in range(48)]
    quantize(digits.model, feeds, dataclasses.replace(CONFIG, activations=Activations.INT), out=tmp_path / "even")
    images = digits.test[:300]
    exact = outputs(digits.model, images)
    errors = [np.square(outputs(f / "model.onnx", images) - exact).sum() for f in (folder, tmp_path / "even")]
    assert errors[0] < 0.8 * errors[1], errors


def test_receivers_check_it(result: tuple[Any, pathlib.Path]) -> None:
    folder = result[1]
    assert [check for check in verify_folder(folder) if not check.passed] == []
    emitted, plan = with_qdq(ir.load(folder / "model.onnx")), QuantPlan.load(folder / "plan.safetensors")
    recovered = recover_float_model(emitted, plan)
    assert not list(differences(recovered, emit(recovered, plan), plan))
    # One other level in the file is found, and so is a table that is none of the plan's.
    lookup = next(lookup for node in emitted.graph if (lookup := lookup_of(node)) is not None)
    table = lookup.constants[-1].const_value
    assert table is not None
    assert len(table.numpy()) > 1  # every channel has levels of its own
    wrong = table.numpy().copy()
    wrong.reshape(-1)[-1] -= 1
    lookup.constants[-1].const_value = ir.Tensor(wrong, name=table.name)
    found = [difference.what for difference in differences(recovered, emitted, plan)]
    assert found
    assert set(found) == {"the table of its levels differs from the plan's"}
    key = next(key for key, entry in plan.requants.items() if getattr(entry, "table", None) is not None)
    stored = next(iter(plan.activations.values()))
    changed = plan.with_requant(key, stored)
    found = [difference.what for difference in differences(recovered, emit(recovered, plan), changed)]
    assert any("expected uniform codes by the plan, found levels of a table" in what for what in found)


def test_what_vendors_get(result: tuple[Any, pathlib.Path]) -> None:
    folder = result[1]
    emitted, plan = ir.load(folder / "model.onnx"), QuantPlan.load(folder / "plan.safetensors")
    # Lookups become standard operators that compute the same: nothing changes.
    standard = standard_model(emitted)
    assert not standard.changes
    assert not list(differences(recover_float_model(standard.model, plan), standard.model, without_borders(plan)))
    notes = collect_entries(recover_float_model(emitted, plan), plan).notes
    assert any("3 bits of a code book" in note.reason for note in notes)


@pytest.mark.usefixtures("torch_installed")
def test_learned_levels_are_what_the_file_computes(
    digits: Any, result: tuple[Any, pathlib.Path], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    for name in ("recipe_for", "network_recipe"):
        recipe = getattr(learning_run, name)
        monkeypatch.setattr(
            learning_run, name, lambda *a, recipe=recipe: dataclasses.replace(recipe(*a), iterations=30)
        )
    feeds = [{"image": digits.calibration[index : index + 1]} for index in range(48)]
    outcome = quantize(digits.model, feeds, dataclasses.replace(CONFIG, learn=True), out=tmp_path / "out")
    assert all(check.passed for check in outcome.report.checks), outcome.report.checks
    assert [check for check in verify_folder(tmp_path / "out") if not check.passed] == []
    assert next(stage for stage in outcome.report.stages if stage.name == "learning").kept
    learned = books(QuantPlan.load(tmp_path / "out" / "plan.safetensors"))
    unlearned = books(result[0].plan)
    assert len(learned) == len(unlearned) > 0
    assert [b.table.tolist() for b in learned if b.table is not None] != [
        b.table.tolist() for b in unlearned if b.table is not None
    ]


def test_an_interrupted_run_goes_on(digits: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = [{"image": digits.calibration[index : index + 1]} for index in range(32)]

    def stop(*a: Any, **b: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "learn", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(digits.model, feeds, CONFIG, out=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(activation_books, "with_code_books", stop)
        resumed = quantize(digits.model, feeds, CONFIG, out=tmp_path / "out")
    whole = quantize(digits.model, feeds, CONFIG, out=tmp_path / "whole")
    names = [stage.name for stage in resumed.report.stages]
    assert names == [stage.name for stage in whole.report.stages]
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()


def test_no_place_is_no_failure(digits: Any, tmp_path: pathlib.Path) -> None:
    feeds = [{"image": digits.calibration[index : index + 1]} for index in range(8)]
    found = quantize(digits.model, feeds, dataclasses.replace(CONFIG, abits=8), out=tmp_path / "out").report
    assert found.passed
    assert any("no activation of at most 4 bits can have a code book" in note for note in found.notes)
    assert not any(is_lookup(node) for node in ir.load(tmp_path / "out" / "model.onnx").graph)


@pytest.mark.parametrize("worth", [-99.0, 99.0])
def test_unasked_they_must_pay(
    digits: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, worth: float
) -> None:
    monkeypatch.setattr(activation_books, "WORTH_DB", worth)
    feeds = [{"image": digits.calibration[index : index + 1]} for index in range(16)]
    config = QuantConfig(wbits=8, abits=4, border=Border.OFF, weights=Weights.INT, verify_samples=4, bundle=False)
    found = quantize(digits.model, feeds, config, out=tmp_path / "out").report
    assert found.passed
    stage = next(stage for stage in found.stages if stage.name == "code books of activations")
    assert stage.kept == (worth < 0)
    assert ("would be worth" in stage.detail) == (not stage.kept)
    assert any(is_lookup(node) for node in ir.load(tmp_path / "out" / "model.onnx").graph) == stage.kept


@pytest.mark.parametrize(
    ("others", "target", "wanted"),
    [
        ({}, "onnxruntime", True),
        ({"border": Border.OFF}, "onnxruntime", True),
        ({"activations": Activations.INT}, "onnxruntime", False),
        ({"border": Border.ON}, "onnxruntime", False),
        ({"adaptive_step": True, "learn": True}, "onnxruntime", False),
        ({"method": Method.MSE}, "onnxruntime", False),
        ({}, "tensorrt", False),
        ({"activations": Activations.LUT, "method": Method.MSE}, "tensorrt", True),
    ],
)
def test_when_they_are_tried(others: dict[str, Any], target: str, wanted: bool) -> None:
    job = SimpleNamespace(config=QuantConfig(abits=4, **others), target=load_target(target), encodings=None)
    assert activation_books.code_books_wanted(cast(Job, job)) == wanted
    job.encodings = object()
    assert activation_books.code_books_wanted(cast(Job, job)) == (wanted and "activations" in others)


def test_learning_makes_up_for_a_part_of_the_gain() -> None:
    asked = dataclasses.replace(CONFIG, learn=True)
    automatic = dataclasses.replace(asked, activations=Activations.AUTO)
    unlearned = dataclasses.replace(automatic, learn=False)
    found = [activation_books.least_gain_db(config) for config in (asked, unlearned, automatic)]
    assert found == sorted(found)
    assert found[0] == 0.0 < found[1] < found[2]


def test_rare_values_take_no_level(digits: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = [{"image": digits.calibration[index : index + 1]} for index in range(16)]
    quantize(digits.model, feeds, dataclasses.replace(CONFIG, activations=Activations.INT), out=tmp_path / "even")
    plan = QuantPlan.load(tmp_path / "even" / "plan.safetensors")
    model = recover_float_model(ir.load(tmp_path / "even" / "model.onnx"), plan)
    sites, _ = level_sites(model, plan)
    spikes = [*feeds, {"image": 30 * feeds[0]["image"]}]
    limited = with_code_books(model, plan, sites, open_calibration(spikes, model, CONFIG))
    monkeypatch.setattr(activation_books, "_WIDER", 20.0)
    unlimited = with_code_books(model, plan, sites, open_calibration(spikes, model, CONFIG))
    for site in sites:
        low, high = (2.0 * float(end) for end in site.quantizer.range())
        narrow, wide = (plan.requants[next(iter(site.keys))] for plan in (limited, unlimited))
        assert isinstance(narrow, TensorQuantizer)
        assert isinstance(wide, TensorQuantizer)
        assert low - float(narrow.scale) <= float(narrow.range()[0])
        assert float(narrow.range()[1]) <= high + float(narrow.scale) < float(wide.range()[1])


def test_wide_networks_take_several_passes(
    digits: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = [{"image": digits.calibration[index : index + 1]} for index in range(8)]
    quantize(digits.model, feeds, dataclasses.replace(CONFIG, activations=Activations.INT), out=tmp_path / "even")
    plan = QuantPlan.load(tmp_path / "even" / "plan.safetensors")
    model = recover_float_model(ir.load(tmp_path / "even" / "model.onnx"), plan)
    sites, _ = level_sites(model, plan)
    source = open_calibration(feeds, model, CONFIG)
    assert len(sites) > 1
    progress = [Mock(), Mock()]
    for most, told in zip((1 << 16, 1), progress, strict=True):
        monkeypatch.setattr(activation_books, "_MOST_CHANNELS", most)
        with_code_books(model, plan, sites, source, told).save(tmp_path / str(most))
    assert [told.call_count for told in progress] == [8, 8 * len(sites)]
    assert (tmp_path / "1").read_bytes() == (tmp_path / str(1 << 16)).read_bytes()


def test_an_input_has_one_of_them() -> None:
    for others in ({"border": Border.ON}, {"adaptive_step": True, "learn": True}):
        with pytest.raises(ConfigError, match="a code book, a rounding border or an adaptive step"):
            dataclasses.replace(CONFIG, **others)
    with pytest.raises(ConfigError, match="vendor's numbers"):
        dataclasses.replace(CONFIG, encodings="numbers.json")


def test_sites_of_a_finished_plan(result: tuple[Any, pathlib.Path]) -> None:
    folder = result[1]
    plan = QuantPlan.load(folder / "plan.safetensors")
    assert level_sites(recover_float_model(ir.load(folder / "model.onnx"), plan), plan)[0] == []
