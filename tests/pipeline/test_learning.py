"""Which layers share a block, and what errors of blocks count."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from postquant.calib.learn import block_cache, network_learner
from postquant.calib.learn.block_cache import BlockCache
from postquant.calib.learn.learner import LearnedBlock
from postquant.calib.learn.recipe import Recipe, recipe_for
from postquant.calib.source import CalibrationSource
from postquant.calib.trial import Outcome, Trial
from postquant.passes.place import PlacementSettings, place
from postquant.passes.plan import QuantPlan
from postquant.passes.target import load_target
from postquant.pipeline import learning_run
from postquant.pipeline.api import quantize
from postquant.pipeline.config import Border, Method, QuantConfig, Weights
from postquant.pipeline.learned_depth import LEFT, LearnedDepth
from postquant.pipeline.learning import learning_blocks
from postquant.pipeline.report import Report, StageReport
from postquant.runtime_ops.errors import ConfigError
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

CHAIN = """
    <ir_version: 8, opset_import: ["" : 17]>
    chain (float[N, 4] x) => (float[N, 4] y)
    <float[4, 4] w0, float[4, 4] w1, float[4, 4] w2, float[4, 4] w3> {
      [first] a = MatMul (x, w0)
      [second] b = MatMul (a, w1)
      [third] c = MatMul (b, w2)
      [fourth] y = MatMul (c, w3)
    }
"""


IMAGES = """
    <ir_version: 8, opset_import: ["" : 17]>
    images (float[1, 3, 16, 16] x) => (float[1, 4, 4, 4] y)
    <float[4, 3, 3, 3] w0, float[4, 4, 3, 3] w1> {
      a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w0)
      b = Relu (a)
      y = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (b, w1)
    }
"""


def _decided(bits: list[int]) -> tuple[ir.Model, QuantPlan]:
    proto = onnx.parser.parse_model(CHAIN)
    for index in range(4):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), f"w{index}"))
    model = ir.from_proto(proto)
    plan = place(model, load_target("onnxruntime"), PlacementSettings(wbits=4, abits=4))
    weights: dict[str, TensorQuantizer] = {}
    for index, width in enumerate(bits):
        spec = QuantSpec(width, signed=True, symmetric=True, axis=1)
        weights[f"w{index}"] = TensorQuantizer(spec, np.ones(4, np.float32), np.zeros(4, np.int32))
    return model, dataclasses.replace(plan, weights=weights)


@pytest.mark.parametrize("bits", [[8, 4, 4, 8], [8, 8, 3, 4], [8, 8, 8, 8]])
def test_widths_do_not_part_layers(bits: list[int]) -> None:
    blocks = learning_blocks(*_decided(bits))
    assert [layer for block in blocks for layer in block.layers] == ["first", "second", "third", "fourth"]
    assert max(len(block.layers) for block in blocks) > 1


@pytest.fixture
def few_steps(torch_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks alone are learned, in 60 steps."""
    monkeypatch.setattr(learning_run, "recipe_for", lambda *a: dataclasses.replace(recipe_for(*a), iterations=60))
    monkeypatch.setattr(learning_run, "network_recipe", lambda *a: None)


