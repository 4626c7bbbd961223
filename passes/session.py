"""onnxruntime sessions over a model or a part of it, without ever serializing the weights.

The protobuf message that onnxruntime gets holds the nodes and the small constants only. A large initializer

* that lies in a file (external data) is named by that file: onnxruntime maps it, nothing is copied;
* that lies in memory is handed over as an OrtValue over the same memory.

So a session over a few nodes of a large model costs milliseconds, models beyond protobuf's 2 GB work, and
any inner value can be an output or, to run a part only, an input. One copy of large weights remains with
``prepack=True``: onnxruntime rearranges matrices for its kernels.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from postquant.passes.skeleton import SMALL_BYTES, inline_tensor
from postquant.passes.subgraph import Cut, find_cut, subgraphs, used_functions
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.library import library_path

# Below this size of all weights a rearranged copy of them is no burden.
_PREPACK_BYTES = 256 << 20

# Types that NumPy does not have; the OrtValue is made over a plain view of the same width.
_VIEWED = {
    ir.DataType.BFLOAT16: np.uint16,
    ir.DataType.FLOAT8E4M3FN: np.uint8,
    ir.DataType.FLOAT8E4M3FNUZ: np.uint8,
    ir.DataType.FLOAT8E5M2: np.uint8,
    ir.DataType.FLOAT8E5M2FNUZ: np.uint8,
}
_NUMPY_TYPES = frozenset(
    ir.DataType[name]
    for name in (
        *("FLOAT", "FLOAT16", "DOUBLE", "BOOL"),
        *("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"),
    )
)
_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
# What onnxruntime says about an operator or a domain that it does not have.
_UNKNOWN_OPERATOR = ("is not a registered function/op", "No opset import", "No Op registered")
_LIBRARIES: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("custom operators", default=())

Feeds = Mapping[str, npt.NDArray[Any]]


class Session:
    """An onnxruntime session together with the arrays that it reads.

    Attributes:
        session: The session itself.
        input_names: Names to feed.
        output_names: Names of the results, in order.
    """

    def __init__(self, session: ort.InferenceSession, keep: Sequence[object], outputs: Sequence[str]) -> None:
        self.session = session
        self.input_names: tuple[str, ...] = tuple(i.name for i in session.get_inputs())
        self.output_names: tuple[str, ...] = tuple(outputs)
        self._keep = tuple(keep)

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, npt.NDArray[Any]]:
        """Runs once.

        Args:
            feeds: Input name -> array; names that the session does not read are ignored.
            outputs: The outputs to compute; all of them by default.

        Returns:
            Output name -> array.

        Raises:
            ModelError: If onnxruntime fails; the sentence holds its reason.
        """
        names = self.output_names if outputs is None else tuple(outputs)
        try:
            results = self.session.run(list(names), {k: feeds[k] for k in self.input_names if k in feeds})
        except Exception as error:  # onnxruntime's exceptions share no base class below Exception
            raise ModelError("onnxruntime cannot run the model", found=first_sentence(error)) from error
        return dict(zip(names, results, strict=True))


@contextlib.contextmanager
def custom_operators(libraries: Iterable[str | os.PathLike[str]]) -> Iterator[None]:
    """Registers libraries of custom operators with every session that is made inside the block.

    A model that needs them needs them wherever a part of it runs, in calibration as in verification.

    Args:
        libraries: Paths; those of an outer block stay registered.
    """
    known = (*_LIBRARIES.get(), *_absolute(libraries))
    token = _LIBRARIES.set(tuple(dict.fromkeys(known)))
    try:
        yield
    finally:
        _LIBRARIES.reset(token)


@contextlib.contextmanager
def native_operators() -> Iterator[None]:
    """Registers our own library with every session that is made inside the block, if it is there.

    It computes what the function bodies do, to the bit, and faster. What a receiver will see is measured without it.
    """
    path = library_path()
    with custom_operators([] if path is None else [path]):
        yield


def _absolute(libraries: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Paths with a folder: the system looks for a bare file name elsewhere."""
    return [os.path.abspath(os.fspath(library)) for library in libraries]


def first_sentence(error: BaseException) -> str:
    """The reason that onnxruntime gives, in one line: without status prefix, source positions and stack."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[0]
    if line.startswith("[ONNXRuntimeError]"):
        line = line.split(" : ", 3)[-1]
    return line.rstrip(".")


def session_options(*, threads: int = 1, optimize: bool = True, prepack: bool = True) -> ort.SessionOptions:
    """The options that every session of postquant uses: quiet, a fixed number of threads, no spinning."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def make_session(
    model: ir.Model,
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    dtypes: Mapping[str, ir.DataType] | None = None,
    threads: int = 1,
    optimize: bool = True,
    prepack: bool | None = None,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
    options: ort.SessionOptions | None = None,
) -> Session:
    """A session over a model, or over the part of it between ``inputs`` and ``outputs``.

    Args:
        model: The model; it is neither changed nor copied.
        inputs: Names of the values that will be fed: graph inputs or inner values. None: the graph's inputs.
            A graph input that has an initializer is a constant unless it is named here.
        outputs: Names of the wanted values: graph outputs or inner values. None: the graph's outputs.
        dtypes: Element types of inner inputs whose type the model does not tell; float32 otherwise.
        threads: Threads within one operator.
        optimize: Whether onnxruntime may fuse and fold. Where it fuses into a convolution or changes the layout
            of its weight, it makes a copy of that weight.
        prepack: Whether onnxruntime may keep a rearranged copy of the weights: faster runs, more memory.
            None: as long as the weights are smaller than 256 MB.
        custom_ops: Libraries of custom operators to register, besides those of :func:`custom_operators`.
        options: Session options to use instead of :func:`session_options`; they are changed.

    Raises:
        ModelError: If a value does not exist, the cut is not complete, or onnxruntime refuses the model.
    """
    cut = find_cut(model.graph, inputs, outputs)
    if prepack is None:
        prepack = sum(value.const_value.nbytes for value in cut.initializers if value.const_value) < _PREPACK_BYTES
    if options is None:
        options = session_options(threads=threads, optimize=optimize, prepack=prepack)
    for library in dict.fromkeys((*_LIBRARIES.get(), *_absolute(custom_ops))):
        try:
            options.register_custom_ops_library(library)
        except Exception as error:  # onnxruntime's exceptions share no base class below Exception
            raise ModelError(
                "the library of custom operators cannot be loaded",
                where=library,
                found=first_sentence(error),
            ) from error
    proto, folder, values = _message(model, cut, dtypes or {})
    if folder is not None:
        options.add_session_config_entry(_FOLDER_OPTION, folder)
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class below Exception
        reason = first_sentence(error)
        unknown = any(text in reason for text in _UNKNOWN_OPERATOR)
        hint = "if a library implements this operator for onnxruntime, name it: --custom-ops, custom_ops"
        raise ModelError("onnxruntime cannot load the model", found=reason, hint=hint if unknown else None) from error
    return Session(session, tuple(values.values()), [value.name or "" for value in cut.outputs])


