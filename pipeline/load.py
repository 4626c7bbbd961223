"""Reading a model file: every mistake in it is found here and said in one sentence.

External data stay in their files: the tensors are read, through memory maps, when somebody wants them.
Whether an operator exists is decided by a stock onnxruntime, whose reason is passed on.
"""

from __future__ import annotations

import mmap
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
from google.protobuf.message import DecodeError

from postquant.passes.session import make_session
from postquant.passes.subgraph import subgraphs
from postquant.pipeline.save import save_model
from postquant.runtime_ops.errors import ModelError

__all__ = ["load_model", "save_model"]

_LFS = b"version https://git-lfs"
# What a file that is no ONNX file begins with, and what to tell its owner.
_KNOWN_STARTS = (
    (_LFS, "a Git LFS pointer", "fetch the file itself with git lfs pull"),
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint", "export the network with torch.onnx.export"),
    (b"\x89HDF", "an HDF5 or Keras file", "convert it with tf2onnx"),
    (b"\x80\x02", "a Python pickle", "export the network with torch.onnx.export"),
    (b"ORTM", "an .ort file", "use the .onnx file that it was made from"),
)


def load_model(
    path: str | os.PathLike[str], *, custom_ops: Sequence[str | os.PathLike[str]] = (), check: bool = True
) -> ir.Model:
    """Reads a model file.

    Args:
        path: The ``.onnx`` file; external data lie beside it.
        custom_ops: Libraries that implement custom operators of the model for onnxruntime.
        check: Whether to ask onnxruntime if it can load the model.

    Returns:
        The model. Tensors in external data files are :class:`onnx_ir.ExternalTensor`: not read yet.

    Raises:
        ModelError: If the file cannot be read, is truncated or no ONNX file, misses its external data, holds
            an empty graph, or onnxruntime does not load it (an unknown operator, for example).
    """
    file = pathlib.Path(path)
    proto = _read(file)
    _check_not_empty(proto, file)
    _densify(proto.graph)
    try:
        model = ir.serde.deserialize_model(proto)
    except ir.serde.SerdeError as error:
        raise ModelError("the model is damaged", where=str(file), found=_cause(error)) from error
    folder = file.absolute().parent
    ir.external_data.set_base_dir(model.graph, folder)
    _check_external_data(model.graph, folder)
    if check:
        try:
            # Nothing is optimized or rearranged: this asks whether every node is known and typed, at little cost.
            make_session(model, optimize=False, prepack=False, custom_ops=custom_ops)
        except ModelError as error:
            raise ModelError(
                error.what,
                where=error.where or str(file),
                expected=error.expected,
                found=error.found,
                hint=error.hint,
            ) from error
    return model


def _read(file: pathlib.Path) -> onnx.ModelProto:
    proto, start = onnx.ModelProto(), b""
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
            if not start:
                raise ModelError("the model file is empty", where=str(file))
            # A map: the bytes of the file are never in memory beside the message that they become.
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
                proto.ParseFromString(view)
    except FileNotFoundError:
        raise ModelError("there is no such model file", where=str(file)) from None
    except IsADirectoryError:
        raise ModelError("the model is a folder", where=str(file), expected="an .onnx file") from None
    except OSError as error:
        raise ModelError(
            "the model file cannot be read", where=str(file), found=error.strerror or str(error)
        ) from error
    except DecodeError:
        raise _not_onnx(file, start) from None
    return proto


def _not_onnx(file: pathlib.Path, start: bytes) -> ModelError:
    for magic, found, hint in _KNOWN_STARTS:
        if start.startswith(magic):
            return ModelError("the file is not an ONNX model", where=str(file), found=found, hint=hint)
    if start[0] == 0x08:  # field 1 of ModelProto, the IR version: every exporter writes it first
        return ModelError("the model file is truncated or damaged", where=str(file), hint="copy or download it again")
    return ModelError("the file is not an ONNX model", where=str(file))


def _check_not_empty(proto: onnx.ModelProto, file: pathlib.Path) -> None:
    if not proto.HasField("graph"):
        start = b"\x08" if proto.ir_version else b"\x00"
        raise _not_onnx(file, start)
    if not proto.graph.node:
        raise ModelError("the graph is empty", where=str(file), expected="at least one node")
    if not proto.graph.output:
        raise ModelError("the graph has no outputs", where=str(file))
    if not proto.opset_import:
        raise ModelError("the model names no operator set", where=str(file), expected="an opset_import")


def _densify(graph: onnx.GraphProto) -> None:
    """Turns sparse initializers, which onnx_ir would drop, into dense ones, as onnxruntime does on loading."""
    for sparse in graph.sparse_initializer:
        values = onnx.numpy_helper.to_array(sparse.values)
        indices = onnx.numpy_helper.to_array(sparse.indices)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
        graph.initializer.append(onnx.numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                _densify(body)


def _check_external_data(graph: ir.Graph, folder: pathlib.Path) -> None:
    """Every external tensor lies whole in a file inside the model's folder."""
    sizes: dict[str, int] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = os.fspath(tensor.location)
        if os.path.isabs(location) or not _inside(folder, location):
            raise ModelError(
                "external data must lie in the model's folder", where=value.name, found=location or "no location"
            )
        if location not in sizes:
            try:
                sizes[location] = os.stat(folder / location).st_size
            except OSError as error:
                raise ModelError(
                    "an external data file of the model is missing",
                    where=str(folder / location),
                    found=f"{error.strerror} (needed for {value.name})",
                    hint="copy it beside the model",
                ) from error
        length = tensor.nbytes if tensor.length is None else tensor.length
        if length != tensor.nbytes:
            raise ModelError(
                "the size of an external tensor does not fit its shape",
                where=value.name,
                expected=f"{tensor.nbytes} bytes",
                found=f"{length}",
            )
        if (tensor.offset or 0) + length > sizes[location]:
            raise ModelError(
                "an external data file of the model is truncated",
                where=str(folder / location),
                expected=f"at least {(tensor.offset or 0) + length} bytes (for {value.name})",
                found=f"{sizes[location]}",
                hint="copy or download it again",
            )
    for node in graph:
        for body in subgraphs(node):
            _check_external_data(body, folder)


def _inside(folder: pathlib.Path, location: str) -> bool:
    return bool(location) and (folder / location).resolve().is_relative_to(folder.resolve())


def _cause(error: BaseException) -> str:
    """The innermost reason of a chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__
