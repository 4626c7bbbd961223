"""The integer program against all choices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from postquant.calib.bit_program import Option, solve, undominated


def _layers(seed: int, layers: int = 5) -> list[list[Option]]:
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(layers):
        size, worth = int(rng.integers(10, 1000)), float(10 ** rng.uniform(-6, -1))
        result.append([Option(bits, 8, size * bits / 8, worth * 4.0 ** -(bits - 2)) for bits in (2, 3, 4, 8)])
    return result


def _total(options: tuple[Option, ...] | list[Option], what: str) -> float:
    return float(sum(getattr(option, what) for option in options))


@pytest.mark.parametrize("seed", range(6))
def test_smallest_noise_within_a_cost(seed: int) -> None:
    layers = _layers(seed)
    limit = 0.45 * sum(options[-1].cost for options in layers)
    found = solve(layers, most_cost=limit)
    best = min(_total(choice, "noise") for choice in itertools.product(*layers) if _total(choice, "cost") <= limit)
    assert found is not None
    assert _total(found, "cost") <= limit
    assert _total(found, "noise") == pytest.approx(best, rel=2e-4)


@pytest.mark.parametrize("seed", range(6))
def test_smallest_cost_with_a_noise(seed: int) -> None:
    layers = _layers(seed)
    limit = 3 * sum(options[-1].noise for options in layers)
    found = solve(layers, most_noise=limit)
    best = min(_total(choice, "cost") for choice in itertools.product(*layers) if _total(choice, "noise") <= limit)
    assert found is not None
    assert _total(found, "noise") <= limit
    assert _total(found, "cost") == pytest.approx(best, rel=2e-4)


def test_no_choice() -> None:
    layers = _layers(0)
    assert solve(layers, most_cost=0.9 * sum(options[0].cost for options in layers)) is None
    assert solve(layers, most_noise=0.0) is None


def test_limit_that_is_met_exactly() -> None:
    layers = _layers(1)
    found = solve(layers, most_cost=sum(options[0].cost for options in layers))
    assert found == [options[0] for options in layers]


def test_options_that_cost_as_much_and_are_worse_are_left_out() -> None:
    options = [Option(5, 8, 8.0, 0.3), Option(8, 8, 8.0, 0.1), Option(2, 8, 2.0, 0.9), Option(3, 8, 4.0, 0.95)]
    assert [option.wbits for option in undominated(options)] == [2, 8]


def test_one_limit_is_needed() -> None:
    with pytest.raises(ValueError, match="one limit"):
        solve(_layers(0))
