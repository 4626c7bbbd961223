"""The C header: compiled, its layers give the codes of the NumPy law, bit for bit."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from postquant.passes.plan import QuantPlan
from postquant.pipeline.encodings.entries import collect_entries
from postquant.pipeline.encodings.fixed_layer import FixedLayer, fixed_layer
from postquant.pipeline.encodings.fixed_point import PROGRAM, write_header
from postquant.runtime_ops.code_book import CodeBook, post_table
from postquant.runtime_ops.law_fixed_point import requantize_fixed_point
from postquant.runtime_ops.quantizer import TensorQuantizer

COMPILER = shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")

# Strides, dilation, uneven padding, groups, a Clip, a depthwise layer, one axis only, a matrix.
NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
net (float[1,6,9,7] x) => (float[1,5] y)
<float[8,3,3,2] w1, float[8] b1, float[8,1,3,3] w2, float[5,8,1,1] w3, float[5] b3, float[5,5] w4, float[5] b4,
 float[5,5] w5, float low = {-0.3}, float high = {0.9}>
{
   [grouped] c1 = Conv <group = 2, strides = [2, 1], dilations = [1, 2], pads = [0, 2, 1, 1]> (x, w1, b1)
   r1 = Relu (c1)
   [depthwise] c2 = Conv <group = 8, pads = [1, 1, 1, 1]> (r1, w2)
   k2 = Clip (c2, low, high)
   [pointwise] c3 = Conv (k2, w3, b3)
   [pool] p = GlobalAveragePool (c3)
   [flat] f = Flatten (p)
   [matrix] m = Gemm <transB = 1> (f, w4, b4)
   r4 = Relu (m)
   [last] y = MatMul (r4, w5)
}
"""


def numpy_codes(layer: FixedLayer, codes: np.ndarray) -> np.ndarray:
    """(H, W, C) int8 codes through a layer: a convolution written out, and the law of requantization."""
    geometry = layer.geometry
    top, left, bottom, right = geometry.pads
    real = codes.astype(np.int64) + layer.input_offset
    padded = np.pad(real, ((top, bottom), (left, right), (0, 0)))
    weights = layer.weights.astype(np.int64)
    if layer.depthwise:  # (H, W, O) -> (O, H, W, 1)
        weights = np.moveaxis(weights, -1, 0)[..., np.newaxis]
    outputs, kernel_h, kernel_w, inputs = weights.shape
    (stride_h, stride_w), (dilation_h, dilation_w) = geometry.strides, geometry.dilations
    height = (padded.shape[0] - (kernel_h - 1) * dilation_h - 1) // stride_h + 1
    width = (padded.shape[1] - (kernel_w - 1) * dilation_w - 1) // stride_w + 1
    sums = np.zeros((height, width, outputs), np.int64)
    for o in range(outputs):
        first = o // (outputs // geometry.groups) * inputs
        for r in range(kernel_h):
            for c in range(kernel_w):
                window = padded[r * dilation_h :, c * dilation_w :, first : first + inputs]
                window = window[: (height - 1) * stride_h + 1 : stride_h, : (width - 1) * stride_w + 1 : stride_w]
                sums[..., o] += (window * weights[o, r, c]).sum(-1)
    sums += layer.bias
    return requantize_fixed_point(
        sums.astype(np.int32), layer.multiplier, layer.shift, layer.output_offset, layer.low, layer.high, axis=2
    )


@pytest.fixture
def build(tmp_path: pathlib.Path) -> Callable[[Any, QuantPlan], tuple[pathlib.Path, dict[str, FixedLayer]]]:
    """Writes a header, compiles it without a warning, and gives the program and the layers."""

    def run(model: Any, plan: QuantPlan) -> tuple[pathlib.Path, dict[str, FixedLayer]]:
        entries = collect_entries(model, plan)
        count, notes = write_header(entries, plan, tmp_path / "fixed_point.h")
        left_out = {note.tensor for note in notes}
        layers = {w.node.name or "": fixed_layer(w, plan) for w in entries.weights if w.node.name not in left_out}
        assert count == len(layers)
        program = tmp_path / "layer"
        assert COMPILER is not None
        flags = ["-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic"]
        subprocess.run([COMPILER, *flags, "-o", program, tmp_path / PROGRAM], check=True)
        return program, layers

    return run


