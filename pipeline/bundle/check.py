"""Checks a bundle with nothing but what is in it: digests, signature, conformance (:func:`check_files`)."""

from __future__ import annotations

import os
import pathlib

import onnx_ir as ir

from postquant.passes.plan import QuantPlan
from postquant.passes.standard import without_borders
from postquant.pipeline.bundle.manifest import Manifest
from postquant.pipeline.bundle.signature import check_signature
from postquant.pipeline.conformance.compare import compare_onnxruntime
from postquant.pipeline.fingerprint import digest_file
from postquant.pipeline.load import load_model
from postquant.pipeline.output import (
    CONFORMANCE_DIRECTORY,
    ENCODINGS_DIRECTORY,
    MANIFEST_FILE,
    QDQ_FILE,
    SIGNATURE_FILE,
)
from postquant.pipeline.plan_check import differences
from postquant.pipeline.report import CheckReport
from postquant.runtime_ops.errors import VerificationError

_SIGNATURE_BYTES = 64


def check_files(folder: pathlib.Path, public_key: str | None = None) -> tuple[CheckReport, ...]:
    """Digests of all files of a bundle, and its signature.

    Args:
        folder: A folder with a manifest.
        public_key: The key that it must be signed with, in hex; None to accept any, or none.

    Raises:
        ModelError: If the manifest cannot be read.
    """
    manifest = Manifest.load(folder)
    return (_digests(folder, manifest), _signature(folder, manifest, public_key))


def check_conformance(folder: pathlib.Path) -> CheckReport:
    """Runs ``model.qdq.onnx`` on the conformance inputs and compares every integer; for a bundle that has both.

    Raises:
        PostquantError: If the model, the plan or the conformance data cannot be read.
    """
    result = compare_onnxruntime(folder)
    return CheckReport(name="conformance", passed=result.passed, detail=result.summary)


def check_standard(folder: pathlib.Path, float_model: ir.Model, plan: QuantPlan) -> CheckReport:
    """Whether ``model.qdq.onnx`` holds the plan, rounding borders excepted.

    Args:
        folder: A bundle that has it.
        float_model: The float model that the plan is about.
        plan: The plan.

    Raises:
        ModelError: If the file cannot be read.
    """
    try:
        written = load_model(folder / QDQ_FILE, check=False)
        found = next(differences(float_model, written, without_borders(plan)), None)
        detail = "" if found is None else f"{found.where}: {found.what}"
    except VerificationError as error:
        detail = str(error)
    return CheckReport(name=f"{QDQ_FILE} holds the plan", passed=not detail, detail=detail)


def has_conformance(folder: pathlib.Path) -> bool:
    """Whether a folder has what :func:`check_conformance` reads."""
    return (folder / QDQ_FILE).is_file() and (folder / CONFORMANCE_DIRECTORY).is_dir()


def _digests(folder: pathlib.Path, manifest: Manifest) -> CheckReport:
    wrong = []
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            if any((folder / part).is_symlink() for part in _prefixes(name)):
                wrong.append(f"{name} is or lies behind a link")
            elif path.stat().st_size != entry.bytes or digest_file(path) != entry.sha256:
                wrong.append(f"{name} is not the file that the manifest is about")
        except OSError as error:
            wrong.append(f"{name}: {error.strerror or error}")
    for top in (ENCODINGS_DIRECTORY, CONFORMANCE_DIRECTORY):
        for place, folders, files in os.walk(folder / top):
            for name in (*folders, *files):
                path = pathlib.Path(place, name)
                known = path.relative_to(folder).as_posix()
                if known not in manifest.files and (path.is_symlink() or not path.is_dir()):
                    wrong.append(f"{known} is not in the manifest")
    detail = ", ".join(wrong[:5]) if wrong else f"{len(manifest.files)} files"
    return CheckReport(name="files are those of the manifest", passed=not wrong, detail=detail)


def _prefixes(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _signature(folder: pathlib.Path, manifest: Manifest, public_key: str | None) -> CheckReport:
    name, path = "signature", folder / SIGNATURE_FILE
    if manifest.signer is None:
        if path.exists():
            return CheckReport(name=name, passed=False, detail=f"{SIGNATURE_FILE} is there, but nobody signed")
        detail = "not signed" if public_key is None else "the bundle is not signed"
        return CheckReport(name=name, passed=public_key is None, detail=detail)
    if public_key is not None and manifest.signer != public_key:
        return CheckReport(name=name, passed=False, detail=f"signed with another key, {manifest.signer[:64]}")
    try:
        with open(path, "rb") as file:
            signature = file.read(_SIGNATURE_BYTES + 1)
        check_signature(manifest.signer, signature, (folder / MANIFEST_FILE).read_bytes())
    except OSError as error:
        return CheckReport(name=name, passed=False, detail=f"{SIGNATURE_FILE}: {error.strerror or error}")
    except VerificationError as error:
        return CheckReport(name=name, passed=False, detail=str(error))
    trust = "the given key" if public_key is not None else "a key that nobody vouches for; give --public-key"
    return CheckReport(name=name, passed=True, detail=f"made with {trust} ({manifest.signer})")
