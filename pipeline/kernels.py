"""What onnxruntime really runs: the graph after all of its optimizations.

A quantized file is a wish: DequantizeLinear -> Conv -> QuantizeLinear is one integer kernel only if onnxruntime fuses
it. Its optimized graph tells which. Fused nodes keep the names of the values that they write, so a node of the
emitted model is found again by its output.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from postquant.passes.lut_expansion import packed_layers, with_qdq
from postquant.passes.session import Session, make_session, session_options
from postquant.pipeline.load import load_model

# Weighted operators, and the integer kernels that stand for them.
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
INTEGER_KERNELS = frozenset(
    {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger", "MatMulNBits"}
    | {"LutQLinearConv", "LutQLinearMatMul", "LutMatMulIntegerToFloat"}
)
# onnxruntime names a node that replaces another "<name>_token_<number>".
_TOKEN = re.compile(r"(_token_\d+)+$")
# Nodes that move data between kernels; how many there are depends on layouts and on what is an output.
_TRANSPORT = frozenset({"Transpose", "Reshape", "ReorderInput", "ReorderOutput", "Identity", "Cast"})


# Above this many bytes of weights, onnxruntime keeps no rearranged copy of them; integer results do not change.
_PREPACKED_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class OptimizedGraph:
    """onnxruntime's optimized graph.

    Attributes:
        counts: Operator type -> number of nodes.
        by_node: Name of a node of the model -> type of the node that does its work; fused nodes keep their name.
        by_value: Value name -> type of the node that computes it, seen through layout changes.
    """

    counts: Mapping[str, int]
    by_node: Mapping[str, str]
    by_value: Mapping[str, str]

    @property
    def computing(self) -> dict[str, int]:
        """Counts without the nodes that only move or convert data, sorted by name."""
        return {op: n for op, n in sorted(self.counts.items()) if op not in _TRANSPORT}

    @property
    def integer(self) -> int:
        """Number of integer kernels of any kind."""
        return sum(n for op, n in self.counts.items() if op in INTEGER_KERNELS or op.startswith("QLinear"))

    def kernel_of(self, node: ir.Node) -> str:
        """The kernel that does the work of a node of the model; "" if it is not found."""
        if node.name and node.name in self.by_node:
            return self.by_node[node.name]
        value = node.outputs[0]
        for _ in range(4):  # Relu, QuantizeLinear, Clip
            kernel = self.by_value.get(value.name or "")
            if kernel is not None:
                return kernel if kernel in INTEGER_KERNELS or value is node.outputs[0] else node.op_type
            if len(value.uses()) != 1:
                break
            (use,) = value.uses()
            if not use.node.outputs:
                break
            value = use.node.outputs[0]
        return ""


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Which weighted nodes run on integers.

    Attributes:
        integer: Node name -> kernel.
        floating: Node name -> kernel, for those that run in float.
    """

    integer: Mapping[str, str]
    floating: Mapping[str, str]

    @property
    def share(self) -> float:
        """Integer nodes among all weighted nodes, 0..1; 1 where there are none."""
        total = len(self.integer) + len(self.floating)
        return len(self.integer) / total if total else 1.0


def observed_session(
    model: ir.Model, observed: Sequence[str] = (), *, threads: int = 1
) -> tuple[Session, OptimizedGraph]:
    """A session with all optimizations over the model's outputs and more values, and its optimized graph.

    Args:
        model: The model; it is not changed.
        observed: Names of inner values that become outputs too.
        threads: Threads within one operator.

    Raises:
        ModelError: If onnxruntime refuses the model.
    """
    own = [value.name or "" for value in model.graph.outputs]
    outputs = [*own, *(name for name in observed if name not in own)]
    with tempfile.TemporaryDirectory(prefix="postquant-") as folder:
        path = pathlib.Path(folder) / "optimized.onnx"
        options = session_options(threads=threads, prepack=_weight_bytes(model) <= _PREPACKED_BYTES)
        options.optimized_model_filepath = str(path)
        # The graph is wanted, not the weights: they would not fit into one message.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        session = make_session(model, outputs=outputs, options=options)
        proto = onnx.load(path, load_external_data=False)
    return session, _read(proto.graph)


def _weight_bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _read(graph: onnx.GraphProto) -> OptimizedGraph:
    counts = collections.Counter(node.op_type for node in graph.node)
    producers = {name: node for node in graph.node for name in node.output}

    def behind(name: str) -> str:
        node = producers[name]
        while node.input and node.input[0] in producers:
            before = producers[node.input[0]]
            # The body of LutMatMulIntegerToFloat takes the negative bias off its product.
            biased = node.op_type == "Sub" and before.op_type == "MatMulIntegerToFloat"
            if not biased and node.op_type not in _TRANSPORT:
                break
            node = before
        return str(node.op_type)

    by_node: dict[str, str] = {}
    for node in graph.node:
        name = _TOKEN.sub("", node.name)
        if name and (name not in by_node or node.op_type not in _TRANSPORT):
            by_node[name] = node.op_type
    return OptimizedGraph(dict(sorted(counts.items())), by_node, {name: behind(name) for name in producers if name})


def optimized_op_counts(model: str | pathlib.Path | ir.Model) -> collections.Counter[str]:
    """Operator types that onnxruntime runs after all optimizations, with their numbers.

    Args:
        model: A file or a model.

    Raises:
        ModelError: If the file cannot be read, or onnxruntime refuses it.
    """
    loaded = model if isinstance(model, ir.Model) else load_model(model, check=False)
    return collections.Counter(observed_session(loaded)[1].counts)


def integer_coverage(model: str | pathlib.Path | ir.Model, optimized: OptimizedGraph | None = None) -> Coverage:
    """Which weighted nodes of a quantized model onnxruntime runs as integer kernels.

    Args:
        model: A file or a model.
        optimized: Its optimized graph, if that is known already.

    Raises:
        ModelError: If the file cannot be read, or onnxruntime refuses it.
    """
    loaded = model if isinstance(model, ir.Model) else load_model(model, check=False)
    if optimized is None:
        optimized = observed_session(loaded)[1]
    integer: dict[str, str] = {}
    floating: dict[str, str] = {}
    # onnxruntime gives nodes of function bodies no names; values that are outputs keep theirs.
    packed = packed_layers(loaded)
    observed = observed_session(loaded, list(packed.values()))[1] if packed else optimized
    for node in with_qdq(loaded).graph:
        if node.domain or node.op_type not in WEIGHTED:
            continue
        if node.name in packed:
            kernel = observed.by_value.get(packed[node.name], "")
            kernel = kernel if kernel in INTEGER_KERNELS else node.op_type
        else:
            kernel = optimized.kernel_of(node)
        name = node.name or node.outputs[0].name or node.op_type
        if kernel in INTEGER_KERNELS:
            integer[name] = kernel
        else:
            floating[name] = kernel or f"fused into another kernel than {node.op_type}"
    return Coverage(integer, floating)
