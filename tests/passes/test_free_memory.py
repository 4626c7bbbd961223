"""Freed memory goes back: against the resident size that the system reports."""

from __future__ import annotations

import ctypes
import pathlib

import numpy as np
import pytest

from postquant.passes.free_memory import give_back_memory

STATUS = pathlib.Path("/proc/self/statm")


def resident_pages() -> int:
    return int(STATUS.read_text(encoding="ascii").split()[1])


def test_it_may_be_called_anywhere() -> None:
    give_back_memory()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim") or not STATUS.exists(), reason="not glibc")
def test_freed_arrays_leave_the_process() -> None:
    # Small enough for the heap, and every other one stays, so that only trimming can give the others back.
    arrays = [np.ones(1 << 13) for _ in range(2000)]
    full = resident_pages()
    kept = arrays[::2]
    del arrays
    give_back_memory()
    assert resident_pages() < full - 1000 * (1 << 16) // 4096 // 2
    assert all(array[0] == 1 for array in kept)