def _message(
    model: ir.Model, cut: Cut, dtypes: Mapping[str, ir.DataType]
) -> tuple[onnx.ModelProto, str | None, dict[str, ort.OrtValue]]:
    """The message for onnxruntime, the folder of its external data, and the initializers kept in memory."""
    # Initializers that are not graph inputs need IR 4, functions IR 8.
    least = 8 if model.functions else 4
    proto = onnx.ModelProto(ir_version=max(model.ir_version, least))
    for domain, version in model.graph.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    graph = proto.graph
    graph.name = model.graph.name or "graph"
    own_inputs = set(model.graph.inputs)
    for value in cut.inputs:
        _add_input(graph, value, dtypes, keep_shape=value in own_inputs)
    for value in cut.outputs:
        graph.output.add(name=value.name)  # onnxruntime infers the type
    folder = data_folder(_all_initializers(cut))
    in_memory: dict[str, ort.OrtValue] = {}
    for value in cut.initializers:
        _add_initializer(graph, value, folder, in_memory)
    for node in cut.nodes:
        ir.serde.serialize_node_into(graph.node.add(), node)
    for function in used_functions(model, cut.nodes):
        ir.serde.serialize_function_into(proto.functions.add(), function, create_value_info=False)
    return proto, folder, in_memory


def _all_initializers(cut: Cut) -> Iterator[ir.Value]:
    """The initializers of the cut, and those of its nodes' subgraphs."""
    yield from cut.initializers
    stack = [graph for node in cut.nodes for graph in subgraphs(node)]
    while stack:
        graph = stack.pop()
        yield from graph.initializers.values()
        stack.extend(body for node in graph for body in subgraphs(node))


def _add_input(graph: onnx.GraphProto, value: ir.Value, dtypes: Mapping[str, ir.DataType], *, keep_shape: bool) -> None:
    if keep_shape:
        ir.serde.serialize_value_into(graph.input.add(), value)
        return
    # The sizes that a file states for inner values may be wrong (a batch of 1 from the export): say the rank only.
    name = value.name or ""
    info = graph.input.add(name=name)
    dtype = value.dtype or dtypes.get(name, ir.DataType.FLOAT)
    info.type.tensor_type.elem_type = int(dtype)
    if value.shape is not None:
        info.type.tensor_type.shape.SetInParent()
        for _ in range(value.shape.rank()):
            info.type.tensor_type.shape.dim.add()


def _add_initializer(
    graph: onnx.GraphProto, value: ir.Value, folder: str | None, in_memory: dict[str, ort.OrtValue]
) -> None:
    tensor = value.const_value
    name = value.name or ""
    if tensor is None:
        raise ModelError("an initializer has no value", where=name)
    if tensor.nbytes < SMALL_BYTES or not (tensor.dtype in _NUMPY_TYPES or tensor.dtype in _VIEWED):
        graph.initializer.append(inline_tensor(tensor, name))
        return
    stub = graph.initializer.add(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    stub.data_location = onnx.TensorProto.EXTERNAL
    if isinstance(tensor, ir.ExternalTensor) and _folder_of(tensor) == folder:
        _locate(stub, os.fspath(tensor.location), tensor.offset or 0, tensor.length or tensor.nbytes)
        return
    _locate(stub, "memory", 0, tensor.nbytes)
    array = np.ascontiguousarray(tensor.numpy())
    view = _VIEWED.get(tensor.dtype)
    if view is None:
        in_memory[name] = ort.OrtValue.ortvalue_from_numpy(array)
    else:
        in_memory[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(view), int(tensor.dtype))


def _locate(stub: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    for key, text in (("location", location), ("offset", str(offset)), ("length", str(length))):
        stub.external_data.add(key=key, value=text)


def _folder_of(tensor: ir.ExternalTensor) -> str:
    return os.path.abspath(os.fspath(tensor.base_dir))


def data_folder(initializers: Iterable[ir.Value]) -> str | None:
    """The folder that holds most bytes of the external data; onnxruntime reads from one folder only."""
    sizes: dict[str, int] = {}
    for value in initializers:
        if isinstance(value.const_value, ir.ExternalTensor):
            folder = _folder_of(value.const_value)
            sizes[folder] = sizes.get(folder, 0) + value.const_value.nbytes
    return max(sizes, key=lambda folder: (sizes[folder], folder)) if sizes else None
