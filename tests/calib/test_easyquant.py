"""The search through a network: where it starts from, what it sees, and that the network gains by it."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from postquant.calib.easyquant import EasyQuant, sites_of
from postquant.calib.input_spec import input_specs
from postquant.calib.observers import MinMax
from postquant.calib.open_source import open_source
from postquant.calib.prefix import Prefix, spaced
from postquant.calib.ranges import method_ranges
from postquant.calib.site_data import SiteData, WorkLimits, sampled_positions
from postquant.calib.source import CalibrationSource
from postquant.calib.trial import Trial
from postquant.calib.weight_search import SearchOptions
from postquant.calib.weight_start import start_weights
from postquant.passes.biases import fit_biases
from postquant.passes.emit import emit
from postquant.passes.place import PlacementSettings, place
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.passes.target import load_target
from postquant.runtime_ops.quantizer import TensorQuantizer

SAMPLES = 12

# Eight convolutions; two sums skip over two of them each, so that cuts cross a skip.
NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
m (float[N,4,8,8] x) => (float[N,4,6,6] y) {
    [c0] a0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
    [r0] t0 = Relu (a0)
    [c1] a1 = Conv <pads = [1, 1, 1, 1]> (t0, w1, b1)
    [r1] t1 = Relu (a1)
    [c2] a2 = Conv <pads = [1, 1, 1, 1]> (t1, w2, b2)
    [s0] s = Add (a2, t0)
    [r2] t2 = Relu (s)
    [c3] a3 = Conv <pads = [1, 1, 1, 1]> (t2, w3, b3)
    [r3] t3 = Relu (a3)
    [c4] a4 = Conv <pads = [1, 1, 1, 1]> (t3, w4, b4)
    [s1] u = Add (a4, t2)
    [c5] a5 = Conv <pads = [1, 1, 1, 1]> (u, w5, b5)
    [r5] t5 = Relu (a5)
    [c6] a6 = Conv <pads = [1, 1, 1, 1]> (t5, w6, b6)
    [r6] t6 = Relu (a6)
    [c7] y = Conv (t6, w7, b7)
}"""


@pytest.fixture(scope="module")
def model() -> ir.Model:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(NETWORK)
    for i in range(8):
        weight = rng.standard_normal((4, 4, 3, 3)) / 6 * np.exp(rng.standard_normal((4, 1, 1, 1)) / 2)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        bias = rng.standard_normal(4).astype(np.float32) / 4
        proto.graph.initializer.append(onnx.numpy_helper.from_array(bias, f"b{i}"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.fixture(scope="module")
def source(model: ir.Model) -> CalibrationSource:
    x = np.random.default_rng(1).standard_normal((SAMPLES, 4, 8, 8)).astype(np.float32)
    return open_source(x, input_specs(model))


@pytest.fixture(scope="module")
def plan(model: ir.Model, source: CalibrationSource) -> QuantPlan:
    """Min-max ranges and the largest weights, at 4 bits, where a search has something to gain."""
    placed = place(model, load_target("onnxruntime"), PlacementSettings(wbits=4, abits=4, sums_bits=8))
    return start_weights(model, method_ranges(model, placed, source, MinMax()).plan)


def made_before(model: ir.Model, plan: QuantPlan, tensor: str) -> list[str]:
    """Stored tensors that the network makes before ``tensor``."""
    order = [v.name for v in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))]
    return [name for name in order[: order.index(tensor)] if name is not None and name in plan.activations]


def quantized_before(plan: QuantPlan, before: list[str], layers: int) -> QuantPlan:
    """The plan with the given tensors and the first ``layers`` weights only."""
    weights = {f"w{i}": plan.weights[f"w{i}"] for i in range(layers)}
    return QuantPlan(
        target=plan.target,
        activations={name: plan.activations[name] for name in before},
        weights=weights,
        int_biases={bias: keys for bias, keys in plan.int_biases.items() if keys[1] in weights},
    )


def test_a_prefix_that_starts_at_a_cut_gives_what_the_whole_network_gives(
    model: ir.Model, source: CalibrationSource, plan: QuantPlan, tmp_path: pathlib.Path
) -> None:
    prefix = Prefix(model, source, tmp_path, float_samples=4)
    whole_float = make_session(model, outputs=[f"t{i}" for i in (0, 1, 2, 3, 5, 6)])
    cuts = set()
    for layer, tensor in ((1, "t0"), (2, "t1"), (3, "t2"), (4, "t3"), (6, "t5"), (7, "t6")):
        before = made_before(model, plan, tensor)
        done = quantized_before(plan, before, layer)
        whole = make_session(emit(model, fit_biases(model, done)), outputs=[tensor])
        seen = []
        for index, (exact, quantized) in enumerate(prefix.stream(done, [tensor], decided=before)):
            (sample,) = source.read([index])
            np.testing.assert_allclose(quantized[tensor], whole.run(sample)[tensor], atol=1e-5)
            if exact is not None:
                # Other fusions, other rounding.
                np.testing.assert_allclose(exact[tensor], whole_float.run(sample)[tensor], atol=1e-5)
                seen.append(index)
        assert seen == spaced(SAMPLES, 4)
        files = {path.name for path in tmp_path.iterdir()}
        assert len(files) in (0, 2), "one cut of each network at a time"
        cuts |= files
    assert len(cuts) >= 4, "later tensors start from cuts"


