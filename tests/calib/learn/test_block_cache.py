"""Samples of blocks equal runs of the whole networks, wherever they are kept and whichever block comes first."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from postquant.calib import prefix
from postquant.calib.input_spec import Sample, input_specs
from postquant.calib.learn.block_cache import BlockCache, BlockSamples
from postquant.calib.open_source import open_source
from postquant.calib.source import CalibrationSource
from postquant.passes.biases import fit_biases
from postquant.passes.blocks import Block, cut_blocks
from postquant.passes.emit import emit
from postquant.passes.place import PlacementSettings, place
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session
from postquant.passes.target import load_target
from postquant.runtime_ops.errors import CalibrationError
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

# Two residual blocks; behind them two heads that read the same tensor, and one that reads it together with the image.
NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
m (float[N,4,h,w] x) => (float[N,4,h,w] y, float[N,4,h,w] z) {
    [c0] a0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
    [r0] a = Relu (a0)
    [c1] d1 = Conv <pads = [1, 1, 1, 1]> (a, w1, b1)
    [r1] d = Relu (d1)
    [c2] e = Conv <pads = [1, 1, 1, 1]> (d, w2, b2)
    [s1] f0 = Add (a, e)
    [r2] f = Relu (f0)
    [c3] g0 = Conv <pads = [1, 1, 1, 1]> (f, w3, b3)
    [r3] g = Relu (g0)
    [c4] h4 = Conv <pads = [1, 1, 1, 1]> (g, w4, b4)
    [s2] i0 = Add (f, h4)
    [r4] i = Relu (i0)
    [c5] j0 = Conv <pads = [1, 1, 1, 1]> (i, w5, b5)
    [r5] j = Relu (j0)
    [c6] k = Conv <pads = [1, 1, 1, 1]> (i, w6, b6)
    [s3] l = Add (k, x)
    [c7] y = Conv <pads = [1, 1, 1, 1]> (j, w7, b7)
    [c8] z = Conv <pads = [1, 1, 1, 1]> (l, w8, b8)
}"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its plan and its blocks."""

    model: ir.Model
    plan: QuantPlan
    blocks: tuple[Block, ...]
    source: CalibrationSource

    def quantized(self, value: str) -> Iterator[npt.NDArray[Any]]:
        """A tensor of the quantized network in front of its own quantizer, from the network's inputs on."""
        entry = self.plan.activations.get(value)
        plan = self.plan
        if isinstance(entry, TensorQuantizer):
            plan = plan.with_activation(value, entry.spec)
        session = make_session(emit(self.model, fit_biases(self.model, plan)), outputs=[value])
        return (session.run(sample)[value] for sample in self.source)

    def exact(self, value: str) -> Iterator[npt.NDArray[Any]]:
        """A tensor of the float network."""
        session = make_session(self.model, outputs=[value])
        return (session.run(sample)[value] for sample in self.source)


@pytest.fixture
def case() -> Case:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(NETWORK)
    for index in range(9):
        for name, shape in ((f"w{index}", (4, 4, 3, 3)), (f"b{index}", (4,))):
            array = rng.normal(scale=0.3, size=shape).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    source = open_source(rng.normal(size=(6, 4, 5, 5)).astype(np.float32), input_specs(model))
    plan = place(model, load_target("onnxruntime"), PlacementSettings(wbits=4, abits=4))
    session = make_session(model, outputs=list(plan.activations))
    results = [session.run(sample) for sample in source]

    def quantizer(value: str, spec: Any) -> TensorQuantizer:
        arrays = [result[value] for result in results]
        return TensorQuantizer.from_range(spec, min(a.min() for a in arrays), max(a.max() for a in arrays))

    def weight(name: str, spec: QuantSpec) -> TensorQuantizer:
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        top = np.abs(tensor.numpy()).max(axis=(1, 2, 3))
        return TensorQuantizer.from_range(spec, -top, top)

    read = {f"{node.name}:{i}": v.name or "" for node in model.graph for i, v in enumerate(node.inputs) if v}
    plan = dataclasses.replace(
        plan,
        activations={name: quantizer(name, spec) for name, spec in plan.activations.items()},
        requants={key: quantizer(read[key], spec) for key, spec in plan.requants.items()},
        weights={name: weight(name, spec) for name, spec in plan.weights.items() if isinstance(spec, QuantSpec)},
    )
    blocks = cut_blocks(model, [f"c{index}" for index in range(9)], max_layers=2)
    return Case(model, plan, blocks, source)


