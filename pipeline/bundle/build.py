"""Completes a result folder to a bundle: :func:`write_bundle`.

Everything is made from what is in the folder and a few samples: the model in standard operators, vendors' encodings,
conformance data, the settings, a page for the receiver, and last the manifest, which has the digests of all files.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.free_memory import give_back_memory, release_weights
from postquant.passes.plan import QuantPlan, write_atomically
from postquant.passes.standard import standard_model, without_borders
from postquant.passes.target import Target
from postquant.pipeline.bundle.check import check_standard
from postquant.pipeline.bundle.manifest import FileEntry, Manifest, ModelEntry
from postquant.pipeline.bundle.needs import model_needs
from postquant.pipeline.bundle.receiver_readme import receiver_readme
from postquant.pipeline.bundle.settings_file import settings_toml
from postquant.pipeline.conformance.expected import Conformance
from postquant.pipeline.conformance.record import write_conformance
from postquant.pipeline.encodings.formats import write_encodings
from postquant.pipeline.fingerprint import digest_file
from postquant.pipeline.load import load_model, save_model
from postquant.pipeline.output import (
    BUNDLE_NAMES,
    CONFORMANCE_DIRECTORY,
    DATA_FILE,
    ENCODINGS_DIRECTORY,
    MANIFEST_FILE,
    MODEL_FILE,
    PLAN_FILE,
    QDQ_FILE,
    README_FILE,
    REPORT_FILE,
    SETTINGS_FILE,
    SIGNATURE_FILE,
)
from postquant.pipeline.recover import recover_float_model
from postquant.pipeline.report import CheckReport, Report
from postquant.runtime_ops.errors import VerificationError

Feed = Mapping[str, npt.NDArray[Any]]

# Samples of the conformance data: two show more than one, and more only cost space.
CONFORMANCE_SAMPLES = 2
# What the index says about samples of a run.
CALIBRATION_DATA = "calibration data"
# Keys of a model's own metadata that say what the manifest has a field for.
_LICENCE_KEYS = ("license", "licence")
_ORIGIN_KEYS = ("origin", "source", "url", "homepage", "author")


def write_bundle(
    folder: pathlib.Path,
    samples: Sequence[Feed],
    target: Target,
    *,
    source: str,
    licence: str | None = None,
    origin: str | None = None,
) -> Manifest:
    """Adds to a result folder what makes a bundle of it.

    Args:
        folder: A folder with the model, the plan and the report, and nothing of an older bundle; nobody reads it yet.
        samples: Feeds for the conformance data, at least one.
        target: What the plan was placed for.
        source: Where the samples come from, for people.
        licence: Licence of the model; None for what the model's metadata say.
        origin: Where the model comes from; None for what the model's metadata say.

    Returns:
        The manifest as written.

    Raises:
        PostquantError: If the folder holds no result, or cannot be written.
    """
    report = Report.load(folder / REPORT_FILE)
    model, plan = load_model(folder / MODEL_FILE, check=False), QuantPlan.load(folder / PLAN_FILE)
    notes: list[str] = []
    models = {MODEL_FILE: model_needs(model)}
    conformance = None
    standard = _write_standard(folder, model, plan, samples[:CONFORMANCE_SAMPLES], source)
    notes += standard.notes
    if standard.needs is not None:
        models[QDQ_FILE] = standard.needs
        conformance = standard.conformance
    _let_go(model)
    encodings = folder / ENCODINGS_DIRECTORY
    encodings.mkdir()
    write_encodings(encodings, recover_float_model(model, plan), plan, target)
    write_atomically(folder / SETTINGS_FILE, settings_toml(report.settings))
    write_atomically(folder / README_FILE, receiver_readme(report, models, conformance, notes))
    manifest = Manifest(
        files=_digests(folder, report),
        models=models,
        notes=tuple(notes),
        source_model=report.model,
        source_sha256=report.model_sha256,
        calibration_sha256=report.data_sha256,
        calibration_samples=report.samples,
        target=report.target,
        versions=dict(report.versions),
        command=("postquant", "quantize", "MODEL", "--calib", "DATA", "--out", "DIR", "--config", SETTINGS_FILE),
        settings=dict(report.settings),
        setting_files=report.setting_files,
        licence=licence or _metadata(model, _LICENCE_KEYS),
        origin=origin or _metadata(model, _ORIGIN_KEYS),
    )
    write_atomically(folder / MANIFEST_FILE, manifest.to_bytes())
    return manifest


@dataclasses.dataclass(frozen=True)
class _Standard:
    """The model in standard operators: what it needs (None where it was left out), its conformance data, notes."""

    needs: ModelEntry | None
    conformance: Conformance | None
    notes: list[str]


def _write_standard(
    folder: pathlib.Path, model: ir.Model, plan: QuantPlan, samples: Sequence[Feed], source: str
) -> _Standard:
    """Writes ``model.qdq.onnx`` and ``conformance/``; a model that does not hold what it should is left out."""
    path = folder / QDQ_FILE
    try:
        standard = standard_model(model)
        save_model(standard.model, path)
        written, plain = load_model(path, check=False), without_borders(plan)
        recovered = recover_float_model(model, plan)
        _let_go(model, written)
        _require(check_standard(folder, recovered, plan))
        _let_go(model, written)
        needs = model_needs(written)
        conformance = write_conformance(folder / CONFORMANCE_DIRECTORY, written, recovered, plain, samples, source)
    except VerificationError as error:
        for name in (QDQ_FILE, f"{QDQ_FILE}.data"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / CONFORMANCE_DIRECTORY, ignore_errors=True)
        return _Standard(None, None, [f"{QDQ_FILE} and {CONFORMANCE_DIRECTORY}/ are left out: {error}"])
    return _Standard(needs, conformance, [f"{QDQ_FILE} differs from {MODEL_FILE}: {c}" for c in standard.changes])


def _let_go(*models: ir.Model) -> None:
    """Gives back the memory of a finished step: of a large model the next one needs as much."""
    for model in models:
        release_weights(model)
    give_back_memory()


def _require(check: CheckReport) -> None:
    if not check.passed:
        raise VerificationError("a check of the bundle failed", where=check.name, found=check.detail)


def _digests(folder: pathlib.Path, report: Report) -> dict[str, FileEntry]:
    """Digest and size of every file of the bundle; manifest and signature are not among them."""
    names = {*report.files, MODEL_FILE, DATA_FILE, PLAN_FILE, REPORT_FILE, *BUNDLE_NAMES} - {
        MANIFEST_FILE,
        SIGNATURE_FILE,
    }
    found = {}
    for top in sorted(names):
        place = folder / top
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                entry = FileEntry(sha256=digest_file(path), bytes=path.stat().st_size)
                found[path.relative_to(folder).as_posix()] = entry
    return dict(sorted(found.items()))


def _metadata(model: ir.Model, keys: Sequence[str]) -> str | None:
    known = {key.lower(): value for key, value in model.metadata_props.items()}
    return next((known[key] for key in keys if known.get(key)), None)
