"""The limit of the scale search's work: the estimate against counted arithmetic, and what is left out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from postquant.calib import weight_search
from postquant.calib.search_effort import choose_effort, efforts, layer_work
from postquant.calib.site_data import WorkLimits
from postquant.calib.weight_search import SearchOptions, search_weight

EVERYTHING = 1e30


@pytest.mark.parametrize("candidates", [2, 12, 20, 21, 100, 103])
def test_judged_candidates_are_counted(layer_case: Any, candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = layer_case("MatMul", inputs=24, outputs=16)
    products = []
    by_block = weight_search._by_block

    def counted(square: Any, matrix: Any) -> Any:
        products.append(square.size * matrix.shape[-1])
        return by_block(square, matrix)

    monkeypatch.setattr(weight_search, "_by_block", counted)
    search_weight(case.layer, case.weight, case.start(8), case.moments(), SearchOptions(candidates=candidates))
    # One more makes the problem.
    assert len(products) == weight_search.tried_candidates(candidates) + 1
    assert set(products) == {24 * 24 * 16}


def test_work_grows_as_its_parts_do(layer_case: Any) -> None:
    options, effort = SearchOptions(rounds=1), efforts(2048)[0]
    small, wide = (
        layer_case("MatMul", inputs=600, outputs=700).layer,
        layer_case("MatMul", inputs=600, outputs=7000).layer,
    )
    assert 8 < layer_work(wide, effort, options, 0) / layer_work(small, effort, options, 0) < 10
    works = [layer_work(wide, effort, dataclasses.replace(options, rounds=r), 0) for r in (1, 2, None)]
    assert works[0] < works[1] == works[2]
    # Half the block and a third of the candidates: products cost less, passes over the weights stay.
    less = dataclasses.replace(effort, block=300, candidates=20)
    assert layer_work(wide, less, options, 0) < layer_work(wide, effort, options, 0) / 2
    # A product for each candidate is most of it.
    judged = 600 * 600 * 7000 * weight_search.tried_candidates(options.candidates)
    assert judged < works[0] < 3 * judged


def test_efforts_only_take_away() -> None:
    asked = SearchOptions(alpha=0.85, beta=1.2, candidates=8, rounds=1)
    assert all(effort.block == 64 for effort in efforts(64))
    for options in (asked, SearchOptions()):
        for effort in efforts(2048):
            reduced = effort.options(options)
            assert options.alpha <= reduced.alpha <= 1 <= reduced.beta <= options.beta
            assert reduced.candidates <= options.candidates
            assert options.rounds is None or reduced.rounds == options.rounds
            assert effort.options(reduced) == reduced


def test_the_largest_effort_within_the_limit_is_chosen_and_told(layer_case: Any) -> None:
    layers = [layer_case("MatMul", inputs=1536, outputs=n).layer for n in (500, 1500)]
    options = SearchOptions()
    known = efforts(2048)
    works = [sum(layer_work(layer, effort, options, 49 * 10) for layer in layers) for effort in known]
    assert works == sorted(works, reverse=True)
    for effort, work in zip(known, works, strict=True):
        found, notes = choose_effort(layers, options, WorkLimits(search_work=work * 1.01), samples=10)
        assert found == effort
        if effort is known[0]:
            assert notes == ()
            assert found.options(options) == options
        else:
            assert effort.detail in notes[0]
            assert f"{work:.1e}" in notes[0]
            assert f"{works[0]:.1e}" in notes[0]
            in_blocks = [note.startswith("second moments of 2 of 2 layers were kept in blocks") for note in notes[1:]]
            assert in_blocks == ([True] if effort.block < 1536 else [])
    assert choose_effort(layers, options, WorkLimits(search_work=1.0), samples=10)[0] == known[-1]


def test_layers_too_deep_for_whole_moments_are_told(layer_case: Any) -> None:
    layers = [layer_case("MatMul", inputs=n).layer for n in (6, 12)]
    effort, notes = choose_effort(layers, SearchOptions(), WorkLimits(block=6, search_work=EVERYTHING), samples=10)
    assert effort.block == 6
    (note,) = notes
    assert note.startswith("second moments of 1 of 2 layers were kept in blocks of up to 6 inputs (node);")
    assert note.endswith("weights of few bits keep uniform codes there")
    assert choose_effort(layers, SearchOptions(), WorkLimits(search_work=EVERYTHING), samples=10)[1] == ()
