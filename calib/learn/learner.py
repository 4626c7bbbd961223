"""Learns a network block after block: :class:`Learner`.

Blocks are visited from the inputs to the outputs. Each sees the inputs that the already learned part of the network
gives (those of the float network where it sees few rows for its weights), and aims at its float output. What a block
may learn is what no node in front of it reads: its weights and biases, and the steps of the activations that it is the
first to read. A block that gets worse is learned again with the codes that it had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import onnx_ir as ir
import torch

from postquant.calib.layers import Layer
from postquant.calib.learn.block_borders import with_neutral
from postquant.calib.learn.block_cache import BlockCache, BlockSamples
from postquant.calib.learn.block_objective import BlockObjective
from postquant.calib.learn.block_quantizers import FIXED_BITS, BlockQuantizers
from postquant.calib.learn.executor import supported
from postquant.calib.learn.objective import BlockDiffersError
from postquant.calib.learn.output_metric import OutputMetric
from postquant.calib.learn.parallel_steps import ParallelSteps
from postquant.calib.learn.read_keys import keys_read
from postquant.calib.learn.recipe import Borders, Recipe, Rounding, block_recipe, judging_samples
from postquant.calib.learn.reconstruct import BlockOutcome, reconstruct
from postquant.calib.learn.visible import visible_part
from postquant.passes.blocks import Block
from postquant.passes.free_memory import hold_memory
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.law_adaptive import Feature
from postquant.runtime_ops.quantizer import TensorQuantizer


@dataclasses.dataclass(frozen=True)
class LearnedBlock:
    """What happened to one block.

    Attributes:
        name: Name of its output.
        layers: Names of its quantized layers.
        kept: Whether the plan has what was learned.
        reason: Why nothing was learned or kept, or None.
        before: SQNR of what readers see of the block's output in dB, on samples that were not learned from, as it was;
            None where nothing was measured.
        after: The same as learned.
        iterations: Steps of the optimizer.
        seconds: Time.
    """

    name: str
    layers: tuple[str, ...]
    kept: bool
    reason: str | None = None
    before: float | None = None
    after: float | None = None
    iterations: int = 0
    seconds: float = 0.0


class Learner:
    """Learns the blocks of one model.

    Args:
        model: The simplified float model.
        blocks: In the order in which they are learned.
        cache: Gives each block's inputs and targets.
        recipe: How blocks are learned; each with a batch and masks that suit it
            (:func:`postquant.calib.learn.recipe.block_recipe`).
        seed: Of everything random.
        device: Where.
        positions: Output positions per sample, by the layer's name; a layer that is missing counts as one position.
        threads: Parts of a batch that are computed at the same time on the CPU, at least 1; never changes the result.
        metrics: Name of a block's output -> how its errors count
            (:func:`postquant.calib.learn.fisher.measure_metrics`); by their squares where it is missing.
        judging: Samples of the cache that only judge; every eighth where None.
        copies: Of every other sample that the cache holds besides; they make no block's rows more.
    """

    def __init__(
        self,
        model: ir.Model,
        blocks: Sequence[Block],
        cache: BlockCache,
        recipe: Recipe,
        *,
        seed: int,
        device: torch.device,
        positions: Mapping[str, int],
        threads: int = 1,
        metrics: Mapping[str, OutputMetric] | None = None,
        judging: Collection[int] | None = None,
        copies: int = 0,
    ) -> None:
        self._threads = threads if device.type == "cpu" else 1
        self._nodes = {node.name: node for node in model.graph}
        self._place = {node.name: index for index, node in enumerate(model.graph)}
        self._model = model
        self._blocks = blocks
        self._cache = cache
        self._recipe = recipe
        self._seed = seed
        self._device = device
        self._positions = positions
        self._metrics = metrics or {}
        self._judging = judging
        self._copies = copies

    def run(
        self,
        plan: QuantPlan,
        *,
        done: Sequence[LearnedBlock],
        save: Callable[[QuantPlan, LearnedBlock], None],
        progress: Callable[[Block, int, float], None],
    ) -> tuple[QuantPlan, tuple[LearnedBlock, ...]]:
        """Learns all blocks that are not done.

        Args:
            plan: The plan behind the blocks that are done.
            done: Blocks that an earlier run has finished: the first ones.
            save: Called after every block.
            progress: Told a block, its iteration and its loss from time to time.

        Returns:
            The plan, and what happened to every block.
        """
        found = list(done)
        with torch_limits(), ParallelSteps(self._threads) as steps:
            for index, block in enumerate(self._blocks[len(done) :], len(done)):
                plan, learned = self._learn(plan, block, index, steps, progress)
                found.append(learned)
                save(plan, learned)
        return plan, tuple(found)

    def _learn(
        self,
        plan: QuantPlan,
        block: Block,
        index: int,
        steps: ParallelSteps,
        progress: Callable[[Block, int, float], None],
    ) -> tuple[QuantPlan, LearnedBlock]:
        nodes = [self._nodes[name] for name in block.nodes]
        unsupported = next((reason for node in nodes if (reason := supported(node)) is not None), None)
        if unsupported is not None:
            reason = f"torch does not run it: {unsupported}"
            return plan, LearnedBlock(block.name, block.layers, kept=False, reason=reason)
        decided, given = self._decided(plan, block), plan
        borders, features = self._recipe.borders is not Borders.OFF, Feature(self._recipe.adaptive) or None
        if borders or features:
            plan = with_neutral(self._model, plan, nodes, decided, borders=borders, features=features)

        visible = visible_part(self._model, plan, block.output)

        def attempt(
            recipe: Recipe, samples: BlockSamples, judging: Collection[int]
        ) -> tuple[BlockQuantizers, BlockOutcome]:
            quantizers = BlockQuantizers(self._model, plan, nodes, decided, recipe, self._device)
            outcome = reconstruct(
                BlockObjective(
                    nodes,
                    block.output,
                    samples,
                    recipe.batch,
                    self._device,
                    steps,
                    visible,
                    self._metrics.get(block.output),
                ),
                samples.groups,
                quantizers,
                recipe,
                judging=judging,
                seed=self._seed + index,
                device=self._device,
                steps=steps,
                progress=lambda iteration, loss: progress(block, iteration, loss),
            )
            return quantizers, outcome

        unlearned = BlockQuantizers(self._model, plan, nodes, decided, self._recipe, self._device)
        if not unlearned.narrow:
            reason = f"nothing in it has fewer than {FIXED_BITS} bits"
            return given, LearnedBlock(block.name, block.layers, kept=False, reason=reason)
        with self._cache.load(block, plan) as samples:
            judging = self._judging
            if judging is None:
                judging = judging_samples(len(samples), self._recipe.validation)
            learned = (len(samples) - len(judging)) // (1 + self._copies)
            recipe = self._recipe_of(block, plan, unlearned.bits, learned)
            if recipe.exact:
                samples = dataclasses.replace(samples, quantized=samples.exact)
            try:
                quantizers, outcome = attempt(recipe, samples, judging)
                if not outcome.kept and recipe.rounding is Rounding.FREE:
                    first = outcome
                    quantizers, outcome = attempt(_without_codes(recipe), samples, judging)
                    outcome = outcome.after_another(first)
            except BlockDiffersError as error:
                return given, LearnedBlock(block.name, block.layers, kept=False, reason=str(error))
        found = learned_block(block.name, block.layers, outcome)
        return quantizers.to_plan(plan) if outcome.kept else given, found

    def _recipe_of(self, block: Block, plan: QuantPlan, bits: int, learned: int) -> Recipe:
        """How a block is learned whose narrowest learned activation has so many bits, from so many samples."""
        shown = {name: self._positions.get(name, 1) for name in block.layers}
        layers = [layer for name in block.layers if (layer := Layer.of(self._nodes[name])) is not None]
        weights = (plan.weights[layer.weight] for layer in layers)
        weight_bits = min((entry.spec.bits for entry in weights if isinstance(entry, TensorQuantizer)), default=8)
        rows = min((shown[layer.name] * learned / layer.depth for layer in layers), default=math.inf)
        return block_recipe(self._recipe, min(shown.values(), default=1), bits, weight_bits, rows)

    def _decided(self, plan: QuantPlan, block: Block) -> frozenset[str]:
        """Keys of quantizers that nodes in front of the block's end, and not in it, read through."""
        end = max(self._place[name] for name in block.nodes)
        inside = set(block.nodes)
        before = [node for node in self._model.graph if self._place[node.name] < end and node.name not in inside]
        return frozenset(keys_read(self._model, before, plan))


def learned_block(name: str, layers: tuple[str, ...], outcome: BlockOutcome) -> LearnedBlock:
    """What an outcome means for the block of that name."""
    return LearnedBlock(
        name,
        layers,
        kept=outcome.kept,
        reason=None if outcome.kept else "no better than before on samples that were not learned from",
        before=_db(outcome.before),
        after=_db(outcome.after),
        iterations=outcome.iterations,
        seconds=outcome.seconds,
    )


def _without_codes(recipe: Recipe) -> Recipe:
    """For a block that got worse: scales, biases and steps alone, with half the steps at a third of their rates."""
    return dataclasses.replace(
        recipe,
        iterations=-(-recipe.iterations // 2),
        rounding_rate=0.0,
        bias_rate=recipe.bias_rate / 3,
        weight_scale_rate=recipe.weight_scale_rate / 3,
        step_rate=recipe.step_rate / 3,
    )


@contextlib.contextmanager
def torch_limits() -> Iterator[None]:
    """How many threads share a sum changes its last bits: an operator gets one (docs/design-notes.md)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with hold_memory():
            yield
    finally:
        torch.set_num_threads(threads)


def _db(error: float) -> float:
    return -10 * math.log10(max(error, 1e-30))
