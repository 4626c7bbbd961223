"""Finds the native operator library and registers it with onnxruntime.

The library is optional. A model runs without it, because every node of domain ``ai.postquant`` carries a
model-local function of standard operators; with it, the same file is faster.
"""

from __future__ import annotations

import importlib.resources
import pathlib
import sys
from typing import Protocol

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
FILE_NAME = f"libpostquant_ops{_SUFFIX}"


class SessionOptions(Protocol):
    """What is needed of ``onnxruntime.SessionOptions``."""

    def register_custom_ops_library(self, path: str) -> None:
        """Loads the library and adds its operators to sessions made with these options."""


def library_path() -> pathlib.Path | None:
    """The library file, or None if postquant was built without it (``POSTQUANT_NATIVE=OFF``).

    The file need not be beside this one: in an editable install it is among the installed files, which is
    why it is found through :mod:`importlib.resources`.
    """
    with importlib.resources.as_file(importlib.resources.files("postquant.runtime_ops").joinpath(FILE_NAME)) as path:
        return path if path.is_file() else None


def register(session_options: SessionOptions) -> bool:
    """Adds the native kernels to sessions made with ``session_options``.

    Args:
        session_options: An ``onnxruntime.SessionOptions``; it is changed.

    Returns:
        Whether the library was there. Without it the model runs all the same.
    """
    path = library_path()
    if path is None:
        return False
    session_options.register_custom_ops_library(str(path))
    return True
