"""Rounding borders in plans and graphs: where they can be, what the emitted nodes compute, what stays integer."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from postquant.calib.border_terms import BorderTerms, border_of
from postquant.calib.layers import Layer
from postquant.passes.biases import fit_biases
from postquant.passes.border_nodes import is_border
from postquant.passes.border_plan import BorderSite, border_sites, with_border
from postquant.passes.emit import emit
from postquant.passes.plan import QuantPlan
from postquant.passes.target import WeightStorage
from postquant.runtime_ops.ops import reference_classes
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

NETWORK = """<ir_version: 8, opset_import: ["" : 21]>
g (float[N,3,8,8] x) => (float[N,2] y)
{
  [first] a = Conv <pads = [1, 1, 1, 1]> (x, w0)
  [relu] r = Relu (a)
  [wide] c = Conv <pads = [1, 1, 1, 1]> (r, w1, b1)
  [relu1] c1 = Relu (c)
  [depthwise] d = Conv <pads = [1, 1, 1, 1], group = 6> (c1, w2, b2)
  [sum] s = Add (d, r)
  [left] e = Conv (s, w3)
  [right] f = Conv <pads = [1, 1, 1, 1]> (s, w4)
  [join] j = Add (e, f)
  [pool] p = GlobalAveragePool (j)
  [flat] v = Flatten (p)
  [last] y = Gemm (v, w5)
}"""


@pytest.fixture(scope="module")
def quantized(bench: Any) -> tuple[ir.Model, QuantPlan, list[dict[str, Any]]]:
    """The network at W8A4, by min-max ranges, and samples."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (6, 3, 3, 3), "w1": (6, 6, 3, 3), "b1": (6,), "w2": (6, 1, 3, 3), "b2": (6,), "w3": (4, 6, 1, 1)}
    shapes |= {"w4": (4, 6, 3, 3), "w5": (4, 2)}
    arrays = {name: (rng.standard_normal(shape) / 3).astype(np.float32) for name, shape in shapes.items()}
    model = bench.model(NETWORK, **arrays)
    feeds = bench.feeds(rng, 3, (2, 3, 8, 8))
    plan = bench.calibrate(model, bench.place(model, abits=4, first_last_bits=8), feeds)
    return model, plan, feeds


def bordered(model: ir.Model, plan: QuantPlan, site: BorderSite) -> TensorQuantizer:
    """The site's quantizer with the border of its layer."""
    layer = Layer.of(site.node)
    assert layer is not None
    entry = plan.weights[layer.weight]
    tensor = model.graph.initializers[layer.weight].const_value
    assert isinstance(entry, TensorQuantizer)
    assert tensor is not None
    found = border_of(layer, entry.simulate(tensor.numpy()), BorderTerms(largest_rank=1.0))
    assert found is not None
    quantizer = plan.input_quantizer(site.key) or plan.activation_quantizer(site.tensor)
    assert quantizer is not None
    return dataclasses.replace(quantizer, border=found.border)


def with_all(model: ir.Model, plan: QuantPlan) -> QuantPlan:
    sites, _ = border_sites(model, plan, bits=4)
    quantizers = {site.key: bordered(model, plan, site) for site in sites}
    for site in sites:
        plan = with_border(plan, site, quantizers[site.key])
    return fit_biases(model, plan)


def test_sites(quantized: tuple[ir.Model, QuantPlan, Any]) -> None:
    model, plan, _ = quantized
    sites, refused = border_sites(model, plan, bits=4)
    assert [site.key for site in sites] == ["wide:0", "depthwise:0", "left:0", "right:0"]
    # The first one reads a requantization of an 8-bit tensor, the others narrow tensors.
    assert [len(site.readers) for site in sites] == [0, 1, 2, 2]
    assert not refused
    assert border_sites(model, plan, bits=3) == ([], {})
    signed = dataclasses.replace(
        plan,
        requants={"wide:0": TensorQuantizer.from_range(QuantSpec(4, signed=True, symmetric=True), -1, 1)},
    )
    sites, refused = border_sites(model, signed, bits=4)
    assert [site.key for site in sites] == ["depthwise:0", "left:0", "right:0"]
    assert "signed" in refused["wide"]


