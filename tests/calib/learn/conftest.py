"""One operator in torch and in onnxruntime; torch with one thread, as postquant runs it; no torch, no tests here."""

from __future__ import annotations

import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from postquant.calib.input_spec import input_specs
from postquant.calib.observers import MinMax
from postquant.calib.open_source import open_source
from postquant.calib.ranges import method_ranges
from postquant.calib.source import CalibrationSource
from postquant.calib.weight_start import start_weights
from postquant.passes.place import PlacementSettings, place
from postquant.passes.plan import QuantPlan
from postquant.passes.target import load_target

Array = npt.NDArray[Any]
OpModel = Callable[..., ir.Model]


class WithoutTorch(pytest.Module):
    """A file whose tests need torch, which is missing; with ``CI=true`` that is a failure."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """Never imports the file."""
        reason = "torch is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def pytest_pycollect_makemodule(module_path: pathlib.Path, parent: pytest.Collector) -> pytest.Module | None:
    """What stands for a test file of this folder; None for pytest's own."""
    if importlib.util.find_spec("torch") is not None:
        return None
    module: pytest.Module = WithoutTorch.from_parent(parent, path=module_path)
    return module


def make_op_model(
    op_type: str,
    inputs: Sequence[Array | None],
    *,
    opset: int = 17,
    outputs: int = 1,
    fed: int | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node, ``op``: the first ``fed`` inputs (all if None) are x0, x1, ..., the others constants."""
    fed = len(inputs) if fed is None else fed
    names = ["" if array is None else f"x{index}" for index, array in enumerate(inputs)]
    results = [f"y{index}" for index in range(outputs)]
    infos, constants = [], []
    for index, (name, array) in enumerate(zip(names, inputs, strict=True)):
        if array is None:
            continue
        if index < fed:
            dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            infos.append(onnx.helper.make_tensor_value_info(name, dtype, [None] * array.ndim))
        else:
            constants.append(onnx.numpy_helper.from_array(array, name))
    node = onnx.helper.make_node(op_type, names, results, name="op", **attributes)
    graph = onnx.helper.make_graph([node], "g", infos, [onnx.ValueInfoProto(name=name) for name in results], constants)
    imports = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 21 else 10)


def compare_op(
    op_type: str,
    inputs: Sequence[Array | None],
    *,
    opset: int = 17,
    outputs: int = 1,
    fed: int | None = None,
    tolerance: float = 2e-6,
    **attributes: Any,
) -> Mapping[str, Array]:
    """Checks that both give equal shapes, types and, up to rounding, numbers; returns onnxruntime's."""
    import torch

    from postquant.calib.learn.executor import constant_values, run_nodes, supported

    proto = make_op_model(op_type, inputs, opset=opset, outputs=outputs, fed=fed, **attributes)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays = {f"x{index}": array for index, array in enumerate(inputs) if array is not None}
    feeds = {i.name: arrays[i.name] for i in session.get_inputs()}
    names = [f"y{index}" for index in range(outputs)]
    expected = dict(zip(names, session.run(names, feeds), strict=True))
    graph = ir.from_proto(proto).graph
    nodes = list(graph)
    assert [supported(node) for node in nodes] == [None]
    values = {**constant_values(nodes), **{name: torch.from_numpy(array.copy()) for name, array in feeds.items()}}
    run_nodes(nodes, values)
    for name in names:
        got = values[name].numpy()
        assert got.shape == expected[name].shape
        assert got.dtype == expected[name].dtype
        scale = float(np.max(np.abs(expected[name]), initial=1.0, where=np.isfinite(expected[name])))
        np.testing.assert_allclose(got, expected[name], rtol=tolerance, atol=tolerance * scale)
    return expected


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def same_as_onnxruntime() -> Callable[..., Mapping[str, Array]]:
    """Compares one operator (:func:`compare_op`)."""
    return compare_op


@pytest.fixture(scope="session")
def op_node() -> Callable[..., ir.Node]:
    """Makes a node of a graph."""

    def make(op_type: str, inputs: Sequence[Array | None], **settings: Any) -> ir.Node:
        graph = ir.from_proto(make_op_model(op_type, inputs, **settings)).graph
        return next(iter(graph))

    return make


def network_at_three_bits(text: str) -> tuple[ir.Model, QuantPlan, CalibrationSource]:
    """A network with random weights and 40 samples x of 3 x 6 x 6, decided by min-max at W3A3; nothing is learned."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in proto.graph.value_info}
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(np.prod(shape[1:]) or 1))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    feeds = [{"x": rng.standard_normal((1, 3, 6, 6)).astype(np.float32)} for _ in range(40)]
    source = open_source(feeds, input_specs(model))
    plan = place(model, load_target("onnxruntime"), PlacementSettings(wbits=3, abits=3))
    return model, start_weights(model, method_ranges(model, plan, source, MinMax()).plan), source


@pytest.fixture(scope="session")
def at_three_bits() -> Callable[[str], tuple[ir.Model, QuantPlan, CalibrationSource]]:
    """Makes a small network to be learned (:func:`network_at_three_bits`)."""
    return network_at_three_bits
