"""Readers of a tensor that make up for each other's errors: what the emitted nodes compute, and what is found amiss."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from postquant.calib.activation_levels import quantizer_with_levels
from postquant.calib.feedback import feedback_of
from postquant.passes.biases import fit_biases
from postquant.passes.emit import emit
from postquant.passes.level_plan import level_sites, with_levels
from postquant.passes.lookup_nodes import lookup_nodes, lookup_of
from postquant.passes.lut_expansion import with_qdq
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.passes.standard import standard_model, without_borders
from postquant.pipeline.plan_check import differences
from postquant.pipeline.recover import recover_float_model
from postquant.runtime_ops.library import register
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

CHANNELS = 5
# A fire module (Iandola et al. 2016): two layers read what one has squeezed.
NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,8,8] x) => (float[N,2,8,8] y)
{
  [first] a = Conv (x, w0)
  [squeezed] r = Relu (a)
  [left] b = Conv (r, w1, b1)
  [right] c = Conv <pads = [1, 1, 1, 1]> (r, w2, b2)
  [both] d = Concat <axis = 1> (b, c)
  [relu] e = Relu (d)
  [last] y = Conv (e, w3)
}"""
READERS = ("left:0", "right:0")


@pytest.fixture(scope="module", params=[1, 2])
def fire(request: pytest.FixtureRequest, bench: Any) -> tuple[ir.Model, QuantPlan, list[dict[str, Any]]]:
    """The network whose two readers make up for each other's errors, across places too, and samples."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (CHANNELS, 3, 1, 1), "w1": (4, CHANNELS, 1, 1), "w2": (4, CHANNELS, 3, 3), "w3": (2, 8, 1, 1)}
    arrays = {name: (rng.standard_normal(shape) / 2).astype(np.float32) for name, shape in shapes.items()}
    arrays |= {name: rng.standard_normal(4).astype(np.float32) for name in ("b1", "b2")}
    model = bench.model(NETWORK, **arrays)
    feeds = bench.feeds(rng, 3, (2, 3, 8, 8))
    plan = bench.calibrate(model, bench.place(model, abits=4, first_last_bits=8), feeds)
    site = next(site for site in level_sites(model, plan)[0] if site.tensor == "r")
    high = float(site.quantizer.range()[1])
    levels = high * (np.arange(16) / 15) ** 2 * np.linspace(0.3, 1.0, CHANNELS)[:, None]
    plan = with_levels(plan, site, quantizer_with_levels(site.quantizer.spec, levels, -3))
    return model, together(plan, rng, request.param), feeds


def together(plan: QuantPlan, rng: np.random.Generator, cell: int) -> QuantPlan:
    """The plan in which the readers have levels of their own, and a feedback across all of them and a cell's places."""
    entry = plan.requants[READERS[0]]
    assert isinstance(entry, TensorQuantizer)
    assert entry.table is not None
    table = np.concatenate([entry.table, np.sort(entry.table - entry.table // 3, axis=1)])
    size = cell * cell * 2 * CHANNELS
    seen = rng.standard_normal((4 * cell, size))
    feedback = feedback_of(seen.T @ seen, np.full(size, float(entry.scale) ** 2), float(entry.scale), cell)
    for copy, key in enumerate(READERS):
        changed = dataclasses.replace(entry, table=table, feedback=feedback, copies=2, copy=copy)
        plan = plan.with_requant(key, changed)
    return plan


def entry_of(plan: QuantPlan, key: str) -> TensorQuantizer:
    entry = plan.requants[key]
    assert isinstance(entry, TensorQuantizer)
    return entry


def test_every_reader_has_its_copys_share_of_what_all_copies_give(fire: Any) -> None:
    _, plan, _ = fire
    x = np.random.default_rng(1).uniform(0, 3, (2, CHANNELS, 4, 3)).astype(np.float32)
    left, right = (entry_of(plan, key) for key in READERS)
    whole = left.whole.quantize(np.concatenate([x, x], axis=1))
    np.testing.assert_array_equal(left.quantize(x), whole[:, :CHANNELS])
    np.testing.assert_array_equal(right.quantize(x), whole[:, CHANNELS:])
    # The second one's errors answer the first one's.
    alone = dataclasses.replace(right, feedback=None)
    assert right.table is not None
    own = dataclasses.replace(alone.whole, table=right.table[CHANNELS:])
    np.testing.assert_array_equal(alone.quantize(x), own.quantize(x))
    assert (alone.quantize(x) != right.quantize(x)).any()


@pytest.mark.parametrize(("copies", "copy"), [(2, 2), (2, -1), (3, 0), (0, 0)])
def test_copies_that_do_not_fit_are_refused(fire: Any, copies: int, copy: int) -> None:
    with pytest.raises(ValueError, match="copy"):
        dataclasses.replace(entry_of(fire[1], READERS[0]), feedback=None, copies=copies, copy=copy)


def test_plans_keep_them_on_the_disk(fire: Any, tmp_path: pathlib.Path) -> None:
    fire[1].save(tmp_path / "plan")
    after = QuantPlan.load(tmp_path / "plan")
    assert [(entry_of(after, key).copies, entry_of(after, key).copy) for key in READERS] == [(2, 0), (2, 1)]
    before, found = entry_of(fire[1], "right:0").feedback, entry_of(after, "right:0").feedback
    assert before is not None
    assert found is not None
    assert found.cell == before.cell
    np.testing.assert_array_equal(entry_of(after, "right:0").table, entry_of(fire[1], "right:0").table)


@pytest.mark.parametrize("standard", [False, True])
def test_nodes_compute_the_law(fire: Any, *, standard: bool) -> None:
    """Codes that every reader reads, on onnxruntime: the law of its quantizer, of what the stored codes stand for."""
    model, plan, feeds = fire
    plan = fit_biases(model, plan)
    emitted = emit(model, plan)
    if standard:
        found = standard_model(emitted)
        emitted, plan = found.model, without_borders(plan)
        assert len(found.changes) == 1
    read = {}
    for key in READERS:
        node = next(node for node in emitted.graph if node.name == key.partition(":")[0])
        dequantize = node.inputs[0].producer() if node.inputs[0] is not None else None
        assert dequantize is not None
        assert dequantize.inputs[0] is not None
        read[key] = dequantize.inputs[0].name or ""
    assert len(set(read.values())) == 2
    stored = plan.activation_quantizer("r")
    assert stored is not None
    for native in (False, True):
        options = onnxruntime.SessionOptions()
        assert not native or register(options)
        proto = ir.to_proto(emitted)
        for name in (*read.values(), "r_quantized"):
            proto.graph.output.add(name=name)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
        for feed in feeds:
            *got, codes = session.run([*read.values(), "r_quantized"], feed)
            for key, levels in zip(read, got, strict=True):
                expected = entry_of(plan, key).quantize(stored.dequantize(codes))
                np.testing.assert_array_equal(levels, expected)


def test_layers_stay_integer_and_one_operator_serves_both(fire: Any, tmp_path: pathlib.Path) -> None:
    model, plan, feeds = fire
    emitted = emit(model, fit_biases(model, plan))
    assert [node.op_type for node in emitted.graph].count("FeedbackRequantize") == 1
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(ir.to_proto(emitted).SerializeToString(), options)
    kinds = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert kinds.count("QLinearConv") == 4
    assert "Conv" not in kinds
    # Everything of it counts as the look-up, and the float model comes back without it.
    assert {node.op_type for node in lookup_nodes(emitted.graph)} == {"Concat", "FeedbackRequantize", "Split"}
    recovered = recover_float_model(emitted, plan)
    assert sorted(node.op_type for node in recovered.graph) == sorted(node.op_type for node in model.graph)
    expected, got = (make_session(found).run(feeds[0])["y"] for found in (model, recovered))
    np.testing.assert_allclose(got, expected, atol=0.3 * np.abs(expected).max())


@pytest.mark.parametrize("standard", [False, True])
def test_other_copies_are_found(fire: Any, *, standard: bool) -> None:
    model, plan, _ = fire
    plan = fit_biases(model, plan)
    emitted = emit(model, plan)
    if standard:
        emitted, plan = standard_model(emitted).model, without_borders(plan)
    recovered = recover_float_model(emitted, plan)
    assert not list(differences(recovered, with_qdq(emitted), plan))
    split = next(node for node in emitted.graph if node.op_type == "Split")
    lookup = lookup_of(split)
    assert lookup is not None
    assert lookup.copies == 2
    if not standard:
        attribute = lookup.nodes[-1].attributes["cell"]
        lookup.nodes[-1].attributes["cell"] = ir.AttrInt64("cell", 3 - attribute.as_int())
        assert len(list(differences(recovered, with_qdq(emitted), plan))) == 2
        lookup.nodes[-1].attributes["cell"] = attribute
    uses = [next(iter(output.uses())) for output in split.outputs]
    for use, output in zip(uses, reversed(split.outputs), strict=True):
        use.node.replace_input_with(use.idx, output)
    wrong = [found.where for found in differences(recovered, with_qdq(emitted), plan)]
    assert len(wrong) == 2
    assert all(name in " ".join(wrong) for name in ("left", "right"))


def test_a_split_behind_other_codes_is_none(fire: Any, bench: Any) -> None:
    model, plan, _ = fire
    emitted = emit(model, fit_biases(model, plan))
    concat = next(node for node in emitted.graph if node.op_type == "Concat" and "copies" in (node.name or ""))
    other = next(value for value in (node.outputs[0] for node in emitted.graph) if value.name == "x_quantized")
    concat.replace_input_with(1, other)
    split = next(node for node in emitted.graph if node.op_type == "Split")
    assert lookup_of(split) is None
    spec = QuantSpec(4, signed=False, symmetric=False)
    with pytest.raises(ValueError, match="copy 1 of 2 for 0 rows"):
        TensorQuantizer(spec, np.ones((), np.float32), np.zeros((), np.int32), copies=2, copy=1)
