"""Gives memory back to the operating system: :func:`give_back_memory`, :func:`release_weights`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable

import onnx_ir as ir


def give_back_memory() -> None:
    """Shrinks the process to what it uses.

    glibc keeps what was freed, in case it is wanted again: after the session of a large quantized model that is twice
    the size of its codes. To be called where something large has just been let go.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def release_weights(model: ir.Model, names: Iterable[str] | None = None) -> None:
    """Lets go of the pages of weights that lie in files; who needs them again reads them again.

    Args:
        model: The model.
        names: Initializers; all of them when None.
    """
    for name in model.graph.initializers if names is None else names:
        tensor = model.graph.initializers[name].const_value
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None with another C library."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim
