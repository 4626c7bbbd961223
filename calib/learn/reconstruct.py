"""Learns one block: its output in the quantized network comes close to the float network's (:func:`reconstruct`).

    L = |f(x_in) - y|^2 / |y - mean y|^2 + (regulariser of the rounding)

``x_in`` comes from the already quantized prefix, ``y`` from the float network. With QDrop's masks (``keep`` below 1) a
part of the input comes from the float network, and a part of the activations inside is not quantized. Some samples
only judge, with every quantizer on and weights rounded, a few times on the way: the best state is what is learned, a
block that has become far worse stops, and one that is never better than without learning keeps what it had.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
import torch

from postquant.calib.learn.adaptive import AdaptiveActivation
from postquant.calib.learn.batch_parts import BatchParts, batch_parts, kept_bytes
from postquant.calib.learn.block_cache import BlockSamples
from postquant.calib.learn.block_quantizers import BlockQuantizers, Reader
from postquant.calib.learn.borders import BorderedActivation
from postquant.calib.learn.curvature import measure_stiffness
from postquant.calib.learn.executor import constant_values, run_nodes
from postquant.calib.learn.parallel_steps import ParallelSteps
from postquant.calib.learn.quantizers import DropMasks
from postquant.calib.learn.recipe import Recipe, Rounding
from postquant.calib.learn.sample_arrays import SampleArrays
from postquant.calib.learn.sample_split import SampleSplit
from postquant.runtime_ops.errors import ModelError

Tensor = torch.Tensor
# The float block in torch may differ from onnxruntime by so much, relative to its largest value.
_SAME = 1e-3
# How often a block says how far it is.
_TOLD = 50
# Judged at these shares of the steps; the best state counts.
_JUDGED = (0.25, 0.5, 0.75, 1.0)
# A block whose error is so many times its best one does not come back.
_HOPELESS = 1.5


@dataclasses.dataclass(frozen=True)
class BlockOutcome:
    """What learning did to a block.

    Attributes:
        before: Error of the output relative to its variance on judging samples, as the plan was.
        after: The same as learned.
        kept: Whether the learned state is better.
        iterations: Steps taken.
        seconds: Time that they took.
    """

    before: float
    after: float
    kept: bool
    iterations: int
    seconds: float


class BlockDiffersError(Exception):
    """The executor does not compute a block as onnxruntime does, for example because its batch size is fixed."""


def reconstruct(
    nodes: Sequence[ir.Node],
    output: str,
    quantizers: BlockQuantizers,
    samples: BlockSamples,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    steps: ParallelSteps,
    progress: Callable[[int, float], None],
) -> BlockOutcome:
    """Learns a block; the result is in ``quantizers``.

    Args:
        nodes: The block's nodes in topological order.
        output: Name of the block's output.
        quantizers: Of these nodes.
        samples: Inputs and targets.
        recipe: How.
        seed: Of the order of samples and the masks.
        device: Where.
        steps: Threads for the parts of a batch; how many changes no result.
        progress: Told the number of iterations done and the loss from time to time.

    Returns:
        The errors before and after, on samples that were not learned from.

    Raises:
        BlockDiffersError: If the float block does not give the target.
    """
    begun = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    split = SampleSplit(samples.groups, recipe.validation, generator)
    block = _Block(nodes, output, samples, recipe.batch, device, steps)
    block.check(split)
    block.settle(quantizers, split)
    block.measure(quantizers, split)
    before = block.error(quantizers.unlearned(), split)
    if _springs(recipe):
        measure_stiffness(
            quantizers.weights,
            lambda part, constants: block.run(block.inputs(part), quantizers.reader(constants=constants)),
            lambda: block.parts.cut(split.batch(recipe.batch)),
            block.variance,
            generator,
            steps,
            at_once=block.parts.at_once,
        )
    masks = DropMasks(generator, device, recipe.keep) if recipe.keep < 1 else None
    optimizer, schedule = _optimizer(quantizers, recipe, block.size)
    best = _Best(optimizer, quantizers, before)
    points = {math.ceil(recipe.iterations * share) for share in _JUDGED}
    for iteration in range(recipe.iterations):
        schedule(iteration)
        quantizers.advance(iteration / recipe.iterations)
        block.settle(quantizers, split)
        optimizer.zero_grad(set_to_none=True)
        loss = block.backward(split.batch(recipe.batch), quantizers, masks, optimizer)
        regulariser = _regulariser(quantizers, recipe, iteration)
        if regulariser is not None:
            torch.autograd.backward(regulariser)
        optimizer.step()
        if iteration % _TOLD == 0 or iteration + 1 == recipe.iterations:
            progress(iteration + 1, loss)
        if iteration + 1 in points:
            with torch.no_grad():
                constants = quantizers.constants(hard=True)
            best.judge(block.error(quantizers.reader(hard=True, all_steps=True, constants=constants), split))
            if best.hopeless:
                break
    best.restore()
    return BlockOutcome(before, best.after, best.after < before, iteration + 1, time.monotonic() - begun)


class _Best:
    """The best judged state of what an optimizer learns.

    Args:
        optimizer: Its parameters are the state.
        quantizers: What they have beside that.
        before: Judged error without learning.

    Attributes:
        after: The smallest judged error of a learned state.
        hopeless: Whether the last state was far worse than the best one or no learning.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, quantizers: BlockQuantizers, before: float) -> None:
        self._quantizers = quantizers
        self._leaves = _leaves(optimizer)
        self._state = [leaf.detach().clone() for leaf in self._leaves]
        self._before = before
        self.after = math.inf
        self.hopeless = False

    def judge(self, error: float) -> None:
        """Keeps the present state if its error is the smallest so far."""
        self.hopeless = not error <= _HOPELESS * min(self.after, self._before)
        if error < self.after:
            self.after, self._state = error, [leaf.detach().clone() for leaf in self._leaves]
            self._quantizers.remember()

    def restore(self) -> None:
        """Puts the best state back."""
        for leaf, kept in zip(self._leaves, self._state, strict=True):
            leaf.data.copy_(kept)
        self._quantizers.recall()


