"""What the report shows beside its numbers, measured at the end of a run: :func:`describe`."""

from __future__ import annotations

import onnx_ir as ir

from postquant.passes.plan import QuantPlan
from postquant.pipeline.describe_tensors import Effects, describe_tensors
from postquant.pipeline.graph_outline import graph_outline
from postquant.pipeline.job import Job
from postquant.pipeline.tensor_statistics import Statistics


def describe(job: Job, model: ir.Model, plan: QuantPlan, effects: Effects) -> Statistics:
    """Histograms with their grids, and the outline of the graph.

    Args:
        job: For its calibration data.
        model: The simplified model.
        plan: The final plan.
        effects: What quantizers do alone, where that was measured.
    """
    job.progress.stage("describe")
    samples, tensors = describe_tensors(model, plan, job.source, effects)
    return Statistics(samples=samples, tensors=tensors, nodes=graph_outline(model, plan))
