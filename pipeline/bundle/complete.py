"""Makes a bundle of a result folder that is there already, signs it, and packs it: :func:`complete_bundle`."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil

from postquant.passes.plan import write_atomically
from postquant.passes.target import Target, load_target
from postquant.pipeline.bundle.build import CONFORMANCE_SAMPLES, write_bundle
from postquant.pipeline.bundle.check import check_files
from postquant.pipeline.bundle.manifest import Manifest
from postquant.pipeline.bundle.signature import public_key_of, read_private_key, sign
from postquant.pipeline.checkpoint import Checkpoint
from postquant.pipeline.config import QuantConfig
from postquant.pipeline.inputs import open_calibration
from postquant.pipeline.load import load_model
from postquant.pipeline.output import (
    MANIFEST_FILE,
    MODEL_FILE,
    REPORT_FILE,
    SIGNATURE_FILE,
    check_inputs_stay,
    check_own,
    output_error,
    publish,
)
from postquant.pipeline.progress import NullProgress
from postquant.pipeline.report import CheckReport, Report
from postquant.pipeline.verify_folder import check_report_files, random_samples
from postquant.runtime_ops.errors import ConfigError, ModelError, VerificationError


def complete_bundle(
    folder: pathlib.Path,
    *,
    conformance_inputs: object = None,
    config: QuantConfig | None = None,
    licence: str | None = None,
    origin: str | None = None,
    sign_with: pathlib.Path | None = None,
    progress: NullProgress | None = None,
) -> Manifest:
    """Makes a bundle of a result.

    A bundle that is there is kept as it is, but for what is asked for: other conformance inputs, licence, origin, a
    signature. A change of it makes an old signature void; it is removed.

    Args:
        folder: The ``--out`` of ``postquant quantize``.
        conformance_inputs: Samples for the conformance data in any form that calibration takes; the first are used.
            None: those of an older bundle, else seeded random ones in the ranges that calibration saw.
        config: For its ``image``, where the inputs are a folder of images.
        licence: Licence of the model.
        origin: Where the model comes from.
        sign_with: PEM file of an Ed25519 key.
        progress: Who is told.

    Returns:
        The manifest as written.

    Raises:
        PostquantError: If there is no result, a file of it has changed, the inputs do not fit, the key is wrong, or a
            file that is read would be replaced.
    """
    progress = progress or NullProgress()
    key = None if sign_with is None else read_private_key(sign_with)
    given = [p for p in (sign_with, conformance_inputs) if isinstance(p, (str, os.PathLike))]
    check_inputs_stay(folder, map(pathlib.Path, given))
    if not (folder / REPORT_FILE).is_file():
        raise ModelError(
            "there is no result to make a bundle of",
            where=str(folder),
            expected=f"a folder with {REPORT_FILE}",
            hint="give the --out of a finished `postquant quantize`",
        )
    try:
        if conformance_inputs is not None or not (folder / MANIFEST_FILE).exists():
            progress.stage("bundle")
            _write(folder, conformance_inputs, config, progress)
        manifest = Manifest.load(folder)
        _refuse_changed(folder, check_files(folder)[0])
        changed = dataclasses.replace(manifest, licence=licence or manifest.licence, origin=origin or manifest.origin)
        if key is not None:
            changed = dataclasses.replace(changed, signer=public_key_of(key))
        elif changed != manifest:
            changed = dataclasses.replace(changed, signer=None)
        content = changed.to_bytes()
        write_atomically(folder / MANIFEST_FILE, content)
        if key is not None:
            write_atomically(folder / SIGNATURE_FILE, sign(key, content))
        elif changed.signer is None:
            (folder / SIGNATURE_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise output_error(error, folder) from None
    return changed


def _write(
    folder: pathlib.Path, conformance_inputs: object, config: QuantConfig | None, progress: NullProgress
) -> None:
    """Makes the bundle beside the folder's files and moves it to its place when it is whole."""
    check_own(folder)
    report = Report.load(folder / REPORT_FILE)
    _refuse_changed(folder, check_report_files(folder, report))
    old = Manifest.load(folder) if (folder / MANIFEST_FILE).exists() else None
    if conformance_inputs is None:
        samples, source = list(random_samples(report.inputs, int(report.settings.get("seed", 0)))), "seeded random"
    else:
        model = load_model(folder / MODEL_FILE, check=False)
        opened = open_calibration(conformance_inputs, model, config or QuantConfig())
        samples, source = list(opened.take(CONFORMANCE_SAMPLES)), "given"
    with Checkpoint(folder, "", progress.say) as checkpoint:
        staging = checkpoint.staging()
        for name in (*report.files, REPORT_FILE):
            _link(folder / name, staging / name)
        write_bundle(
            staging,
            samples,
            _target(report),
            source=source,
            licence=None if old is None else old.licence,
            origin=None if old is None else old.origin,
        )
        publish(staging, folder)


def _refuse_changed(folder: pathlib.Path, check: CheckReport) -> None:
    """A bundle speaks for its files: changed ones must not get new digests."""
    if not check.passed:
        raise VerificationError("files of the result have changed", where=str(folder), found=check.detail)


def _target(report: Report) -> Target:
    """The target of a result; one from a file that is not here lends its name to the default one."""
    try:
        return load_target(report.target)
    except ConfigError:
        return dataclasses.replace(load_target("onnxruntime"), name=report.target)


def _link(source: pathlib.Path, place: pathlib.Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)
