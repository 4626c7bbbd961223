"""Runs one kernel, quantize-dequantize group or operator of ours elsewhere, for comparison with its NumPy law."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from postquant.runtime_ops import ops
from postquant.runtime_ops.integer import Affine
from postquant.runtime_ops.law_feedback import Feedback, feedback_requantize
from postquant.runtime_ops.schema import DOMAIN, VERSION

ROOT = pathlib.Path(__file__).resolve().parents[2]

Quantized = tuple[npt.NDArray[Any], Affine]


class Kernels:
    """Random quantized tensors, and onnxruntime's results on them."""

    def affine(self, rng: np.random.Generator, dtype: Any = np.uint8, channels: int | None = None) -> Affine:
        """Random numbers: an activation with a zero point, or a weight with ``channels`` scales and none."""
        if channels is not None:
            scale = np.exp(rng.uniform(-7, -4, channels)).astype(np.float32)
            return Affine(scale, np.zeros(channels, np.int32), np.dtype(dtype), 0)
        info = np.iinfo(dtype)
        zero = np.asarray(rng.integers(info.min, info.max + 1), np.int32)
        return Affine(np.asarray(np.exp(rng.uniform(-5, -1)), np.float32), zero, np.dtype(dtype))

    def codes(self, rng: np.random.Generator, shape: Sequence[int], dtype: Any = np.uint8) -> npt.NDArray[Any]:
        """Random codes of the whole container."""
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max + 1, shape).astype(dtype)

    def bias(self, rng: np.random.Generator, x: Affine, w: Affine, channels: int) -> Quantized:
        """Random int32 bias codes and their numbers."""
        scale = np.broadcast_to((x.scale * w.scale).astype(np.float32), (channels,))
        codes = rng.integers(-9000, 9000, channels).astype(np.int32)
        return codes, Affine(scale, np.zeros(channels, np.int32), np.dtype(np.int32), 0)

    def run(self, model: onnx.ModelProto, feeds: Mapping[str, Any], *, optimize: bool = True) -> tuple[Any, set[str]]:
        """The first output, and the types of the nodes that onnxruntime ran."""
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        with tempfile.TemporaryDirectory() as folder:
            optimized = pathlib.Path(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(optimized)
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            kernels = {node.op_type for node in onnx.load(optimized).graph.node}
        return session.run(None, dict(feeds))[0], kernels

    def qlinear_conv(
        self, x: Quantized, w: Quantized, bias: Quantized | None, y: Affine, attributes: Mapping[str, Any]
    ) -> npt.NDArray[Any]:
        """The operator QLinearConv itself, which exists for int8 activations on every machine."""
        initializers, names = [], ["x"]

        def constant(name: str, array: npt.NDArray[Any]) -> None:
            initializers.append(numpy_helper.from_array(np.asarray(array), name))
            names.append(name)

        constant("xs", x[1].scale)
        constant("xz", x[1].zero_point.astype(x[1].dtype))
        constant("w", w[0])
        constant("ws", w[1].scale)
        constant("wz", w[1].zero_point.astype(w[1].dtype))
        constant("ys", y.scale)
        constant("yz", y.zero_point.astype(y.dtype))
        if bias is not None:
            constant("b", bias[0])
        node = helper.make_node("QLinearConv", names, ["y"], **attributes)
        kinds = [helper.np_dtype_to_tensor_dtype(np.dtype(t)) for t in (x[1].dtype, y.dtype)]
        graph = helper.make_graph(
            [node],
            "kernel",
            [helper.make_tensor_value_info("x", kinds[0], x[0].shape)],
            [helper.make_tensor_value_info("y", kinds[1], None)],
            initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return np.asarray(self.run(model, {"x": x[0]})[0])

    def group(
        self,
        op_type: str,
        inputs: Sequence[Quantized],
        out: Affine | None,
        *,
        constants: Mapping[int, Quantized] | None = None,
        plain: Mapping[int, npt.NDArray[Any]] | None = None,
        attributes: Mapping[str, Any] | None = None,
        opset: int = 17,
        optimize: bool = True,
    ) -> tuple[npt.NDArray[Any], set[str]]:
        """Codes (floats, without ``out``) of DequantizeLinear -> op -> QuantizeLinear and the kernels that ran.

        Args:
            op_type: The operator.
            inputs: Codes fed at run time; they fill the input slots not named elsewhere.
            out: Numbers of the output.
            constants: Input slot -> constant codes (weights, biases).
            plain: Input slot -> constant that is not dequantized (shapes).
            attributes: Attributes of the node.
            opset: Opset of the model.
            optimize: Whether onnxruntime may fuse.
        """
        nodes: list[onnx.NodeProto] = []
        initializers: list[onnx.TensorProto] = []
        values: list[onnx.ValueInfoProto] = []

        def constant(name: str, array: Any) -> str:
            initializers.append(numpy_helper.from_array(np.asarray(array), name))
            return name

        def numbers(name: str, q: Affine) -> list[str]:
            return [constant(f"{name}_scale", q.scale), constant(f"{name}_zero", q.zero_point.astype(q.dtype))]

        def dequantize(source: str, q: Affine) -> str:
            extra: dict[str, Any] = {} if q.axis is None else {"axis": q.axis}
            nodes.append(helper.make_node("DequantizeLinear", [source, *numbers(source, q)], [f"{source}_f"], **extra))
            return f"{source}_f"

        slots: list[str] = []
        waiting = list(enumerate(inputs))
        for slot in range(len(inputs) + len(constants or {}) + len(plain or {})):
            if constants and slot in constants:
                slots.append(dequantize(constant(f"c{slot}", constants[slot][0]), constants[slot][1]))
            elif plain and slot in plain:
                slots.append(constant(f"p{slot}", plain[slot]))
            else:
                index, (array, q) = waiting.pop(0)
                kind = int(helper.np_dtype_to_tensor_dtype(array.dtype))
                values.append(helper.make_tensor_value_info(f"x{index}", kind, array.shape))
                slots.append(dequantize(f"x{index}", q))
        nodes.append(helper.make_node(op_type, slots, ["real"], **(attributes or {})))
        result, kind = "real", int(onnx.TensorProto.FLOAT)
        if out is not None:
            nodes.append(helper.make_node("QuantizeLinear", ["real", *numbers("y", out)], ["y"]))
            result, kind = "y", int(helper.np_dtype_to_tensor_dtype(out.dtype))
        ends = [helper.make_tensor_value_info(result, kind, None)]
        graph = helper.make_graph(nodes, "group", values, ends, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        feeds = {f"x{i}": array for i, (array, _) in enumerate(inputs)}
        observed, kernels = self.run(model, feeds, optimize=optimize)
        return np.asarray(observed), kernels


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """onnxruntime's kernels."""
    return Kernels()


class Operators:
    """Models of one node of ``ai.postquant``, and what each runner makes of them."""

    def model(
        self,
        name: str,
        x: npt.NDArray[Any],
        constants: Mapping[str, npt.NDArray[Any]],
        attributes: Mapping[str, Any],
        *,
        opset: int = 21,
        functions: bool = True,
        stored: bool = False,
    ) -> onnx.ModelProto:
        """A model of one node with a dynamic first dimension.

        Args:
            name: The operator.
            x: What it will be fed.
            constants: All other inputs, by name.
            attributes: All attributes.
            opset: Version of the standard operators.
            functions: Whether the model carries the operator's function body.
            stored: Whether float values are quantized in front of the node and dequantized behind it, with the node's
                own numbers, so that onnxruntime sees codes between other operators, as in a whole network.
        """
        operator = ops.operator(name)
        schema = operator.schema()
        first, *rest = [p.name for p in schema.inputs]
        outputs = [p.name for p in schema.outputs]
        assert list(constants) == rest
        nodes = [helper.make_node(name, [first, *rest], outputs, domain=DOMAIN, **attributes)]
        kinds = [
            int(onnx.TensorProto.FLOAT if "float" in p.type_str else onnx.TensorProto.UINT8) for p in schema.outputs
        ]
        kind = int(helper.np_dtype_to_tensor_dtype(x.dtype))
        if schema.outputs[0].type_str == "T":
            kinds[0] = kind
        if stored:
            nodes[0].input[0] = "codes_in"
            nodes.insert(0, helper.make_node("QuantizeLinear", [first, *rest[:2]], ["codes_in"]))
            if schema.outputs[0].type_str == "T":
                nodes[1].output[0] = "codes_out"
                nodes.append(helper.make_node("DequantizeLinear", ["codes_out", *rest[-2:]], outputs[:1]))
            kind = kinds[0] = int(onnx.TensorProto.FLOAT)
        shape = ["N", *x.shape[1:]]
        shapes: list[Any] = [["N", *(f"y{i}" for i in range(1, x.ndim))] if "Lut" in name else shape, ["N"]]
        graph = helper.make_graph(
            nodes,
            "one_node",
            [helper.make_tensor_value_info(first, kind, shape)],
            [helper.make_tensor_value_info(o, k, s) for o, k, s in zip(outputs, kinds, shapes, strict=False)],
            [numpy_helper.from_array(np.asarray(array), key) for key, array in constants.items()],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
            functions=ops.functions_for([name], opset=opset) if functions else [],
            ir_version=10,
        )
        onnx.checker.check_model(model, full_check=functions)
        return model

    def on_onnxruntime(
        self, model: onnx.ModelProto, x: npt.NDArray[Any], *, optimize: bool = True
    ) -> tuple[list[npt.NDArray[Any]], set[str]]:
        """All outputs of a stock onnxruntime, and the types of the nodes that it ran."""
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        with tempfile.TemporaryDirectory() as folder:
            optimized = pathlib.Path(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(optimized)
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            kernels = {node.op_type for node in onnx.load(optimized).graph.node}
        return session.run(None, {model.graph.input[0].name: x}), kernels

    def on_evaluator(
        self, model: onnx.ModelProto, x: npt.NDArray[Any], *, reference: bool = False
    ) -> list[npt.NDArray[Any]]:
        """All outputs of onnx's ReferenceEvaluator: of the function body, or of the registered reference."""
        if reference:
            model = onnx.ModelProto.FromString(model.SerializeToString())
            del model.functions[:]
        evaluator = ReferenceEvaluator(model, new_ops=ops.reference_classes() if reference else None)
        return list(evaluator.run(None, {model.graph.input[0].name: x}))


@pytest.fixture(scope="session")
def operators() -> Operators:
    """Models of single operators of ``ai.postquant``."""
    return Operators()


class Feedbacks:
    """Random inputs of FeedbackRequantize, and its law."""

    def constants(
        self, rng: np.random.Generator, channels: int, rank: int, *, rows: int = 1, count: int = 4
    ) -> dict[str, npt.NDArray[Any]]:
        """All inputs but x, with shifts that reach from small ones to those beyond the limits.

        Args:
            rng: Source of numbers.
            channels: Of a position.
            rank: Of the coefficients.
            rows: Of the table.
            count: Levels.
        """
        return {
            "x_scale": np.asarray(0.031, np.float32),
            "x_zero_point": np.asarray(13, np.uint8),
            "scale": np.asarray(0.043, np.float32),
            "zero_point": np.asarray(7, np.uint8),
            "table": np.sort(rng.integers(0, 256, (rows, count)), axis=1).astype(np.uint8),
            "group": rng.integers(0, 8, channels).astype(np.uint8),
            "left": rng.integers(-127, 128, (rank, channels)).astype(np.int8),
            "left_scale": rng.uniform(0, 0.02, rank).astype(np.float32),
            "right": rng.integers(-127, 128, (channels, rank)).astype(np.int8),
            "right_scale": rng.uniform(-0.02, 0.02, channels).astype(np.float32),
        }

    def law(
        self, x: npt.NDArray[Any], constants: Mapping[str, npt.NDArray[Any]], axis: int, cell: int = 1
    ) -> npt.NDArray[Any]:
        """The law of the inputs of a node."""
        inputs: dict[str, Any] = dict(constants)
        parts = {name: inputs.pop(name) for name in ("group", "left", "left_scale", "right", "right_scale")}
        return feedback_requantize(x, **inputs, feedback=Feedback(**parts, cell=cell), axis=axis)


@pytest.fixture(scope="session")
def feedbacks() -> Feedbacks:
    """Inputs and law of FeedbackRequantize."""
    return Feedbacks()


def _build_lut_library(folder: pathlib.Path, flags: str = "-O3 -DNDEBUG") -> pathlib.Path:
    """Builds the library in ``folder``, which is kept: a second build has nothing to do."""
    cmake = shutil.which("cmake", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("cmake or a C++ compiler is not installed")
    source = ROOT / "runtime_ops"
    options = [f"-DCMAKE_CXX_FLAGS_RELEASE={flags}", "-DCMAKE_BUILD_TYPE=Release", "-DPOSTQUANT_NATIVE=ON"]
    commands = (
        [cmake, "-S", str(source), "-B", str(folder), *options],
        [cmake, "--build", str(folder), "--parallel", "2", "--target", "postquant_lut_test"],
    )
    for command in commands:
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("libpostquant_lut_test.*"))


@pytest.fixture(scope="session")
def lut_build() -> Callable[..., pathlib.Path]:
    """Builds the library of ``lut_test_entry.cc`` in a folder, with the flags given."""
    return _build_lut_library


@pytest.fixture(scope="session")
def lut_library() -> pathlib.Path:
    """The library of ``lut_test_entry.cc``: the kernels without onnxruntime."""
    given = os.environ.get("POSTQUANT_LUT_TEST_LIBRARY")
    return pathlib.Path(given) if given else _build_lut_library(ROOT / "build" / "lut-test")
