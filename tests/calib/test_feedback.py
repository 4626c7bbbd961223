"""Feedback lowers what rounding errors of channels do to the outputs, and its numbers are the operator's."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from postquant.calib.activation_levels import quantizer_with_levels
from postquant.calib.feedback import (
    Candidate,
    candidates,
    choose,
    expected_harm,
    feedback_of,
    feedbacks_of,
    within_places,
)
from postquant.runtime_ops.law_feedback import COEFFICIENT_WEIGHT, GROUPS, Feedback
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

SPEC = QuantSpec(4, signed=False, symmetric=False)


def _quantizer(channels: int, rng: np.random.Generator) -> TensorQuantizer:
    levels = np.linspace(-3, 3, 16)[None] * rng.uniform(0.5, 1.0, (channels, 1))
    levels[:, 7] = 0.0
    return quantizer_with_levels(SPEC, levels, -2)


def _errors(quantizer: TensorQuantizer, x: np.ndarray) -> np.ndarray:
    errors: np.ndarray = quantizer.simulate(x).astype(np.float64) - x
    return errors


@pytest.mark.parametrize(("channels", "outputs", "least"), [(64, 8, 6.0), (16, 16, 0.3), (5, 2, 2.0)])
def test_it_lowers_the_error_of_a_layer_behind(channels: int, outputs: int, least: float) -> None:
    """A layer with 8 outputs of 64 channels sees 8 sums of their errors, which later channels can make small."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((outputs, channels))
    quantizer = _quantizer(channels, rng)
    x = np.clip(rng.standard_normal((channels, 4000)), -2.5, 2.5).astype(np.float32)
    nearest = _errors(quantizer, x)
    feedback = feedback_of(weight.T @ weight, np.square(nearest).mean(axis=1), float(quantizer.scale))
    assert feedback is not None
    fed = _errors(_with(quantizer, feedback), x)
    gain = 10 * np.log10(np.square(weight @ nearest).sum() / np.square(weight @ fed).sum())
    assert gain > least
    # Each of them alone is rounded worse.
    assert np.square(fed).sum() >= np.square(nearest).sum()


def _with(quantizer: TensorQuantizer, feedback: Feedback) -> TensorQuantizer:
    return dataclasses.replace(quantizer, feedback=feedback)


def test_independent_channels_have_nothing_to_make_up_for() -> None:
    rng = np.random.default_rng(1)
    quantizer = _quantizer(12, rng)
    x = rng.standard_normal((12, 500)).astype(np.float32)
    feedback = feedback_of(np.diag(rng.uniform(1, 2, 12)), np.ones(12), float(quantizer.scale))
    assert feedback is not None
    np.testing.assert_array_equal(_errors(_with(quantizer, feedback), x), _errors(quantizer, x))


