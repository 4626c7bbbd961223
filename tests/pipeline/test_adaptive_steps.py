"""Adaptive steps in a plan, in the file and in its verification; how they are learned is not asked here."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

from postquant.passes.adaptive_nodes import is_adaptive
from postquant.passes.border_plan import border_sites, with_border
from postquant.passes.emit import emit
from postquant.passes.place import PlacementSettings
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.passes.standard import standard_model, without_borders
from postquant.pipeline.encodings.entries import collect_entries
from postquant.pipeline.encodings.fixed_layer import NoFixedFormError, fixed_layer
from postquant.pipeline.plan_check import differences
from postquant.pipeline.recover import recover_float_model
from postquant.pipeline.verify import verify_model
from postquant.runtime_ops.adaptive_module import AdaptiveModule
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.law_adaptive import Feature
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

# The factor follows the largest magnitude.
MODULE = AdaptiveModule(
    w1=np.array([[0.3]], np.float32),
    b1=np.array([0.5], np.float32),
    w2=np.ones((1, 1), np.float32),
    b2=np.zeros(1, np.float32),
    features=Feature.MAXIMUM,
    beta_min=0.5,
    beta_max=2.0,
)


@pytest.fixture(scope="module")
def narrow(cases: Any) -> Any:
    """The small network at W8A4."""
    return cases.build(settings=PlacementSettings(abits=4))


@pytest.fixture(scope="module")
def plan(narrow: Any) -> QuantPlan:
    """Its plan with all adaptive steps that there can be."""
    plan: QuantPlan = narrow.plan
    count = 0
    for site in border_sites(narrow.model, plan, bits=4)[0]:
        old = narrow.plan.input_quantizer(site.key) or narrow.plan.activation_quantizer(site.tensor)
        if old.zero_point:
            continue
        plan, count = with_border(plan, site, dataclasses.replace(old, adaptive=MODULE)), count + 1
        integers = {bias: keys for bias, keys in plan.int_biases.items() if keys[0] != site.key}
        plan = dataclasses.replace(plan, int_biases=integers)
    assert count
    return plan


def test_the_file_does_what_the_plan_says(narrow: Any, plan: QuantPlan) -> None:
    emitted = emit(narrow.model, plan)
    verification = verify_model(narrow.model, emitted, plan, narrow.samples)
    assert verification.passed
    names = {node.name or "" for node in emitted.graph if is_adaptive(node)}
    compared = {t.codes_name: t for t in verification.tensors}
    assert names
    assert names <= set(compared)
    assert all(compared[name].law == "kernel" and not compared[name].mismatches for name in names)


def test_every_sample_of_a_batch_has_its_own_step(narrow: Any, plan: QuantPlan) -> None:
    session = make_session(emit(narrow.model, plan), outputs=None)
    name = next(iter(narrow.samples[0]))
    both = np.concatenate([narrow.samples[0][name], 3 * narrow.samples[1][name]])
    together = next(iter(session.run({name: both}).values()))
    alone = [next(iter(session.run({name: both[i : i + 1]}).values())) for i in range(len(both))]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4, atol=1e-5)


def test_the_plan_and_the_float_model_come_back(narrow: Any, plan: QuantPlan, tmp_path: pathlib.Path) -> None:
    plan.save(tmp_path / "plan")
    read = QuantPlan.load(tmp_path / "plan")
    emitted = emit(narrow.model, plan)
    recovered = recover_float_model(emitted, read)
    assert not list(differences(recovered, emit(recovered, read), read))
    changed = dataclasses.replace(MODULE, beta_max=1.5)
    key, entry = next(
        (k, e) for k, e in plan.requants.items() if isinstance(e, TensorQuantizer) and e.adaptive is not None
    )
    other = plan.with_requant(key, dataclasses.replace(entry, adaptive=changed))
    found = [difference.what for difference in differences(narrow.model, emitted, other)]
    assert found == ["attribute beta_max of the adaptive step differs from the plan's"]
    plain = plan.with_requant(key, dataclasses.replace(entry, adaptive=None))
    assert any("adaptive" in d.what.lower() for d in differences(narrow.model, emitted, plain))
    assert any("adaptive" in d.what for d in differences(narrow.model, emit(narrow.model, plain), plan))


def test_the_standard_model_has_the_fixed_step(narrow: Any, plan: QuantPlan) -> None:
    standard = standard_model(emit(narrow.model, plan))
    assert any("fixed step" in change for change in standard.changes)
    assert not any(node.domain for node in standard.model.graph)
    assert not list(differences(narrow.model, standard.model, without_borders(plan)))
    make_session(standard.model).run(narrow.samples[0])


def test_a_layer_behind_an_adaptive_step_has_no_fixed_point_form(narrow: Any, plan: QuantPlan) -> None:
    for entry in collect_entries(narrow.model, plan).weights:
        source = entry.source
        if source is not None and source.adaptive is not None:
            with pytest.raises(NoFixedFormError, match="a step per sample"):
                fixed_layer(entry, plan)
            return
    pytest.fail("no layer reads an adaptive step")


def test_what_cannot_be_is_told() -> None:
    spec = QuantSpec(4, signed=False, symmetric=False)
    with pytest.raises(ValueError, match="zero point 0"):
        TensorQuantizer(spec, np.array(1, np.float32), np.array(3, np.int32), adaptive=MODULE)
    with pytest.raises(ModelError, match="missing"):
        AdaptiveModule.from_arrays({"w1": MODULE.w1})
    quantizer = TensorQuantizer(spec, np.array(0.1, np.float32), np.array(0, np.int32), adaptive=MODULE)
    with pytest.raises(ValueError, match="steps of their samples"):
        quantizer.dequantize(np.zeros(3, np.uint8))
