"""Activations with code books in plans and graphs: where they can be, what the emitted nodes compute, what stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from postquant.calib.activation_levels import quantizer_with_levels
from postquant.passes.biases import fit_biases
from postquant.passes.emit import emit
from postquant.passes.level_plan import level_sites, with_levels
from postquant.passes.lookup_nodes import is_lookup, lookup_dequantize, lookup_differs, lookup_of, maker_of
from postquant.passes.plan import QuantPlan
from postquant.passes.qdq import Builder
from postquant.passes.session import make_session
from postquant.passes.standard import standard_model
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.integer import Affine
from postquant.runtime_ops.ops import reference_classes
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.schema import DOMAIN
from postquant.runtime_ops.spec import QuantSpec

NETWORK = """<ir_version: 8, opset_import: ["" : 21]>
g (float[N,3,8,8] x) => (float[N,2] y)
{
  [first] a = Conv <pads = [1, 1, 1, 1]> (x, w0)
  [relu] r = Relu (a)
  [pool] m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
  [one] c = Conv (m, w1, b1)
  [relu1] c1 = Relu (c)
  [left] d = Conv <pads = [1, 1, 1, 1]> (c1, w2, b2)
  [right] e = Conv (c1, w3)
  [sum] s = Add (d, e)
  [behind] f = Conv (s, w4)
  [again] g = Add (f, s)
  [mean] p = GlobalAveragePool (g)
  [flat] v = Flatten (p)
  [last] y = Gemm (v, w5)
}"""


class GatherElements(OpRun):
    """The operator by its definition; that of onnx's evaluator knows no more than 64 elements."""

    op_domain = ""

    def _run(self, data: Any, indices: Any, axis: int) -> tuple[Any]:
        return (np.take_along_axis(data, indices, axis),)


