"""``manifest.json``: what a bundle holds, what it needs, and how it was made (:class:`Manifest`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from postquant.pipeline.output import MANIFEST_FILE
from postquant.pipeline.report import SettingFile
from postquant.runtime_ops.errors import ModelError

SCHEMA_VERSION = 1
LARGEST_BYTES = 16 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a bundle: its SHA-256 in hex and its size in bytes."""

    sha256: str
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """What a model file of a bundle asks of its runtime.

    Attributes:
        ir_version: ONNX IR version.
        opsets: Domain -> version; "" is ONNX's own.
        operators: "Conv" or "domain::Operator" -> number of nodes, function bodies not counted.
        functions: Operators that the file defines by standard ones.
        features: What else a runtime must be able to do, one clause each.
    """

    ir_version: int
    opsets: Mapping[str, int]
    operators: Mapping[str, int]
    functions: tuple[str, ...]
    features: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a bundle.

    Attributes:
        files: Path in the bundle, with ``/`` -> digest and size; manifest and signature are not in it.
        models: Model file -> what it needs.
        notes: What is not as one might expect: how ``model.qdq.onnx`` differs, what was left out, and why.
        source_model: File name of the float model.
        source_sha256: Its digest.
        calibration_sha256: Digest of the calibration data.
        calibration_samples: How many there were.
        target: Name of the target.
        versions: Package -> version that made the bundle.
        command: The command that makes it again, in words of a shell; MODEL and DATA stand for the two inputs.
        settings: Every setting of it.
        setting_files: Files that the settings name: ``setting``, ``name`` and ``sha256`` of each.
        licence: Licence of the model; None if nobody said.
        origin: Where the model comes from; None if nobody said.
        signer: Ed25519 public key, 32 bytes in hex, that ``manifest.sig`` was made with; None for an unsigned bundle.
    """

    files: Mapping[str, FileEntry]
    models: Mapping[str, ModelEntry]
    notes: tuple[str, ...]
    source_model: str
    source_sha256: str
    calibration_sha256: str
    calibration_samples: int
    target: str
    versions: Mapping[str, str]
    command: tuple[str, ...]
    settings: Mapping[str, Any]
    setting_files: tuple[SettingFile, ...] = ()
    licence: str | None = None
    origin: str | None = None
    signer: str | None = None

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``, the digest of all of it but this line included."""
        data = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        data["manifest_sha256"] = hashlib.sha256(_serialized(data)).hexdigest()
        return _serialized(data)

    @classmethod
    def load(cls, folder: pathlib.Path) -> Manifest:
        """Reads the manifest of a folder.

        Raises:
            ModelError: If it is missing, damaged, of another schema version, or names a file outside the folder.
        """
        path = folder / MANIFEST_FILE
        try:
            if path.stat().st_size > LARGEST_BYTES:
                raise ModelError("the manifest is too large", where=str(path), expected=f"{LARGEST_BYTES} bytes")
            content = path.read_bytes()
        except OSError as error:
            raise ModelError(
                "there is no bundle",
                where=str(folder),
                expected=f"a folder with {MANIFEST_FILE}",
                found=error.strerror or str(error),
                hint="postquant bundle DIR makes one of a result",
            ) from None
        return cls.from_bytes(content, str(path))

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Manifest:
        """Reads the content of a manifest; ``where`` is for error messages.

        Raises:
            ModelError: As for :meth:`load`.
        """
        try:
            data = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ModelError("the manifest is damaged", where=where, found=str(error)) from None
        version = data.pop("schema_version", None) if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            raise ModelError(
                "the manifest has a newer format" if newer else "the manifest has no known format",
                where=where,
                expected=f"schema_version {SCHEMA_VERSION}",
                found="none" if version is None else str(version)[:40],
                hint="install a newer postquant" if newer else None,
            )
        try:
            files = {str(name): FileEntry(**entry) for name, entry in data.pop("files").items()}
            models = {
                str(name): ModelEntry(
                    **{**entry, "functions": tuple(entry["functions"]), "features": tuple(entry["features"])}
                )
                for name, entry in data.pop("models").items()
            }
            data.pop("manifest_sha256")
            notes, command = tuple(data.pop("notes")), tuple(data.pop("command"))
            named = tuple(SettingFile(**entry) for entry in data.pop("setting_files"))
            result = cls(files=files, models=models, notes=notes, command=command, setting_files=named, **data)
            _check(result, content)
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            raise ModelError("the manifest is damaged", where=where, found=str(error)) from None
        return result


def _serialized(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _check(manifest: Manifest, content: bytes) -> None:
    """Raises ValueError if a file entry makes no sense, or the digest is not that of the content."""
    for name, entry in manifest.files.items():
        if not _SHA256.fullmatch(entry.sha256) or type(entry.bytes) is not int or entry.bytes < 0:
            raise ValueError(f"no digest and size of {name}")
        check_path(name)
    if manifest.to_bytes() != content:
        raise ValueError("its digest is not that of its content")


def check_path(name: str) -> None:
    r"""Checks that a path names a file inside its folder and means the same on every system.

    Raises:
        ValueError: If it does not.

    >>> check_path("conformance/0/codes.npz")
    >>> check_path("../model.onnx")
    Traceback (most recent call last):
    ValueError: the path '../model.onnx' is not inside the bundle
    """
    parts = name.split("/")
    bad = any(part in ("", ".", "..") or part.endswith((" ", ".")) for part in parts)
    if bad or len(name) > 512 or any(ord(c) < 32 or c in '\\:*?"<>|' for c in name):
        raise ValueError(f"the path {name[:200]!r} is not inside the bundle")
