"""Histograms, grids, clipping and thresholds of a plan's tensors, against NumPy on the same samples."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from postquant.calib.input_spec import input_specs
from postquant.calib.open_source import open_source
from postquant.passes.place import PlacementSettings
from postquant.passes.session import make_session
from postquant.pipeline.describe_tensors import describe_tensors
from postquant.pipeline.tensor_statistics import TensorStatistic
from postquant.runtime_ops.code_book import CodeBook
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.rounding_border import RoundingBorder
from postquant.runtime_ops.spec import QuantSpec


@pytest.fixture(scope="module")
def narrow(cases: Any) -> Any:
    return cases.build(settings=PlacementSettings(wbits=4, abits=4))


def _described(case: Any, plan: Any = None, **options: Any) -> dict[str, TensorStatistic]:
    source = open_source(case.samples, input_specs(case.model))
    count, found = describe_tensors(case.model, plan or case.plan, source, **options)
    assert count == len(case.samples)
    return {tensor.key: tensor for tensor in found}


def _values(case: Any, name: str) -> npt.NDArray[np.float64]:
    inputs = {value.name for value in case.model.graph.inputs}
    if name in inputs:
        return np.concatenate([feed[name].ravel() for feed in case.samples]).astype(np.float64)
    session = make_session(case.model, outputs=[name])
    return np.concatenate([session.run(feed)[name].ravel() for feed in case.samples]).astype(np.float64)


def test_a_large_model_is_looked_at_in_parts(narrow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _described(narrow)
    monkeypatch.setattr("postquant.pipeline.quality._PREPACKED_BYTES", 0)
    monkeypatch.setattr("postquant.pipeline.describe_tensors._CHUNK", 3)
    parts = _described(narrow)
    assert list(parts) == list(whole)
    for key, tensor in whole.items():
        one, other = tensor.histogram, parts[key].histogram
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert other.low == pytest.approx(one.low, rel=1e-4, abs=1e-5)
            assert other.high == pytest.approx(one.high, rel=1e-4, abs=1e-5)


def test_every_quantizer_is_there(narrow: Any) -> None:
    found = _described(narrow)
    plan = narrow.plan
    assert set(found) == {*plan.activations, *plan.requants, *plan.weights}
    assert [t.kind for t in found.values()] == ["activation"] * (len(plan.activations) + len(plan.requants)) + [
        "weight"
    ] * len(plan.weights)


def test_activations_hold_what_the_float_model_computes(narrow: Any) -> None:
    for tensor in _described(narrow).values():
        if tensor.kind != "activation":
            continue
        values = _values(narrow, tensor.value)
        assert tensor.histogram is not None
        assert sum(tensor.histogram.counts) == values.size
        assert (tensor.histogram.low, tensor.histogram.high) == pytest.approx((values.min(), values.max()), abs=1e-6)


def test_a_narrow_grid_is_drawn_whole(narrow: Any) -> None:
    key, quantizer = next((k, q) for k, q in narrow.plan.activations.items() if q.spec.bits == 4)
    tensor = _described(narrow)[key]
    codes = np.arange(16, dtype=np.uint8)
    assert np.allclose(tensor.grid.levels, quantizer.dequantize(codes), rtol=1e-6)
    for (low, high), code in zip(tensor.grid.thresholds, codes, strict=False):
        assert low == high
        step = float(quantizer.scale)
        assert quantizer.quantize(np.array([low - 0.01 * step, low + 0.01 * step], np.float32)).tolist() == [
            code,
            code + 1,
        ]
    wide = _described(narrow)["image"]
    assert (wide.bits, wide.grid.levels) == (8, ())


@pytest.mark.parametrize("shrink", [1.0, 0.4])
def test_clipping_is_counted(narrow: Any, shrink: float) -> None:
    key, quantizer = next((k, q) for k, q in narrow.plan.activations.items() if q.spec.bits == 4)
    smaller = dataclasses.replace(quantizer, scale=np.float32(quantizer.scale * shrink))
    tensor = _described(narrow, narrow.plan.with_activation(key, smaller))[key]
    values, (low, high), half = _values(narrow, tensor.value), smaller.range(), float(smaller.scale) / 2
    assert tensor.grid.above == pytest.approx(float((values > high + half).mean()), abs=2e-3)
    assert tensor.grid.below == pytest.approx(float((values < low - half).mean()), abs=2e-3)
    assert (tensor.grid.above > 0) == (shrink < 1)


def test_weights_are_in_units_of_their_scale(narrow: Any) -> None:
    found = _described(narrow)
    for name, quantizer in narrow.plan.weights.items():
        tensor, weight = found[name], narrow.model.graph.initializers[name].const_value.numpy()
        shape = [1] * weight.ndim
        if quantizer.spec.axis is not None:
            shape[quantizer.spec.axis] = -1
        ratio = weight / quantizer.scale.reshape(shape)
        assert tensor.histogram is not None
        assert (tensor.histogram.low, tensor.histogram.high) == pytest.approx((ratio.min(), ratio.max()), rel=1e-5)
        assert tensor.moved == 0.0


def test_moved_codes_are_counted(narrow: Any) -> None:
    name, quantizer = next(iter(narrow.plan.weights.items()))
    weight = narrow.model.graph.initializers[name].const_value.numpy()
    codes = quantizer.quantize(weight).copy()
    flat = codes.reshape(-1)
    flat[:10] = np.where(flat[:10] > 0, flat[:10] - 1, flat[:10] + 1)
    moved = dataclasses.replace(quantizer, codes=codes)
    assert _described(narrow, narrow.plan.with_weight(name, moved))[name].moved == pytest.approx(10 / codes.size)


def test_a_table_has_uneven_levels(narrow: Any) -> None:
    name, quantizer = next((k, q) for k, q in narrow.plan.weights.items() if q.spec.axis is not None)
    spec = dataclasses.replace(quantizer.spec, bits=4, narrow=False, code_book=CodeBook.POST)
    table = TensorQuantizer(spec, (quantizer.scale / 16).astype(np.float32), np.zeros_like(quantizer.zero_point))
    tensor = _described(narrow, narrow.plan.with_weight(name, table))[name]
    assert tensor.values == "post"
    assert tensor.grid.levels == (-96, -68, -48, -34, -24, -17, -12, 0, 12, 17, 24, 34, 48, 68, 96)
    assert tensor.grid.thresholds[0] == (-82, -82)
    assert tensor.grid.step == 5


def test_borders_differ_between_channels(narrow: Any) -> None:
    key, quantizer = next((k, q) for k, q in narrow.plan.activations.items() if q.spec.bits == 4 and not q.spec.signed)
    channels = 8
    none: dict[str, Any] = {
        "window": np.zeros((channels, 1, 1), np.int8),
        "window_scale": np.zeros(channels, np.float32),
        "left": np.zeros((0, channels), np.int8),
        "left_scale": np.zeros(0, np.float32),
        "right": np.zeros((channels, 0), np.int8),
        "right_scale": np.zeros(channels, np.float32),
    }
    places = np.linspace(0.25, 0.75, channels, dtype=np.float32)[:, None]
    plain = RoundingBorder(border=places, **none)
    grid = _described(narrow, narrow.plan.with_activation(key, dataclasses.replace(quantizer, border=plain)))[key].grid
    step, zero = float(quantizer.scale), int(quantizer.zero_point)
    assert grid.thresholds[3] == pytest.approx(((3.25 - zero) * step, (3.75 - zero) * step))
    assert not grid.neighbours
    # Residuals are in 1 / 128 of a step and at most half a step: their deviation is 128 / sqrt(12).
    window = np.zeros((channels, 3, 3), np.int8)
    window[:, 0, 1] = 4
    moving = dataclasses.replace(plain, window=window, window_scale=np.full(channels, 1e-3, np.float32))
    grid = _described(narrow, narrow.plan.with_activation(key, dataclasses.replace(quantizer, border=moving)))[key].grid
    rng = np.random.default_rng(0)
    moved = float(np.std(4 * rng.uniform(-64, 64, 200_000))) * 1e-3
    assert grid.thresholds[3] == pytest.approx(((3.25 - moved - zero) * step, (3.75 + moved - zero) * step), rel=1e-2)
    assert grid.neighbours


def test_effects_belong_to_a_format(narrow: Any) -> None:
    key, quantizer = next((k, q) for k, q in narrow.plan.activations.items() if q.spec.bits == 4)
    effects = {key: (4, 33.0), "image": (4, 20.0)}
    found = _described(narrow, effects=effects)
    assert (found[key].effect_db, found["image"].effect_db) == (33.0, None)
    # The narrow format moves to a reader, and the tensor gets a wider one.
    wide = TensorQuantizer.from_range(QuantSpec(8, signed=False, symmetric=False), 0.0, 4.0)
    reader = next(
        f"{node.name}:{index}"
        for node in narrow.model.graph
        for index, value in enumerate(node.inputs)
        if value is not None and value.name == key
    )
    plan = narrow.plan.with_activation(key, wide).with_requant(reader, quantizer)
    found = _described(narrow, plan, effects=effects)
    assert (found[key].effect_db, found[reader].effect_db) == (None, 33.0)
