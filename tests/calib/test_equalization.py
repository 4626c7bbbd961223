"""Factors for equalization: what they promise, and that the noise model means what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from postquant.calib.channel_statistics import ChannelStatistics, collect_channels
from postquant.calib.equalization import (
    LARGEST_FACTOR,
    best_factors,
    equalizations,
    full_factors,
    merged,
    predicted_error,
)
from postquant.calib.input_spec import Sample, input_specs
from postquant.calib.open_source import open_source
from postquant.passes.equalize import EqualizePass
from postquant.passes.place import PlacementSettings, place
from postquant.passes.session import make_session
from postquant.passes.target import load_target

Doubles = np.ndarray[Any, np.dtype[np.float64]]
MAGNITUDES = hnp.arrays(np.float64, st.integers(1, 6), elements=st.floats(0, 1e3, width=32))


def statistics_of(columns: np.ndarray[Any, np.dtype[np.float32]]) -> ChannelStatistics:
    found = ChannelStatistics.empty(len(columns))
    found.update(columns)
    return found


@given(MAGNITUDES)
def test_full_factors_lift_every_channel_to_the_largest(magnitude: Doubles) -> None:
    factors = full_factors(magnitude)
    top = magnitude.max()
    assert ((factors >= 1) & (factors <= LARGEST_FACTOR)).all()
    assert (factors * magnitude <= top * (1 + 1e-9)).all()
    lifted = (factors < LARGEST_FACTOR) & (magnitude > 0)
    np.testing.assert_allclose((factors * magnitude)[lifted], top, rtol=1e-9)


def test_full_factors_of_next_to_nothing() -> None:
    assert full_factors(np.array([5e-324, 0.0])).tolist() == [1.0, 1.0]


@given(MAGNITUDES, st.floats(0.1, 1e3), st.booleans(), st.integers(0, 9))
def test_no_channel_passes_the_ceiling(magnitude: Doubles, ceiling: float, free: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = (rng.uniform(-1, 1, (len(magnitude), 50)) * magnitude[:, np.newaxis]).astype(np.float32)
    statistics = statistics_of(columns)
    weights = [rng.standard_normal((len(magnitude), 2, 3))]
    factors = best_factors(statistics, weights, abits=8, wbits=8, ceiling=ceiling, free=free)
    reached = np.minimum(statistics.magnitude, ceiling)
    assert (factors >= 1).all()
    assert (factors * reached <= ceiling * (1 + 1e-9)).all()
    # A channel that is clipped keeps its place.
    np.testing.assert_allclose(factors[statistics.magnitude >= ceiling], 1)


def test_the_noise_model_orders_factors_as_experiments_do() -> None:
    """Rounding of activations and weights, simulated, against the prediction, for factors between none and full."""
    rng = np.random.default_rng(0)
    sizes = np.array([8.0, 4.0, 1.0, 0.5, 0.25, 1.0])
    x = rng.uniform(-1, 1, (4000, 6)) * sizes
    weight = rng.standard_normal((6, 1, 16))
    magnitude, variance = np.abs(x).max(0), x.var(0)
    wanted = x @ weight[:, 0]
    predicted, measured = [], []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        s = full_factors(magnitude) ** strength
        step = 2 * (s * magnitude).max() / 255
        scaled = weight[:, 0] / s[:, np.newaxis]
        steps = np.abs(scaled).max(0) / 127
        output = (np.rint(s * x / step) * step) @ (np.rint(scaled / steps) * steps)
        measured.append(np.square(output - wanted).mean(0).sum())
        predicted.append(predicted_error(s, magnitude, variance, [weight], abits=8, wbits=8))
    ratio = np.array(predicted) / np.array(measured)
    assert ratio.max() / ratio.min() < 3
    assert abs(int(np.argmin(predicted)) - int(np.argmin(measured))) <= 1


def test_merged_statistics_are_those_of_one_tensor() -> None:
    rng = np.random.default_rng(1)
    one, two = (rng.standard_normal((3, n)).astype(np.float32) for n in (10, 25))
    both = merged({"a": statistics_of(one), "b": statistics_of(two)}, ["a", "b"])
    direct = statistics_of(np.concatenate([one, two], axis=1))
    for name in ("low", "high", "mean", "variance", "magnitude"):
        np.testing.assert_allclose(getattr(both, name), getattr(direct, name), rtol=1e-6)
    assert both.count == direct.count == 35


@pytest.mark.parametrize("last_axis", [False, True])
def test_channel_statistics(last_axis: bool) -> None:
    rng = np.random.default_rng(2)
    samples: list[Sample] = [{"x": rng.standard_normal((2, 3, 4, 5)).astype(np.float32)} for _ in range(3)]
    found = collect_channels(lambda feed: feed, samples, ["x"], last_axis=last_axis)["x"]
    values = np.moveaxis(np.concatenate([feed["x"] for feed in samples]), -1 if last_axis else 1, 0)
    values = values.reshape(len(values), -1).astype(np.float64)
    np.testing.assert_array_equal(found.low, values.min(1))
    np.testing.assert_array_equal(found.high, values.max(1))
    np.testing.assert_allclose(found.mean, values.mean(1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.variance, values.var(1), rtol=1e-5)


NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
m (float[N,4,8,8] x) => (float[N,4,8,8] y) {
    [first] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    [clip] r = Clip (a, zero, six)
    [depthwise] c = Conv <pads = [1, 1, 1, 1], group = 4> (r, w2, b2)
    [relu] e = Relu (c)
    [last] y = Conv (e, w3, b3)
}"""


