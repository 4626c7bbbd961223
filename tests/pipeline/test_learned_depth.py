"""Learned blocks are used up to where the outputs are best."""

from __future__ import annotations

import pytest

from postquant.calib.learn.learner import LearnedBlock
from postquant.passes.plan import QuantPlan
from postquant.pipeline.learned_depth import LEFT, LearnedDepth


@pytest.mark.parametrize(
    ("errors", "depth"),
    [
        ([0.9, 0.8, 0.7], 3),
        # One that makes the outputs worse stays where later ones make up for it.
        ([0.9, 0.95, 0.7], 3),
        ([0.9, 0.7, 0.8], 2),
        # Equal is no better.
        ([0.9, 0.9, 0.9], 1),
        ([1.1, 1.2, 1.0], 0),
    ],
)
def test_the_best_depth_is_kept(errors: list[float], depth: int) -> None:
    plans = [QuantPlan("onnxruntime") for _ in range(4)]
    known = {id(plan): error for plan, error in zip(plans[1:], errors, strict=True)}
    found = LearnedDepth(plans[0], 1.0, lambda plan: known[id(plan)])
    for index, plan in enumerate(plans[1:]):
        found.add(plan, LearnedBlock(f"b{index}", ("l",), kept=True))
    assert found.plan is plans[depth]
    assert [block.kept for block in found.blocks] == [index < depth for index in range(3)]
    assert {block.reason for block in found.blocks[depth:]} <= {LEFT}


def test_what_was_not_kept_for_another_reason_says_so_and_is_not_measured() -> None:
    plan = QuantPlan("onnxruntime")
    found = LearnedDepth(plan, 1.0, lambda _: pytest.fail("measured"))
    found.add(plan, LearnedBlock("b", ("l",), kept=False, reason="no gain"))
    assert found.blocks[0].reason == "no gain"
    assert found.plan is plan
