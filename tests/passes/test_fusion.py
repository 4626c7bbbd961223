"""What onnxruntime makes of emitted models: counts of integer operators in its optimized graph.

These tests hold the facts of docs/targets.md. One that fails after an update of onnxruntime means that the page and
the target file need another look.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from postquant.passes.concat import share_concat
from postquant.passes.emit import emit

KEEP = "<pads = [1, 1, 1, 1]>"

# Model -> operators that must all be integer, besides one QLinearConv for each Conv.
EXPECTED = {
    "resnet20": {"QLinearAdd": 9, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "resnet56": {"QLinearAdd": 27, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "resnet8": {"QLinearAdd": 3, "QLinearAveragePool": 1, "QGemm": 1},
    "mobilenetv2": {"QLinearAdd": 10, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "squeezenet": {"QLinearConcat": 8},
    "dncnn": {},
    "fastestdet": {"QLinearConcat": 18, "QLinearAveragePool": 1, "QLinearAdd": 1},
    "rfb320": {"QLinearConcat": 1, "QLinearAdd": 1},
    "vww": {"QLinearAveragePool": 1, "QGemm": 1},
}


def sqnr(reference: dict[str, Any], outputs: dict[str, Any]) -> float:
    signal = sum(float(np.square(a.astype(np.float64)).sum()) for a in reference.values())
    noise = sum(float(np.square(reference[name].astype(np.float64) - outputs[name]).sum()) for name in reference)
    return 10 * math.log10(signal / noise)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", EXPECTED)
def test_every_convolution_of_a_real_network_is_integer(
    bench: Any, shared_data: pathlib.Path, tmp_path: pathlib.Path, name: str, bits: int
) -> None:
    model = bench.real_model(shared_data, name)
    samples = bench.real_feeds(shared_data, name, 2)
    plan = bench.calibrate(model, bench.place(model, wbits=bits, abits=bits), samples)
    result = emit(model, plan)
    bench.check(result)
    ops = bench.optimized(result, tmp_path)
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(ops)
    assert ops["QLinearConv"] == bench.ops(model)["Conv"]
    assert {op: ops[op] for op in EXPECTED[name]} == EXPECTED[name]
    if bits == 8:
        assert sqnr(bench.run(model, samples[0]), bench.run(result, samples[0])) > 10


def test_every_matrix_product_of_minilm_is_integer(
    bench: Any, shared_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model = bench.real_model(shared_data, "minilm")
    samples = bench.real_feeds(shared_data, "minilm", 2)
    result = emit(model, bench.calibrate(model, bench.place(model), samples))
    bench.check(result)
    ops = bench.optimized(result, tmp_path)
    assert not {"Gemm", "MatMul", "FusedMatMul"} & set(ops)
    assert ops["QGemm"] + ops["MatMulIntegerToFloat"] + ops["QLinearMatMul"] == 48
    assert sqnr(bench.run(model, samples[0]), bench.run(result, samples[0])) > 12


class Lab:
    """Builds ``x -> Conv -> ... -> Conv`` around some nodes, quantizes and optimizes it."""

    def __init__(self, bench: Any, folder: pathlib.Path, rng: np.random.Generator) -> None:
        self.bench = bench
        self.folder = folder
        self.rng = rng

    def conv(self, out: int, into: int = 4) -> np.ndarray[Any, Any]:
        return self.rng.standard_normal((out, into, 3, 3)).astype(np.float32)

    def model(self, middle: str, *, channels: int = 4, **arrays: Any) -> Any:
        """The first convolution writes ``a``, the last one reads ``z``."""
        text = self.bench.graph(f"a = Conv {KEEP} (x, w1, b1) {middle} y = Conv {KEEP} (z, w9, b9)")
        return self.bench.model(
            text,
            w1=self.conv(4),
            b1=np.ones(4, np.float32),
            w9=self.conv(4, channels),
            b9=np.zeros(4, np.float32),
            **arrays,
        )

    def feed(self) -> dict[str, Any]:
        return {"x": self.rng.standard_normal((1, 4, 8, 8)).astype(np.float32)}

    def quantize(self, model: ir.Model, **settings: Any) -> ir.Model:
        plan = self.bench.calibrate(model, self.bench.place(model, **settings), [self.feed() for _ in range(3)])
        return emit(model, plan)

    def optimized(self, result: ir.Model) -> Any:
        """Operators of the optimized graph; the optimized results equal the others up to rounding ties."""
        feed = self.feed()
        plain, fast = (self.bench.run(result, feed, optimize=optimize)["y"] for optimize in (False, True))
        step = float(self.bench.array(result, "y_scale"))
        # A tie that falls the other way moves a code by one, and the outputs that read it by a little.
        assert np.abs(plain - fast).max() <= 3.01 * step
        assert np.mean(plain != fast) < 0.1
        return self.bench.optimized(result, self.folder)


@pytest.fixture
def lab(bench: Any, tmp_path: pathlib.Path, rng: np.random.Generator) -> Lab:
    return Lab(bench, tmp_path, rng)


@pytest.mark.parametrize(
    ("middle", "integer"),
    [
        ("z = Relu (a)", {}),
        ("z = Clip (a, zero, six)", {}),
        ("z = LeakyRelu <alpha = 0.1> (a)", {"QLinearLeakyRelu": 1}),
        ("z = Sigmoid (a)", {"QLinearSigmoid": 1}),
        ("s = Sigmoid (a) z = Mul (a, s)", {"QLinearSigmoid": 1, "QLinearMul": 1}),
        ("z = AveragePool <kernel_shape = [2, 2]> (a)", {"QLinearAveragePool": 1}),
        ("z = GlobalAveragePool (a)", {"QLinearGlobalAveragePool": 1}),
        ("z = MaxPool <kernel_shape = [2, 2]> (a)", {"NhwcMaxPool": 1}),
        ('z = Resize <mode = "nearest"> (a, , twice)', {"Resize": 1}),
        ("z = Add (a, x)", {"QLinearAdd": 1}),
        ("z = Transpose <perm = [0, 1, 3, 2]> (a)", {}),
        ("z = Slice (a, one, two)", {"Slice": 1}),
        ("z = Gather <axis = 2> (a, one)", {"Gather": 1}),
    ],
)
@pytest.mark.parametrize("bits", [8, 4])
def test_nodes_between_convolutions_that_become_integer(
    lab: Lab, middle: str, integer: dict[str, int], bits: int
) -> None:
    constants: dict[str, Any] = {
        "zero": np.float32(0),
        "six": np.float32(6),
        "twice": np.array([1, 1, 2, 2], np.float32),
        "one": np.array([0]),
        "two": np.array([4]),
    }
    model = lab.model(middle, **{name: v for name, v in constants.items() if f" {name}" in middle})
    result = lab.quantize(model, wbits=bits, abits=bits, first_last_bits=None)
    ops = lab.optimized(result)
    assert ops["QLinearConv"] == 2
    assert {op: ops[op] for op in integer} == integer
    if not integer:
        # Only the way in and out is in float.
        assert (ops["QuantizeLinear"], ops["DequantizeLinear"]) == (1, 1)


@pytest.mark.parametrize(
    "middle",
    [
        "z = Sub (a, x)",
        "z = HardSigmoid (a)",
        "z = HardSwish (a)",
        "z = Pad (a, pads)",
        'z = Resize <mode = "linear"> (a, , twice)',
    ],
)
def test_nodes_that_compute_in_float_leave_the_convolutions_integer(lab: Lab, middle: str) -> None:
    constants: dict[str, Any] = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "twice": np.array([1, 1, 2, 2], np.float32),
    }
    model = lab.model(middle, **{name: v for name, v in constants.items() if f" {name}" in middle})
    ops = lab.optimized(lab.quantize(model))
    assert ops["QLinearConv"] == 2
    assert ops["DequantizeLinear"] >= 2


@pytest.mark.parametrize("shared", [False, True])
def test_concat_is_integer_with_own_and_with_shared_scales(lab: Lab, shared: bool) -> None:
    model = lab.model(
        f"r = Relu (a) b = Conv {KEEP} (x, w2, b2) z = Concat <axis = 1> (r, b)",
        channels=8,
        w2=lab.conv(4),
        b2=np.ones(4, np.float32),
    )
    plan = lab.bench.place(model)
    if shared:
        plan = share_concat(plan, next(node for node in model.graph if node.op_type == "Concat"))
    result = emit(model, lab.bench.calibrate(model, plan, [lab.feed()]))
    ops = lab.optimized(result)
    assert (ops["QLinearConv"], ops["QLinearConcat"], ops["Concat"]) == (3, 1, 0)


def test_requantized_sum_is_not_merged_with_its_8_bit_form(lab: Lab) -> None:
    model = lab.model(
        f"r = Relu (a) c = Conv {KEEP} (r, w2, b2) s = Add (r, c) t = Relu (s) "
        f"d = Conv {KEEP} (t, w3, b3) z = Add (t, d)",
        w2=lab.conv(4),
        b2=np.ones(4, np.float32),
        w3=lab.conv(4),
        b3=np.ones(4, np.float32),
    )
    result = lab.quantize(model, wbits=4, abits=4)
    ops = lab.optimized(result)
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["Clip"]) == (4, 2, 2)


@pytest.mark.parametrize("attributes", ["", "<transA = 1>", "<transB = 1>", "<alpha = 0.5>", "<beta = 0.5>"])
@pytest.mark.parametrize("followed", [False, True])
def test_gemm(lab: Lab, attributes: str, followed: bool) -> None:
    body = (
        f"h = Gemm {attributes} (x, w, b) r = Relu (h) y = Gemm (r, v, b)"
        if followed
        else (f"y = Gemm {attributes} (x, w, b)")
    )
    square = lab.rng.standard_normal((6, 6)).astype(np.float32)
    arrays = {"w": square, "b": np.ones(6, np.float32)} | ({"v": square.T.copy()} if followed else {})
    model = lab.bench.model(lab.bench.graph(body, "float[6,6] x", "float[6,6] y"), **arrays)
    feed = {"x": lab.rng.standard_normal((6, 6)).astype(np.float32)}
    result = emit(model, lab.bench.calibrate(model, lab.bench.place(model), [feed]))
    ops = lab.bench.optimized(result, lab.folder)
    assert ops == {"QuantizeLinear": 1, "QGemm": 2 if followed else 1}


@pytest.mark.parametrize("shape", ["4,6", "2,4,6", "N,4,6"])
@pytest.mark.parametrize("bias_first", [False, True])
def test_matmul_with_bias(lab: Lab, shape: str, bias_first: bool) -> None:
    body = f"m = MatMul (x, w) y = Add ({'b, m' if bias_first else 'm, b'})"
    outputs = f"float[{shape}] y"
    model = lab.bench.model(
        lab.bench.graph(body, f"float[{shape}] x", outputs),
        w=lab.rng.standard_normal((6, 6)).astype(np.float32),
        b=np.ones(6, np.float32),
    )
    feed = {"x": lab.rng.standard_normal([int(d) if d != "N" else 3 for d in shape.split(",")]).astype(np.float32)}
    result = emit(model, lab.bench.calibrate(model, lab.bench.place(model), [feed]))
    ops = lab.bench.optimized(result, lab.folder)
    assert ops["QGemm"] + ops["MatMulIntegerToFloat"] == 1
    assert not {"Gemm", "MatMul"} & set(ops)


@pytest.mark.parametrize("body", ["y = MatMul (x, k)", "y = MatMul (w, x)"])
def test_products_of_two_activations_and_of_a_constant_left_operand(lab: Lab, body: str) -> None:
    inputs = "float[6,6] x" + (", float[6,6] k" if " k" in body else "")
    arrays = {} if " k" in body else {"w": lab.rng.standard_normal((6, 6)).astype(np.float32)}
    model = lab.bench.model(lab.bench.graph(body, inputs, "float[6,6] y"), **arrays)
    feed = {v.name: lab.rng.standard_normal((6, 6)).astype(np.float32) for v in model.graph.inputs}
    result = emit(model, lab.bench.calibrate(model, lab.bench.place(model), [feed]))
    assert lab.bench.optimized(result, lab.folder)["MatMulIntegerToFloat"] == 1


@pytest.mark.parametrize(
    ("x", "w", "group"),
    [((1, 8, 10), (8, 8, 3), 1), ((1, 8, 4, 4, 4), (8, 8, 3, 3, 3), 1), ((1, 8, 6, 6), (8, 1, 3, 3), 8),
     ((1, 8, 6, 6), (16, 4, 1, 1), 2)],
)  # fmt: skip
def test_convolutions_of_every_rank_and_grouping(lab: Lab, x: tuple[int, ...], w: tuple[int, ...], group: int) -> None:
    shape = ",".join(map(str, x))
    outputs = f"float[{','.join('abcde'[: len(x)])}] y"
    model = lab.bench.model(
        lab.bench.graph(f"y = Conv <group = {group}> (x, w, b)", f"float[{shape}] x", outputs),
        w=lab.rng.standard_normal(w).astype(np.float32),
        b=np.ones(w[0], np.float32),
    )
    feed = {"x": lab.rng.standard_normal(x).astype(np.float32)}
    result = emit(model, lab.bench.calibrate(model, lab.bench.place(model), [feed]))
    assert lab.bench.optimized(result, lab.folder)["QLinearConv"] == 1


def test_conv_transpose_is_stored_in_8_bits_but_computed_in_float(lab: Lab) -> None:
    model = lab.model("z = ConvTranspose <strides = [2, 2]> (a, w2, b2)", w2=lab.conv(4), b2=np.ones(4, np.float32))
    ops = lab.optimized(lab.quantize(model))
    assert (ops["QLinearConv"], ops["ConvTranspose"]) == (2, 1)


def test_avx2_target_keeps_pairs_of_products_within_int16(bench: Any, shared_data: pathlib.Path) -> None:
    model = bench.real_model(shared_data, "resnet20")
    plan = bench.calibrate(
        model, bench.place(model, target="onnxruntime-avx2"), bench.real_feeds(shared_data, "resnet20", 1)
    )
    result = emit(model, plan)
    for name in plan.weights:
        codes = bench.array(result, f"{name}_quantized")
        assert 2 * 255 * int(np.abs(codes.astype(int)).max()) <= 2**15 - 1
