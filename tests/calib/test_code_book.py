"""Code books of layers: what is chosen, and that it is what the output error says."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from postquant.calib.code_book import CodeBooks, choose_code_book, takes_code_book
from postquant.calib.moments import Moments
from postquant.calib.table_rounding import Levels, Rounder
from postquant.calib.table_search import learn_table, polished, quantiles
from postquant.calib.weight_search import WeightProblem
from postquant.runtime_ops.code_book import CodeBook, post_table, uniform_table

KINDS = ("Conv", "grouped", "depthwise", "Gemm", "MatMul")
ALL = CodeBooks(frozenset(CodeBook))
Array = np.ndarray[Any, np.dtype[np.float32]]


def problem(case: Any) -> WeightProblem:
    return WeightProblem(case.layer, case.weight, case.moments())


def rounder_of(case: Any) -> Rounder:
    return Rounder(case.layer.matrix(case.weight), case.moments().square)


def exact_error(rounder: Rounder, case: Any, levels: Array, scale: Array) -> Any:
    d = levels.astype(np.float64) * scale - rounder.matrix
    return np.square(np.einsum("pgk,gkm->pgm", case.rows.astype(np.float64), d)).mean(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_every_book_is_measured_and_the_best_taken(layer_case: Any, kind: str, bits: int) -> None:
    case = layer_case(kind, seed=bits, outputs=8)
    start = case.start(bits)
    choice = choose_code_book(case.layer, problem(case), start, ALL)
    assert set(choice.candidates) == set(CodeBook)
    energy = np.square(case.outputs(case.weight)).mean(0).sum()
    for candidate in choice.candidates.values():
        assert candidate.db >= candidate.nearest_db - 0.01
    best = max(candidate.db for candidate in choice.candidates.values())
    book = choice.quantizer.spec.code_book
    assert choice.candidates[book].db > best - 0.05
    found = 10 * np.log10(energy / case.errors(choice.quantizer).sum())
    assert found == pytest.approx(choice.candidates[book].db, abs=0.05)
    # A learned table contains what the others have; on 4 bits it is hardly ever beaten.
    assert choice.candidates[CodeBook.LEARNED].db > max(c.db for c in choice.candidates.values()) - 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_entries_of_the_table(layer_case: Any, kind: str) -> None:
    case = layer_case(kind, outputs=8)
    for book in (CodeBook.POST, CodeBook.LEARNED):
        quantizer = choose_code_book(case.layer, problem(case), case.start(4), CodeBooks(frozenset({book}))).quantizer
        assert quantizer.spec.code_book is book
        assert quantizer.codes is not None
        assert quantizer.table is not None
        assert quantizer.codes.shape == case.weight.shape
        assert quantizer.codes.dtype == np.int8
        assert np.isin(quantizer.codes, quantizer.table).all()
        assert (quantizer.scale > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_codes_are_never_worse_than_the_start(layer_case: Any, kind: str) -> None:
    case = layer_case(kind, count=30)
    start = case.start(3)
    choice = choose_code_book(case.layer, problem(case), start, CodeBooks())
    assert (case.errors(choice.quantizer) <= case.errors(start) * (1 + 1e-4) + 1e-9).all()
    assert choice.quantizer.codes is not None
    assert np.abs(choice.quantizer.codes.astype(int)).max() <= start.spec.qmax


def test_a_simpler_book_wins_a_tie(layer_case: Any) -> None:
    """Weights that every book represents exactly."""
    case = layer_case("Gemm")
    weight = np.sign(case.weight).astype(np.float32)
    exact = dataclasses.replace(case, weight=weight)
    choice = choose_code_book(case.layer, problem(exact), exact.start(4), ALL)
    assert choice.quantizer.spec.code_book is CodeBook.UNIFORM
    assert exact.errors(choice.quantizer).sum() < 1e-9


def test_who_takes_a_table(layer_case: Any) -> None:
    for kind in KINDS:
        assert takes_code_book(layer_case(kind).layer, layer_case(kind).start(4))
    transposed = layer_case("ConvTranspose")
    assert not takes_code_book(transposed.layer, transposed.start(4))
    conv = layer_case("Conv")
    assert not takes_code_book(conv.layer, conv.start(3))
    assert not takes_code_book(conv.layer, conv.start(4, per_channel=False))
    choice = choose_code_book(transposed.layer, problem(transposed), transposed.start(4), ALL)
    assert set(choice.candidates) == {CodeBook.UNIFORM}


def test_levels_can_be_kept_small(layer_case: Any) -> None:
    case = layer_case("Conv", outputs=8)
    choice = choose_code_book(case.layer, problem(case), case.start(4), CodeBooks(frozenset(CodeBook), largest=63))
    assert set(choice.candidates) == {CodeBook.UNIFORM, CodeBook.LEARNED}
    table = learn_table(rounder_of(case), 4, largest=63)
    assert np.abs(table.astype(int)).max() == 63


def test_dead_layers(layer_case: Any) -> None:
    case = layer_case("depthwise")
    weight = case.weight.copy()
    weight[4] = 0
    dead = dataclasses.replace(case, weight=weight)
    square = case.moments().square
    square[2] = 0
    for moments in (square, np.zeros_like(square)):
        moved = WeightProblem(case.layer, weight, Moments(10, np.zeros(square.shape[:2]), moments))
        quantizer = choose_code_book(case.layer, moved, dead.start(4), ALL).quantizer
        assert np.isfinite(quantizer.scale).all()
        # A table may have no zero; the scale is as small as scales get.
        assert np.abs(quantizer.simulate(weight)[4]).max() < 1e-27


def test_a_few_products_are_searched_almost_exhaustively(layer_case: Any) -> None:
    """Depthwise 2 x 2 with 2-bit codes: all 256 codes of a channel, each with its best scale."""
    case = layer_case("depthwise", inputs=12)
    matrix = case.layer.matrix(case.weight)[:, :4]
    square = case.moments().square[:, :4, :4]
    rounder = Rounder(np.ascontiguousarray(matrix), square)
    table = post_table(2)
    _, found = rounder.best(Levels.of_table(table))
    best = np.full(len(matrix), np.inf)
    for levels in itertools.product(table.astype(np.float64), repeat=4):
        q = np.array(levels)
        norm = np.einsum("k,gkl,l->g", q, square, q)
        inner = np.einsum("k,gkl,gl->g", q, square, matrix[:, :, 0].astype(np.float64))
        energy = np.einsum("gk,gkl,gl->g", matrix[:, :, 0], square, matrix[:, :, 0])
        gain = np.where((inner > 0) & (norm > 0), inner**2 / np.maximum(norm, 1e-30), 0)
        best = np.minimum(best, energy - gain)
    assert (found.error[:, 0] >= best * (1 - 1e-3)).all()
    assert found.total < 1.1 * best.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_reported_errors_are_real(layer_case: Any, kind: str) -> None:
    case = layer_case(kind)
    rounder = rounder_of(case)
    for codes in rounder.best(Levels.of_table(post_table(4))):
        np.testing.assert_allclose(codes.error, exact_error(rounder, case, codes.levels, codes.scale), rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_hidden_table_is_found(layer_case: Any, bits: int) -> None:
    """Weights that are exactly levels of an odd table times a scale per channel."""
    rng = np.random.default_rng(bits)
    case = layer_case("Gemm", inputs=40, outputs=48)
    hidden = np.sort(rng.choice(np.arange(-127, 128), 1 << bits, replace=False))
    hidden[-1] = 127
    weight = (hidden[rng.integers(0, 1 << bits, case.weight.shape)] * rng.uniform(0.5, 2, (48, 1))).astype(np.float32)
    rounder = rounder_of(dataclasses.replace(case, weight=weight))
    table = learn_table(rounder, bits)
    table, codes = polished(rounder, table, rounder.best(Levels.of_table(table))[1])
    energy = float((rounder.matrix * rounder.response).sum())
    assert codes.total < energy * 10 ** (-28 / 10)


def test_polishing_never_hurts(layer_case: Any) -> None:
    for seed, bits in itertools.product(range(3), (2, 4)):
        rounder = rounder_of(layer_case("Conv", seed, outputs=12))
        table = uniform_table(bits)
        before = rounder.best(Levels.of_table(table))[1]
        after_table, after = polished(rounder, table, before)
        assert after.total <= before.total
        assert np.isin(after.levels, after_table).all()


def test_the_same_layer_gives_the_same_table(layer_case: Any) -> None:
    one, two = (learn_table(rounder_of(layer_case("grouped")), 4) for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_quantiles_of_nothing() -> None:
    levels = quantiles(np.zeros((1, 3, 2), np.float32), 2)
    assert levels.tolist() == sorted(levels.tolist())
