"""ncnn itself runs layers with the numbers of a table, on its int8 kernels, and gives what the plan says.

``ncnn2int8`` is not in ncnn's Python package, so the files that it would write are written here: int8 weights (tag
0x000D4B38, padded to four bytes), float biases, then the table's numbers of weight and input.
"""

from __future__ import annotations

import pathlib
import struct
from typing import Any

import numpy as np
import pytest

from postquant.pipeline.encodings.entries import collect_entries
from postquant.pipeline.encodings.float_model import float_model
from postquant.pipeline.encodings.ncnn import write_table

ncnn = pytest.importorskip("ncnn", reason="ncnn is not installed")

_INT8_TAG = 0x000D4B38
# Node -> (ncnn layer with its parameters, names of input, weight and bias)
LAYERS = {
    "conv1": ("Convolution", "0=8 1=3 4=1 5=1 6=216 8=2", ("image", "w1", "b1")),
    "depthwise": ("ConvolutionDepthWise", "0=8 1=3 4=1 5=1 6=72 7=8 8=1", ("r1", "w2", "b2")),
    "project": ("Convolution", "0=8 1=1 5=1 6=64 8=2", ("r2", "w3", "b3")),
}


def run_in_ncnn(folder: pathlib.Path, name: str, weight: Any, bias: Any, x: Any) -> np.ndarray:
    """One layer with the numbers of ``folder/ncnn.table``."""
    kind, parameters, _ = LAYERS[name]
    lines = (folder / "ncnn.table").read_text().splitlines()
    table = {key: [float(n) for n in rest] for key, *rest in map(str.split, lines)}
    numbers = np.array(table[f"{name}_param_0"], np.float32)
    codes = np.clip(np.rint(weight * numbers.reshape(-1, 1, 1, 1)), -127, 127).astype(np.int8)
    payload = codes.tobytes() + b"\0" * (-codes.size % 4)
    floats = np.concatenate([bias, numbers, table[name]]).astype("<f4").tobytes()
    (folder / "net.bin").write_bytes(struct.pack("<I", _INT8_TAG) + payload + floats)
    lines = ["7767517", "2 2", "Input in 0 1 x", f"{kind} {name} 1 1 x y {parameters}"]
    (folder / "net.param").write_text("\n".join(lines) + "\n")
    net = ncnn.Net()
    net.opt.num_threads = 1
    net.opt.use_vulkan_compute = False
    assert net.load_param(str(folder / "net.param")) == 0
    assert net.load_model(str(folder / "net.bin")) == 0
    extractor = net.create_extractor()
    extractor.input("x", ncnn.Mat(np.ascontiguousarray(x)).clone())
    status, y = extractor.extract("y")
    assert status == 0
    result: np.ndarray = np.array(y)
    return result


def convolution(x: Any, w: Any, b: Any, *, pad: int) -> np.ndarray:
    """(C, H, W) through a convolution with stride 1, in float64; depthwise where the weight has one input channel."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad)))
    height, width = x.shape[1:]
    y: np.ndarray = np.zeros((len(w), height, width)) + b.reshape(-1, 1, 1)
    for row in range(w.shape[2]):
        for column in range(w.shape[3]):
            window = padded[:, row : row + height, column : column + width]
            taps = w[:, :, row, column].astype(np.float64)
            y += window * taps.reshape(-1, 1, 1) if w.shape[1] == 1 else np.einsum("oi,ihw->ohw", taps, window)
    return y


@pytest.mark.parametrize("name", LAYERS)
def test_ncnn_computes_what_the_plan_says(name: str, symmetric: tuple[Any, Any], tmp_path: pathlib.Path) -> None:
    model, plan = symmetric
    write_table(collect_entries(model, plan), tmp_path / "ncnn.table")
    source, weight_name, bias_name = LAYERS[name][2]
    constants: Any = float_model(model, plan).graph.initializers
    weight, bias = (constants[key].const_value.numpy() for key in (weight_name, bias_name))
    quantizer = plan.activation_quantizer(source)
    x = np.random.default_rng(0).normal(size=(weight.shape[1] if name != "depthwise" else 8, 12, 12))
    # On the grid already, so that ncnn's rounding of ties (away from zero) plays no part.
    # ncnn saturates at -127, the plan at -128.
    x = quantizer.simulate(np.clip(x * 60, -127, 127).astype(np.float32) * quantizer.scale)
    wanted = convolution(x, weight, bias, pad=weight.shape[2] // 2)
    found = run_in_ncnn(tmp_path, name, weight, bias, x)
    # On x86 its depthwise kernel divides by an estimate of the reciprocal (rcpps: 12 bits); the others are exact.
    tolerance = 2.0**-11 if name == "depthwise" else 2e-5
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * float(np.abs(wanted).max()))
    # Not by chance: with float weights instead of decoded ones the results differ.
    original = model.graph.initializers[weight_name].const_value.numpy()
    assert np.abs(convolution(x, original, bias, pad=weight.shape[2] // 2) - wanted).max() > 1e-3 * np.abs(wanted).max()
