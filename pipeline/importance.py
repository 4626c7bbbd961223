"""What the elements of the blocks' outputs count while they are learned: :func:`block_importance`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from postquant.calib.learn.recipe import Recipe, judging_samples
from postquant.passes.blocks import Block
from postquant.pipeline.job import Job

if TYPE_CHECKING:
    import torch


def block_importance(
    job: Job, model: ir.Model, blocks: Sequence[Block], recipe: Recipe
) -> tuple[Mapping[str, torch.Tensor], list[str]]:
    """Measured on the samples that are learned from, where that was asked for; a resumed run measures it again.

    Args:
        job: What to do.
        model: The simplified float model.
        blocks: Of it.
        recipe: How they are learned.

    Returns:
        Name of a block's output -> what its elements count, and notes for the report; both empty where it was not
        asked for.
    """
    if not job.config.fisher:
        return {}, []
    import torch

    from postquant.calib.learn.fisher import measure_importance

    job.progress.detail("gradients of the network's outputs")
    judges = judging_samples(len(job.source), recipe.validation)
    found = measure_importance(
        model,
        [block.output for block in blocks],
        job.source,
        sorted(set(range(len(job.source))) - set(judges)) or judges,
        seed=job.config.seed,
        device=torch.device(job.config.device.value),
    )
    count = f"{len(found.weights)} of {len(blocks)}"
    notes = [f"errors of {count} blocks are weighed by squared gradients of the network's outputs"]
    notes += [f"errors of block {name} are not weighed: {reason}" for name, reason in found.reasons.items()]
    return found.weights, notes
