"""Widths for all layers within a budget, measured and repaired: :func:`allocate_bits`.

1. :func:`postquant.calib.bit_program.solve` chooses by the measured noise of each layer, as if noises added up.
2. The network is quantized quickly with these widths and its outputs are compared with the float network's.
3. Where the sum of the noises was wrong by more than :data:`TRUSTED_DB`, they are measured again, in the quantized
   network this time: what the error falls by when one layer gets its float weights back. Each layer's noises, at all
   widths, are multiplied by the quotient of the two measurements, and the program is solved again.

The best network that was measured is taken: the one with the smallest error within the budget, or the cheapest of
those that are good enough. A limit that the measured network misses (an SQNR, or a size that a formula predicts) is
moved by as much.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from postquant.calib.bit_program import Option, solve
from postquant.calib.trial import Outcome

# The sum of noises is trusted so far, in dB.
TRUSTED_DB = 1.0
_REPAIRS = 2
_TURNS = 6
# A layer's noise changes by at most this factor in one repair.
_MOST_CHANGE = 16.0
# An SQNR is met when it lies above the wanted one by no more than this, in dB.
_CLOSE_DB = 0.25

Choice = Mapping[str, Option]


@dataclasses.dataclass(frozen=True)
class Quick:
    """What a quickly quantized network is like.

    Attributes:
        outcome: Error of its outputs.
        cost: In the unit of the budget.
    """

    outcome: Outcome
    cost: float

    @property
    def noise(self) -> float:
        """Squared error over energy."""
        return self.outcome.error**2


@dataclasses.dataclass(frozen=True)
class Limit:
    """The budget; one of the two is given.

    Attributes:
        cost: Largest cost; the error is to be the smallest.
        sqnr_db: Smallest SQNR in dB; the cost is to be the smallest.
    """

    cost: float | None = None
    sqnr_db: float | None = None

    def __post_init__(self) -> None:
        if (self.cost is None) == (self.sqnr_db is None):
            raise ValueError("one limit is needed, of the cost or of the SQNR")

    def kept(self, quick: Quick) -> bool:
        """Whether a network is within the budget."""
        if self.cost is not None:
            return quick.cost <= self.cost
        return self.sqnr_db is None or quick.outcome.sqnr_db >= self.sqnr_db


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The chosen widths.

    Attributes:
        choice: Layer -> option.
        quick: What was measured.
        predicted_db: SQNR that the sum of the noises, as measured one by one, had promised.
        repaired: How often the noises were measured again.
        kept: Whether the measured network is within the budget.
    """

    choice: Choice
    quick: Quick
    predicted_db: float
    repaired: int
    kept: bool


def allocate_bits(
    options: Mapping[str, Sequence[Option]],
    limit: Limit,
    measure: Callable[[Choice], Quick],
    without: Callable[[Choice, str], Outcome],
    *,
    fixed_noise: float = 0.0,
    fixed_cost: float = 0.0,
) -> Allocation:
    """The best widths.

    Args:
        options: Layer -> what it may be.
        limit: The budget.
        measure: Quantizes the network so.
        without: The error of that network when one layer is float again.
        fixed_noise: Noise that no choice changes (activations at given widths).
        fixed_cost: Cost that no choice changes.

    Returns:
        The allocation; where nothing that was measured keeps the limit, the best of that, which is not `kept`.
    """
    names = list(options)
    tables = [list(options[name]) for name in names]
    most_cost = None if limit.cost is None else limit.cost - fixed_cost
    most_noise = None if limit.sqnr_db is None else 10 ** (-limit.sqnr_db / 10)
    best: Allocation | None = None
    known: dict[tuple[tuple[int, int], ...], Quick] = {}
    repaired, first_db = 0, None
    for _ in range(_TURNS):
        room = None if most_noise is None else max(most_noise - fixed_noise, 0.0)
        found = solve(tables, most_cost=most_cost, most_noise=room)
        if found is None:
            if limit.sqnr_db is None and (best is None or not best.kept):
                # The formula may be wrong by little: the cheapest network is measured before the limit is given up.
                found = [min(table, key=lambda option: option.cost) for table in tables]
            elif best is None:
                found = [min(table, key=lambda option: option.noise) for table in tables]
            else:
                break
        choice = dict(zip(names, found, strict=True))
        widths = tuple((option.wbits, option.abits) for option in found)
        again = widths in known
        quick = known.setdefault(widths, known[widths] if again else measure(choice))
        predicted = fixed_noise + sum(option.noise for option in found)
        first_db = -10 * math.log10(max(predicted, 1e-20)) if first_db is None else first_db
        candidate = Allocation(choice, quick, first_db, repaired, limit.kept(quick))
        if best is None or _better(candidate, best, limit):
            best = candidate
        if limit.sqnr_db is not None:
            missing = limit.sqnr_db - quick.outcome.sqnr_db
            if again or -_CLOSE_DB <= missing <= 0:
                break
            assert most_noise is not None
            most_noise = fixed_noise + max(most_noise - fixed_noise, 1e-3 * most_noise) * 10 ** (-missing / 10)
            continue
        assert limit.cost is not None
        assert most_cost is not None
        if quick.cost > limit.cost and not again:
            # Below the cost of this choice, not below the room that it left: else it could be chosen once more.
            most_cost = sum(option.cost for option in found) - (quick.cost - limit.cost)
            continue
        wrong = abs(10 * math.log10(max(quick.noise, 1e-20) / max(predicted, 1e-20)))
        if again or repaired == _REPAIRS or wrong <= TRUSTED_DB:
            break
        tables = [
            _rescaled(table, option, quick.noise - without(choice, name).error ** 2)
            for name, table, option in zip(names, tables, found, strict=True)
        ]
        repaired += 1
    assert best is not None  # the first turn sets it
    return best


def _better(one: Allocation, other: Allocation, limit: Limit) -> bool:
    if one.kept != other.kept:
        return one.kept
    if limit.sqnr_db is None:
        return one.quick.noise < other.quick.noise
    if one.kept:
        return one.quick.cost < other.quick.cost
    return one.quick.outcome.sqnr_db > other.quick.outcome.sqnr_db


def _rescaled(table: Sequence[Option], taken: Option, noise: float) -> list[Option]:
    """The options with noises as they are in the quantized network."""
    factor = min(max(noise / max(taken.noise, 1e-20), 1 / _MOST_CHANGE), _MOST_CHANGE)
    return [dataclasses.replace(option, noise=option.noise * factor) for option in table]
