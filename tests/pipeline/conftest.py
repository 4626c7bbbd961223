"""A small float model, its plan by plain min-max ranges, and the quantized model: what verification is tested on."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

import postquant
from postquant.passes.emit import emit
from postquant.passes.normalize import normalize
from postquant.passes.place import PlacementSettings, place
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.passes.target import WeightStorage, load_target
from postquant.pipeline.config import Method
from postquant.runtime_ops.quantizer import TensorQuantizer

Feed = Mapping[str, npt.NDArray[Any]]

TARGETS = pathlib.Path(__file__).resolve().parents[2] / "pipeline" / "targets"

# Plain, depthwise and strided convolutions, a residual sum, pools, a concatenation, LeakyRelu, Sigmoid, a Gemm.
CNN = """<ir_version: 8, opset_import: ["" : 17]>
cnn (float[N,3,16,16] image) => (float[N,10] logits)
<float[8,3,3,3] w1, float[8] b1, float[8,1,3,3] w2, float[8] b2, float[8,8,1,1] w3, float[8] b3,
 float[12,8,3,3] w4, float[12] b4, float[20,10] w5, float[10] b5>
{
   [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (image, w1, b1)
   [relu1] r1 = Relu (c1)
   [depthwise] c2 = Conv <pads = [1, 1, 1, 1], group = 8> (r1, w2, b2)
   [relu2] r2 = Relu (c2)
   [project] c3 = Conv (r2, w3, b3)
   [residual] sum = Add (c3, r1)
   [maxpool] m1 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (sum)
   [reduce] c4 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (m1, w4, b4)
   [leaky] l4 = LeakyRelu <alpha = 0.1> (c4)
   [average] a1 = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (m1)
   [gate] g1 = Sigmoid (a1)
   [scale] s1 = Mul (a1, g1)
   [concat] cat = Concat <axis = 1> (l4, s1)
   [pool] p1 = GlobalAveragePool (cat)
   [flatten] f1 = Flatten (p1)
   [head] logits = Gemm (f1, w5, b5)
}
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One quantized model with everything that it was made from."""

    model: ir.Model
    plan: QuantPlan
    emitted: ir.Model
    samples: Sequence[Feed]


def float_model(text: str, seed: int = 0) -> ir.Model:
    """The model of an ONNX text; the values that it declares are random initializers."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    for info in proto.graph.value_info:
        shape = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
        fan = max(1, int(np.prod(shape[1:])) if len(shape) > 2 else shape[0])
        size = 1.5 / np.sqrt(fan) if len(shape) > 1 else 0.2
        values = (rng.normal(size=shape) * size).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, info.name))
    del proto.graph.value_info[:]
    return normalize(ir.serde.deserialize_model(proto)).model


def with_ranges(model: ir.Model, plan: QuantPlan, samples: Sequence[Feed]) -> QuantPlan:
    """The plan with min-max ranges."""
    nodes = {node.name: node for node in model.graph}
    read = {}
    for key in plan.requants:
        name, _, index = key.rpartition(":")
        value = nodes[name].inputs[int(index)]
        assert value is not None
        read[key] = value.name or ""
    names = {*plan.activations, *read.values()}
    inputs = {value.name or "" for value in model.graph.inputs}
    session = make_session(model, outputs=[name for name in sorted(names) if name not in inputs])
    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for feed in samples:
        arrays = {**feed, **session.run(feed)}
        for name in names:
            low[name] = min(low[name], float(arrays[name].min()))
            high[name] = max(high[name], float(arrays[name].max()))

    def ranged(entry: Any, name: str) -> TensorQuantizer:
        return TensorQuantizer.from_range(entry, low[name], high[name])

    weights = {}
    for name, entry in plan.weights.items():
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        array = tensor.numpy()
        spec = entry.spec if isinstance(entry, TensorQuantizer) else entry
        axes = tuple(axis for axis in range(array.ndim) if axis != spec.axis)
        weights[name] = TensorQuantizer.from_range(spec, array.min(axes), array.max(axes))
    return dataclasses.replace(
        plan,
        activations={name: ranged(entry, name) for name, entry in plan.activations.items()},
        requants={key: ranged(entry, read[key]) for key, entry in plan.requants.items()},
        weights=weights,
    )


class Cases:
    """Builds quantized models for tests."""

    cnn = CNN

    def float_model(self, text: str, seed: int = 0) -> ir.Model:
        """The model of an ONNX text; the values that it declares are random initializers."""
        return float_model(text, seed)

    def ranged(self, model: ir.Model, plan: QuantPlan, samples: Sequence[Feed]) -> QuantPlan:
        """The plan with min-max ranges."""
        return with_ranges(model, plan, samples)

    def build(
        self, text: str = CNN, *, settings: PlacementSettings | None = None, seed: int = 0, **options: Any
    ) -> Case:
        """Quantizes the model of an ONNX text with min-max ranges; options go to ``emit``."""
        model = float_model(text, seed)
        rng = np.random.default_rng(seed + 1)
        name, shape = model.graph.inputs[0].name, model.graph.inputs[0].shape
        assert name is not None
        assert shape is not None
        sizes = [d if isinstance(d, int) else 2 for d in shape]
        samples = [{name: rng.normal(size=sizes).astype(np.float32)} for _ in range(3)]
        plan = place(model, load_target(TARGETS / "onnxruntime.toml"), settings or PlacementSettings())
        plan = with_ranges(model, plan, samples)
        return Case(model, plan, emit(model, plan, **options), samples)


@pytest.fixture(scope="session")
def torch_installed() -> None:
    """Without torch the test is skipped; with ``CI=true`` it fails."""
    if importlib.util.find_spec("torch") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("torch is not installed")
        pytest.skip("torch is not installed")


@pytest.fixture(scope="session")
def cases() -> Cases:
    """Builds quantized models."""
    return Cases()


@pytest.fixture(scope="session")
def cnn(cases: Cases) -> Case:
    """The small network at 8 bits; tests must not change it."""
    return cases.build()


@pytest.fixture(scope="session")
def made(cnn: Case, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A bundle of the small network with packed 4-bit weights; tests must not change it."""
    folder = tmp_path_factory.mktemp("made")
    ir.save(cnn.model, folder / "net.onnx")
    np.savez(folder / "calib.npz", image=np.concatenate([feed["image"] for feed in cnn.samples]))
    config = postquant.QuantConfig(method=Method.MINMAX, wbits=4, weight_storage=WeightStorage.PACKED, seed=3)
    return postquant.quantize(folder / "net.onnx", folder / "calib.npz", config, out=folder / "out").folder