def test_a_network_keeps_its_outputs_and_equalizes_its_channels() -> None:
    rng = np.random.default_rng(3)
    proto = onnx.parser.parse_model(NETWORK)
    spread = np.array([0.03, 0.1, 0.5, 2.0], np.float32).reshape(4, 1, 1, 1)
    arrays: dict[str, Any] = {
        "w1": rng.standard_normal((4, 4, 3, 3)).astype(np.float32) * spread,
        "w2": rng.standard_normal((4, 1, 3, 3)).astype(np.float32),
        "w3": rng.standard_normal((4, 4, 1, 1)).astype(np.float32),
        **{f"b{i}": np.zeros(4, np.float32) for i in (1, 2, 3)},
        "zero": np.float32(0),
        "six": np.float32(6),
    }
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    source = open_source(rng.standard_normal((8, 4, 8, 8)).astype(np.float32), input_specs(model))
    plan = place(model, load_target("onnxruntime"), PlacementSettings())
    found = equalizations(model, plan, source)
    assert found[0].group.consumers == ("depthwise",)
    changed = model.clone()
    EqualizePass([(item.group, item.factors) for item in found])(changed)
    names = ["r", "y"]
    before, after = (make_session(m, outputs=names) for m in (model, changed))
    ranges = []
    for sample in source:
        old, new = before.run(sample), after.run(sample)
        np.testing.assert_allclose(new["y"], old["y"], rtol=1e-4, atol=1e-4 * float(np.abs(old["y"]).max()))
        ranges.append([values["r"].max(axis=(0, 2, 3)) for values in (old, new)])
    old_range, new_range = np.max(ranges, axis=0)
    assert new_range.max() == pytest.approx(old_range.max(), rel=1e-5)
    assert new_range.min() / new_range.max() > 3 * old_range.min() / old_range.max()


def test_a_group_whose_reader_stays_float_is_left_alone() -> None:
    proto = onnx.parser.parse_model(NETWORK.replace("Clip (a, zero, six)", "Relu (a)"))
    rng = np.random.default_rng(3)
    shapes = {"w1": (4, 4, 3, 3), "w2": (4, 1, 3, 3), "w3": (4, 4, 1, 1), "b1": (4,), "b2": (4,), "b3": (4,)}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    source = open_source(rng.standard_normal((2, 4, 8, 8)).astype(np.float32), input_specs(model))
    plan = place(model, load_target("onnxruntime"), PlacementSettings())
    assert equalizations(model, type(plan)(plan.target), source) == []
