"""Gives memory that is free back to the operating system: :func:`give_back_memory`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back_memory() -> None:
    """Shrinks the process to what it uses.

    glibc keeps what was freed, in case it is wanted again: after the session of a large quantized model that is twice
    the size of its codes. To be called where something large has just been let go.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None with another C library."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim
