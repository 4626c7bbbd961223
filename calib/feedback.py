"""Error feedback across channels: which numbers make later channels undo what earlier ones' errors do.

Let ``e`` be the rounding errors of all channels at one place and ``H`` (C x C) what they do to the network's outputs:

    error of the outputs = e' H e,    H = E[g g'],    g the outputs' gradient along the channels

Rounding every channel to nearest makes errors that know nothing of each other, and the sum of the diagonal is what is
lost. But a layer that has 64 outputs for 512 channels sees 64 sums of errors only, and a channel's rounding can be
chosen so that it undoes the others'. Channels are rounded in groups, one after the other. Behind some groups with
errors ``e_before``, the best that all others could do with real numbers is

    e_rest = -(H_rest,rest + lambda I)^-1 H_rest,before e_before

of which the next group takes its part: it rounds ``x - shift`` with ``shift = (the part of e_rest with the sign
turned)``. That is Babai's nearest plane (1986) with steps of many dimensions at a time, known from weights as GPTQ
(Frantar et al. 2023, with H from the layer's inputs), here for activations at run time, with H from the outputs.
``lambda`` stands for what the others cannot do because they are rounded as well.

``H = U D U'`` has few eigenvalues that matter, and so the shift needs only ``R`` sums of the errors,
``t = left e`` with ``left = sqrt(D) U'``, and ``shift = right t``.

Layers with windows of 3 x 3 see sums over neighbouring places as well. So ``e`` may be the errors of all channels at
all places of a *cell*, a square of places. How many coefficients an activation has, and whether across cells, is a
matter of what they save on gradients that they do not come from, and of their bytes (:func:`choose`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.law_feedback import COEFFICIENT_WEIGHT, GROUPS, Feedback

Reals = npt.NDArray[np.float64]
# In units of the mean of H's diagonal (docs/learning.md, "Error feedback").
_DAMPING = 0.1
# Share of the trace of H that its smallest eigenvalues may have together to be left out.
_LEFT_OUT = 0.03
# The largest code of the operator's coefficients and of the sums that it carries, and how many deviations of a sum,
# were errors independent, it stands for.
_LARGEST = 127
_DEVIATIONS = 5.0
# How often the number of coefficients is halved at most, and one more.
_HALVED = 5
# Of the harm of all activations together, what coefficients of as many bytes as the weights must save.
_PRICE = 0.25


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What may be done about the errors of some channels.

    Attributes:
        feedback: Its numbers; None for nearest levels.
        harm: What is left of the errors at the outputs by gradients that it does not come from; infinite where there
            are none.
    """

    feedback: Feedback | None
    harm: float

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return 0 if self.feedback is None else self.feedback.nbytes


def candidates(halves: Sequence[Reals], noise: Reals, step: float, cell: int) -> tuple[Candidate, ...]:
    """Nearest levels, and feedbacks with and without cells, of many and of few coefficients.

    Args:
        halves: Two of (n n C, n n C), each from half of the samples: what errors in cells do to the outputs.
        noise: (C,) >= 0, mean square of every channel's error of rounding to nearest, in the tensor's units.
        step: Of the codes that the operator counts errors in, > 0, in the tensor's units.
        cell: n, the side of the cells, at least 1.

    Returns:
        Nearest levels first, and nothing else where there are fewer than two channels or no error matters.
    """
    alone = np.add(*(within_places(half, cell) for half in halves))
    found = [Candidate(None, float(np.diag(alone) @ noise))]
    for side in dict.fromkeys((1, cell)):
        parts = [half if side == cell else within_places(half, cell) for half in halves]
        everywhere = np.tile(noise, side * side)
        feedbacks = feedbacks_of(np.add(*parts), everywhere, step, side)
        ranks = [feedback.rank for feedback in feedbacks]
        harms = [0.0] * len(ranks)
        for half, other in (parts, reversed(parts)):
            judged = feedbacks_of(half, everywhere, step, side, ranks)
            for index in range(len(ranks)):
                harms[index] += expected_harm(other, everywhere, judged[index]) if judged else math.inf
        found += [Candidate(feedback, harm) for feedback, harm in zip(feedbacks, harms, strict=True)]
    return tuple(found)


def choose(sites: Sequence[Sequence[Candidate]], weight_bytes: float) -> list[Feedback | None]:
    """What saves the most of the harm of all activations, at a price: coefficients are bytes, and work at run time.

    Args:
        sites: The :func:`candidates` of each.
        weight_bytes: Of the model's weights.

    Returns:
        For every site; None for nearest levels.
    """
    whole = sum(min(one.harm for one in site) for site in sites)

    def cost(one: Candidate) -> float:
        return one.harm / max(whole, 1e-300) + _PRICE * one.size / max(weight_bytes, 1.0)

    return [min(site, key=cost).feedback for site in sites]


