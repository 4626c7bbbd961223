"""Ranges by what they do to the network's outputs, against a quantized network that is really built."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from postquant.calib.effect_candidates import candidate_quantizers, hopeful, settled
from postquant.calib.input_spec import input_specs
from postquant.calib.observers import MinMax
from postquant.calib.open_source import open_source
from postquant.calib.output_effect import EffectOptions, OutputEffect
from postquant.calib.output_error import SampleError
from postquant.calib.ranges import (
    alternatives,
    collect_statistics,
    effect_db,
    effect_ranges,
    method_ranges,
    places_of,
)
from postquant.calib.source import CalibrationSource
from postquant.passes.emit import emit
from postquant.passes.place import PlacementSettings, place
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.passes.target import load_target
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

SAMPLES = 6
UNSIGNED = QuantSpec(4, False, False)
SIGNED = QuantSpec(4, True, False)

# "t" is read by a layer and by a sum; "best" is an output that is not float.
NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
m (float[N,3,6,6] x) => (float[N,3,6,6] y, int64[N,1,6,6] best) {
    [c0] a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
    [r0] t = Relu (a)
    [c1] b = Conv <pads = [1, 1, 1, 1]> (t, w1, b1)
    [sum] y = Add (b, t)
    [c2] d = Conv <pads = [1, 1, 1, 1]> (x, w2, b2)
    [top] best = ArgMax <axis = 1> (d)
}"""


@pytest.fixture(scope="module")
def model() -> ir.Model:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(NETWORK)
    for i in range(3):
        weight = rng.standard_normal((3, 3, 3, 3)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"w{i}"))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(3, np.float32), f"b{i}"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.fixture(scope="module")
def source(model: ir.Model) -> CalibrationSource:
    # Heavy tails: clipping pays.
    x = np.random.default_rng(1).standard_t(3, (SAMPLES, 3, 6, 6)).astype(np.float32)
    return open_source(x, input_specs(model))


