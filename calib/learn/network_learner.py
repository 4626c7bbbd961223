"""Learns the whole network behind its blocks: :func:`learn_network`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch

from postquant.calib.learn.augment import Augmentation
from postquant.calib.learn.block_quantizers import BlockQuantizers
from postquant.calib.learn.executor import supported
from postquant.calib.learn.learner import LearnedBlock, learned_block, torch_limits
from postquant.calib.learn.network_objective import NetworkObjective
from postquant.calib.learn.network_samples import NetworkSamples
from postquant.calib.learn.objective import BlockDiffersError
from postquant.calib.learn.parallel_steps import ParallelSteps
from postquant.calib.learn.recipe import Recipe, judging_samples
from postquant.calib.learn.reconstruct import BlockOutcome, reconstruct
from postquant.calib.learn.visible import visible_part
from postquant.calib.output_error import float_outputs
from postquant.calib.source import CalibrationSource
from postquant.passes.blocks import Block
from postquant.passes.plan import QuantPlan

NAME = "the whole network"
# What a deep network does not bear, in a second try.
_LOWER = 1 / 3


def learn_network(
    model: ir.Model,
    plan: QuantPlan,
    blocks: Sequence[Block],
    source: CalibrationSource,
    recipe: Recipe,
    folder: pathlib.Path,
    *,
    memory: int,
    augment: bool,
    seed: int,
    device: torch.device,
    threads: int,
    progress: Callable[[int, float], None],
) -> tuple[QuantPlan, LearnedBlock]:
    """Learns codes, scales, biases and steps of all layers at once.

    Args:
        model: The simplified float model.
        plan: A decided plan.
        blocks: Its blocks: what lies between them is held where it is in the float network.
        source: Calibration data.
        recipe: How.
        folder: Existing folder for temporary files.
        memory: How many bytes of samples may stay in memory.
        augment: Whether images are mirrored and shifted.
        seed: Of everything random.
        device: Where.
        threads: Parts of a batch that are computed at the same time on the CPU, at least 1; never changes the result.
        progress: Told the number of steps done and the loss from time to time.

    Returns:
        The plan, changed or not, and what happened.

    Raises:
        OutputError: If there is no room for temporary files.
    """
    layers = tuple(name for block in blocks for name in block.layers)
    outputs = float_outputs(model)
    reason = next((reason for node in model.graph if (reason := supported(node)) is not None), None)
    if reason is not None:
        return plan, LearnedBlock(NAME, layers, kept=False, reason=f"torch does not run it: {reason}")
    if not outputs:
        return plan, LearnedBlock(NAME, layers, kept=False, reason="no output is a float")

    inner = {block.output: visible_part(model, plan, block.output) for block in blocks}

    def attempt(recipe: Recipe) -> tuple[BlockQuantizers, BlockOutcome]:
        generator = torch.Generator().manual_seed(seed)
        objective = NetworkObjective(
            model,
            outputs,
            inner,
            recipe.features,
            samples,
            Augmentation.of(source.inputs, generator) if augment else None,
            recipe.batch,
            device,
            steps,
        )
        quantizers = BlockQuantizers(model, plan, list(model.graph), frozenset(), recipe, device)
        outcome = reconstruct(
            objective,
            samples.groups,
            quantizers,
            recipe,
            judging=judging_samples(len(samples), recipe.validation),
            seed=seed,
            device=device,
            steps=steps,
            progress=progress,
        )
        return quantizers, outcome

    workers = threads if device.type == "cpu" else 1
    with torch_limits(), ParallelSteps(workers) as steps, NetworkSamples(source, folder, memory=memory) as samples:
        try:
            quantizers, outcome = attempt(recipe)
            if outcome.hopeless and not outcome.kept:
                first = outcome
                quantizers, outcome = attempt(_lower(recipe))
                outcome = outcome.after_another(first)
        except BlockDiffersError as error:
            return plan, LearnedBlock(NAME, layers, kept=False, reason=str(error))
    return quantizers.to_plan(plan) if outcome.kept else plan, learned_block(NAME, layers, outcome)


def _lower(recipe: Recipe) -> Recipe:
    """The recipe at lower rates."""
    return dataclasses.replace(
        recipe,
        rounding_rate=recipe.rounding_rate * _LOWER,
        bias_rate=recipe.bias_rate * _LOWER,
        weight_scale_rate=recipe.weight_scale_rate * _LOWER,
        step_rate=recipe.step_rate * _LOWER,
    )
