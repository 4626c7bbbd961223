"""Writing a model file: whole or not at all, the same bytes every time, one tensor in memory at a time.

The message is written around the weights. Protobuf allows the fields of a message in any order, so
``ModelProto`` is its small fields followed by ``graph``, and ``graph`` is its small fields followed by one
``initializer`` after the other, each a short header followed by ``raw_data`` straight from the tensor:

    ModelProto   ... | 0x3a length GraphProto
    GraphProto   ... | 0x2a length TensorProto | 0x2a length TensorProto | ...
    TensorProto  dims, data_type, name | 0x4a length bytes
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, cast

import onnx
import onnx_ir as ir

from postquant.passes.skeleton import SMALL_BYTES, Weights, inline_tensor, to_skeleton
from postquant.runtime_ops.errors import OutputError

# A message ends at 2 GB; weights beyond this go to a file of their own.
EXTERNAL_BYTES = 1_500_000_000
# Tensors in the data file start at pages, so that a reader can map them.
_ALIGNMENT = 4096

_GRAPH_TAG, _INITIALIZER_TAG, _RAW_TAG = b"\x3a", b"\x2a", b"\x4a"


def save_model(model: ir.Model, path: str | os.PathLike[str], *, external: bool | None = None) -> None:
    """Writes a model file, and its data file ``<name>.onnx.data`` if it has one.

    Lazy tensors are evaluated one at a time. Tensors of the model that lie in the very file that is replaced
    must not be read through this model afterwards; load the new file.

    Args:
        model: The model; it is not changed.
        path: The file; its folder exists. An older model of that name is replaced.
        external: Whether weights go to a data file. None: when they exceed 1.5 GB.

    Raises:
        OutputError: If the folder does not exist or is not writable, or the disk is full. Neither file is then
            touched.
    """
    file = pathlib.Path(path)
    proto, weights = to_skeleton(model)
    if external is None:
        external = sum(tensor.nbytes for tensor in weights.values()) > EXTERNAL_BYTES
    data_file = file.with_name(file.name + ".data")
    try:
        if not external:
            with _temporary(file) as (stream, temporary):
                _write_inline(proto, weights, stream)
                _finish(stream)
                os.replace(temporary, file)
            data_file.unlink(missing_ok=True)
            return
        with _temporary(data_file) as (data, temporary_data), _temporary(file) as (stream, temporary):
            _write_data(proto, weights, data, data_file.name)
            stream.write(proto.SerializeToString(deterministic=True))
            _finish(data)
            _finish(stream)
            # An old model must never be found beside new data: it goes first.
            file.unlink(missing_ok=True)
            os.replace(temporary_data, data_file)
            os.replace(temporary, file)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            "the model cannot be written",
            where=str(file),
            found="a full disk" if full else error.strerror or str(error),
            hint="free some space there and run the same command again" if full else None,
        ) from error


def model_bytes(model: ir.Model) -> int:
    """How many bytes :func:`save_model` would write, padding between external tensors excepted; nothing is computed."""
    proto, weights = to_skeleton(model)
    size = len(proto.SerializeToString(deterministic=True))
    for name, tensor in weights.items():
        content = len(_header(tensor, name)) + _payload(tensor)
        size += len(_INITIALIZER_TAG) + len(_varint(content)) + content
    return size + len(_varint(size)) - 1


@contextlib.contextmanager
def _temporary(file: pathlib.Path) -> Iterator[tuple[BinaryIO, str]]:
    """A file beside ``file`` that is gone afterwards unless it was moved to its place."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream, name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _finish(stream: BinaryIO) -> None:
    stream.flush()
    os.fchmod(stream.fileno(), 0o644)
    os.fsync(stream.fileno())


def _write_inline(proto: onnx.ModelProto, weights: Weights, stream: BinaryIO) -> None:
    graph = onnx.GraphProto()
    graph.CopyFrom(proto.graph)
    proto.ClearField("graph")
    small = graph.SerializeToString(deterministic=True)
    headers = {name: _header(tensor, name) for name, tensor in weights.items()}
    length = len(small)
    for name, header in headers.items():
        content = len(header) + _payload(weights[name])
        length += len(_INITIALIZER_TAG) + len(_varint(content)) + content
    stream.write(proto.SerializeToString(deterministic=True))
    stream.write(_GRAPH_TAG + _varint(length))
    stream.write(small)
    for name, header in headers.items():
        tensor = weights[name]
        stream.write(_INITIALIZER_TAG + _varint(len(header) + _payload(tensor)))
        stream.write(header)
        if tensor.dtype != ir.DataType.STRING:
            _write_tensor(tensor, stream)


def _header(tensor: ir.TensorProtocol, name: str) -> bytes:
    """A TensorProto up to its raw bytes; the whole of it for strings, which have none."""
    if tensor.dtype == ir.DataType.STRING:
        return cast(bytes, inline_tensor(tensor, name).SerializeToString(deterministic=True))
    head = onnx.TensorProto(dims=tensor.shape.numpy(), data_type=int(tensor.dtype), name=name)
    return cast(bytes, head.SerializeToString(deterministic=True)) + _RAW_TAG + _varint(tensor.nbytes)


def _payload(tensor: ir.TensorProtocol) -> int:
    return 0 if tensor.dtype == ir.DataType.STRING else tensor.nbytes


def _write_tensor(tensor: ir.TensorProtocol, stream: BinaryIO) -> None:
    if isinstance(tensor, ir.ExternalTensor):
        tensor.tofile(stream)  # from file to file, nothing is mapped
        return
    data = tensor.tobytes()
    if len(data) != tensor.nbytes:
        raise OSError(f"the tensor {tensor.name} has {len(data)} bytes instead of {tensor.nbytes}")
    stream.write(data)


def _write_data(proto: onnx.ModelProto, weights: Weights, data: BinaryIO, location: str) -> None:
    """Writes the data file and adds initializers that point into it to the message."""
    position = 0
    for name, tensor in weights.items():
        if tensor.dtype == ir.DataType.STRING or tensor.nbytes < SMALL_BYTES:
            proto.graph.initializer.append(inline_tensor(tensor, name))
            continue
        data.write(b"\0" * (-position % _ALIGNMENT))
        position += -position % _ALIGNMENT
        stub = proto.graph.initializer.add(dims=tensor.shape.numpy(), data_type=int(tensor.dtype), name=name)
        stub.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", location), ("offset", str(position)), ("length", str(tensor.nbytes))):
            stub.external_data.add(key=key, value=text)
        _write_tensor(tensor, data)
        position += tensor.nbytes


def _varint(number: int) -> bytes:
    """Protobuf's variable-length integer.

    >>> _varint(300).hex()
    'ac02'
    """
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)