def test_a_long_residual_stream_does_not_collect_in_the_cuts(tmp_path: pathlib.Path) -> None:
    """A sum is read once more by the block that follows it, and by nobody after the next sum."""
    blocks = 12
    nodes = "".join(
        f"[r{i}] t{i} = Relu (s{i}) [c{i}] a{i} = Conv (t{i}, w{i}) [d{i}] s{i + 1} = Add (s{i}, a{i}) "
        for i in range(blocks)
    )
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> m (float[N,4,8,8] s0) => (float[N,4,8,8] s{blocks}) {{ {nodes} }}'
    )
    rng = np.random.default_rng(0)
    for i in range(blocks):
        weight = rng.standard_normal((4, 4, 1, 1)).astype(np.float32) / 4
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"w{i}"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    source = open_source(rng.standard_normal((SAMPLES, 4, 8, 8)).astype(np.float32), input_specs(model))
    prefix = Prefix(model, source, tmp_path)
    plan, value = QuantPlan(target="onnxruntime"), 4 * 8 * 8 * 4
    cuts = 0
    for i in range(1, blocks):
        # Nothing is quantized: what reaches a block is what the float network computes.
        whole = make_session(model, outputs=[f"t{i}"])
        for index, (_, quantized) in enumerate(prefix.stream(plan, [f"t{i}"], decided=[f"s{i - 1}", f"t{i - 1}"])):
            (sample,) = source.read([index])
            np.testing.assert_allclose(quantized[f"t{i}"], whole.run(sample)[f"t{i}"], atol=1e-5)
        sizes = [path.stat().st_size for path in tmp_path.iterdir()]
        cuts += bool(sizes)
        assert all(size < SAMPLES * 3 * value for size in sizes)
    assert cuts > blocks / 2


def test_an_abandoned_stream_leaves_the_prefix_as_it_was(
    model: ir.Model, source: CalibrationSource, plan: QuantPlan, tmp_path: pathlib.Path
) -> None:
    prefix = Prefix(model, source, tmp_path)
    before = made_before(model, plan, "t5")
    done = quantized_before(plan, before, 6)
    stream = prefix.stream(done, ["t5"], decided=before)
    (_, first) = next(stream)
    stream.close()  # type: ignore[attr-defined]  # a generator
    (_, again) = next(prefix.stream(done, ["t5"]))
    np.testing.assert_array_equal(first["t5"], again["t5"])