def within_places(hessian: Reals, cell: int) -> Reals:
    """What errors do that know nothing of other places.

    Args:
        hessian: (n n C, n n C) of cells.
        cell: n.

    Returns:
        (C, C), the sum over the places of a cell.
    """
    places = cell * cell
    channels = len(hessian) // places
    found: Reals = np.einsum("icid->cd", hessian.reshape(places, channels, places, channels))
    return found


def expected_harm(hessian: Reals, noise: Reals, feedback: Feedback) -> float:
    """What is left of the errors at the outputs, if roundings are independent of each other and no shift is limited.

    Args:
        hessian: (C, C), what errors do to the outputs.
        noise: (C,), mean square of every channel's error of rounding to nearest.
        feedback: Of C channels.
    """
    left = feedback.left.astype(np.float64) * feedback.left_scale[:, None]
    right = feedback.right.astype(np.float64) * feedback.right_scale[:, None]
    # Errors by roundings: e = roundings - right left e, for each group with those of the groups before it.
    errors = np.eye(len(hessian))
    for group in range(1, GROUPS):
        own, before = feedback.group == group, feedback.group < group
        errors[own] -= right[own] @ (left[:, before] @ errors[before])
    return float(noise @ np.einsum("ki,ki->i", hessian @ errors, errors))


def feedback_of(hessian: Reals, noise: Reals, step: float, cell: int = 1) -> Feedback | None:
    """The feedback of most coefficients (:func:`feedbacks_of`), None where there is none."""
    found = feedbacks_of(hessian, noise, step, cell)
    return found[0] if found else None


def feedbacks_of(
    hessian: Reals, noise: Reals, step: float, cell: int = 1, ranks: Sequence[int] | None = None
) -> list[Feedback]:
    """Feedbacks for some channels, of many and of few coefficients.

    Args:
        hessian: (C, C), symmetric, what errors do to the outputs; its unit plays no part.
        noise: (C,) >= 0, mean square of every channel's error of rounding to nearest, in the tensor's units.
        step: Of the codes that the operator counts errors in, > 0, in the tensor's units.
        cell: The channels are those of squares of places with this side.
        ranks: Of each; by default so many that little is left out, and halves of that down to a sixteenth.

    Returns:
        Nothing where there are fewer than two channels or no error matters.
    """
    channels = len(hessian)
    power = float(np.trace(hessian)) / max(channels, 1)
    if channels < 2 or not (np.isfinite(power) and power > 0) or not (noise > 0).any():
        return []
    hessian = hessian / power
    # What does most harm comes first: the others can still do something about it.
    order = np.argsort(-np.diag(hessian) * noise, kind="stable")
    group = np.empty(channels, np.uint8)
    parts = np.array_split(order, GROUPS)
    for index, part in enumerate(parts):
        group[part] = index
    factor, enough = _factor(hessian)
    if ranks is None:
        ranks = list(dict.fromkeys(max(enough >> halved, 1) for halved in range(_HALVED)))
    factor = factor[:, : max(ranks)]
    right = np.zeros(factor.shape)
    for index, part in enumerate(parts):
        if index and len(part):
            rest = np.concatenate(parts[index:])
            damped = hessian[np.ix_(rest, rest)] + _DAMPING * np.eye(len(rest))
            right[part] = np.linalg.solve(damped, factor[rest])[: len(part)]
    deviations = np.sqrt(noise) / step
    every = (_coded(group, factor[:, :rank].T, right[:, :rank], deviations) for rank in ranks)
    return [dataclasses.replace(feedback, cell=cell) for feedback in every]


def _factor(hessian: Reals) -> tuple[Reals, int]:
    """(C, C) whose product with its transpose is H, what matters most first; and how many columns are enough."""
    values, vectors = np.linalg.eigh(hessian)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    rank = int(np.searchsorted(np.cumsum(values), (1 - _LEFT_OUT) * values.sum())) + 1
    factor: Reals = vectors * np.sqrt(values)
    return factor, rank


def _coded(group: npt.NDArray[np.uint8], left: Reals, right: Reals, deviations: Reals) -> Feedback:
    """The operator's numbers.

    Args:
        group: (C,).
        left: (R, C).
        right: (C, R).
        deviations: (C,) of every channel's error, in codes.
    """
    # A sum's largest value gets the code 127.
    largest = _DEVIATIONS * np.sqrt((np.square(left) * np.square(deviations)).sum(axis=1))
    unit = np.maximum(largest, 1e-30) / _LARGEST
    left_codes, left_unit = _rows(left)
    right_codes, right_unit = _rows(right * unit)
    return Feedback(
        group,
        left_codes,
        (left_unit / unit).astype(np.float32),
        right_codes,
        right_unit.astype(np.float32),
    )


def _rows(values: Reals) -> tuple[npt.NDArray[np.int8], Reals]:
    """Codes of every row, and its unit; sums of a row's codes are exact in float32."""
    size = np.abs(values)
    unit = np.maximum(size.max(axis=1) / _LARGEST, size.sum(axis=1) / (COEFFICIENT_WEIGHT - values.shape[1]))
    unit = np.where(unit > 0, unit, 1.0)
    return np.rint(values / unit[:, None]).astype(np.int8), unit
