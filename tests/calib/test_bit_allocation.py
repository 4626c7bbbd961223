"""Allocation on a network that is a formula: what the sum of noises misses is measured and repaired."""

from __future__ import annotations

import math

import pytest

from postquant.calib.bit_allocation import Allocation, Choice, Limit, Quick, allocate_bits
from postquant.calib.bit_program import Option
from postquant.calib.trial import Outcome

SIZES = {"a": 100.0, "b": 100.0, "c": 200.0}
WORTH = {"a": 1e-1, "b": 3e-2, "c": 1e-3}


def _noise(worth: float, bits: int) -> float:
    return worth * 4.0 ** -(bits - 2)


OPTIONS = {
    name: [Option(bits, 8, size * bits / 8, _noise(WORTH[name], bits)) for bits in (2, 4, 8)]
    for name, size in SIZES.items()
}


class Network:
    """Noises add up, times a factor for each layer that only shows in company."""

    def __init__(self, factors: dict[str, float], extra_cost: float = 0.0) -> None:
        self.factors = factors
        self.extra_cost = extra_cost
        self.measured = 0

    def outcome(self, choice: Choice, left_out: str | None = None) -> Outcome:
        noise = 1e-6 + sum(
            self.factors[name] * _noise(WORTH[name], option.wbits)
            for name, option in choice.items()
            if name != left_out
        )
        return Outcome(math.sqrt(noise), -10 * math.log10(noise))

    def measure(self, choice: Choice) -> Quick:
        self.measured += 1
        return Quick(self.outcome(choice), self.extra_cost + sum(option.cost for option in choice.values()))

    def allocate(self, limit: Limit) -> Allocation:
        return allocate_bits(OPTIONS, limit, self.measure, self.outcome, fixed_noise=1e-6)


PLAIN = {"a": 1.0, "b": 1.0, "c": 1.0}


def test_sums_that_are_right_are_measured_once() -> None:
    network = Network(PLAIN)
    found = network.allocate(Limit(cost=200.0))
    assert {name: option.wbits for name, option in found.choice.items()} == {"a": 8, "b": 4, "c": 2}
    assert found.kept
    assert network.measured == 1
    assert found.predicted_db == pytest.approx(found.quick.outcome.sqnr_db, abs=1e-6)


def test_sums_that_are_wrong_are_repaired() -> None:
    # In company "c" is two hundred times as bad as alone: it should have had the bits of "b".
    network = Network({"a": 1.0, "b": 0.05, "c": 200.0})
    found = network.allocate(Limit(cost=200.0))
    assert found.repaired >= 1
    assert found.kept
    alone = Network(network.factors).measure(
        {name: next(o for o in OPTIONS[name] if o.wbits == bits) for name, bits in {"a": 8, "b": 4, "c": 2}.items()}
    )
    assert found.quick.outcome.sqnr_db > alone.outcome.sqnr_db + 3


def test_a_cost_that_a_formula_misses_is_kept_all_the_same() -> None:
    network = Network(PLAIN, extra_cost=40.0)
    found = network.allocate(Limit(cost=200.0))
    assert found.kept
    assert found.quick.cost <= 200.0


def test_sqnr_is_reached_at_the_smallest_cost() -> None:
    network = Network({"a": 4.0, "b": 4.0, "c": 4.0})
    found = network.allocate(Limit(sqnr_db=25.0))
    assert found.kept
    assert found.quick.outcome.sqnr_db >= 25.0
    narrower = [
        network.measure({**found.choice, name: option})
        for name, taken in found.choice.items()
        for option in OPTIONS[name]
        if option.cost < taken.cost
    ]
    assert all(quick.outcome.sqnr_db < 25.0 for quick in narrower)


def test_sqnr_out_of_reach_gives_the_widest() -> None:
    found = Network(PLAIN).allocate(Limit(sqnr_db=90.0))
    assert not found.kept
    assert {option.wbits for option in found.choice.values()} == {8}


def test_a_choice_that_leaves_room_and_costs_more_than_the_formula_is_not_taken_again() -> None:
    # The formula leaves 5 of 205 free and misses 10: room less by what is too much would let the same choice in.
    network = Network(PLAIN, extra_cost=10.0)
    found = network.allocate(Limit(cost=205.0))
    assert found.kept
    assert found.quick.cost <= 205.0


def test_the_cheapest_is_measured_where_the_formula_says_that_nothing_fits() -> None:
    # Every layer at 2 bits costs 100 by the formula, 70 in truth.
    found = Network(PLAIN, extra_cost=-30.0).allocate(Limit(cost=80.0))
    assert found.kept
    assert {option.wbits for option in found.choice.values()} == {2}


def test_cost_out_of_reach() -> None:
    found = Network(PLAIN).allocate(Limit(cost=50.0))
    assert not found.kept
    assert found.quick.cost == 100.0


def test_one_limit() -> None:
    with pytest.raises(ValueError, match="one limit"):
        Limit()