def test_spaced_choices_share_few_samples() -> None:
    assert spaced(5, None) == spaced(5, 9) == [0, 1, 2, 3, 4]
    for count in (10, 64, 101):
        for limit in (1, 3, count // 2):
            one, other = spaced(count, limit), spaced(count, limit, between=True)
            assert len(set(one)) == len(set(other)) == limit
            assert max(other) < count
            assert not set(one) & set(other)


def test_sites_are_what_quantized_layers_read_through(model: ir.Model, plan: QuantPlan) -> None:
    sites = sites_of(model, plan)
    assert sorted(layer.name for site in sites for layer in site.layers) == [f"c{i}" for i in range(8)]
    for site in sites:
        assert {layer.input for layer in site.layers} == {site.tensor}
        # What a sum reads as well is stored with 8 bits and requantized to 4 in front of a layer.
        assert (site.key is not None) == (site.tensor in {"t0", "t2"})


def searched(model: ir.Model, plan: QuantPlan, source: CalibrationSource, folder: pathlib.Path) -> QuantPlan:
    folder.mkdir()
    search = EasyQuant(model, Prefix(model, source, folder), SearchOptions(centred=False), WorkLimits())
    steps: list[None] = []
    result = search.run(plan, lambda: steps.append(None))
    assert len(steps) == len(sites_of(model, plan))
    assert [change.layer for change in result.changes] == [f"c{i}" for i in range(8)]
    assert all(change.rounds >= 1 for change in result.changes)
    assert all(change.weight_gain_db >= -1e-6 for change in result.changes)
    return result.plan


def test_the_network_gains_and_the_result_is_repeatable(
    model: ir.Model, source: CalibrationSource, plan: QuantPlan, tmp_path: pathlib.Path
) -> None:
    found = searched(model, plan, source, tmp_path / "one")
    trial = Trial(model, source)
    assert trial.measure(model, found).sqnr_db > trial.measure(model, plan).sqnr_db + 1
    again = searched(model, plan, source, tmp_path / "two")
    for entries, others in ((found.weights, again.weights), (found.activations, again.activations)):
        assert entries.keys() == others.keys()
        for name, entry in entries.items():
            other = others[name]
            assert isinstance(entry, TensorQuantizer)
            assert isinstance(other, TensorQuantizer)
            np.testing.assert_array_equal(entry.scale, other.scale)
            np.testing.assert_array_equal(entry.zero_point, other.zero_point)


def test_little_work_still_helps_and_is_told(
    model: ir.Model, source: CalibrationSource, plan: QuantPlan, tmp_path: pathlib.Path
) -> None:
    trial = Trial(model, source)
    before = trial.measure(model, plan).sqnr_db
    # No bias is corrected here, so mean errors must count.
    options = SearchOptions(centred=False)
    for block, work in ((2048, 1.0), (6, 1e13)):
        folder = tmp_path / str(block)
        folder.mkdir()
        limits = WorkLimits(block=block, search_work=work)
        result = EasyQuant(model, Prefix(model, source, folder), options, limits).run(plan)
        assert all(change.weight_gain_db >= -1e-6 for change in result.changes)
        assert trial.measure(model, result.plan).sqnr_db > before + 1
        # Each convolution has 36 inputs.
        assert ("was reduced to" in result.notes[0]) == (work == 1.0)
        assert ("8 of 8 layers were kept in blocks of up to 6 inputs" in result.notes[-1]) == (block == 6)


def test_fixed_and_refused_scales_stay(
    model: ir.Model, source: CalibrationSource, plan: QuantPlan, tmp_path: pathlib.Path
) -> None:
    asked = []

    def refuse(tensor: str, reader: tuple[str, int] | None, quantizers: dict[str, TensorQuantizer]) -> TensorQuantizer:
        asked.append(tensor)
        assert set(quantizers) == {"start", "search"}
        return quantizers["start"]

    search = EasyQuant(
        model,
        Prefix(model, source, tmp_path),
        SearchOptions(),
        WorkLimits(),
        fixed=frozenset({"x"}),
        judge=refuse,  # type: ignore[arg-type]  # a dict is what it is given
    )
    result = search.run(plan).plan
    assert asked
    assert "x" not in asked
    assert result.activations == plan.activations
    assert result.requants == plan.requants


def test_site_data_keep_moments_means_and_rows(model: ir.Model, plan: QuantPlan) -> None:
    site = next(site for site in sites_of(model, plan) if site.tensor == "t0")
    (layer,) = site.layers
    quantizer = plan.activations["t0"]
    assert isinstance(quantizer, TensorQuantizer)
    data = SiteData(site.layers, quantizer, WorkLimits(search_rows=SAMPLES * 10, search_samples=SAMPLES))
    rng = np.random.default_rng(2)
    parts = [rng.uniform(0, 1, (64, layer.groups, layer.depth)).astype(np.float32) for _ in range(3)]
    for index, rows in enumerate(parts):
        data.add(layer, rows, rows + 1 if index < 2 else None, complete=True)
    assert data.exact[layer.name]
    np.testing.assert_allclose(data.float_mean(layer), np.concatenate(parts[:2]).mean(0) + 1, rtol=1e-5)
    exact, quantized, starts = data.search_rows(layer)
    assert starts.tolist() == [0, 10]
    np.testing.assert_allclose(exact, quantized + 1, rtol=1e-6)
    everything = quantizer.simulate(np.concatenate(parts)).astype(np.float64)
    moments = data.moments(layer, quantizer)
    np.testing.assert_allclose(moments.square, np.einsum("pgk,pgl->gkl", everything, everything) / 192, rtol=1e-4)


def test_sampled_positions_are_seeded_and_in_order(model: ir.Model, plan: QuantPlan) -> None:
    layer = sites_of(model, plan)[0].layers[0]
    assert sampled_positions(layer, (1, 4, 8, 8), 64, 0, 0) is None
    chosen = sampled_positions(layer, (1, 4, 8, 8), 10, 0, 3)
    assert chosen is not None
    assert len(set(chosen.tolist())) == 10
    assert (np.diff(chosen) > 0).all()
    again = sampled_positions(layer, (1, 4, 8, 8), 10, 0, 3)
    assert again is not None
    np.testing.assert_array_equal(chosen, again)
