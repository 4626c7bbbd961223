"""``postquant.session``: an onnxruntime session that runs a postquant model as fast as this machine can.

The file runs on any onnxruntime, because every operator of ``ai.postquant`` in it carries its definition. What this
adds is the library with the native kernels, when postquant was built with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import onnxruntime as ort

from postquant.passes.session import first_sentence
from postquant.runtime_ops.errors import ConfigError, ModelError
from postquant.runtime_ops.library import register


def session(
    path: str | os.PathLike[str],
    *,
    providers: Sequence[str | tuple[str, dict[str, Any]]] | None = None,
    session_options: ort.SessionOptions | None = None,
    threads: int | None = None,
    native: bool = True,
) -> ort.InferenceSession:
    """Opens a model with the native kernels of ``ai.postquant``.

    Args:
        path: The ``.onnx`` file.
        providers: Execution providers, as onnxruntime takes them; the CPU by default, where the kernels are.
        session_options: Options of the session; they are changed. onnxruntime's defaults otherwise.
        threads: Threads within one operator, at least 1. None: what the options say.
        native: Whether to use the library. Without it, or where postquant was built without it, the definitions that
            the file carries run: the same codes (but for rounding ties that onnxruntime's kernels break differently),
            more slowly.

    Returns:
        The session, which is onnxruntime's own.

    Raises:
        ConfigError: If ``threads`` is not positive.
        ModelError: If onnxruntime cannot load the library or the model.
    """
    if threads is not None and threads < 1:
        raise ConfigError("a session needs at least one thread", where="threads", found=str(threads))
    options = ort.SessionOptions() if session_options is None else session_options
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        if native:
            register(options)
        return ort.InferenceSession(os.fspath(path), options, providers=list(providers or ["CPUExecutionProvider"]))
    except Exception as error:  # onnxruntime's exceptions share no base class below Exception
        raise ModelError(
            "onnxruntime cannot open the model", where=os.fspath(path), found=first_sentence(error)
        ) from error