def test_coefficients_are_those_of_the_best_real_answer() -> None:
    """Against the solution of the least squares that the module docstring names, for every group."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((6, 24))
    hessian, noise, step = weight.T @ weight, rng.uniform(0.5, 2.0, 24), 0.1
    feedback = feedback_of(hessian, noise, step)
    assert feedback is not None
    real = feedback.right * feedback.right_scale[:, None].astype(np.float64)
    real = real @ (feedback.left * feedback.left_scale[:, None].astype(np.float64))
    damped = hessian + 0.1 * np.trace(hessian) / 24 * np.eye(24)
    for group in range(1, GROUPS):
        before, rest = np.flatnonzero(feedback.group < group), np.flatnonzero(feedback.group >= group)
        best = np.linalg.solve(damped[np.ix_(rest, rest)], hessian[np.ix_(rest, before)])
        own = feedback.group[rest] == group
        found, wanted = real[np.ix_(rest[own], before)], best[own]
        assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


def test_what_does_most_harm_is_rounded_first() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((4, 16))
    hessian, noise = weight.T @ weight, rng.uniform(0.1, 9.0, 16)
    feedback = feedback_of(hessian, noise, 1.0)
    assert feedback is not None
    harm = np.diag(hessian) * noise
    for group in range(1, GROUPS):
        assert harm[feedback.group == group].max() <= harm[feedback.group == group - 1].min()


def test_sums_of_many_channels_stay_exact() -> None:
    """With equal coefficients for 3000 channels the largest codes would add up to more than float32 holds."""
    hessian = np.ones((3000, 3000))
    feedback = feedback_of(hessian, np.ones(3000), 1.0)
    assert feedback is not None
    assert np.abs(feedback.left.astype(np.int64)).sum(axis=1).max() <= COEFFICIENT_WEIGHT


@pytest.mark.parametrize(
    ("hessian", "noise"),
    [
        (np.ones((1, 1)), np.ones(1)),
        (np.zeros((3, 3)), np.ones(3)),
        (np.ones((3, 3)), np.zeros(3)),
        (np.full((3, 3), np.nan), np.ones(3)),
    ],
)
def test_without_errors_that_matter_there_is_none(hessian: np.ndarray, noise: np.ndarray) -> None:
    assert feedback_of(hessian, noise, 1.0) is None


@pytest.mark.parametrize("across", [False, True])
def test_cells_are_chosen_where_neighbours_are_seen_together(across: bool) -> None:
    """Readers see sums over the places of a cell, or every place by itself; the gradients are samples of that."""
    rng = np.random.default_rng(4)
    channels, places = 6, 4
    seen = rng.standard_normal((3, channels))
    rows = [np.kron(np.ones((1, places)) if across else np.eye(places), seen) for _ in range(2)]
    halves = [(row.T * rng.uniform(0.8, 1.2, len(row))) @ row for row in rows]
    noise = rng.uniform(0.5, 1.0, channels)
    (feedback,) = choose([candidates(halves, noise, 0.1, 2)], math.inf)
    assert feedback is not None
    assert feedback.cell == (2 if across else 1)
    assert feedback.channels == channels
    np.testing.assert_allclose(
        within_places(halves[0], 2), sum(halves[0].reshape(4, 6, 4, 6)[i, :, i] for i in range(4))
    )


def test_gradients_of_one_half_do_not_choose_cells_for_the_other() -> None:
    """Few gradients are all explained by many coefficients: those of other samples judge."""
    rng = np.random.default_rng(5)
    channels = 8
    halves = []
    for _ in range(2):
        few = rng.standard_normal((6, 4 * channels))
        halves.append(few.T @ few)
    every = candidates(halves, np.ones(channels), 0.1, 2)
    most = {n: next(one for one in every if one.feedback is not None and one.feedback.cell == n) for n in (1, 2)}
    assert most[2].harm > most[1].harm
    (feedback,) = choose([every], math.inf)
    assert feedback is None or feedback.cell == 1


def test_the_expected_harm_is_that_of_the_law() -> None:
    rng = np.random.default_rng(6)
    quantizer = _quantizer(12, rng)
    weight = rng.standard_normal((5, 12))
    hessian = weight.T @ weight
    # Values between the ends of the levels, whose errors are independent.
    x = rng.uniform(-0.8, 0.8, (12, 4000)).astype(np.float32)
    nearest = _errors(quantizer, x)
    noise = np.square(nearest).mean(axis=1)
    feedback = feedback_of(hessian, noise, float(quantizer.scale))
    assert feedback is not None
    fed = _errors(_with(quantizer, feedback), x)
    found = np.square(weight @ fed).sum() / x.shape[1]
    assert expected_harm(hessian, noise, feedback) == pytest.approx(found, rel=0.25)
    assert found < 0.7 * np.square(weight @ nearest).sum() / x.shape[1]


def test_what_is_saved_has_a_price() -> None:
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((3, 8))
    hessian = weight.T @ weight
    few, many = feedbacks_of(hessian, np.ones(8), 0.1, ranks=[1, 3])
    # The second activation does little harm: what may be saved there is not worth as much.
    much, little = (
        (Candidate(None, 8 * harm), Candidate(few, 2 * harm), Candidate(many, harm)) for harm in (100.0, 1.0)
    )
    assert choose([much, little], math.inf) == [many, many]
    assert choose([much, little], 10 * little[1].size) == [many, few]
    assert choose([much, little], 2 * little[1].size) == [many, None]
    assert choose([much, little], 1) == [None, None]


def test_fewer_coefficients_are_the_most_important_ones() -> None:
    rng = np.random.default_rng(9)
    weight = rng.standard_normal((12, 32)) * np.geomspace(1, 0.1, 12)[:, None]
    hessian, noise = weight.T @ weight, np.ones(32)
    every = feedbacks_of(hessian, noise, 0.1)
    ranks = [feedback.rank for feedback in every]
    assert ranks == [ranks[0] >> halved for halved in range(len(ranks))]
    assert ranks[-1] == 1 or len(ranks) == 5
    harms = [expected_harm(hessian, noise, feedback) for feedback in every]
    assert harms == sorted(harms)
    assert harms[-1] < np.diag(hessian).sum()
    assert [feedback.rank for feedback in feedbacks_of(hessian, noise, 0.1, ranks=[5, 2])] == [5, 2]


def test_without_a_second_half_levels_are_nearest() -> None:
    weight = np.random.default_rng(8).standard_normal((6, 16))
    every = candidates([weight.T @ weight, np.zeros((16, 16))], np.ones(4), 0.1, 2)
    assert all(math.isinf(one.harm) for one in every[1:])
    assert choose([every], math.inf) == [None]
    nothing = candidates([np.zeros((16, 16))] * 2, np.ones(4), 0.1, 2)
    assert nothing == (Candidate(None, 0.0),)
    assert choose([nothing], 1) == [None]
