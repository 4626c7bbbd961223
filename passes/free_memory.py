"""What the C library does with memory that is free, and weights in files: :func:`give_back_memory` and others."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator

import onnx_ir as ir

# glibc's mallopt: from which size on memory is mapped, and how much may be free at the end before it is given back.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_NEVER = (1 << 31) - 1
_DEFAULT = 128 << 10


def give_back_memory() -> None:
    """Shrinks the process to what it uses.

    glibc keeps what was freed, in case it is wanted again: after the session of a large quantized model that is twice
    the size of its codes. To be called where something large has just been let go.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def release_tensor(tensor: ir.TensorProtocol | None) -> None:
    """Lets go of the pages of a tensor that lies in a file; it is mapped again when it is read again."""
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):  # somebody else still reads it
            tensor.release()


def release_weights(model: ir.Model, names: Iterable[str] | None = None) -> None:
    """Lets go of the pages of weights that lie in files; who needs them again reads them again.

    Args:
        model: The model.
        names: Initializers; all of them when None.
    """
    for name in model.graph.initializers if names is None else names:
        release_tensor(model.graph.initializers[name].const_value)


@contextlib.contextmanager
def hold_memory() -> Iterator[None]:
    """Keeps what is freed for the next allocation.

    glibc asks the system for every array of more than some hundred kilobytes, and gives it back at once; each time all
    of its pages are cleared and mapped. For loops that make the same large arrays again and again that is a third of
    the time. At the end everything free goes back.
    """
    option = _mallopt()
    if option is None:
        yield
        return
    option(_MMAP_THRESHOLD, _NEVER)
    option(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        option(_MMAP_THRESHOLD, _DEFAULT)
        option(_TRIM_THRESHOLD, _DEFAULT)
        give_back_memory()


@functools.cache
def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's ``mallopt``; None with another C library."""
    try:
        option: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return None
    return option


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None with another C library."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim
