"""Models of one node of ai.postquant, what they should compute, and what the native kernels compute."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from postquant.runtime_ops import library
from postquant.runtime_ops.law_lut import pack_codes
from postquant.runtime_ops.ops import functions_for, reference_classes

_WORKER = pathlib.Path(__file__).with_name("worker.py")
DOMAIN = "ai.postquant"

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Node:
    """One node with its inputs, all of them constants of the graph but those in ``fed``.

    Attributes:
        op: Operator.
        inputs: Input name -> value, in order.
        attributes: Attributes.
        fed: Names of the inputs that are fed.
        result_types: ONNX element type of each output.
    """

    op: str
    inputs: Mapping[str, Array]
    attributes: Mapping[str, Any]
    fed: Collection[str]
    result_types: Sequence[int]

    def changed(self, *, fed: Collection[str] | None = None, **inputs: Array | None) -> Node:
        """The same node with other inputs (None takes one away)."""
        merged = {**self.inputs, **inputs}
        kept = {name: value for name, value in merged.items() if value is not None}
        return dataclasses.replace(self, inputs=kept, fed=self.fed if fed is None else fed)

    def with_attributes(self, **attributes: Any) -> Node:
        """The same node with other attributes (None takes one away)."""
        merged = {**self.attributes, **attributes}
        return dataclasses.replace(self, attributes={k: v for k, v in merged.items() if v is not None})

    @property
    def feeds(self) -> dict[str, Array]:
        """What to feed to the model."""
        return {name: value for name, value in self.inputs.items() if name in self.fed}

    def model(self, *, body: bool = True, ranks_only: bool = True) -> onnx.ModelProto:
        """The model; sizes of fed inputs are open unless ``ranks_only`` is False."""
        initializers, values = [], []
        for name, value in self.inputs.items():
            if name in self.fed:
                kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                shape = [None] * value.ndim if ranks_only else value.shape
                values.append(helper.make_tensor_value_info(name, kind, shape))
            else:
                initializers.append(numpy_helper.from_array(value, name))
        outputs = [f"out{i}" for i in range(len(self.result_types))]
        node = helper.make_node(self.op, list(self.inputs), outputs, name="the_node", domain=DOMAIN)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in self.attributes.items())
        results = [
            helper.make_tensor_value_info(name, kind, None)
            for name, kind in zip(outputs, self.result_types, strict=True)
        ]
        graph = helper.make_graph([node], "single", values, results, initializers)
        imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
        functions = functions_for([self.op], opset=17) if body else []
        return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions)

    def expected(self) -> list[Array]:
        """What the NumPy law says."""
        evaluator = ReferenceEvaluator(self.model(body=False), new_ops=list(reference_classes()))
        return [np.asarray(value) for value in evaluator.run(None, self.feeds)]


class Native:
    """The library under test."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def session(self, model: onnx.ModelProto, *, threads: int = 1, severity: int = 4) -> ort.InferenceSession:
        """A session in this process."""
        options = ort.SessionOptions()
        options.log_severity_level = severity
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(str(self.path))
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, node: Node, *, threads: int = 1) -> list[Array]:
        """Outputs of a node in this process."""
        return [np.asarray(value) for value in self.session(node.model(), threads=threads).run(None, node.feeds)]

    def failure(self, node: Node) -> str:
        """The sentence with which loading or running a node fails."""
        with pytest.raises(Exception) as caught:  # noqa: PT011 - onnxruntime's exceptions share no base class
            self.run(node)
        return str(caught.value)

    def run_apart(
        self,
        nodes: Mapping[str, Node],
        folder: pathlib.Path,
        *,
        isa: str = "",
        threads: Sequence[int] = (1,),
        python: str = sys.executable,
        native: bool = True,
    ) -> tuple[dict[str, list[list[Array] | str]], str]:
        """Outputs of many nodes in a process of their own.

        Args:
            nodes: Name -> node.
            folder: Where to put the models.
            isa: Instruction set to force.
            threads: Numbers of threads.
            python: Interpreter of an environment with onnxruntime.
            native: Whether to register the library.

        Returns:
            Name -> outputs (or the sentence of a failure) for each number of threads; the version of onnxruntime.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name, node in nodes.items():
            onnx.save(node.model(), folder / f"{name}.onnx")
            feeds: dict[str, Any] = node.feeds
            np.savez(folder / f"{name}.npz", **feeds)
        environment = {k: v for k, v in os.environ.items() if k not in ("POSTQUANT_ISA", "PYTHONPATH")}
        if isa:
            environment["POSTQUANT_ISA"] = isa
        command = [python, str(_WORKER), str(self.path) if native else "", str(folder), *map(str, threads)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"the process died: {done.returncode}\n{done.stderr}"
        if isa and any("POSTQUANT_ISA" in error.read_text(encoding="utf-8") for error in folder.glob("*.error")):
            pytest.skip(f"this machine or this build has no {isa}")
        results: dict[str, list[list[Array] | str]] = {}
        for name in nodes:
            results[name] = [self._result(folder, name, count) for count in threads]
        return results, done.stdout.split()[-1]

    @staticmethod
    def check(results: Mapping[str, list[list[Array] | str]], nodes: Mapping[str, Node]) -> None:
        """Asserts that results of :meth:`run_apart` are what the law says."""
        for name, node in nodes.items():
            for outputs in results[name]:
                assert not isinstance(outputs, str), f"{name}: {outputs}"
                for output, expected in zip(outputs, node.expected(), strict=True):
                    assert output.dtype == expected.dtype, name
                    np.testing.assert_array_equal(output, expected, err_msg=name)

    @staticmethod
    def _result(folder: pathlib.Path, name: str, threads: int) -> list[Array] | str:
        error = folder / f"{name}.{threads}.error"
        if error.exists():
            return error.read_text(encoding="utf-8")
        with np.load(folder / f"{name}.{threads}.out.npz") as outputs:
            return [outputs[key] for key in outputs.files]


class Nodes:
    """Random nodes."""

    def lut_conv(
        self,
        rng: np.random.Generator,
        *,
        w_shape: Sequence[int] = (5, 3, 3, 3),
        spatial: Sequence[int] = (7, 6),
        batch: int = 1,
        group: int = 1,
        bits: int = 4,
        dtype: Any = np.uint8,
        strides: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
    ) -> Node:
        """A LutQLinearConv."""
        rank = len(w_shape) - 2
        x = self._codes(rng, (batch, w_shape[1] * group, *spatial), dtype)
        return Node(
            "LutQLinearConv",
            {"x": x, **self._lut(rng, w_shape[0], math.prod(w_shape[1:]), bits, dtype)},
            {
                "bits": bits,
                "group": group,
                "w_shape": list(w_shape),
                "strides": list(strides or [1] * rank),
                "dilations": list(dilations or [1] * rank),
                "pads": list(pads or [0] * (2 * rank)),
            },
            {"x"},
            [helper.np_dtype_to_tensor_dtype(np.dtype(dtype))],
        )

    def lut_matmul(
        self,
        rng: np.random.Generator,
        *,
        outer: Sequence[int] = (2,),
        outputs: int = 5,
        inputs: int = 7,
        bits: int = 4,
        dtype: Any = np.uint8,
    ) -> Node:
        """A LutQLinearMatMul."""
        return Node(
            "LutQLinearMatMul",
            {"x": self._codes(rng, (*outer, inputs), dtype), **self._lut(rng, outputs, inputs, bits, dtype)},
            {"bits": bits, "w_shape": [outputs, inputs]},
            {"x"},
            [helper.np_dtype_to_tensor_dtype(np.dtype(dtype))],
        )

    def lut_matmul_to_float(self, rng: np.random.Generator, **sizes: Any) -> Node:
        """A LutMatMulIntegerToFloat of the sizes of :meth:`lut_matmul`."""
        node = self.lut_matmul(rng, **sizes)
        bias = rng.normal(0, 9, len(node.inputs["bias"])).astype(np.float32)
        node = node.changed(bias=bias, y_scale=None, y_zero_point=None)
        return dataclasses.replace(node, op="LutMatMulIntegerToFloat", result_types=[onnx.TensorProto.FLOAT])

    def adaptive(
        self,
        rng: np.random.Generator,
        *,
        shape: Sequence[int] = (2, 5, 6, 7),
        features: int = 7,
        hidden: int = 3,
        requantize: bool = False,
        qmin: int = 0,
        qmax: int = 255,
    ) -> Node:
        """An AdaptiveQuantize or AdaptiveRequantize."""
        count = shape[1] * (features & 1) + (features >> 1 & 1) + (features >> 2 & 1)
        network = {
            "step": np.asarray(0.05, np.float32),
            "zero_point": self._codes(rng, (), np.uint8),
            "w1": rng.normal(0, 0.5, (hidden, count)).astype(np.float32),
            "b1": rng.normal(0, 0.5, hidden).astype(np.float32),
            "w2": rng.normal(0, 0.5, (1, hidden)).astype(np.float32),
            "b2": np.ones(1, np.float32),
        }
        if requantize:
            inputs = {
                "x": self._codes(rng, shape, np.uint8),
                "x_scale": np.asarray(0.031, np.float32),
                "x_zero_point": self._codes(rng, (), np.uint8),
                **network,
            }
        else:
            inputs = {"x": rng.normal(0.5, 3, shape).astype(np.float32), **network}
        return Node(
            "AdaptiveRequantize" if requantize else "AdaptiveQuantize",
            inputs,
            {"features": features, "beta_min": 0.25, "beta_max": 4.0, "qmin": qmin, "qmax": qmax},
            {"x"},
            [onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT],
        )

    def border(
        self,
        rng: np.random.Generator,
        *,
        shape: Sequence[int] = (2, 5, 6, 7),
        window: Sequence[int] = (1, 1),
        rank: int = 0,
        table: bool = False,
        zero_point: int = 0,
        qmin: int = 0,
        qmax: int = 15,
    ) -> Node:
        """A BorderQuantize."""
        channels = shape[1]
        taps = rng.integers(-20, 21, (channels, *window))
        taps[:, window[0] // 2, window[1] // 2] = 0
        return Node(
            "BorderQuantize",
            {
                "x": rng.normal(0.4, 0.6, shape).astype(np.float32),
                "scale": np.asarray(0.11, np.float32),
                "zero_point": np.asarray(zero_point, np.uint8),
                "border": rng.uniform(0.2, 0.8, (channels, qmax - qmin + 1 if table else 1)).astype(np.float32),
                "window": taps.astype(np.int8),
                "window_scale": rng.uniform(0, 1e-3, channels).astype(np.float32),
                "left": rng.integers(-127, 128, (rank, channels)).astype(np.int8),
                "left_scale": rng.uniform(0, 0.01, rank).astype(np.float32),
                "right": rng.integers(-127, 128, (channels, rank)).astype(np.int8),
                "right_scale": rng.uniform(0, 1e-4, channels).astype(np.float32),
            },
            {"channels": channels, "qmin": qmin, "qmax": qmax},
            {"x"},
            [onnx.TensorProto.UINT8],
        )

    def levels(
        self,
        rng: np.random.Generator,
        *,
        shape: Sequence[int] = (2, 5, 6, 7),
        axis: int = -3,
        channels: int | None = None,
        count: int = 16,
        x_scale: float = 0.031,
        scale: float = 0.043,
    ) -> Node:
        """A LutRequantize; ``channels`` is the size of the axis unless it is given."""
        rows = shape[axis] if channels is None else channels
        return Node(
            "LutRequantize",
            {
                "x": self._codes(rng, shape, np.uint8),
                "x_scale": np.asarray(x_scale, np.float32),
                "x_zero_point": self._codes(rng, (), np.uint8),
                "scale": np.asarray(scale, np.float32),
                "zero_point": self._codes(rng, (), np.uint8),
                "table": np.sort(self._codes(rng, (rows, count), np.uint8), axis=1),
            },
            {"axis": axis},
            {"x"},
            [onnx.TensorProto.UINT8],
        )

    def feedback(
        self, rng: np.random.Generator, *, rank: int = 3, rows: int | None = None, groups: Any = range(8), **levels: Any
    ) -> Node:
        """A FeedbackRequantize; ``rows`` of the table are the channels unless given, ``levels`` as of the method."""
        cell = levels.pop("cell", 1)
        node = self.levels(rng, channels=rows, **levels).with_attributes(cell=cell)
        channels = node.inputs["x"].shape[node.attributes["axis"]] * cell**2
        # Inner sums and shifts of all sizes, some of them beyond the limits.
        feedback = {
            "group": rng.choice(np.array(groups, np.uint8), channels),
            "left": rng.integers(-127, 128, (rank, channels)).astype(np.int8),
            "left_scale": (rng.uniform(0, 0.04, rank) / math.sqrt(channels)).astype(np.float32),
            "right": rng.integers(-127, 128, (channels, rank)).astype(np.int8),
            "right_scale": (rng.uniform(-0.04, 0.04, channels) / math.sqrt(rank)).astype(np.float32),
        }
        return dataclasses.replace(node, op="FeedbackRequantize", inputs={**node.inputs, **feedback})

    def _lut(self, rng: np.random.Generator, outputs: int, terms: int, bits: int, dtype: Any) -> dict[str, Array]:
        # A step at which the outputs fill their range and sometimes leave it.
        step = 80.0 * math.sqrt(terms) * 0.02 / 40
        return {
            "x_scale": np.asarray(0.02, np.float32),
            "x_zero_point": self._codes(rng, (), dtype),
            "codes": pack_codes(rng.integers(0, 1 << bits, (outputs, terms)), bits),
            "table": rng.integers(-128, 128, 1 << bits).astype(np.int8),
            "w_scale": rng.uniform(0.5, 1.5, outputs).astype(np.float32),
            "bias": rng.integers(-9000, 9000, outputs).astype(np.int32),
            "y_scale": np.asarray(step, np.float32),
            "y_zero_point": self._codes(rng, (), dtype),
        }

    @staticmethod
    def _codes(rng: np.random.Generator, shape: Sequence[int], dtype: Any) -> Array:
        info = np.iinfo(dtype)
        return np.asarray(rng.integers(info.min, info.max + 1, shape)).astype(dtype)


@pytest.fixture(scope="session")
def native() -> Native:
    """The library."""
    override = os.environ.get("POSTQUANT_TEST_LIBRARY")  # a build that is not installed
    path = pathlib.Path(override) if override else library.library_path()
    if path is None:
        reason = "postquant was installed without the native library"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return Native(path)


@pytest.fixture(scope="session")
def nodes() -> Nodes:
    """Random nodes of every operator."""
    return Nodes()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded by the name of the test."""
    return np.random.default_rng(sum(request.node.name.encode()))
