"""A whole network on ncnn's int8 layers, with the numbers of ``ncnn.table``, against the same plan on onnxruntime.

``ncnn2int8`` is not in ncnn's Python package, so what it would write is written here: the layers' lines, int8 weights
behind a tag, float biases, the table's numbers. Its converter ``pnnx`` names layers its own way; names here are ONNX's.
"""

from __future__ import annotations

import pathlib
import struct
from typing import Any

import numpy as np
import pytest

from postquant.passes.emit import emit
from postquant.passes.place import PlacementSettings, place
from postquant.passes.session import make_session
from postquant.passes.target import load_target
from postquant.pipeline.encodings.entries import collect_entries
from postquant.pipeline.encodings.float_model import float_model
from postquant.pipeline.encodings.ncnn import write_table

ncnn = pytest.importorskip("ncnn", reason="ncnn is not installed")

NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
net (float[1,3,16,16] image) => (float[1,10] logits)
<float[8,3,3,3] w1, float[8] b1, float[8,1,3,3] w2, float[8] b2, float[8,8,1,1] w3, float[8] b3,
 float[8,10] w4, float[10] b4>
{
   [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (image, w1, b1)
   [relu1] r1 = Relu (c1)
   [depthwise] c2 = Conv <pads = [1, 1, 1, 1], group = 8> (r1, w2, b2)
   [relu2] r2 = Relu (c2)
   [project] c3 = Conv (r2, w3, b3)
   [residual] sum = Add (c3, r1)
   [pool] p1 = GlobalAveragePool (sum)
   [flatten] f1 = Flatten (p1)
   [head] logits = Gemm (f1, w4, b4)
}
"""
PARAM = """7767517
8 9
Input image 0 1 image
Convolution conv1 1 1 image r1 0=8 1=3 4=1 5=1 6=216 8=2 9=1
Split split 1 2 r1 r1a r1b
ConvolutionDepthWise depthwise 1 1 r1a r2 0=8 1=3 4=1 5=1 6=72 7=8 8=1 9=1
Convolution project 1 1 r2 c3 0=8 1=1 5=1 6=64 8=2
BinaryOp residual 2 1 c3 r1b sum 0=0
Pooling pool 1 1 sum p1 0=1 4=1
InnerProduct head 1 1 p1 logits 0=10 1=1 2=80 8=2
"""
_INT8_TAG = 0x000D4B38


def write_network(folder: pathlib.Path, constants: Any) -> None:
    """``net.param`` and ``net.bin`` with the numbers of ``folder/ncnn.table``."""
    lines = map(str.split, (folder / "ncnn.table").read_text().splitlines())
    table = {key: [float(n) for n in rest] for key, *rest in lines}
    content = b""
    for name, index in {"conv1": 1, "depthwise": 2, "project": 3, "head": 4}.items():
        weight = constants[f"w{index}"].const_value.numpy()
        weight = weight.T if name == "head" else weight  # a Gemm's is (in, out)
        numbers = np.array(table[f"{name}_param_0"], np.float32)
        scaled = weight * numbers.reshape(-1, *[1] * (weight.ndim - 1))
        codes = np.clip(np.rint(scaled), -127, 127).astype(np.int8)
        floats = np.concatenate([constants[f"b{index}"].const_value.numpy(), numbers, table[name]]).astype("<f4")
        content += struct.pack("<I", _INT8_TAG) + codes.tobytes() + b"\0" * (-codes.size % 4) + floats.tobytes()
    (folder / "net.bin").write_bytes(content)
    (folder / "net.param").write_text(PARAM)


def run_in_ncnn(folder: pathlib.Path, image: np.ndarray) -> np.ndarray:
    net = ncnn.Net()
    net.opt.num_threads = 1
    net.opt.use_vulkan_compute = False
    assert net.load_param(str(folder / "net.param")) == 0
    assert net.load_model(str(folder / "net.bin")) == 0
    extractor = net.create_extractor()
    extractor.input("image", ncnn.Mat(np.ascontiguousarray(image)).clone())
    status, y = extractor.extract("logits")
    assert status == 0
    result: np.ndarray = np.array(y)
    return result


def test_a_network_with_the_table(cases: Any, tmp_path: pathlib.Path) -> None:
    model = cases.float_model(NETWORK)
    rng = np.random.default_rng(4)
    samples = [{"image": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(16)]
    target = load_target("ncnn")
    plan = cases.ranged(model, place(model, target, PlacementSettings()), samples)
    write_table(collect_entries(model, plan), tmp_path / "ncnn.table")
    write_network(tmp_path, float_model(model, plan).graph.initializers)
    ours, plain = make_session(emit(model, plan, integer_clips=target.integer_clips)), make_session(model)
    wanted = np.concatenate([ours.run(sample)["logits"] for sample in samples]).astype(np.float64)
    exact = np.concatenate([plain.run(sample)["logits"] for sample in samples]).astype(np.float64)
    found = np.stack([run_in_ncnn(tmp_path, sample["image"][0]) for sample in samples])
    apart = 10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum())
    from_float = 10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum())
    # Ties, biases that onnxruntime rounds to int32, and ncnn's estimated reciprocal in the depthwise layer remain.
    assert apart > from_float + 6, (apart, from_float)
    np.testing.assert_array_equal(found.argmax(1), wanted.argmax(1))
