"""What each built-in target promises, read out of the plans and files of real networks."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from postquant.passes import semantics
from postquant.passes.emit import emit
from postquant.passes.plan import Entry, QuantPlan
from postquant.passes.target import Target, builtin_targets, load_target
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

# ResNet-20 adds, VWW has depthwise convolutions, SqueezeNet concatenates.
NETWORKS = ("resnet20", "vww", "squeezenet")
SIGNED_SYMMETRIC = ("tensorrt", "vitis-ai", "ncnn", "generic")
PER_TENSOR_WEIGHTS = ("vitis-ai", "generic")
FLOAT_BIAS = ("tensorrt", "ncnn")
SHARED_CONCAT = ("openvino", "tensorrt", "vitis-ai", "generic")
ACCUMULATING = ("openvino", "tensorrt")


@dataclasses.dataclass(frozen=True)
class Case:
    """One network for one target."""

    target: Target
    model: ir.Model
    plan: QuantPlan
    emitted: ir.Model
    feeds: list[Any]


@pytest.fixture(scope="module")
def case(shared_data: pathlib.Path, bench: Any) -> Callable[[str, str], Case]:
    @functools.cache
    def real(network: str) -> tuple[ir.Model, list[Any]]:
        return bench.real_model(shared_data, network), bench.real_feeds(shared_data, network, 2)

    @functools.cache
    def made(name: str, network: str) -> Case:
        model, feeds = real(network)
        target = load_target(name)
        plan = bench.calibrate(model, bench.place(model, target=name), feeds)
        emitted = emit(model, plan, integer_clips=target.integer_clips)
        return Case(target, model, plan, emitted, feeds)

    return made


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def spec_of(entry: Entry) -> QuantSpec:
    return entry.spec if isinstance(entry, TensorQuantizer) else entry


def constants(emitted: ir.Model, index: int, *, of_weights: bool) -> Iterator[npt.NDArray[Any]]:
    """Scales (index 1) or zero points (2) of the DequantizeLinear nodes of the file; biases are left out."""
    for node in emitted.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.dtype == ir.DataType.INT32 or (codes.const_value is not None) is not of_weights:
            continue
        tensor = node.inputs[index]
        assert tensor is not None
        assert tensor.const_value is not None
        yield tensor.const_value.numpy()


def stored(case: Case, value: ir.Value | None) -> bool:
    return value is not None and case.plan.activation_entry(value.name or "") is not None


@pytest.mark.parametrize("name", builtin_targets())
class TestEveryTarget:
    def test_formats_of_activations(self, case: Callable[[str, str], Case], name: str, network: str) -> None:
        found = case(name, network)
        signed = name in SIGNED_SYMMETRIC
        zeros = list(constants(found.emitted, 2, of_weights=False))
        assert zeros
        assert all(zero.dtype == (np.int8 if signed else np.uint8) and zero.ndim == 0 for zero in zeros)
        assert not signed or not any(zero.any() for zero in zeros)

    def test_formats_of_weights(self, case: Callable[[str, str], Case], name: str, network: str) -> None:
        found = case(name, network)
        zeros = list(constants(found.emitted, 2, of_weights=True))
        scales = list(constants(found.emitted, 1, of_weights=True))
        assert len(scales) == len(found.plan.weights) > 0
        assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
        assert {scale.ndim for scale in scales} == {0 if name in PER_TENSOR_WEIGHTS else 1}
        widths = {spec_of(entry).bits for entry in found.plan.weights.values()}
        assert widths == {7 if name == "onnxruntime-avx2" else 8}

    def test_powers_of_two(self, case: Callable[[str, str], Case], name: str, network: str) -> None:
        found = case(name, network)
        scales = [*constants(found.emitted, 1, of_weights=True), *constants(found.emitted, 1, of_weights=False)]
        powers = all((np.frexp(scale)[0] == 0.5).all() for scale in scales)
        assert powers == (name == "vitis-ai")

    def test_biases(self, case: Callable[[str, str], Case], name: str, network: str) -> None:
        found = case(name, network)
        integers = [n for n in found.emitted.graph if n.op_type == "DequantizeLinear" and _is_bias(n)]
        assert (not integers) == (name in FLOAT_BIAS)
        assert bool(found.plan.int_biases) == (name not in FLOAT_BIAS)

    def test_codes_are_clipped_only_where_the_backend_has_that(
        self, case: Callable[[str, str], Case], name: str, network: str
    ) -> None:
        found = case(name, network)
        eight = (ir.DataType.INT8, ir.DataType.UINT8)
        clips = [n for n in found.emitted.graph if n.op_type == "Clip" and n.inputs[0] and n.inputs[0].dtype in eight]
        # ncnn reads a table; its file says with a Clip that codes end at -127.
        assert (not clips) or name == "ncnn"

    def test_only_operators_of_the_target_run_on_integers(
        self, case: Callable[[str, str], Case], name: str, network: str
    ) -> None:
        found = case(name, network)
        integer = {n.op_type for n in found.model.graph if n.name not in found.plan.floats}
        assert integer <= {*found.target.ops, "Constant"}
        assert all(reason for reason in found.plan.floats.values())

    def test_the_file_runs(self, case: Callable[[str, str], Case], bench: Any, name: str, network: str) -> None:
        found = case(name, network)
        feed = found.feeds[0]
        expected = next(iter(bench.run(found.model, feed).values())).astype(np.float64)
        got = next(iter(bench.run(found.emitted, feed).values()))
        assert 10 * np.log10(np.square(expected).sum() / np.square(got - expected).sum()) > 3.0


@pytest.mark.parametrize("name", builtin_targets())
def test_residual_sums(case: Callable[[str, str], Case], name: str) -> None:
    found = case(name, "resnet20")
    for node in (n for n in found.model.graph if n.op_type == "Add"):
        inputs = sum(stored(found, value) for value in node.inputs)
        if name == "ncnn":
            assert "float" in found.plan.floats[node.name or ""]
        else:
            assert inputs == (1 if name in ACCUMULATING else 2)


@pytest.mark.parametrize("name", builtin_targets())
def test_scales_of_concats(case: Callable[[str, str], Case], name: str) -> None:
    found = case(name, "squeezenet")
    for node in (n for n in found.model.graph if n.op_type == "Concat"):
        values = [v.name or "" for v in (*node.inputs, *node.outputs) if v is not None]
        keys = {found.plan.shared.get(value, value) for value in values}
        assert name == "ncnn" or (len(keys) == 1) == (name in SHARED_CONCAT)
        assert name != "ncnn" or node.name in found.plan.floats


@pytest.mark.parametrize("name", builtin_targets())
def test_matrix_products_of_a_transformer(shared_data: pathlib.Path, bench: Any, name: str) -> None:
    model = _minilm(bench, shared_data)
    plan = bench.place(model, target=name)
    products = [n for n in model.graph if n.op_type == "MatMul"]
    floats = [n for n in products if n.name in plan.floats]
    assert len(floats) == (len(products) if name in ("vitis-ai", "ncnn") else 0)
    inner = [n for n in products if n not in floats and semantics.weight_index(n) is None]
    written = [n for n in inner if plan.activation_entry(n.outputs[0].name or "") is not None]
    if name == "qnn":  # its kernels write codes
        assert len(written) == len(inner) > 0


def test_sixteen_bits_exist_on_qnn_only(bench: Any, shared_data: pathlib.Path) -> None:
    assert [name for name in builtin_targets() if 16 in load_target(name).activations.bits] == ["qnn"]
    plan = bench.place(_minilm(bench, shared_data), target="qnn", abits=16, sums_bits=16)
    assert {spec_of(entry).container for entry in plan.activations.values()} == {"uint16"}
    assert {spec_of(entry).container for entry in plan.weights.values()} == {"int8"}


def _is_bias(node: ir.Node) -> bool:
    return node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.INT32


@functools.cache
def _minilm(bench: Any, folder: pathlib.Path) -> ir.Model:
    model: ir.Model = bench.real_model(folder, "minilm")
    return model