@pytest.mark.parametrize("spec", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
@pytest.mark.parametrize("tensor", ["x", "t", "y"])
def test_the_choice_is_the_best_of_networks_that_are_built(
    model: ir.Model, source: CalibrationSource, tensor: str, spec: QuantSpec
) -> None:
    tops = {f"{top}": TensorQuantizer.from_range(spec, -top, top) for top in (1.0, 3.0, 6.0, 12.0, 40.0)}
    effect = OutputEffect(model, source, EffectOptions(samples=SAMPLES, screening=SAMPLES))
    choice = effect.choose(tensor, tops)
    reference = make_session(model, outputs=["y"])
    errors, shares = {}, {}
    for name, quantizer in tops.items():
        if tensor == "y":
            runs = [(reference.run(sample)["y"], quantizer.simulate(reference.run(sample)["y"])) for sample in source]
        else:
            built = make_session(emit(model, QuantPlan("", activations={tensor: quantizer})), outputs=["y"])
            runs = [(reference.run(sample)["y"], built.run(sample)["y"]) for sample in source]
        mean = np.mean([np.linalg.norm(got - wanted) / np.linalg.norm(wanted) for wanted, got in runs])
        together = np.sqrt(
            sum(np.sum((got - wanted) ** 2.0) for wanted, got in runs) / sum(np.sum(wanted**2.0) for wanted, _ in runs)
        )
        errors[name] = np.sqrt(mean * together)
        shares[name] = np.array([np.sum((got - wanted) ** 2.0) / np.sum(wanted**2.0) for wanted, got in runs])
    best = min(errors, key=errors.__getitem__)
    differences = {name: share - shares[best] for name, share in shares.items()}
    as_good = {name for name, d in differences.items() if d.mean() <= d.std(ddof=1) / np.sqrt(len(d))}
    assert choice.candidate == max(as_good | {best}, key=float), "the widest that is not worse beyond doubt"
    assert choice.quantizer is tops[choice.candidate]
    assert choice.effect_db == pytest.approx(-20 * math.log10(errors[choice.candidate]), abs=0.01)


def test_one_reader_alone(model: ir.Model, source: CalibrationSource) -> None:
    """A quantizer in front of one reader leaves the other's input as it is."""
    coarse = {"a": TensorQuantizer.from_range(UNSIGNED, 0.0, 20.0), "b": TensorQuantizer.from_range(UNSIGNED, 0.0, 9.0)}
    effect = OutputEffect(model, source, EffectOptions(samples=SAMPLES, screening=SAMPLES))
    every = effect.choose("t", coarse)
    layer = effect.choose("t", coarse, reader=("c1", 0))
    added = effect.choose("t", coarse, reader=("sum", 1))
    assert added.effect_db > layer.effect_db
    assert every.effect_db != layer.effect_db


def test_what_float_nodes_read_before_quantization_stays_exact(model: ir.Model, source: CalibrationSource) -> None:
    """A residual that starts at the network's input: the sum stays in float and reads the input itself."""
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    m (float[N,3,6,6] x) => (float[N,3,6,6] y) {
        [conv] n = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
        [rest] y = Sub (x, n)
    }""")
    for name in ("w0", "b0"):
        value = model.graph.initializers[name].const_value
        assert value is not None
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
    residual = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    quantizers = {str(top): TensorQuantizer.from_range(SIGNED, -top, top) for top in (4.0, 9.0)}
    options = EffectOptions(samples=SAMPLES, screening=SAMPLES)
    effect = OutputEffect(residual, source, options, floats={"rest"})
    choice = effect.choose("x", quantizers)
    plan = QuantPlan("", activations={"x": choice.quantizer}, floats={"rest": "no integer kernel"})
    built, reference = make_session(emit(residual, plan)), make_session(residual)
    pairs = [(reference.run(sample)["y"], built.run(sample)["y"]) for sample in source]
    mean = np.mean([np.linalg.norm(got - wanted) / np.linalg.norm(wanted) for wanted, got in pairs])
    noise = sum(np.sum((got - wanted) ** 2.0) for wanted, got in pairs)
    together = np.sqrt(noise / sum(np.sum(wanted**2.0) for wanted, _ in pairs))
    assert choice.effect_db == pytest.approx(-20 * math.log10(np.sqrt(mean * together)), abs=0.01)
    everything = OutputEffect(residual, source, options).choose("x", quantizers)
    assert everything.effect_db != pytest.approx(choice.effect_db, abs=0.1)


def test_a_tensor_that_no_float_output_sees(model: ir.Model, source: CalibrationSource) -> None:
    candidates = {
        "a": TensorQuantizer.from_range(UNSIGNED, 0.0, 2.0),
        "b": TensorQuantizer.from_range(UNSIGNED, 0.0, 1),
    }
    effect = OutputEffect(model, source, EffectOptions())
    assert effect.sees("x")
    assert effect.sees("y")
    assert effect.sees("t", reader=("c1", 0))
    assert not effect.sees("d")
    assert not effect.sees("x", reader=("c2", 0))
    choice = effect.choose("d", candidates)
    assert choice.candidate == "a"  # a tie goes to the first


def test_an_end_that_a_relu_cuts_off_gets_no_codes() -> None:
    """A branch of a residual sum: whatever lies far below zero vanishes in the Relu behind the sum."""
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    m (float[N,16] x) => (float[N,16] y) {
        half = Constant <value = float {0.5}> ()
        [rest] r = Relu (x)
        [branch] b = Mul (x, half)
        [sum] s = Add (b, r)
        [last] y = Relu (s)
    }""")
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    x = np.random.default_rng(2).uniform(-8, 2, (60, 16)).astype(np.float32)
    effect = OutputEffect(model, open_source(x, input_specs(model)), EffectOptions(samples=60, screening=60))
    observed = {f"{f}": TensorQuantizer.from_range(SIGNED, -4.0 * f, 1.0 * f) for f in (1.0, 0.8)}
    kept = effect.choose("b", observed)
    moved = effect.choose("b", observed, ends=True)
    low, high = (float(end) for end in moved.quantizer.range())
    assert low > -2.5, "codes are not spent on what the Relu makes zero"
    assert high > 0.7, "the other end is needed"
    assert moved.effect_db > kept.effect_db + 2
    assert "low end" in moved.candidate


def test_candidates_differ_and_hold_the_observers() -> None:
    candidates = candidate_quantizers(
        QuantSpec(8, False, False), {"one": (0.0, 4.0), "two": (0.0, 16.0), "same": (0.0, 4.0)}
    )
    scales = [float(quantizer.scale) * 255 for quantizer in candidates.values()]
    assert any(scale == pytest.approx(4.0) for scale in scales)
    assert any(scale == pytest.approx(16.0) for scale in scales)
    assert sum(4.5 < scale < 15.5 for scale in scales) >= 2, "widths in between"
    assert len({round(scale, 4) for scale in scales}) == len(scales)