def c_codes(program: pathlib.Path, layer: FixedLayer, codes: np.ndarray) -> np.ndarray:
    height, width, _ = codes.shape
    command = [str(program), layer.name, str(height), str(width)]
    done = subprocess.run(command, input=codes.tobytes(), capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.int8)


@needs_compiler
@pytest.mark.parametrize(("wbits", "signed"), [(8, False), (8, True), (6, False), (4, True), (3, False), (2, False)])
def test_the_program_computes_what_the_law_says(build: Any, planned: Any, wbits: int, signed: bool) -> None:
    formats = {"signed": True, "symmetric": True} if signed else {}
    program, layers = build(*planned(NETWORK, wbits=wbits, activations=formats))
    assert set(layers) == {"grouped", "depthwise", "pointwise", "matrix"}
    assert layers["depthwise"].depthwise
    assert layers["grouped"].bits == {8: 8, 6: 8, 4: 4, 3: 4, 2: 2}[wbits]
    rng = np.random.default_rng(0)
    for layer in layers.values():
        codes = rng.integers(-128, 128, (6, 5, layer.in_channels)).astype(np.int8)
        wanted = numpy_codes(layer, codes)
        assert len(np.unique(wanted)) > 4
        np.testing.assert_array_equal(c_codes(program, layer, codes), wanted.reshape(-1))


@needs_compiler
def test_weights_with_a_code_book_keep_their_table(build: Any, planned: Any) -> None:
    model, plan = planned(NETWORK, wbits=4)
    weight = plan.weights["w1"]
    spec = dataclasses.replace(weight.spec, code_book=CodeBook.POST)
    quantizer = TensorQuantizer(spec, weight.scale / 12, weight.zero_point)
    program, layers = build(model, plan.with_weight("w1", quantizer))
    layer = layers["grouped"]
    np.testing.assert_array_equal(layer.table, post_table(4))
    codes = np.random.default_rng(0).integers(-128, 128, (6, 5, 6)).astype(np.int8)
    np.testing.assert_array_equal(c_codes(program, layer, codes), numpy_codes(layer, codes).reshape(-1))
    values = quantizer.quantize(model.graph.initializers["w1"].const_value.numpy())
    np.testing.assert_array_equal(layer.weights, np.transpose(values, (0, 2, 3, 1)))


def test_real_values_are_those_of_the_float_layer(planned: Any) -> None:
    model, plan = planned(NETWORK)
    (entry,) = [w for w in collect_entries(model, plan).weights if w.node.name == "pointwise"]
    layer = fixed_layer(entry, plan)
    codes = np.random.default_rng(0).integers(-128, 128, (2, 2, 8)).astype(np.int8)
    x = (codes.astype(np.float64) + layer.input_offset) * layer.input_scale
    w = plan.weights["w3"].simulate(model.graph.initializers["w3"].const_value.numpy())[:, :, 0, 0]
    b = model.graph.initializers["b3"].const_value.numpy()
    wanted = x @ w.T.astype(np.float64) + b
    found = (numpy_codes(layer, codes) - layer.output_offset) * layer.output_scale
    inside = (numpy_codes(layer, codes) > layer.low) & (numpy_codes(layer, codes) < layer.high)
    assert inside.sum() > 4
    np.testing.assert_allclose(found[inside], wanted[inside], atol=0.51 * layer.output_scale)


def test_layers_without_a_fixed_form_are_told(planned: Any, tmp_path: pathlib.Path) -> None:
    model, plan = planned(NETWORK)
    _, notes = write_header(collect_entries(model, plan), plan, tmp_path / "fixed_point.h")
    assert {note.tensor: note.reason for note in notes} == {"last": "its output stays in float"}


@needs_compiler
def test_wrong_commands_end_with_a_line(build: Any, planned: Any) -> None:
    program, layers = build(*planned(NETWORK))
    listed = subprocess.run([program], capture_output=True, check=True, text=True).stdout
    assert [line.split(":")[0] for line in listed.splitlines()] == list(layers)
    for arguments in (["nothing", "3", "3"], ["grouped", "0", "3"], ["grouped", "3"]):
        done = subprocess.run([program, *arguments], input=b"", capture_output=True, check=False)
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    short = subprocess.run([program, "grouped", "9", "7"], input=b"x", capture_output=True, check=False)
    assert short.returncode == 2
    assert b"378 bytes" in short.stderr