@pytest.fixture(scope="module")
def quantized(bench: Any) -> tuple[ir.Model, QuantPlan, list[dict[str, Any]]]:
    """The network at W8A4, by min-max ranges, and samples."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (6, 3, 3, 3), "w1": (5, 6, 1, 1), "b1": (5,), "w2": (4, 5, 3, 3), "b2": (4,), "w3": (4, 5, 1, 1)}
    shapes |= {"w4": (4, 4, 1, 1), "w5": (4, 2)}
    arrays = {name: (rng.standard_normal(shape) / 3).astype(np.float32) for name, shape in shapes.items()}
    model = bench.model(NETWORK, **arrays)
    feeds = bench.feeds(rng, 3, (2, 3, 8, 8))
    return model, bench.calibrate(model, bench.place(model, abits=4, first_last_bits=8), feeds), feeds


def booked(model: ir.Model, plan: QuantPlan, *, channels: bool) -> QuantPlan:
    """Every place with levels that grow by squares, as far as the codes did, or as channels differ."""
    for site in level_sites(model, plan)[0]:
        low, high = (float(end) for end in site.quantizer.range())
        below, above = low * (np.arange(3, 0, -1) / 3) ** 2, high * (np.arange(1, 13) / 12) ** 2
        levels = np.sort(np.concatenate([[0.0], below, above]))
        if channels:
            levels = levels * np.linspace(0.3, 1.0, site.channels)[:, None]
        axis = site.axis if channels else None
        plan = with_levels(plan, site, quantizer_with_levels(site.quantizer.spec, levels, axis))
    return fit_biases(model, plan)


def test_places(quantized: tuple[ir.Model, QuantPlan, Any]) -> None:
    model, plan, _ = quantized
    sites, refused = level_sites(model, plan)
    assert {site.tensor or next(iter(site.keys)): sorted(site.keys) for site in sites} == {
        "r": ["one:0"],  # through a MaxPool, which copies codes
        "c1": ["left:0", "right:0"],
        "behind:0": ["behind:0"],  # narrows the sum, which has 8 bits
    }
    assert {(site.value, site.axis, site.channels) for site in sites} == {("m", -3, 6), ("c1", -3, 5), ("s", -3, 4)}
    assert not refused
    after = booked(model, plan, channels=True)
    for name in ("r", "c1"):
        stored = after.activation_quantizer(name)
        assert stored is not None
        assert stored.spec.bits == 8
        assert stored.table is None
    assert after.int_biases["b1"][0] == "one:0"
    assert after.int_biases["b2"][0] == "left:0"
    assert not level_sites(model, after)[0]


@pytest.mark.parametrize(("name", "reason"), [("signed", "signed"), ("float", "reads it, too")])
def test_places_that_cannot_have_one(quantized: tuple[ir.Model, QuantPlan, Any], name: str, reason: str) -> None:
    model, plan, _ = quantized
    if name == "float":
        plan = QuantPlan(**{**vars(plan), "floats": {"right": "asked for"}})
    else:
        entry = plan.activations["c1"]
        assert isinstance(entry, TensorQuantizer)
        spec = type(entry.spec)(4, signed=True, symmetric=True)
        plan = plan.with_activation("c1", TensorQuantizer(spec, entry.scale, np.zeros((), np.int32)))
    sites, refused = level_sites(model, plan)
    assert "c1" not in {site.tensor for site in sites}
    assert reason in refused["c1"]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("[a] y = Conv (r, w)", ("r", -3, 6)),
        ("[p] m = MaxPool <kernel_shape = [2, 2]> (r) [a] y = Conv (m, w)", ("m", -3, 6)),
        # What layers read through a pass-through node and without it has not the same places.
        ("[p] m = MaxPool <kernel_shape = [2, 2]> (r) [a] d = Conv (m, w) [b] y = Conv (r, w)", ("r", None, 1)),
        ("[f] m = Flatten (r) [a] y = Gemm (m, v)", ("m", -1, 96)),
        ("[f] m = Flatten <axis = 2> (r) [a] y = Gemm <transA = 1> (m, u)", ("m", None, 1)),
        ("[t] m = Transpose <perm = [0, 2, 3, 1]> (r) [a] y = MatMul (m, t)", ("m", -1, 6)),
    ],
)
def test_channels_are_those_of_what_layers_read(bench: Any, text: str, read: tuple[Any, ...]) -> None:
    source = """<ir_version: 8, opset_import: ["" : 21]> g (float[1,3,4,4] x) => (float y)
    { [first] a = Conv (x, w0) [relu] r = Relu (a) BODY [last] z = Relu (y) }""".replace("BODY", text)
    rng = np.random.default_rng(0)
    shapes = {"w0": (6, 3, 1, 1), "w": (2, 6, 1, 1), "v": (96, 2), "u": (6, 2), "t": (6, 2)}
    arrays = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items() if f", {n})" in source}
    model = bench.model(source.replace("(float y)", "(float z)"), **arrays)
    feeds = bench.feeds(rng, 2, (1, 3, 4, 4))
    plan = bench.calibrate(model, bench.place(model, abits=4, first_last_bits=4), feeds)
    sites = [site for site in level_sites(model, plan)[0] if site.tensor == "r"]
    assert [(site.value, site.axis, site.channels) for site in sites] == [read]


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("channels", [False, True])
def test_nodes_compute_the_law(
    quantized: tuple[ir.Model, QuantPlan, list[dict[str, Any]]], *, channels: bool, standard: bool
) -> None:
    """Codes behind every lookup, on onnxruntime: the law of the quantizer, of what the stored codes stand for."""
    model, plan, feeds = quantized
    plan = booked(model, plan, channels=channels)
    emitted = standard_model(emit(model, plan)).model if standard else emit(model, plan)
    assert (DOMAIN in emitted.graph.opset_imports) != standard
    lookups = sorted(node.name or "" for node in emitted.graph if is_lookup(node))
    assert lookups == ["behind_input0_quantized", "left_input0_quantized", "one_input0_quantized"]
    stored = {"behind": "s_quantized", "left": "c1_quantized", "one": "m_quantized"}
    tensors = {"behind": "s", "left": "c1", "one": "r"}
    session = make_session(emitted, outputs=[*lookups, *stored.values()])
    for feed in feeds:
        got = session.run(feed)
        for layer, codes in stored.items():
            quantizer, wide = plan.requants[f"{layer}:0"], plan.activation_quantizer(tensors[layer])
            assert isinstance(quantizer, TensorQuantizer)
            assert wide is not None
            levels = got[f"{layer}_input0_quantized"]
            np.testing.assert_array_equal(levels, quantizer.quantize(wide.dequantize(got[codes])))
            assert quantizer.table is not None
            assert set(np.unique(levels)) <= set(quantizer.table.ravel().tolist())
    # Nothing reads the stored codes but the lookups.
    assert not {"c1_dequantized", "m_dequantized"} & {node.name for node in emitted.graph}
    assert "r_dequantized" in {node.name for node in emitted.graph}


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("channels", [False, True])
def test_onnxruntime_and_the_reference_agree_and_layers_stay_integer(
    quantized: tuple[ir.Model, QuantPlan, list[dict[str, Any]]], tmp_path: Any, *, channels: bool, standard: bool
) -> None:
    model, plan, feeds = quantized
    emitted = emit(model, booked(model, plan, channels=channels))
    proto = ir.to_proto(standard_model(emitted).model if standard else emitted)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    reference: Any = ReferenceEvaluator(proto, new_ops=[GatherElements, *reference_classes()])
    for feed in feeds:
        got, expected = (np.asarray(runner.run(None, feed)[0]) for runner in (session, reference))
        np.testing.assert_allclose(got, expected, atol=0.05 * np.abs(expected).max())
    kinds = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert kinds.count("QLinearConv") == 5
    assert "Conv" not in kinds
    # Tables of channels are computed once, when the model is loaded.
    assert not {"MatMulInteger", "LessOrEqual", "ReduceSum"} & set(kinds)
    assert kinds.count("GatherElements") == 3


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("channels", [False, True])
def test_other_constants_are_found(
    quantized: tuple[ir.Model, QuantPlan, Any], *, channels: bool, standard: bool
) -> None:
    model, plan, _ = quantized
    plan = booked(model, plan, channels=channels)
    emitted = standard_model(emit(model, plan)).model if standard else emit(model, plan)
    lookup = next(found for node in emitted.graph if (found := lookup_of(node)) is not None)
    layer = (lookup.nodes[-1].name or "").removesuffix("_input0_quantized")
    quantizer = plan.requants[f"{layer}:0"]
    dequantize = next(use.node for use in lookup.nodes[-1].outputs[0].uses())
    assert dequantize.op_type == "DequantizeLinear"
    maker = maker_of(lookup.codes)
    assert maker is not None
    assert isinstance(quantizer, TensorQuantizer)
    scale, zero_point = (value.const_value.numpy() for value in maker.inputs[1:3] if value and value.const_value)
    stored = Affine(scale, zero_point.astype(np.int32), np.dtype(np.uint8))
    levels = lookup.nodes[-1].outputs[0]
    assert not lookup_differs(lookup, levels, quantizer, stored)
    for constant in lookup.constants:
        right = constant.const_value
        assert right is not None
        wrong = right.numpy().copy()
        wrong.reshape(-1)[-1] = not wrong.reshape(-1)[-1]
        constant.const_value = ir.Tensor(wrong, name=constant.name)
        assert lookup_differs(lookup, levels, quantizer, stored), constant.name
        constant.const_value = right
    if channels and not standard:
        lookup.nodes[-1].attributes["axis"] = ir.AttrInt64("axis", -2)
        assert lookup_differs(lookup, levels, quantizer, stored)


def test_a_chain_with_other_attributes_is_none(quantized: tuple[ir.Model, QuantPlan, Any]) -> None:
    model, plan, _ = quantized
    emitted = standard_model(emit(model, booked(model, plan, channels=True))).model
    lookup = next(found for node in emitted.graph if (found := lookup_of(node)) is not None)
    changed = 0
    for node in lookup.nodes:
        for name, attribute in tuple(node.attributes.items()):
            other = {"axis": 1 - attribute.as_int(), "keepdims": 1, "to": int(ir.DataType.INT64)}[name]
            node.attributes[name] = ir.AttrInt64(name, other)
            assert not is_lookup(lookup.nodes[-1]), (node.op_type, name)
            node.attributes[name] = attribute
            changed += 1
    assert changed == 5  # two GatherElements, two Casts, a ReduceSum
    assert is_lookup(lookup.nodes[-1])


def test_only_codes_of_8_bits_have_a_table(quantized: tuple[ir.Model, QuantPlan, Any]) -> None:
    model = quantized[0].clone()
    quantizer = quantizer_with_levels(_spec(), np.array([0.0, 0.1, 0.5, 3.0]))
    with pytest.raises(ModelError, match="codes of 8 bits"):
        lookup_dequantize(model.graph, Builder(model.graph), model.graph.inputs[0], quantizer, "x")


def _spec() -> QuantSpec:
    return QuantSpec(2, signed=False, symmetric=False)
