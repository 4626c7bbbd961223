"""Chooses one option for every layer by an integer linear program: :func:`solve`.

With ``x[l, o]`` = 1 where layer ``l`` takes its option ``o``, ``n`` the noise that it adds to the network's outputs and
``c`` what it costs,

    minimize  sum n x   subject to   sum c x <= limit    (the smallest noise within a budget)
    minimize  sum c x   subject to   sum n x <= limit    (the smallest cost with a quality)

and ``sum_o x[l, o] = 1`` for every layer: a multiple-choice knapsack, solved by :func:`scipy.optimize.milp`. Noise adds
up because rounding errors of different layers are independent; where they are not, the noises are measured again
(:mod:`postquant.calib.bit_allocation`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Branches that the solver may look at; a limit of time would make results depend on the machine.
_NODES = 20_000
_GAP = 1e-4


@dataclasses.dataclass(frozen=True)
class Option:
    """What one layer may be.

    Attributes:
        wbits: Bits of the weight.
        abits: Bits of the input.
        cost: In the unit of the limit (bytes, bit operations), >= 0.
        noise: Squared error of the network's outputs over their energy, by this layer alone, >= 0.
    """

    wbits: int
    abits: int
    cost: float
    noise: float


def undominated(options: Sequence[Option]) -> list[Option]:
    """Options that no other beats in cost and noise together, from the cheapest to the best.

    >>> undominated([Option(8, 8, 2.0, 0.1), Option(4, 8, 1.0, 0.2), Option(3, 8, 1.0, 0.3), Option(7, 8, 2.0, 0.1)])
    [Option(wbits=4, abits=8, cost=1.0, noise=0.2), Option(wbits=8, abits=8, cost=2.0, noise=0.1)]
    """
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.noise, -o.wbits, -o.abits)):
        if not kept or option.noise < kept[-1].noise:
            kept.append(option)
    return kept


def solve(
    layers: Sequence[Sequence[Option]], *, most_cost: float | None = None, most_noise: float | None = None
) -> list[Option] | None:
    """The best option of every layer; exactly one of the two limits is given.

    Args:
        layers: The options of each layer, at least one each.
        most_cost: Limit of the total cost; the noise is minimized.
        most_noise: Limit of the total noise; the cost is minimized.

    Returns:
        One option per layer, or None where no choice keeps the limit.

    Raises:
        ValueError: If none or both of the limits are given.
    """
    if (most_cost is None) == (most_noise is None):
        raise ValueError("one limit is needed, of the cost or of the noise")
    choices = [undominated(options) for options in layers]
    noise = np.array([option.noise for options in choices for option in options])
    cost = np.array([option.cost for options in choices for option in options])
    goal, weight, limit = (noise, cost, most_cost) if most_cost is not None else (cost, noise, most_noise)
    assert limit is not None
    owner = np.repeat(np.arange(len(choices)), [len(options) for options in choices])
    least = [min(weight[owner == layer]) for layer in range(len(choices))]
    if sum(least) > limit:
        return None
    # Tolerances of the solver are absolute: the goal is measured in units of a first solution.
    unit, taken = float(goal.sum()) or 1.0, np.zeros(0)
    for _ in range(2):
        taken = _solution(goal / unit, weight / max(limit, 1e-300), owner)
        unit = float(goal @ taken) or unit
    flat = [option for options in choices for option in options]
    found = [option for option, used in zip(flat, taken, strict=True) if used > 0.5]
    return _within(choices, found, most_cost, most_noise)


def _solution(
    goal: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], owner: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """0 or 1 for every option: one of each owner, total weight at most 1, smallest total goal."""
    count = int(owner.max()) + 1
    # 20 MB that nobody without a budget needs.
    import scipy.optimize
    import scipy.sparse

    one = scipy.sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(count, len(owner)))
    result = scipy.optimize.milp(
        goal,
        integrality=np.ones(len(goal)),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one, 1, 1),
            scipy.optimize.LinearConstraint(weight[np.newaxis], -np.inf, 1),
        ],
        options={"node_limit": _NODES, "mip_rel_gap": _GAP},
    )
    if result.x is None:
        raise RuntimeError(f"the integer program was not solved: {result.message}")
    return np.asarray(np.rint(result.x), np.float64)


def _within(
    choices: Sequence[Sequence[Option]], found: list[Option], most_cost: float | None, most_noise: float | None
) -> list[Option]:
    """The solution, with the cheapest steps back where the solver's tolerance let the limit be exceeded."""

    def weight(option: Option) -> float:
        return option.cost if most_cost is not None else option.noise

    def goal(option: Option) -> float:
        return option.noise if most_cost is not None else option.cost

    limit = most_cost if most_cost is not None else most_noise
    assert limit is not None
    while sum(weight(option) for option in found) > limit:
        steps = [
            ((goal(other) - goal(option)) / (weight(option) - weight(other)), index, other)
            for index, (options, option) in enumerate(zip(choices, found, strict=True))
            for other in options
            if weight(other) < weight(option)
        ]
        _, index, other = min(steps, key=lambda step: step[:2])
        found[index] = other
    return found
