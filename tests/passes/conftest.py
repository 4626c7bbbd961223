"""Small models in ONNX text, min-max plans, and what onnxruntime makes of the emitted models."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import onnxsim
import pytest

from postquant.passes.biases import fit_biases
from postquant.passes.normalize import normalize
from postquant.passes.place import PlacementSettings, place
from postquant.passes.plan import Entry, QuantPlan
from postquant.passes.target import load_target
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

Feeds = Mapping[str, npt.NDArray[Any]]

# Short name -> data set of eval.py, file.
REAL_MODELS = {
    "resnet20": ("cifar10", "cifar10/resnet20.onnx"),
    "resnet56": ("cifar10", "cifar10/resnet56.onnx"),
    "resnet8": ("cifar10_raw", "cifar10/resnet8_mlperftiny.onnx"),
    "mobilenetv2": ("imagenet", "imagenet/mobilenetv2_1.0.onnx"),
    "squeezenet": ("imagenet", "imagenet/squeezenet1.1.onnx"),
    "dncnn": ("denoise", "denoise/dncnn_s25.onnx"),
    "fastestdet": ("coco", "coco/fastestdet.onnx"),
    "rfb320": ("face", "coco/face_rfb320.onnx"),
    "vww": ("vww", "coco/vww_mobilenetv1_0.25_96.onnx"),
    "minilm": ("sts", "sts/minilm_l6.onnx"),
}


def spec_of(entry: Entry) -> QuantSpec:
    """The format behind an entry of a plan."""
    return entry.spec if isinstance(entry, TensorQuantizer) else entry


class Workbench:
    """What the tests of placement and emission do with a model."""

    def model(self, text: str, **arrays: npt.NDArray[Any]) -> ir.Model:
        """A model from ONNX text whose undeclared names become initializers, with all types inferred."""
        proto = onnx.parser.parse_model(text)
        for name, array in arrays.items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        for index, node in enumerate(proto.graph.node):
            node.name = node.name or f"{node.op_type}_{index}"
        onnx.checker.check_model(proto)
        model: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        return model

    def graph(
        self, body: str, inputs: str = "float[N,4,8,8] x", outputs: str = "float[a,b,c,d] y", opset: int = 17
    ) -> str:
        """ONNX text around the nodes of ``body``."""
        return f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'

    def arrays(self, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
        """w1, b1, w2, b2: two convolutions 3x3 of 4 channels."""
        shapes = {"w1": (4, 4, 3, 3), "b1": (4,), "w2": (4, 4, 3, 3), "b2": (4,)}
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def feeds(
        self, rng: np.random.Generator, count: int = 2, shape: tuple[int, ...] = (1, 4, 8, 8)
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Random samples of the input ``x``."""
        return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]

    def difference(self, result: ir.Model, model: ir.Model, feed: Feeds) -> float:
        """Power of the error of ``y`` relative to the power of ``y``."""
        expected = self.run(model, feed)["y"]
        return float(np.square(self.run(result, feed)["y"] - expected).mean() / np.square(expected).mean())

    def place(self, model: ir.Model, target: str = "onnxruntime", **settings: Any) -> QuantPlan:
        """The plan of a built-in target."""
        return place(model, load_target(target), PlacementSettings(**settings))

    def calibrate(self, model: ir.Model, plan: QuantPlan, feeds: Sequence[Feeds]) -> QuantPlan:
        """The plan with every entry decided by the smallest and largest value that occurs."""
        sources = {key: key for key in plan.activations}
        nodes = {node.name: node for node in model.graph}
        for key in plan.requants:
            node, _, index = key.rpartition(":")
            value = nodes[node].inputs[int(index)]
            assert value is not None
            assert value.name is not None
            sources[key] = value.name
        low: dict[str, float] = dict.fromkeys(sources.values(), 0.0)
        high = dict(low)
        for feed in feeds:
            for name, array in self.values(model, sorted(low), feed).items():
                low[name] = min(low[name], float(array.min()))
                high[name] = max(high[name], float(array.max()))

        def decide(table: Mapping[str, Entry]) -> dict[str, Entry]:
            return {
                key: TensorQuantizer.from_range(spec_of(entry), low[sources[key]], high[sources[key]])
                for key, entry in table.items()
            }

        weights: dict[str, Entry] = {}
        for name, entry in plan.weights.items():
            spec = spec_of(entry)
            values = self.array(model, name)
            others = None if spec.axis is None else tuple(i for i in range(values.ndim) if i != spec.axis)
            top = np.abs(values).max(axis=others)
            weights[name] = TensorQuantizer.from_range(spec, -top, top)
        plan = dataclasses.replace(
            plan, activations=decide(plan.activations), requants=decide(plan.requants), weights=weights
        )
        return fit_biases(model, plan)

    def array(self, model: ir.Model, name: str) -> npt.NDArray[Any]:
        """Values of an initializer."""
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        return tensor.numpy()

    def inputs(self, model: ir.Model, op_type: str) -> list[str]:
        """Names of the inputs of the first node of a type."""
        node = next(node for node in model.graph if node.op_type == op_type)
        return [value.name or "" for value in node.inputs if value is not None]

    def values(self, model: ir.Model, names: Sequence[str], feed: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Values of a float model by name."""
        copy = model.clone()
        known = {v.name: v for node in copy.graph for v in node.outputs}
        present = {v.name for v in copy.graph.outputs}
        copy.graph.outputs.extend(known[name] for name in names if name in known and name not in present)
        found = dict(feed) | self.run(copy, feed)
        return {name: found[name] for name in names}

    def session(self, model: ir.Model, *, optimize: bool = True, save: pathlib.Path | None = None) -> Any:
        """One-threaded onnxruntime session."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if save is not None:
            options.optimized_model_filepath = str(save)
        return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, model: ir.Model, feed: Feeds, *, optimize: bool = True) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name."""
        session = self.session(model, optimize=optimize)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, dict(feed)), strict=True))

    def optimized(self, model: ir.Model, folder: pathlib.Path) -> collections.Counter[str]:
        """How often each operator occurs in onnxruntime's optimized graph."""
        path = folder / "optimized.onnx"
        self.session(model, save=path)
        return collections.Counter(node.op_type for node in onnx.load(path).graph.node)

    def check(self, model: ir.Model) -> onnx.ModelProto:
        """The model as a proto that passed the checker, types and shapes inferred strictly."""
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        return proto

    def ops(self, model: ir.Model) -> collections.Counter[str]:
        """How often each operator occurs."""
        return collections.Counter(node.op_type for node in model.graph)

    def real_model(self, folder: pathlib.Path, name: str) -> ir.Model:
        """A real model, BatchNorm folded, in the simplified form that placement expects."""
        proto, same = onnxsim.simplify(onnx.load(folder / REAL_MODELS[name][1]))
        assert same
        model: ir.Model = ir.from_proto(proto)
        normalize(model)
        return model

    def real_feeds(self, folder: pathlib.Path, name: str, count: int) -> list[Feeds]:
        """Calibration samples of a real model."""
        spec = importlib.util.spec_from_file_location("shared_eval", folder / "eval.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return list(module.batches(REAL_MODELS[name][0], "calib", batch=1, limit=count))


@pytest.fixture(scope="session")
def bench() -> Workbench:
    """Tools for models, plans and sessions."""
    return Workbench()


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every run."""
    return np.random.default_rng(7)
