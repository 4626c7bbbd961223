"""Weights that a fold has changed, out of memory again.

A folded weight of a model whose weights lie in files is a lazy tensor: a formula over the file. Read often, it
costs time; held in memory, it costs a second copy of the model. So each is computed once and written to a file
of its own kind, from which it is mapped like any external tensor. A few small ones are simply kept.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
import weakref

import onnx_ir as ir

from postquant.runtime_ops.errors import OutputError

# Up to this size in total, changed weights are kept in memory.
KEEP_BYTES = 64 << 20
_ALIGNMENT = 4096
_FILE = "folded.data"


class _TemporaryFolder:
    """A folder that is there as long as this object (tempfile.TemporaryDirectory warns when it is let go)."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="postquant-")
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def settle_lazy_tensors(model: ir.Model, folder: str | os.PathLike[str] | None = None) -> None:
    """Evaluates the lazy initializers of a model, one at a time, into memory or into a file.

    Args:
        model: The model; its initializers are changed.
        folder: Where the file may lie; it must stay as long as the model's tensors are used. None: a temporary
            folder that goes with the last of these tensors.

    Raises:
        OutputError: If the file cannot be written.
    """
    values = [v for v in model.graph.initializers.values() if isinstance(v.const_value, ir.LazyTensor)]
    if sum(v.const_value.nbytes for v in values if v.const_value is not None) <= KEEP_BYTES:
        for value in values:
            assert value.const_value is not None
            value.const_value = ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype)
        return
    owner = None
    if folder is None:
        owner = _TemporaryFolder()
        folder = owner.path
    base = pathlib.Path(folder).absolute()
    try:
        handle, name = tempfile.mkstemp(dir=base, suffix=f".{_FILE}")
        with os.fdopen(handle, "wb") as stream:
            for value in values:
                tensor = value.const_value
                assert tensor is not None
                stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
                offset = stream.tell()
                stream.write(tensor.tobytes())
                settled = ir.ExternalTensor(
                    os.path.basename(name),
                    offset,
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                    base_dir=base,
                )
                settled.meta["folder"] = owner  # the folder lives as long as a tensor that lies in it
                value.const_value = settled
    except OSError as error:
        raise OutputError(
            "folded weights cannot be set aside", where=str(base), found=error.strerror or str(error)
        ) from error
