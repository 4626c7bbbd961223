"""The whole network, with two outputs: its error falls, what lies between blocks counts, and it repeats itself."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch

from postquant.calib.input_spec import input_specs
from postquant.calib.learn import network_learner
from postquant.calib.learn.block_quantizers import BlockQuantizers
from postquant.calib.learn.learner import LearnedBlock
from postquant.calib.learn.network_learner import learn_network
from postquant.calib.learn.network_objective import NetworkObjective
from postquant.calib.learn.network_samples import NetworkSamples
from postquant.calib.learn.parallel_steps import ParallelSteps
from postquant.calib.learn.recipe import Recipe
from postquant.calib.learn.reconstruct import BlockOutcome, reconstruct
from postquant.calib.learn.visible import Visible
from postquant.calib.observers import MinMax
from postquant.calib.open_source import open_source
from postquant.calib.ranges import method_ranges
from postquant.calib.source import CalibrationSource
from postquant.calib.weight_start import start_weights
from postquant.passes.blocks import Block, cut_blocks
from postquant.passes.emit import emit
from postquant.passes.place import PlacementSettings, place
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.passes.target import load_target

CPU = torch.device("cpu")
OUTPUTS = ("y", "z")
NETWORK = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3, 16, 16] x) => (float[N, 5] y, float[N, 4, 16, 16] z)
    <float[6, 3, 3, 3] w0, float[6] b0, float[6, 6, 3, 3] w1, float[6] b1, float[6, 6, 3, 3] w2, float[6] b2,
     float[4, 6, 1, 1] w3, float[4] b3, float[6, 5] w4, float[5] b4> {
      [stem] c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
      [relu0] r0 = Relu (c0)
      [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (r0, w1, b1)
      [relu1] r1 = Relu (c1)
      [conv2] c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2, b2)
      [sum] a = Add (c2, r0)
      [relu2] r2 = Relu (a)
      [map] z = Conv (r2, w3, b3)
      [pool] p = GlobalAveragePool (r2)
      [flat] f = Flatten (p)
      [head] y = Gemm (f, w4, b4)
    }
"""
RECIPE = Recipe(iterations=60, batch=8, rounding_rate=1e-2, bias_rate=5e-3, damping=0.0, features=1.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with everything decided by min-max."""

    model: ir.Model
    plan: QuantPlan
    source: CalibrationSource
    blocks: tuple[Block, ...]

    def learn(
        self, folder: pathlib.Path, recipe: Recipe = RECIPE, *, threads: int = 1, augment: bool = True
    ) -> tuple[QuantPlan, LearnedBlock]:
        """The learned plan."""
        return learn_network(
            self.model,
            self.plan,
            self.blocks,
            self.source,
            recipe,
            folder,
            memory=1 << 20,
            augment=augment,
            seed=3,
            device=CPU,
            threads=threads,
            progress=lambda step, loss: None,
        )

    def values(self, plan: QuantPlan | None, names: tuple[str, ...] = OUTPUTS) -> dict[str, np.ndarray]:
        """Values of the emitted model, or of the float one, for all samples, in onnxruntime."""
        session = make_session(self.model if plan is None else emit(self.model, plan), outputs=names)
        found = [session.run(sample) for sample in self.source]
        return {name: np.concatenate([values[name] for values in found]) for name in names}

    def errors(self, plan: QuantPlan) -> dict[str, float]:
        """Squared error of every output over its variance."""
        exact, got = self.values(None), self.values(plan)
        return {name: float(np.square(got[name] - exact[name]).mean() / exact[name].var()) for name in OUTPUTS}


@pytest.fixture(scope="module")
def case() -> Case:
    proto = onnx.parser.parse_model(NETWORK)
    rng = np.random.default_rng(0)
    for info in proto.graph.value_info:
        shape = tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        array = rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(np.prod(shape[1:]) or 1))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, info.name))
    model = ir.from_proto(proto)
    feeds = [{"x": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(24)]
    source = open_source(feeds, input_specs(model))
    plan = place(model, load_target("onnxruntime"), PlacementSettings(wbits=3, abits=3))
    plan = start_weights(model, method_ranges(model, plan, source, MinMax()).plan)
    blocks = cut_blocks(model, {"stem", "conv1", "conv2", "map", "head"})
    return Case(model, plan, source, blocks)


def test_both_outputs_of_the_emitted_model_come_closer(case: Case, tmp_path: pathlib.Path) -> None:
    plan, network = case.learn(tmp_path)
    assert network.kept
    assert network.name == "the whole network"
    assert network.layers == ("stem", "conv1", "conv2", "map", "head")
    assert network.iterations == RECIPE.iterations
    assert network.before is not None
    assert network.after is not None
    assert network.after > network.before + 1.0
    before, after = case.errors(case.plan), case.errors(plan)
    for name in OUTPUTS:
        assert after[name] < 0.8 * before[name]


@pytest.mark.parametrize("augment", [False, True])
def test_the_same_bytes_with_any_number_of_threads(case: Case, tmp_path: pathlib.Path, augment: bool) -> None:
    recipe = dataclasses.replace(RECIPE, iterations=6, keep=0.5)
    written = []
    for threads in (1, 1, 2, 3):
        case.learn(tmp_path, recipe, threads=threads, augment=augment)[0].save(tmp_path / "plan")
        written.append((tmp_path / "plan").read_bytes())
    assert len(set(written)) == 1
    case.learn(tmp_path, recipe, augment=not augment)[0].save(tmp_path / "plan")
    assert (tmp_path / "plan").read_bytes() != written[0]


def test_the_loss_is_that_of_its_definition(case: Case, tmp_path: pathlib.Path) -> None:
    inner = {"c0": Visible(), "c1": Visible(-0.5, 0.25)}
    names = (*OUTPUTS, *inner)
    few = [0, 5, 17]
    exact, got = case.values(None, names), case.values(case.plan, names)
    seen = np.clip(exact["c1"], -0.5, 0.25)
    errors = {name: (got[name] - exact[name])[few] for name in names}
    over, under = exact["c1"][few] >= 0.25, exact["c1"][few] <= -0.5
    errors["c1"] = (got["c1"] - seen)[few]
    errors["c1"] = np.where(over, np.minimum(errors["c1"], 0), errors["c1"])
    errors["c1"] = np.where(under, np.maximum(errors["c1"], 0), errors["c1"])
    assert over.any()
    assert under.any()
    variances = {name: exact[name].var() for name in names} | {"c1": seen.var()}
    relative = {name: np.square(errors[name]).mean() / variances[name] for name in names}
    with ParallelSteps(1) as steps, NetworkSamples(case.source, tmp_path, memory=0) as samples:
        objective = NetworkObjective(case.model, OUTPUTS, inner, 0.5, samples, None, 8, CPU, steps)
        quantizers = BlockQuantizers(case.model, case.plan, list(case.model.graph), frozenset(), RECIPE, CPU)
        loss, error, count = objective.judged_sums(few, quantizers.unlearned())
        (item,) = objective.items(few, None)
        learned, samples_in_item = objective.loss(item, quantizers.constants(), quantizers)
    expected = np.mean([relative[name] for name in OUTPUTS])
    assert count == samples_in_item == 3
    # Sums in another order may put single values at the other side of a rounding tie.
    assert error / count == pytest.approx(expected, rel=0.02)
    whole = expected + 0.5 * np.mean([relative[name] for name in inner])
    assert loss / count == pytest.approx(whole, rel=0.02)
    # Without weights that have moved, what is learned is what is judged.
    assert float(learned.detach()) == pytest.approx(whole, rel=0.02)


def test_rates_that_are_too_high_end_early_and_are_lowered(case: Case, tmp_path: pathlib.Path) -> None:
    recipe = dataclasses.replace(RECIPE, iterations=16, judged=(0.125, 1.0), bias_rate=1.0)
    network = case.learn(tmp_path, recipe)[1]
    # Two steps until the first judgement, twice at most.
    assert network.iterations in (2 + 2, 2 + 16)


def test_what_was_better_before_it_became_hopeless_is_kept(
    case: Case, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[BlockOutcome] = []

    def hopeless(*arguments: Any, **options: Any) -> BlockOutcome:
        outcomes.append(dataclasses.replace(reconstruct(*arguments, **options), hopeless=True))
        return outcomes[-1]

    monkeypatch.setattr(network_learner, "reconstruct", hopeless)
    plan, network = case.learn(tmp_path)
    assert len(outcomes) == 1
    assert network.kept
    assert plan is not case.plan


def test_a_network_that_gets_worse_keeps_what_it_had(case: Case, tmp_path: pathlib.Path) -> None:
    recipe = dataclasses.replace(RECIPE, iterations=5, rounding_rate=100.0, bias_rate=100.0, step_rate=0.9)
    plan, network = case.learn(tmp_path, recipe)
    assert not network.kept
    assert network.reason == "no better than before on samples that were not learned from"
    assert plan is case.plan


def test_what_torch_does_not_run_is_named(case: Case, tmp_path: pathlib.Path) -> None:
    proto = ir.to_proto(case.model)
    proto.graph.node.append(onnx.helper.make_node("Det", ["m"], ["d"], name="det"))
    proto.graph.input.append(onnx.helper.make_tensor_value_info("m", onnx.TensorProto.FLOAT, [2, 2]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("d", onnx.TensorProto.FLOAT, []))
    other = dataclasses.replace(case, model=ir.from_proto(proto))
    plan, network = other.learn(tmp_path)
    assert plan is case.plan
    assert network.reason == "torch does not run it: operator Det"
