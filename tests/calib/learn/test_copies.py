"""Readers of a tensor that make up for each other's errors: what is measured of them, and how they are learned."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
import pytest
import torch

from postquant.calib import feedback
from postquant.calib.activation_levels import quantizer_with_levels
from postquant.calib.feedback import within_places
from postquant.calib.learn import moments
from postquant.calib.learn.block_cache import BlockCache
from postquant.calib.learn.block_quantizers import BlockQuantizers
from postquant.calib.learn.executor import constant_values, run_nodes
from postquant.calib.learn.learner import Learner
from postquant.calib.learn.moments import FeedbackSite, feedback_sites, measure_moments
from postquant.calib.learn.read_keys import copies_read
from postquant.calib.learn.reader import Reader
from postquant.calib.learn.recipe import Recipe
from postquant.calib.source import CalibrationSource
from postquant.passes.blocks import Block, cut_blocks
from postquant.passes.emit import emit
from postquant.passes.level_plan import level_sites, with_levels
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.pipeline.feedback import with_feedback
from postquant.runtime_ops.quantizer import TensorQuantizer

CPU = torch.device("cpu")
CHANNELS = 6
READERS = ("left:0", "right:0")
NETWORK = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3, 6, 6] x) => (float[N, 3, 6, 6] y)
    <float[6, 3, 3, 3] w0, float[6] b0, float[5, 6, 1, 1] w1, float[5] b1, float[5, 6, 3, 3] w2, float[5] b2,
     float[4, 10, 1, 1] w3, float[4] b3, float[3, 4, 1, 1] w4> {
      [stem] c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
      [relu0] r = Relu (c0)
      [left] c1 = Conv (r, w1, b1)
      [right] c2 = Conv <pads = [1, 1, 1, 1]> (r, w2, b2)
      [both] a = Concat <axis = 1> (c1, c2)
      [squeeze] s = Conv (a, w3, b3)
      [relu] q = Relu (s)
      [last] y = Conv (q, w4)
    }
"""
Fire = tuple[ir.Model, QuantPlan, CalibrationSource]


@pytest.fixture(scope="module", autouse=True)
def _free() -> Iterator[None]:
    """Coefficients cost nothing: those of a small network would be as large as its weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, "_PRICE", 0.0)
        yield


@pytest.fixture(scope="module")
def fire(at_three_bits: Callable[[str], Fire]) -> Fire:
    """Two layers read one tensor through code books of its channels; everything is decided, nothing learned."""
    model, plan, source = at_three_bits(NETWORK)
    site = next(site for site in level_sites(model, plan)[0] if site.tensor == "r")
    levels = float(site.quantizer.range()[1]) * np.linspace(0, 1, 8) ** 1.5 * np.linspace(0.5, 1, CHANNELS)[:, None]
    plan = with_levels(plan, site, quantizer_with_levels(site.quantizer.spec, levels, -3))
    return model, plan, source


@pytest.fixture(scope="module")
def fed(fire: Fire) -> Fire:
    """The same with feedback."""
    model, plan, source = fire
    plan, count = with_feedback(model, plan, source, seed=0, device=CPU)
    assert count == 1
    return model, plan, source


def _entry(plan: QuantPlan, key: str) -> TensorQuantizer:
    entry = plan.requants[key]
    assert isinstance(entry, TensorQuantizer)
    return entry


def _outputs(model: ir.Model, source: CalibrationSource) -> np.ndarray:
    session = make_session(model)
    return np.concatenate([session.run(sample)["y"] for sample in source])


def test_errors_of_readers_are_told_apart(fire: Fire, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over readers is what one error that all of them see does."""
    model, plan, source = fire
    (site,) = feedback_sites(model, plan)
    assert (site.value, site.keys, site.copies) == ("r", READERS, 2)

    def measured(site: FeedbackSite) -> np.ndarray:
        found = measure_moments(model, [site], source, range(len(source)), seed=0, device=CPU)["r"]
        hessian = within_places(np.add(*found.halves), found.cell)
        assert found.noise.shape == (len(hessian),)
        return hessian

    apart = measured(site)
    alone = [measured(FeedbackSite("r", (key,), site.quantizer)) for key in READERS]
    parts = apart.reshape(2, CHANNELS, 2, CHANNELS)
    np.testing.assert_allclose(parts[0, :, 0], alone[0], rtol=1e-3, atol=1e-4 * np.abs(alone[0]).max())
    np.testing.assert_allclose(parts[1, :, 1], alone[1], rtol=1e-3, atol=1e-4 * np.abs(alone[1]).max())
    monkeypatch.setattr(moments, "_MOST_COPIES", 2 * CHANNELS - 1)
    assert site.copies == 1
    np.testing.assert_allclose(measured(site), parts.sum((0, 2)), rtol=1e-3, atol=1e-4 * np.abs(apart).max())


