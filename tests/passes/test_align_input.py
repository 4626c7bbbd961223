"""Aligned image inputs: the same float function, integers at the first convolution, integer kernels behind them."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from postquant.passes.align_input import AlignInputPass, exact_quantizers, with_exact_inputs
from postquant.passes.emit import emit
from postquant.passes.input_levels import InputGrid
from postquant.passes.session import make_session
from postquant.pipeline.verify import verify_model
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
GRID = InputGrid(1 / (255 * STD), -MEAN / STD, 256)
UNIFORM = InputGrid(np.full(3, 1 / 128), np.full(3, -127 / 128), 256)
SPEC = QuantSpec(8, signed=False, symmetric=False)
POWERS_OF_TWO = QuantSpec(8, signed=False, symmetric=False, power_of_two=True)

CONVS = {
    "padded": "<pads = [1, 1, 1, 1], strides = [2, 2]>",
    "uneven": "<pads = [0, 1, 2, 0]>",
    "valid": '<auto_pad = "VALID">',
    "no padding": "",
    "same upper": '<auto_pad = "SAME_UPPER", strides = [2, 2]>',
    "same lower": '<auto_pad = "SAME_LOWER", strides = [2, 3]>',
}


def arrays(rng: np.random.Generator) -> dict[str, Any]:
    shapes = {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (5, 4, 3, 3), "b2": (5,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def build(bench: Any, rng: np.random.Generator, body: str, inputs: str = "float[N,3,12,10] x", **more: Any) -> ir.Model:
    given = {name: array for name, array in (arrays(rng) | more).items() if name in body}
    model: ir.Model = bench.model(bench.graph(body, inputs), **given)
    return model


def pixels(rng: np.random.Generator, count: int = 2, size: tuple[int, int] = (12, 10)) -> Any:
    return rng.integers(0, 256, (count, 3, *size)).astype(np.float32)


def normalised(p: Any) -> dict[str, Any]:
    x = (p / np.float32(255) - MEAN.astype(np.float32)[:, None, None]) / STD.astype(np.float32)[:, None, None]
    return {"x": x.astype(np.float32)}


def sqnr(reference: Any, other: Any) -> float:
    noise = float(np.square(reference.astype(np.float64) - other).sum())
    return math.inf if noise == 0 else 10 * math.log10(float(np.square(reference.astype(np.float64)).sum()) / noise)


def values(model: ir.Model, name: str, feed: dict[str, Any]) -> Any:
    return make_session(model, outputs=[name]).run(feed)[name]


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("bias", [True, False])
def test_same_function_and_integers(bench: Any, rng: np.random.Generator, name: str, bias: bool) -> None:
    model = build(bench, rng, f"y = Conv {CONVS[name]} (x, w1{', b1' if bias else ''})")
    p = pixels(rng)
    before = bench.run(model, normalised(p))["y"]
    passed = AlignInputPass({"x": GRID})
    assert passed(model).modified
    assert passed.notes == []
    bench.check(model)
    assert sqnr(before, bench.run(model, normalised(p))["y"]) > 110
    padded = name not in ("valid", "no padding")
    assert [node.op_type for node in model.graph] == [*(["Pad"] if padded else []), "Mul", "Add", "Conv"]
    aligned = values(model, "x_aligned", normalised(p))
    inner = aligned[:, :, 1:-1, 1:-1] if name == "padded" else aligned
    if name in ("padded", "valid", "no padding"):
        assert np.abs(inner - p).max() < 1e-3
    if name == "padded":
        np.testing.assert_allclose(aligned[0, :, 0, 0], 255 * MEAN, rtol=1e-5)
    assert not AlignInputPass({"x": GRID})(model).modified  # a second run changes nothing


def test_readers_with_the_same_padding_share_the_aligned_value(bench: Any, rng: np.random.Generator) -> None:
    keep = "<pads = [1, 1, 1, 1]>"
    model = build(bench, rng, f"a = Conv {keep} (x, w1, b1) b = Conv {keep} (x, w1, b1) y = Add (a, b)")
    feed = normalised(pixels(rng))
    before = bench.run(model, feed)["y"]
    assert AlignInputPass({"x": GRID})(model).modified
    assert sqnr(before, bench.run(model, feed)["y"]) > 110
    assert bench.ops(model) == {"Pad": 1, "Mul": 1, "Add": 2, "Conv": 2}


def test_grouped_convolution_and_dynamic_size(bench: Any, rng: np.random.Generator) -> None:
    w = rng.standard_normal((6, 1, 3, 3)).astype(np.float32)
    model = build(bench, rng, "y = Conv <group = 3, pads = [1, 1, 1, 1]> (x, w)", "float[N,3,H,W] x", w=w)
    feed = normalised(pixels(rng, size=(7, 9)))
    before = bench.run(model, feed)["y"]
    assert AlignInputPass({"x": GRID})(model).modified
    assert sqnr(before, bench.run(model, feed)["y"]) > 110
    bench.check(model)


def test_names_that_are_taken(bench: Any, rng: np.random.Generator) -> None:
    model = build(bench, rng, "x_aligned = Conv (x, w1, b1) y = Conv (x_aligned, w2, b2)")
    assert AlignInputPass({"x": GRID})(model).modified
    assert list(exact_quantizers(model, {"x": GRID})) == ["x_aligned_1"]


LEFT_ALONE = {
    "another reader": ("a = Conv (x, w1, b1) b = Relu (x) y = Conv (b, w1, b1)", "Relu_1 reads it, and is no conv"),
    "different padding": (
        "a = Conv <pads = [1, 1, 1, 1]> (x, w1) b = Conv (x, w1) c = Conv (a, w2) y = Conv (b, w2)",
        "its readers pad it differently",
    ),
    "dynamic size": ('y = Conv <auto_pad = "SAME_UPPER"> (x, w1)', "Conv_0 pads by an amount that depends"),
    "negative padding": ("y = Conv <pads = [-1, 0, 0, 0]> (x, w1)", "a negative padding cuts it"),
    "as a weight": ("y = Conv (w1, x)", "Conv_0 reads it, and is no conv"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone_with_a_reason(bench: Any, rng: np.random.Generator, name: str) -> None:
    body, reason = LEFT_ALONE[name]
    sizes = {"dynamic size": "N,3,H,W", "as a weight": "N,3,3,3"}.get(name, "N,3,12,10")
    text = bench.graph(body, f"float[{sizes}] x")
    given = {k: v for k, v in arrays(rng).items() if k in body}
    model = bench.model(text, **given)
    nodes = [node.op_type for node in model.graph]
    passed = AlignInputPass({"x": GRID})
    assert not passed(model).modified
    assert [node.op_type for node in model.graph] == nodes
    (note,) = passed.notes
    assert note.startswith("input x keeps its own values, although they lie on a grid: ")
    assert reason in note
    assert exact_quantizers(model, {"x": GRID}) == {}


def test_padding_outside_the_grid(bench: Any, rng: np.random.Generator) -> None:
    far = InputGrid(np.ones(3), np.full(3, 300.0), 256)  # x is 300 .. 555: a padded 0 would be level -300
    padded = build(bench, rng, "y = Conv <pads = [1, 1, 1, 1]> (x, w1)")
    passed = AlignInputPass({"x": far})
    assert not passed(padded).modified
    assert "the zeros of the padding lie outside the grid" in passed.notes[0]
    assert AlignInputPass({"x": far})(build(bench, rng, "y = Conv (x, w1)")).modified


def test_uniform_grids_need_no_change(bench: Any, rng: np.random.Generator) -> None:
    model = build(bench, rng, "a = Conv (x, w1) y = Relu (a)")
    assert not AlignInputPass({"x": UNIFORM, "absent": GRID})(model).modified
    (quantizer,) = exact_quantizers(model, {"x": UNIFORM}).values()
    p = pixels(rng)
    x = ((p - 127) / 128).astype(np.float32)
    np.testing.assert_array_equal(quantizer.quantize(x), p.astype(np.uint8))
    np.testing.assert_array_equal(quantizer.simulate(x), x)


@pytest.mark.parametrize(
    ("grid", "spec", "expected"),
    [
        (GRID, SPEC, (1.0, 0)),
        (UNIFORM, SPEC, (1 / 128, 127)),
        (GRID, QuantSpec(8, signed=True, symmetric=False), (1.0, -128)),
        (UNIFORM, QuantSpec(8, signed=True, symmetric=False), (1 / 128, -1)),
        (UNIFORM, POWERS_OF_TWO, (1 / 128, 127)),
        (GRID, QuantSpec(16, signed=False, symmetric=False), (1.0, 0)),
        (GRID, QuantSpec(7, signed=False, symmetric=False), None),
        (GRID, QuantSpec(8, signed=True, symmetric=True), None),
        (InputGrid(np.full(3, 1 / 255), np.zeros(3), 256), POWERS_OF_TWO, None),
        (InputGrid(np.full(1, 1 / 16), np.zeros(1), 16), QuantSpec(4, signed=False, symmetric=False), (1 / 16, 0)),
    ],
)
def test_formats(grid: InputGrid, spec: QuantSpec, expected: tuple[float, int] | None) -> None:
    quantizer = grid.quantizer(spec)
    found = None if quantizer is None else (float(quantizer.scale), int(quantizer.zero_point))
    assert found == expected


@pytest.mark.parametrize(
    ("step", "offset", "levels"),
    [(np.ones(3), np.ones(2), 256), (np.zeros(3), np.ones(3), 256), (np.ones(3), np.full(3, np.nan), 256)]
    + [(np.ones(3), np.ones(3), levels) for levels in (1, 257)],
)
def test_impossible_grids(step: Any, offset: Any, levels: int) -> None:
    with pytest.raises(ValueError, match=r"grid|step|positive"):
        InputGrid(step, offset, levels)


def test_placement_emission_and_verification(bench: Any, rng: np.random.Generator, tmp_path: pathlib.Path) -> None:
    keep = "<pads = [1, 1, 1, 1]>"
    body = f"a = Conv {keep} (x, w1, b1) r = Relu (a) y = Conv {keep} (r, w2, b2)"
    model = build(bench, rng, body)
    feeds = [normalised(pixels(rng)) for _ in range(3)]
    AlignInputPass({"x": GRID})(model)
    plan = with_exact_inputs(bench.calibrate(model, bench.place(model), feeds), model, {"x": GRID})
    quantizer = plan.activations["x_aligned"]
    assert isinstance(quantizer, TensorQuantizer)
    assert (float(quantizer.scale), int(quantizer.zero_point)) == (1.0, 0)
    assert "x" not in plan.activations
    assert set(plan.floats) == {"x_pad", "x_align_mul", "x_align_add"}
    assert all("turns the input into integers" in reason for reason in plan.floats.values())
    result = emit(model, plan)
    bench.check(result)
    ops = bench.optimized(result, tmp_path)
    assert ops["QLinearConv"] == 2
    assert not {"Conv", "QLinearAdd", "QLinearMul"} & set(ops)
    assert verify_model(model, result, plan, feeds).passed


def test_inputs_in_other_formats_stay_undecided(bench: Any, rng: np.random.Generator) -> None:
    model = build(bench, rng, "a = Conv (x, w1, b1) y = Conv (a, w2, b2)")
    AlignInputPass({"x": GRID})(model)
    plan = bench.place(model, abits=4, first_last_bits=None)
    assert with_exact_inputs(plan, model, {"x": GRID}) == plan


def test_quantizing_the_input_of_a_real_network_costs_nothing(bench: Any, shared_data: pathlib.Path) -> None:
    model = bench.real_model(shared_data, "resnet20")
    feeds = bench.real_feeds(shared_data, "resnet20", 8)
    plain = bench.place(model)
    low = min(float(feed["input"].min()) for feed in feeds)
    high = max(float(feed["input"].max()) for feed in feeds)
    rounded = emit(model, plain.with_activation("input", TensorQuantizer.from_range(SPEC, low, high)))
    aligned = model.clone()
    assert AlignInputPass({"input": GRID})(aligned).modified
    exact = emit(aligned, with_exact_inputs(bench.place(aligned), aligned, {"input": GRID}))
    reference = [bench.run(model, feed)["logits"] for feed in feeds]

    def quality(other: ir.Model) -> float:
        return sqnr(np.concatenate(reference), np.concatenate([bench.run(other, feed)["logits"] for feed in feeds]))

    assert quality(aligned) > 110
    assert quality(exact) > quality(rounded) + 20
