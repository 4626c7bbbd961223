"""Digest of everything that a result depends on: the key under which finished stages are resumed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Iterable

from postquant.passes.target import Target
from postquant.pipeline.config import QuantConfig
from postquant.runtime_ops.errors import ModelError

_PACKAGES = ("postquant", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "onnxsim", "numpy", "scipy")
_BLOCK = 1 << 22


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide about a result's bytes."""
    result = {}
    for name in _PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "unknown"  # run from a source tree that is not installed
    return result


def digest_file(path: pathlib.Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def digest_model(path: pathlib.Path, external: Iterable[pathlib.Path]) -> str:
    """SHA-256 of a model file with its external data.

    Args:
        path: The file.
        external: Its external data files (:func:`postquant.pipeline.inputs.external_files`).

    Raises:
        ModelError: If a file cannot be read.
    """
    try:
        digest = hashlib.sha256(digest_file(path).encode())
        for file in external:
            digest.update(f"\0{file.name}\0{digest_file(file)}".encode())
    except OSError as error:
        raise ModelError(
            "the model cannot be read", where=str(error.filename or path), found=error.strerror or str(error)
        ) from None
    return digest.hexdigest()


def fingerprint(model_digest: str, data_digest: str, config: QuantConfig, target: Target) -> str:
    """Hex digest of a run: model, data, settings, target, versions, and the files that they name."""
    record = {
        "model": model_digest,
        "data": data_digest,
        "config": config.to_json(),
        "versions": package_versions(),
        "target": repr(target),
        "libraries": [digest_file(pathlib.Path(library)) for library in config.custom_ops],
        "encodings": None if config.encodings is None else digest_file(pathlib.Path(config.encodings)),
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