@pytest.mark.parametrize("apart", [False, True])
def test_readers_that_answer_each_other_change_the_outputs_less(
    fire: Fire, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against nearest levels; and more so if the readers may differ."""
    model, plan, source = fire
    plan = dataclasses.replace(plan, weights={}, int_biases={}, activations={"r": plan.activations["r"]}, shared={})
    exact = _outputs(model, source)

    def error(plan: QuantPlan) -> float:
        return float(np.square(_outputs(emit(model, plan), source) - exact).mean())

    together = with_feedback(model, plan, source, seed=0, device=CPU)[0]
    assert [_entry(together, key).copies for key in READERS] == [2, 2]
    if not apart:
        assert error(together) < 0.7 * error(plan)
        return
    monkeypatch.setattr(moments, "_MOST_COPIES", 0)
    same = with_feedback(model, plan, source, seed=0, device=CPU)[0]
    assert [_entry(same, key).copies for key in READERS] == [1, 1]
    assert error(together) < 0.9 * error(same)


def test_they_are_learned_together_and_computed_as_learned(fed: Fire, tmp_path: pathlib.Path) -> None:
    model, plan, source = fed
    blocks = cut_blocks(model, {"stem", "left", "right", "squeeze", "last"})
    block = next(block for block in blocks if set(block.layers) >= {"left", "right"})
    recipe = Recipe(iterations=40, batch=16, rounding_rate=1e-2, bias_rate=1e-2, step_rate=2e-2)
    cache = BlockCache(model, blocks, source, tmp_path, memory=1 << 30)
    run = Learner(model, blocks, cache, recipe, seed=0, device=CPU, positions={}, threads=2)
    learned, found = run.run(plan, done=(), save=lambda *_: None, progress=lambda *_: None)
    assert next(one for one in found if one.name == block.name).kept
    before, after = ([_entry(one, key) for key in READERS] for one in (plan, learned))
    assert [(entry.copies, entry.copy) for entry in after] == [(2, 0), (2, 1)]
    tables = [np.asarray(entry.table) for entry in after]
    np.testing.assert_array_equal(tables[0], tables[1])
    assert (tables[0] != before[0].table).any()
    # Levels of the readers differ by now, and one operator still makes both.
    assert (tables[0][:CHANNELS] != tables[0][CHANNELS:]).any()
    emitted = emit(model, learned)
    assert [node.op_type for node in emitted.graph].count("FeedbackRequantize") == 1

    nodes = list(model.graph)
    for one in (plan, learned):
        reader = BlockQuantizers(model, one, nodes, frozenset(), recipe, CPU).unlearned()
        seen: dict[str, np.ndarray] = {}

        def read(
            node: ir.Node,
            index: int,
            name: str,
            value: torch.Tensor,
            reader: Reader = reader,
            seen: dict[str, np.ndarray] = seen,
        ) -> torch.Tensor:
            seen[f"{node.name}:{index}"] = reader(node, index, name, value).numpy()
            return torch.from_numpy(seen[f"{node.name}:{index}"])

        values = {**constant_values(nodes), "x": torch.from_numpy(np.concatenate([s["x"] for s in source]))}
        run_nodes(nodes, values, read)
        names = ["left_input0_dequantized", "left_input0_dequantized_1", "q_dequantized"]
        session = make_session(emit(model, one), outputs=names)
        written = [session.run(sample) for sample in source]
        for name, key in zip(names, (*READERS, "last:0"), strict=True):
            expected = np.concatenate([found[name] for found in written])
            # Sums in another order may put single values at the other side of a rounding tie.
            assert (np.abs(seen[key] - expected) > 1e-4).mean() < 0.005


def test_what_one_reader_has_decided_stays_for_all(fed: Fire) -> None:
    model, plan, _ = fed
    assert copies_read(model, plan) == dict.fromkeys(READERS, READERS)
    nodes = [node for node in model.graph if node.name in ("left", "right")]
    recipe = Recipe(iterations=1)
    assert list(BlockQuantizers(model, plan, nodes, frozenset(), recipe, CPU).steps) == ["left:0"]
    assert not BlockQuantizers(model, plan, nodes, frozenset({"right:0"}), recipe, CPU).steps
    one = BlockQuantizers(model, plan, nodes[1:], frozenset(), recipe, CPU)
    after = one.to_plan(plan)
    np.testing.assert_array_equal(_entry(after, "left:0").table, _entry(after, "right:0").table)


def test_blocks_of_the_network_hold_both_readers(fed: Fire) -> None:
    model, _, _ = fed
    blocks: tuple[Block, ...] = cut_blocks(model, {"stem", "left", "right", "squeeze", "last"})
    assert any(set(block.layers) >= {"left", "right"} for block in blocks)


def test_cells_are_there_where_they_pay_and_wanted(fire: Fire) -> None:
    """The readers have windows of 3 x 3, and see sums over places."""
    model, plan, source = fire
    plan = dataclasses.replace(plan, weights={}, int_biases={}, activations={"r": plan.activations["r"]}, shared={})
    exact, errors = _outputs(model, source), []
    for cells in (False, True):
        found, count = with_feedback(model, plan, source, cells=cells, seed=0, device=CPU)
        feedbacks = [_entry(found, key).feedback for key in READERS]
        assert count == 1
        assert [feedback is not None and feedback.cell for feedback in feedbacks] == [2 if cells else 1] * 2
        errors.append(np.square(_outputs(emit(model, found), source) - exact).mean())
    assert errors[1] < 0.95 * errors[0]