def same(found: Any, expected: Iterator[npt.NDArray[Any]]) -> None:
    assert len(found) == 6
    for index, array in enumerate(expected):
        np.testing.assert_allclose(found.take([index]).numpy(), array, rtol=1e-5, atol=1e-5)


def test_the_case_has_what_it_is_made_for(case: Case) -> None:
    layers = [("c0",), ("c1", "c2"), ("c3", "c4"), ("c6",), ("c5", "c7"), ("c8",)]
    assert [block.layers for block in case.blocks] == layers
    assert case.blocks[3].inputs == ("i", "x")
    assert "c1:0" in case.plan.requants


@pytest.mark.parametrize(("memory", "most"), [(0, 2), (3000, 2), (1 << 30, 2), (1 << 30, 1)])
def test_samples_equal_whole_runs(case: Case, tmp_path: pathlib.Path, memory: int, most: int) -> None:
    # With one layer per block the image is read again behind a cut.
    case = dataclasses.replace(
        case, blocks=cut_blocks(case.model, [f"c{index}" for index in range(9)], max_layers=most)
    )
    cache = BlockCache(case.model, case.blocks, case.source, tmp_path, memory=memory)
    read: set[str] = set()
    for block in case.blocks:
        with cache.load(block, case.plan) as samples:
            assert len(samples) == 6
            assert samples.groups == (tuple(range(6)),)
            assert (samples.spilled > 0) == (memory < 1 << 30)
            same(samples.target, case.exact(block.output))
            for name in block.inputs:
                same(samples.exact[name], case.exact(name))
                quantizer = case.plan.activation_quantizer(name)
                if name in read and quantizer is not None:
                    # From behind the quantizer where that stands for a Relu: the same once it has been quantized.
                    for index, array in enumerate(case.quantized(name)):
                        found = quantizer.simulate(samples.quantized[name].take([index]).numpy())
                        np.testing.assert_allclose(found, quantizer.simulate(array), rtol=1e-5, atol=1e-5)
                else:
                    same(samples.quantized[name], case.quantized(name))
            read.update(block.inputs)


def test_a_later_start_gives_the_same_bytes(case: Case, tmp_path: pathlib.Path) -> None:
    def loaded(blocks: Sequence[Block]) -> list[BlockSamples]:
        cache = BlockCache(case.model, case.blocks, case.source, tmp_path, memory=1 << 30)
        return [cache.load(block, case.plan) for block in blocks]

    whole = loaded(case.blocks)
    for start in range(1, len(case.blocks)):
        for samples, expected in zip(loaded(case.blocks[start:]), whole[start:], strict=True):
            for name, arrays in expected.quantized.items():
                every = range(len(arrays))
                assert np.array_equal(samples.quantized[name].take(every).numpy(), arrays.take(every).numpy())


def test_networks_start_behind_earlier_blocks(
    case: Case, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Any] = []

    def recording(*arguments: Any, **settings: Any) -> Any:
        starts.append(settings["inputs"])
        return make_session(*arguments, **settings)

    monkeypatch.setattr(prefix, "make_session", recording)
    cache = BlockCache(case.model, case.blocks, case.source, tmp_path, memory=1 << 30)
    for block in case.blocks:
        with cache.load(block, case.plan):
            pass
    assert starts[0] is None
    assert starts[-2:] == [("f", "x"), ("f_quantized", "x_quantized")]


def test_samples_of_different_shapes_form_groups(case: Case, tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.normal(size=(1, 4, size, 5)).astype(np.float32)} for size in (5, 7, 5, 6, 7)]
    source = open_source(feeds, input_specs(case.model))
    cache = BlockCache(case.model, case.blocks, source, tmp_path, memory=1 << 30)
    samples = cache.load(case.blocks[1], case.plan)
    assert samples.groups == ((0, 2), (1, 4), (3,))
    assert samples.target.take(samples.groups[1]).shape == (2, 4, 7, 5)


class _Breaking(CalibrationSource):
    """Fails at its fourth sample."""

    def __init__(self, source: CalibrationSource) -> None:
        super().__init__(source.inputs)
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        for number, sample in enumerate(self._source.read(indices)):
            if number == 3:
                raise CalibrationError("the data cannot be read any more")
            yield sample


def test_nothing_stays_open_when_data_fail(case: Case, tmp_path: pathlib.Path) -> None:
    cache = BlockCache(case.model, case.blocks, _Breaking(case.source), tmp_path, memory=0)
    # An open file would be a warning, and so an error.
    with pytest.raises(CalibrationError):
        cache.load(case.blocks[0], case.plan)