def _learn(out: pathlib.Path, **changes: Any) -> Report:
    """The chain at 3 bits, in blocks of two layers."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(CHAIN)
    for index in range(4):
        weight = rng.standard_normal((4, 4)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"w{index}"))
    feeds = [{"x": rng.standard_normal((1, 4)).astype(np.float32)} for _ in range(24)]
    config = QuantConfig(
        wbits=3,
        abits=3,
        method=Method.MSE,
        weights=Weights.INT,
        border=Border.OFF,
        learn=True,
        max_layers=2,
        verify_samples=4,
        bundle=False,
    )
    report = quantize(proto, feeds, dataclasses.replace(config, **changes), out=out).report
    assert all(check.passed for check in report.checks)
    return report


@pytest.mark.usefixtures("few_steps")
def test_errors_of_blocks_are_weighed_unless_nobody_wants_it(tmp_path: pathlib.Path) -> None:
    plans, notes, count = [], [], 0
    for fisher in (False, None):
        report = _learn(tmp_path / str(fisher), fisher=fisher)
        notes.append([note for note in report.notes if "errors of" in note])
        count = sum(stage.name.startswith("learn ") for stage in report.stages)
        plans.append((tmp_path / str(fisher) / "plan.safetensors").read_bytes())
    told = f"errors of {count - 1} of {count - 1} blocks are weighed by what they do to the network's outputs"
    assert notes == [[], [told]]
    assert plans[0] != plans[1]


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("augment", [True, False])
def test_blocks_are_learned_from_copies_of_images_that_do_not_judge(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, *, augment: bool
) -> None:
    sources = []

    class Watched(BlockCache):
        def __init__(self, model: ir.Model, blocks: Any, source: CalibrationSource, *more: Any, **options: Any) -> None:
            sources.append(source)
            super().__init__(model, blocks, source, *more, **options)

    monkeypatch.setattr(block_cache, "BlockCache", Watched)
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(IMAGES)
    for name, shape in (("w0", (4, 3, 3, 3)), ("w1", (4, 4, 3, 3))):
        weight = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    feeds = [{"x": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(24)]
    config = QuantConfig(wbits=4, method=Method.MSE, learn=True, augment=augment, verify_samples=4, bundle=False)
    report = quantize(proto, feeds, config, out=tmp_path / "out").report
    (source,) = sources
    # Every eighth judges.
    assert len(source) == (24 + 21 if augment else 24)
    assert any("copy of every image" in note for note in report.notes) == augment


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(("errors", "depth"), [([0.5, 0.7], 1), ([1.1, 1.2], 0)])
def test_blocks_behind_the_best_depth_are_as_they_were(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, errors: list[float], depth: int
) -> None:
    def learned(name: str, errors: list[float]) -> list[StageReport]:
        left = iter(errors)
        monkeypatch.setattr(
            learning_run, "LearnedDepth", lambda plan, *_: LearnedDepth(plan, 1.0, lambda _: next(left))
        )
        report = _learn(tmp_path / name)
        return [stage for stage in report.stages if stage.name.startswith("learn ")]

    assert [stage.kept for stage in learned("found", [0.5, 0.4])] == [True, True]
    stages = learned("cut", errors)
    assert [stage.kept for stage in stages] == [index < depth for index in range(2)]
    assert all(LEFT in stage.detail for stage in stages[depth:])
    found, cut = (QuantPlan.load(tmp_path / name / "plan.safetensors") for name in ("found", "cut"))
    for index in range(4):
        one, other = (plan.weights[f"w{index}"] for plan in (found, cut))
        assert isinstance(one, TensorQuantizer)
        assert isinstance(other, TensorQuantizer)
        same = np.array_equal(one.scale, other.scale)
        assert same == (index < 2 * depth)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(("error", "kept"), [(0.3, True), (0.4, False), (float("nan"), False)])
def test_the_whole_network_is_kept_where_its_outputs_are_better(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: float, kept: bool
) -> None:
    def learn_network(model: ir.Model, plan: QuantPlan, *more: Any, **options: Any) -> tuple[QuantPlan, LearnedBlock]:
        return plan.with_note("the whole network"), LearnedBlock("the whole network", ("first",), kept=True)

    # Unlearned, behind each of two blocks, behind the network, and of what was chosen.
    errors = iter([1.0, 0.5, 0.4, error, 0.3])
    monkeypatch.setattr(Trial, "measure", lambda *a: Outcome(next(errors), 1.0))
    monkeypatch.setattr(learning_run, "network_recipe", lambda *a: Recipe(4))
    monkeypatch.setattr(network_learner, "learn_network", learn_network)
    report = _learn(tmp_path / "out")
    network = next(stage for stage in report.stages if stage.name == "learn the whole network")
    assert network.kept == kept
    assert (learning_run.NO_GAIN in network.detail) == (not kept)
    assert ("the whole network" in QuantPlan.load(tmp_path / "out" / "plan.safetensors").notes) == kept


def test_errors_are_weighed_only_where_blocks_are_learned() -> None:
    with pytest.raises(ConfigError, match="learn = true"):
        QuantConfig(fisher=True)
