"""The activation search, against every candidate tried on explicit rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postquant.calib.activation_search import Reader, scaled, score_of, search_activation
from postquant.calib.weight_search import Objective, SearchOptions
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

STARTS = np.array([0, 50, 120])
ALL = SearchOptions(candidates=15)


def reader_of(layer_case: Any, kind: str, seed: int = 0, **changes: Any) -> Reader:
    case = layer_case(kind, seed)
    matrix = case.layer.matrix(case.weight)
    target = case.outputs(case.weight).astype(np.float32)
    return dataclasses.replace(Reader(case.layer, target, case.rows, STARTS, matrix), **changes)


def start_of(bits: int, *readers: Reader) -> TensorQuantizer:
    """The quantizer of the whole range of the rows."""
    low = min(float(reader.rows.min()) for reader in readers)
    high = max(float(reader.rows.max()) for reader in readers)
    return TensorQuantizer.from_range(QuantSpec(bits, signed=False, symmetric=False), low, high)


def literal_score(quantizer: TensorQuantizer, reader: Reader, objective: Objective) -> float:
    """Mean over samples, each one vector."""
    scores = []
    for begin, end in zip(STARTS, [*STARTS[1:], len(reader.rows)], strict=True):
        rows = quantizer.simulate(reader.rows[begin:end]).astype(np.float64)
        output = np.einsum("pgk,gkm->pgm", rows, reader.matrix)
        if reader.ceiling is not None and reader.bias is not None:
            output = np.clip(output + reader.bias, *reader.ceiling)
        wanted = reader.target[begin:end].astype(np.float64)
        if objective is Objective.COSINE:
            scores.append((output * wanted).sum() / np.sqrt(max((output**2).sum(), 1e-12) * (wanted**2).sum()))
        else:
            scores.append(-np.square(output - wanted).sum() / (wanted**2).sum())
    return float(np.mean(scores))


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("kind", ["Conv", "depthwise", "MatMul"])
def test_scores_are_means_over_samples(layer_case: Any, objective: Objective, kind: str) -> None:
    for ceiling in (None, (0.0, np.inf), (0.0, 1.5)):
        bias = np.random.default_rng(1).standard_normal(layer_case(kind).layer.out_channels).astype(np.float32)
        reader = reader_of(layer_case, kind)
        if ceiling is not None:
            shaped = bias.reshape(reader.matrix.shape[0], -1)
            target = np.clip(reader.target + shaped, *ceiling).astype(np.float32)
            reader = dataclasses.replace(reader, ceiling=ceiling, bias=shaped, target=target)
        quantizer = start_of(4, reader)
        found = score_of(quantizer, [reader, reader], objective)
        assert found == pytest.approx(literal_score(quantizer, reader, objective), rel=1e-4)


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_best_candidate_of_all(layer_case: Any, objective: Objective, bits: int) -> None:
    readers = [reader_of(layer_case, "Conv"), reader_of(layer_case, "MatMul", 1)]
    start = start_of(bits, *readers)
    options = dataclasses.replace(ALL, objective=objective)
    found, score, at_start = search_activation(start, readers, options)
    candidates = [scaled(start, float(m)) for m in np.linspace(options.alpha, options.beta, options.candidates)]
    scores = [np.mean([literal_score(q, r, objective) for r in readers]) for q in (start, *candidates)]
    assert score == pytest.approx(max(scores), abs=3e-6)
    assert at_start == pytest.approx(scores[0], abs=3e-6)
    assert score == pytest.approx(np.mean([literal_score(found, r, objective) for r in readers]), abs=3e-6)


def test_coarse_to_fine_is_close_to_the_best_of_100(layer_case: Any) -> None:
    reader = reader_of(layer_case, "Conv", 2)
    start = start_of(4, reader)
    options = SearchOptions()
    _, score, at_start = search_activation(start, [reader], options)
    multiples = np.linspace(options.alpha, options.beta, options.candidates)
    best = max(literal_score(scaled(start, float(m)), reader, Objective.COSINE) for m in multiples)
    assert best - 2e-3 <= score <= best + 1e-5
    assert score >= at_start


def test_thinned_rows_keep_their_samples(layer_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_of(layer_case, "MatMul")
    repeats = -(-1024 // len(reader.rows))
    rows, target = (np.tile(a, (repeats, 1, 1)) for a in (reader.rows, reader.target))
    many = dataclasses.replace(reader, rows=rows, target=target, starts=np.array([0, 50, 120, 121]))
    assert many.thinned is many  # cheap enough
    many = dataclasses.replace(many)
    monkeypatch.setattr("postquant.calib.activation_search._CHEAP", 0)
    thinned = many.thinned
    stride = min(len(rows) // 256, 4)
    assert stride > 1
    taken = np.concatenate([np.arange(a, b, stride) for a, b in ((0, 50), (50, 120), (120, 121), (121, len(rows)))])
    np.testing.assert_array_equal(thinned.rows, rows[taken])
    np.testing.assert_array_equal(thinned.target, target[taken])
    assert [taken[start] for start in thinned.starts] == [0, 50, 120, 121]
    assert reader.thinned is reader  # few rows


def test_a_search_behind_a_search_finds_the_same(layer_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postquant.calib.activation_search._CHEAP", 0)
    monkeypatch.setattr("postquant.calib.activation_search._FEW_ROWS", 32)
    reader = reader_of(layer_case, "Conv", 2)
    assert reader.thinned is not reader
    found, score, _ = search_activation(start_of(4, reader), [reader], SearchOptions())
    _, near_score, at_start = search_activation(found, [reader], SearchOptions(), near=True)
    assert at_start == pytest.approx(score, abs=1e-5)
    assert near_score >= at_start


def test_ties_go_to_the_start(layer_case: Any) -> None:
    """Values that 8 bits hold exactly cannot be improved."""
    reader = reader_of(layer_case, "MatMul")
    rows = np.random.default_rng(0).integers(0, 256, reader.rows.shape).astype(np.float32)
    target = np.einsum("pgk,gkm->pgm", rows, reader.matrix).astype(np.float32)
    start = TensorQuantizer(QuantSpec(8, False, False), np.ones((), np.float32), np.zeros((), np.int32))
    for objective in Objective:
        exact = dataclasses.replace(reader, rows=rows, target=target)
        found, score, at_start = search_activation(start, [exact], dataclasses.replace(ALL, objective=objective))
        assert found is start
        assert score == at_start


def test_samples_of_zeros_do_no_harm(layer_case: Any) -> None:
    reader = reader_of(layer_case, "MatMul")
    rows, target = reader.rows.copy(), reader.target.copy()
    rows[50:120], target[50:120] = 0, 0
    silent = dataclasses.replace(reader, rows=rows, target=target)
    for objective in Objective:
        _, score, at_start = search_activation(
            start_of(4, silent), [silent], dataclasses.replace(ALL, objective=objective)
        )
        assert np.isfinite([score, at_start]).all()


@given(st.floats(-100, 0), st.floats(1e-3, 100), st.sampled_from([2, 4, 8]), st.floats(0.5, 2.0), st.booleans())
def test_scaled_ranges(low: float, high: float, bits: int, multiple: float, symmetric: bool) -> None:
    start = TensorQuantizer.from_range(QuantSpec(bits, signed=symmetric, symmetric=symmetric), low, high)
    found = scaled(start, multiple)
    assert found.spec == start.spec
    np.testing.assert_allclose(found.scale, start.scale / multiple, rtol=1e-5)
    assert abs(int(found.zero_point) - int(start.zero_point)) <= (0 if symmetric else 1)
    same = scaled(start, 1.0)
    np.testing.assert_allclose(same.scale, start.scale, rtol=2e-7)
    assert int(same.zero_point) == int(start.zero_point)