def test_a_tensor_of_its_own_is_stored_in_8_bits(quantized: tuple[ir.Model, QuantPlan, Any]) -> None:
    model, plan, _ = quantized
    site = next(s for s in border_sites(model, plan, bits=4)[0] if s.key == "depthwise:0")
    narrow = plan.activation_quantizer(site.tensor)
    changed = with_border(plan, site, bordered(model, plan, site))
    stored, read = changed.activation_quantizer(site.tensor), changed.input_quantizer("depthwise:0")
    assert narrow is not None
    assert stored is not None
    assert read is not None
    assert (stored.spec.bits, read.spec.bits) == (8, 4)
    assert read.border is not None
    # The same range: what one clips, the other clips.
    np.testing.assert_allclose(stored.range(), narrow.range(), rtol=1e-6)
    assert changed.int_biases["b2"][0] == "depthwise:0"
    assert plan.int_biases["b2"][0] == site.tensor


def test_codes_are_the_law_and_everything_integer_stays_integer(
    bench: Any, quantized: tuple[ir.Model, QuantPlan, Any], tmp_path: pathlib.Path
) -> None:
    model, plan, feeds = quantized
    plain, full = emit(model, fit_biases(model, plan)), with_all(model, plan)
    emitted = emit(model, full)
    bench.check(emitted)
    nodes = [node for node in emitted.graph if is_border(node)]
    assert len(nodes) == 4
    assert not any(node.op_type == "Clip" for node in emitted.graph)
    before, after = bench.optimized(plain, tmp_path), bench.optimized(emitted, tmp_path)
    for kernel in ("QLinearConv", "QGemm", "QLinearAdd"):
        assert after[kernel] == before[kernel]
    watched = emitted.clone()
    places = {}
    for node in [node for node in watched.graph if is_border(node)]:
        codes, source = node.outputs[0], node.inputs[0]
        assert source is not None
        watched.graph.outputs.extend([codes, source])
        places[(codes.name or "").removesuffix("_quantized").replace("_input", ":")] = codes.name, source.name
    for feed in feeds:
        found = bench.run(watched, feed)
        for key, (codes_name, source_name) in places.items():
            quantizer = full.input_quantizer(key)
            assert quantizer is not None
            np.testing.assert_array_equal(found[codes_name], quantizer.quantize(found[source_name]))


def test_packed_weights_read_bordered_activations(bench: Any, quantized: tuple[ir.Model, QuantPlan, Any]) -> None:
    model, _, feeds = quantized
    plan = bench.calibrate(model, bench.place(model, abits=4, wbits=4, first_last_bits=8), feeds)
    plan = with_all(model, plan)
    packed = emit(model, plan, weight_storage=WeightStorage.PACKED)
    bench.check(packed)
    names = {node.op_type for node in packed.graph if node.domain}
    assert names == {"BorderQuantize", "LutQLinearConv"}
    assert {function.name for function in packed.functions.values()} == names
    expected = bench.run(emit(model, plan), feeds[0])["y"]
    np.testing.assert_allclose(bench.run(packed, feeds[0])["y"], expected, rtol=1e-5, atol=1e-6)


def test_other_evaluators_run_it(bench: Any, quantized: tuple[ir.Model, QuantPlan, Any]) -> None:
    model, plan, feeds = quantized
    proto = bench.check(emit(model, with_all(model, plan)))
    expected: Any = ReferenceEvaluator(proto, new_ops=reference_classes()).run(None, feeds[0])
    found: Any = ReferenceEvaluator(proto).run(None, feeds[0])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)


def test_a_plan_with_borders_survives_the_disk(
    quantized: tuple[ir.Model, QuantPlan, Any], tmp_path: pathlib.Path
) -> None:
    model, plan, _ = quantized
    full = with_all(model, plan)
    full.save(tmp_path / "plan")
    again = QuantPlan.load(tmp_path / "plan")
    for key, entry in full.requants.items():
        other = again.requants[key]
        assert isinstance(entry, TensorQuantizer)
        assert isinstance(other, TensorQuantizer)
        assert (entry.border is None) == (other.border is None)
        if entry.border is not None and other.border is not None:
            for name, array in entry.border.arrays().items():
                np.testing.assert_array_equal(array, other.border.arrays()[name])
                assert array.dtype == other.border.arrays()[name].dtype
    one, two = (ir.to_proto(emit(model, p)).SerializeToString(deterministic=True) for p in (full, again))
    assert one == two


def test_a_border_belongs_to_unsigned_codes(quantized: tuple[ir.Model, QuantPlan, Any]) -> None:
    model, plan, _ = quantized
    border = bordered(model, plan, border_sites(model, plan, bits=4)[0][0]).border
    with pytest.raises(ValueError, match="unsigned"):
        dataclasses.replace(TensorQuantizer.from_range(QuantSpec(4, signed=True, symmetric=True), -1, 1), border=border)
