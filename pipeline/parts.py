"""Keeps of the scale search and the bias correction what lowers the output error: :func:`keep_parts`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.bias_correction import correct_biases
from postquant.calib.trial import Outcome, Trial, keep_better
from postquant.passes.plan import QuantPlan
from postquant.pipeline.stage_log import StageLog


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """One combination of parts, and what it does to the outputs."""

    plan: QuantPlan
    outcome: Outcome
    weights: bool = False
    activations: bool = False
    biases: bool = False


def keep_parts(
    model: ir.Model,
    plan: QuantPlan,
    searched: QuantPlan,
    trial: Trial,
    start: Outcome,
    means: Mapping[str, npt.NDArray[np.float32]] | None,
    log: StageLog,
) -> QuantPlan:
    """The best combination of searched weights, searched activation scales and corrected biases.

    Scales are searched layer by layer against the layers' outputs; whether that helps the network's outputs is another
    question, and the answer may differ for weights and activations.

    Args:
        model: The simplified float model.
        plan: Before the search.
        searched: After it; ``plan`` itself where nothing was searched.
        trial: Measures.
        start: What it measured for ``plan``.
        means: Node name -> means of the float inputs for the bias correction; None leaves the biases alone.
        log: Told what was kept.
    """
    candidates = [_Candidate(plan, start)]

    def add(found: QuantPlan, *, weights: bool = False, activations: bool = False, biases: bool = False) -> None:
        if biases:
            assert means is not None
            found = correct_biases(model, found, means)
        candidates.append(_Candidate(found, trial.measure(model, found), weights, activations, biases))

    correcting = means is not None
    if searched is not plan:
        add(searched, weights=True, activations=True)
        if correcting:
            add(searched, weights=True, activations=True, biases=True)
        add(dataclasses.replace(plan, weights=searched.weights), weights=True, biases=correcting)
        add(dataclasses.replace(searched, weights=plan.weights), activations=True, biases=correcting)
    if correcting:
        add(plan, biases=True)
    best = candidates[keep_better([candidate.outcome for candidate in candidates])]
    for name, shown in (
        ("weights", "scales and rounding of the weights"),
        ("activations", "scales of the activations"),
    ):
        if searched is not plan:
            alone = next(c for c in candidates if getattr(c, name) and not (c.weights and c.activations))
            log.add(f"scale search, {name}", shown, kept=getattr(best, name), sqnr_db=alone.outcome.sqnr_db)
    if correcting:
        log.add("bias correction", "mean error of the weights", kept=best.biases, sqnr_db=best.outcome.sqnr_db)
    return best.plan