def test_ranges_and_their_alternatives(model: ir.Model, source: CalibrationSource) -> None:
    plan = place(model, load_target("onnxruntime"), PlacementSettings(abits=4, first_last_bits=None))
    places = places_of(model, plan)
    assert places
    statistics = collect_statistics(model, places, source, histogram=True)
    effect = OutputEffect(model, source, EffectOptions())
    found = effect_ranges(model, plan, source, statistics, effect)
    assert places_of(model, found.plan) == []
    assert set(found.choices) == {place.key for place in places if effect.sees(place.value, reader=place.reader)}
    assert math.isfinite(effect_db(found.choices))
    others = alternatives(model, plan, found.plan, statistics)
    assert others["effect"] is found.plan
    extremes = method_ranges(model, plan, source, MinMax()).plan
    for name, other in others.items():
        assert places_of(model, other) == [], name
        for tensor, entry in other.activations.items():
            widest = extremes.activations[tensor]
            assert isinstance(entry, TensorQuantizer)
            assert isinstance(widest, TensorQuantizer)
            assert float(entry.scale) <= float(widest.scale) * 1.25, (name, tensor)
    for tensor, entry in found.plan.activations.items():
        wider = others["effect, wider by 1.5"].activations[tensor]
        assert isinstance(entry, TensorQuantizer)
        assert isinstance(wider, TensorQuantizer)
        assert float(wider.scale) >= float(entry.scale) * 0.999


def test_candidates_far_behind_are_dropped_but_not_the_neighbours() -> None:
    effects = {"a": 9.0, "b": 2.9, "c": 4.0, "d": 2.0, "e": 7.0, "f": 3.1}
    assert hopeful(effects) == ["b", "c", "d", "e"]
    assert hopeful({"only": 1.0}) == ["only"]


def test_a_choice_is_settled_when_chance_cannot_explain_it() -> None:
    def errors(values: list[float]) -> list[SampleError]:
        return [SampleError(1.0, value, value) for value in values]

    noise = np.random.default_rng(0).uniform(0.9, 1.1, 12)
    best, close, far = errors(list(noise)), errors(list(noise[::-1] + 0.01)), errors(list(noise + 0.5))
    assert settled([far, best])
    assert not settled([close, best])
    assert not settled([far, best, close])
    assert not settled([far[:7], best[:7]])  # too few to tell
    assert settled([best[:4]])


def test_one_tensor_after_the_other(model: ir.Model, source: CalibrationSource) -> None:
    """What was put into the network for one tensor is gone for the next."""
    tops = {f"{top}": TensorQuantizer.from_range(UNSIGNED, -top, top) for top in (1.0, 6.0, 40.0)}
    asked: list[tuple[str, tuple[str, int] | None]] = [("t", None), ("y", None), ("t", ("sum", 1)), ("x", None)]
    options = EffectOptions(samples=SAMPLES, screening=SAMPLES)
    effect = OutputEffect(model, source, options)
    for tensor, reader in [*asked, *asked]:
        alone = OutputEffect(model, source, options).choose(tensor, tops, reader=reader)
        again = effect.choose(tensor, tops, reader=reader)
        assert (again.candidate, again.effect_db) == (alone.candidate, alone.effect_db)


def test_a_tensor_that_a_subgraph_captures() -> None:
    """Only the body of the If reads "a": its quantization reaches the output all the same."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        m (float[N,4] x) => (float[N,4] y) {
            a = Exp (x)
            yes = Constant <value = bool {1}> ()
            u = If (yes) <
                then_branch = t () => (float[N,4] t1) { t1 = Neg (a) },
                else_branch = e () => (float[N,4] e1) { e1 = Abs (a) }
            >
            y = Mul (u, x)
        }"""
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    x = np.random.default_rng(0).normal(size=(SAMPLES, 4)).astype(np.float32)
    effect = OutputEffect(model, open_source(x, input_specs(model)), EffectOptions(samples=SAMPLES, screening=SAMPLES))
    assert effect.sees("a")
    tops = {f"{top}": TensorQuantizer.from_range(UNSIGNED, 0.0, top) for top in (0.1, 5.0)}
    choice = effect.choose("a", tops)
    kept = {name: float(np.square(x * (q.simulate(np.exp(x)) - np.exp(x))).sum()) for name, q in tops.items()}
    assert choice.candidate == min(kept, key=kept.__getitem__)
    noise = kept[choice.candidate] / float(np.square(x * np.exp(x)).sum())
    assert choice.effect_db == pytest.approx(-10 * np.log10(noise), abs=6)
