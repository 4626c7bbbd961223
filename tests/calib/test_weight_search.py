"""The scale search, against every candidate tried on explicit rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from postquant.calib.moments import Moments
from postquant.calib.weight_search import Objective, SearchOptions, search_weight
from postquant.runtime_ops.quantizer import TensorQuantizer

KINDS = ("Conv", "grouped", "depthwise", "ConvTranspose", "transposed groups", "Gemm", "MatMul")

Doubles = np.ndarray[Any, np.dtype[np.float64]]

# So few candidates that each of them is tried.
ALL = SearchOptions(candidates=17, centred=False)


def scaled(start: TensorQuantizer, multiple: float) -> TensorQuantizer:
    return dataclasses.replace(start, scale=(start.scale / np.float32(multiple)).astype(np.float32))


def cosines(case: Any, quantizer: TensorQuantizer, *, centred: bool) -> Doubles:
    """(G, M) cosine of the outputs; one number for all channels where one scale serves all."""
    outputs, wanted = (case.outputs(w, centred=centred) for w in (quantizer.simulate(case.weight), case.weight))
    axis = 0 if quantizer.spec.axis is not None else None
    inner, norm, energy = ((a * b).sum(axis) for a, b in ((outputs, wanted), (outputs, outputs), (wanted, wanted)))
    # Where a coarse scale rounds every weight to zero, there is no output, and no likeness.
    return np.asarray(inner / np.sqrt(np.maximum(norm, 1e-300) * energy))


def best_of_all(case: Any, start: TensorQuantizer, options: SearchOptions) -> Doubles:
    """The best score of each channel: cosine, or minus the squared error."""
    multiples = [1.0, *np.linspace(options.alpha, options.beta, options.candidates)]
    if options.objective is Objective.COSINE:
        scores = [cosines(case, scaled(start, m), centred=options.centred) for m in multiples]
    else:
        scores = [-case.errors(scaled(start, m), centred=options.centred) for m in multiples]
        scores = [score if start.spec.axis is not None else np.asarray(score.sum()) for score in scores]
    best: Doubles = np.max(scores, axis=0)
    return best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("centred", [False, True])
class TestAgainstEveryCandidate:
    def test_cosine(self, layer_case: Any, kind: str, bits: int, centred: bool) -> None:
        case = layer_case(kind)
        options = dataclasses.replace(ALL, centred=centred)
        start = case.start(bits)
        found = search_weight(case.layer, case.weight, start, case.moments(), options)
        reached = cosines(case, found, centred=centred)
        np.testing.assert_allclose(reached, best_of_all(case, start, options), rtol=3e-6)
        # The codes are those of a scale on the grid, and the scale is the best one for them.
        assert found.codes is not None
        assert np.abs(found.codes.astype(int)).max() <= start.spec.qmax
        for gain in (0.999, 1.001):
            other = dataclasses.replace(found, scale=(found.scale * gain).astype(np.float32))
            assert case.errors(found, centred=centred).sum() <= case.errors(other, centred=centred).sum() * (1 + 1e-4)

    def test_mse(self, layer_case: Any, kind: str, bits: int, centred: bool) -> None:
        case = layer_case(kind)
        options = dataclasses.replace(ALL, centred=centred, objective=Objective.MSE)
        start = case.start(bits)
        found = search_weight(case.layer, case.weight, start, case.moments(), options)
        assert found.codes is None
        errors = case.errors(found, centred=centred)
        reached = errors if start.spec.axis is not None else errors.sum()
        np.testing.assert_allclose(reached, -best_of_all(case, start, options), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_coarse_to_fine_is_close_to_the_best_of_100(layer_case: Any, kind: str) -> None:
    case = layer_case(kind, count=400)
    options = SearchOptions(centred=False)
    start = case.start(4)
    found = search_weight(case.layer, case.weight, start, case.moments(), options)
    reached, best = cosines(case, found, centred=False), best_of_all(case, start, options)
    # In terms of the error that remains, at most a tenth worse in the mean, and never worse than the start.
    assert (1 - reached).mean() <= 1.1 * (1 - best).mean() + 1e-7
    assert (reached >= cosines(case, start, centred=False) - 1e-6).all()


@pytest.mark.parametrize("objective", list(Objective))
def test_one_scale_for_the_tensor(layer_case: Any, objective: Objective) -> None:
    case = layer_case("MatMul")
    start = case.start(4, per_channel=False)
    options = dataclasses.replace(ALL, objective=objective)
    found = search_weight(case.layer, case.weight, start, case.moments(), options)
    assert found.scale.shape == ()
    best = best_of_all(case, start, options)
    reached = cosines(case, found, centred=False) if objective is Objective.COSINE else -case.errors(found).sum()
    np.testing.assert_allclose(reached, best, rtol=1e-4)


def test_dead_channels_and_dead_inputs(layer_case: Any) -> None:
    case = layer_case("Conv")
    weight = case.weight.copy()
    weight[2] = 0
    dead = dataclasses.replace(case, weight=weight)
    for objective in Objective:
        options = dataclasses.replace(ALL, objective=objective)
        found = search_weight(dead.layer, weight, dead.start(4), dead.moments(), options)
        assert np.isfinite(found.scale).all()
        assert not found.simulate(weight)[2].any()
        # Nothing arrives: every scale is as good as the start, which therefore stays.
        start = case.start(4)
        nothing = Moments(10, np.zeros_like(case.moments().mean), np.zeros_like(case.moments().square))
        kept = search_weight(case.layer, case.weight, start, nothing, options)
        np.testing.assert_array_equal(kept.scale, start.scale)
        np.testing.assert_array_equal(kept.simulate(case.weight), start.simulate(case.weight))


def test_constant_inputs_leave_the_centred_problem_empty(layer_case: Any) -> None:
    """Where an input never changes, the bias removes its whole error, and the start stays."""
    case = layer_case("MatMul")
    constant = dataclasses.replace(case, rows=np.broadcast_to(case.rows[:1], case.rows.shape).copy())
    start = case.start(4)
    found = search_weight(case.layer, case.weight, start, constant.moments(), dataclasses.replace(ALL, centred=True))
    assert np.isfinite(found.scale).all()
    assert (np.abs(found.scale / start.scale - 1) <= 1).all()


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("per_channel", [False, True])
def test_scales_stay_powers_of_two(layer_case: Any, objective: Objective, per_channel: bool) -> None:
    case = layer_case("Conv")
    free = case.start(4, per_channel=per_channel)
    start = TensorQuantizer.from_range(
        dataclasses.replace(free.spec, power_of_two=True), -7 * free.scale, 7 * free.scale
    )
    found = search_weight(case.layer, case.weight, start, case.moments(), dataclasses.replace(ALL, objective=objective))
    assert (np.frexp(start.scale)[0] == 0.5).all()
    assert (np.frexp(found.scale)[0] == 0.5).all()
    assert case.errors(found, centred=False).sum() <= case.errors(start, centred=False).sum() * 1.05
