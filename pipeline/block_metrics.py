"""How errors of the blocks' outputs count while they are learned: :func:`block_metrics`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from postquant.calib.learn.recipe import Recipe, judging_samples
from postquant.passes.blocks import Block
from postquant.pipeline.job import Job

if TYPE_CHECKING:
    from postquant.calib.learn.output_metric import OutputMetric

_CHANNELS_FIRST = frozenset({"Conv", "ConvTranspose"})


def block_metrics(
    job: Job, model: ir.Model, blocks: Sequence[Block], recipe: Recipe
) -> tuple[Mapping[str, OutputMetric], list[str]]:
    """Measured on the samples that are learned from, unless nobody wants it; a resumed run measures it again.

    Args:
        job: What to do.
        model: The simplified float model.
        blocks: Of it.
        recipe: How they are learned.

    Returns:
        Name of a block's output -> how its errors count, and notes for the report; both empty where all errors are to
        count the same.
    """
    if job.config.fisher is False:
        return {}, []
    axes = channel_axes(model, blocks)
    if not axes:
        return {}, []
    import torch

    from postquant.calib.learn.fisher import measure_metrics

    job.progress.detail("gradients of the network's outputs")
    judges = judging_samples(len(job.source), recipe.validation)
    result = measure_metrics(
        model,
        axes,
        job.source,
        sorted(set(range(len(job.source))) - set(judges)) or judges,
        seed=job.config.seed,
        device=torch.device(job.config.device.value),
    )
    count = f"{len(result.found)} of {len(axes)}"
    notes = [f"errors of {count} blocks are weighed by what they do to the network's outputs"]
    notes += [f"errors of block {name} are not weighed: {reason}" for name, reason in result.reasons.items()]
    return result.found, notes


def channel_axes(model: ir.Model, blocks: Sequence[Block]) -> dict[str, int]:
    """Outputs of blocks that are not the network's, with the axes of the channels of their last layers.

    Args:
        model: The simplified float model.
        blocks: Of it.
    """
    nodes = {node.name: node for node in model.graph}
    values = {value.name: value for node in model.graph for value in node.outputs}
    axes = {}
    for block in blocks:
        value = values[block.output]
        if value.is_graph_output() or value.shape is None:
            continue
        first = any(nodes[name].op_type in _CHANNELS_FIRST for name in block.layers[-1:])
        axes[block.output] = 1 - len(value.shape) if first and len(value.shape) > 1 else -1
    return axes