class _Block:
    """A block that runs on parts of its samples."""

    def __init__(
        self,
        nodes: Sequence[ir.Node],
        output: str,
        samples: BlockSamples,
        batch: int,
        device: torch.device,
        steps: ParallelSteps,
    ) -> None:
        self._steps = steps
        self.parts = BatchParts(batch, 1)
        self._nodes = nodes
        self._batch = batch
        self._output = output
        self._samples = samples
        self._device = device
        self._constants = constant_values(nodes, device)
        total, square, count = 0.0, 0.0, 0
        for index in range(0, len(samples), max(len(samples) // 64, 1)):
            part = samples.target.take([index]).double()
            total, square, count = total + float(part.sum()), square + float(part.square().sum()), count + part.numel()
        self.variance = max(square / count - (total / count) ** 2, 1e-30)
        self.size = math.sqrt(max(square / count, 1e-30))

    def take(self, values: SampleArrays, chosen: Sequence[int]) -> Tensor:
        """Some samples on the device."""
        part = values.take(chosen).to(self._device)
        # Convolutions of few channels are twice as fast in this layout.
        return part.contiguous(memory_format=torch.channels_last) if part.ndim == 4 else part

    def mixed(self, chosen: Sequence[int], masks: DropMasks | None) -> dict[str, Tensor]:
        """The inputs of some samples: of the quantized prefix, or float where the masks drop."""
        quantized = self.inputs(chosen)
        if masks is None:
            return quantized
        result = {}
        for name, values in quantized.items():
            exact = self._samples.exact[name]
            floating = values.is_floating_point() and exact is not self._samples.quantized[name]
            result[name] = torch.lerp(self.take(exact, chosen), values, masks.like(values)) if floating else values
        return result

    def inputs(self, chosen: Sequence[int], *, exact: bool = False) -> dict[str, Tensor]:
        """The inputs of some samples: of the quantized prefix, or of the float network."""
        source: Mapping[str, SampleArrays] = self._samples.exact if exact else self._samples.quantized
        return {name: self.take(values, chosen) for name, values in source.items()}

    def run(self, inputs: Mapping[str, Tensor], reader: Reader | None) -> Tensor:
        """The block's output."""
        values = {**self._constants, **inputs}
        run_nodes(self._nodes, values, reader, wanted=(self._output,))
        return values[self._output]

    def check(self, split: SampleSplit) -> None:
        """The float block gives the target.

        Raises:
            BlockDiffersError: If it does not.
        """
        few = split.few()
        try:
            with torch.no_grad():
                got = self.run(self.inputs(few, exact=True), None)
        except (RuntimeError, ModelError) as error:  # a shape that holds for one sample only
            raise BlockDiffersError(f"torch cannot run it on {len(few)} samples: {error}") from error
        want = self.take(self._samples.target, few)
        if got.shape != want.shape:
            raise BlockDiffersError(f"in torch it gives shape {tuple(got.shape)}, not {tuple(want.shape)}")
        difference = float((got - want).abs().max())
        if not difference <= _SAME * max(float(want.abs().max()), 1e-30):
            raise BlockDiffersError(f"in torch it differs from onnxruntime by {difference:.2g}")

    def settle(self, quantizers: BlockQuantizers, split: SampleSplit) -> None:
        """Lets a whole batch decide what the first run decides, so that no part of one does."""
        if not quantizers.settled:
            with torch.no_grad():
                self.run(self.inputs(split.batch(self._batch)), quantizers.reader())

    def measure(self, quantizers: BlockQuantizers, split: SampleSplit) -> None:
        """Decides into which parts batches are cut; a GPU computes them whole."""
        if self._device.type != "cpu":
            return
        constants, one = quantizers.constants(), split.few()[:1]
        shared = (*self._constants.values(), *constants.values())
        reader = quantizers.reader(constants=constants)
        kept = kept_bytes(lambda: self.run(self.inputs(one), reader), 1, shared)
        self.parts = batch_parts(kept, self._batch)

    def backward(
        self,
        chosen: Sequence[int],
        quantizers: BlockQuantizers,
        masks: DropMasks | None,
        optimizer: torch.optim.Optimizer,
    ) -> float:
        """Adds the gradients of the loss on some samples to those of what is learned; gives the loss."""
        parts = [(part, None if masks is None else masks.part()) for part in self.parts.cut(chosen)]

        def loss(item: tuple[list[int], DropMasks | None], constants: Mapping[str, Tensor]) -> Tensor:
            part, own = item
            reader = quantizers.reader(masks=own, constants=constants)
            result = self.run(self.mixed(part, own), reader)
            error = (result - self.take(self._samples.target, part)).square().mean() / self.variance
            return (error + reader.penalty()) * (len(part) / len(chosen))

        constants = quantizers.constants()
        return self._steps.backward(loss, parts, _leaves(optimizer), constants, at_once=self.parts.at_once)

    def error(self, reader: Reader, split: SampleSplit) -> float:
        """Error of the output relative to its variance, on judging samples of the quantized prefix."""
        total, count = 0.0, 0

        def judge(part: list[int]) -> tuple[float, int]:
            with torch.no_grad():
                result = self.run(self.inputs(part), reader.another())
                square = (result - self.take(self._samples.target, part)).square()
                return float(square.double().sum()), result.numel()

        def add(found: tuple[float, int]) -> None:
            nonlocal total, count
            total, count = total + found[0], count + found[1]

        self._steps.each(judge, list(split.judging(self.parts.size)), add, at_once=self.parts.at_once)
        return total / count / self.variance


def _springs(recipe: Recipe) -> bool:
    """Whether latent weights are held at their levels."""
    return recipe.rounding is Rounding.FREE and recipe.damping > 0 and recipe.rounding_rate > 0


def _leaves(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that is learned."""
    return [leaf for group in optimizer.param_groups for leaf in group["params"]]


def _regulariser(quantizers: BlockQuantizers, recipe: Recipe, iteration: int) -> Tensor | None:
    """The springs, or what drives the choice between neighbours: nothing in the warm-up, then a falling exponent."""
    weights = quantizers.weights.values()
    share = (iteration / recipe.iterations - recipe.warm_up) / (1 - recipe.warm_up)
    if not weights or not (_springs(recipe) or (recipe.rounding is Rounding.NEIGHBOURS and share > 0)):
        return None
    first, last = recipe.beta
    beta = last + (first - last) * (1 - share)
    total = torch.stack([w.regulariser(beta) for w in weights]).sum()
    if recipe.rounding is Rounding.FREE:
        return recipe.damping * total
    return recipe.regularisation * total / sum(w.variable.numel() for w in weights)


def _optimizer(
    quantizers: BlockQuantizers, recipe: Recipe, size: float
) -> tuple[torch.optim.Optimizer, Callable[[int], None]]:
    """Adam with a learning rate per kind, and what sets the rates of an iteration."""
    weights, biases, steps = quantizers.weights.values(), quantizers.biases.values(), quantizers.steps.values()
    groups = [
        ([w.variable for w in weights], recipe.rounding_rate, recipe.rounding is Rounding.FREE),
        ([b.values for b in biases], recipe.bias_rate * size, True),
        ([w.scale.factor for w in weights], recipe.weight_scale_rate, True),
        ([s.scale.factor for s in steps], recipe.step_rate, True),
        ([p for s in steps if isinstance(s, BorderedActivation) for p in s.parameters()], recipe.border_rate, True),
        ([s.weights for s in steps if isinstance(s, AdaptiveActivation)], recipe.adaptive_rate, True),
    ]
    learned = [([p for p in params if p.requires_grad], rate, falls) for params, rate, falls in groups]
    used = [(params, rate, falls) for params, rate, falls in learned if params]
    optimizer = torch.optim.Adam([{"params": params, "lr": rate} for params, rate, _ in used])

    def schedule(iteration: int) -> None:
        share = 0.5 * (1 + math.cos(math.pi * iteration / recipe.iterations))
        for group, (_, rate, falls) in zip(optimizer.param_groups, used, strict=True):
            group["lr"] = rate * share if falls else rate

    return optimizer, schedule
