"""Checks a result folder again, with nothing but what is in it: :func:`verify_folder`."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from postquant.passes.plan import QuantPlan
from postquant.pipeline.bundle.archive import extract_archive
from postquant.pipeline.bundle.check import check_conformance, check_files, check_standard, has_conformance
from postquant.pipeline.config import QuantConfig
from postquant.pipeline.conformance.compare import compare_outputs
from postquant.pipeline.conformance.result import Result
from postquant.pipeline.fingerprint import digest_file
from postquant.pipeline.inputs import open_calibration
from postquant.pipeline.load import load_model
from postquant.pipeline.output import MANIFEST_FILE, MODEL_FILE, PLAN_FILE, REPORT_FILE
from postquant.pipeline.progress import NullProgress
from postquant.pipeline.recover import recover_float_model
from postquant.pipeline.report import CheckReport, InputReport, Report
from postquant.pipeline.verify import verify_model
from postquant.runtime_ops.errors import ModelError, VerificationError

_RANDOM_SAMPLES = 2


def verify_folder(
    folder: pathlib.Path,
    data: object = None,
    *,
    config: QuantConfig | None = None,
    progress: NullProgress | None = None,
    public_key: str | None = None,
) -> tuple[CheckReport, ...]:
    """Verifies a result: digests, then everything of :func:`postquant.pipeline.verify.verify_model`.

    Args:
        folder: A folder with ``model.onnx``, ``plan.safetensors`` and ``report.json``, or a bundle, in which the
            manifest, the signature and the conformance data are checked too.
        data: Samples, in any form that calibration takes; None for seeded random ones in the recorded ranges.
        config: For its ``samples``, ``image`` and ``custom_ops``.
        progress: Who is told.
        public_key: Ed25519 key in hex that a bundle must be signed with; None to accept any, or none.

    Returns:
        Every check with its outcome. Nothing else is looked at when the digests are wrong.

    Raises:
        ModelError: If the report, the plan or the model cannot be read.
        CalibrationError: If the data do not fit the model.
    """
    progress = progress or NullProgress()
    if not (folder / REPORT_FILE).is_file():
        raise ModelError(
            "there is no result to verify",
            where=str(folder),
            expected=f"a folder with {MODEL_FILE}, {PLAN_FILE} and {REPORT_FILE}",
            hint="give the --out of a finished `postquant quantize`",
        )
    progress.stage("digests")
    bundled = public_key is not None or (folder / MANIFEST_FILE).exists()
    first = check_files(folder, public_key) if bundled else ()
    if not all(check.passed for check in first):
        return first
    report = Report.load(folder / REPORT_FILE)
    digests = (*first, check_report_files(folder, report))
    if not digests[-1].passed:
        return digests
    plan = QuantPlan.load(folder / PLAN_FILE)
    model = load_model(folder / MODEL_FILE, check=False)
    progress.stage("verify")
    if data is None:
        seed = int(report.settings.get("seed", 0))
        samples: Sequence[dict[str, npt.NDArray[np.generic]]] = list(random_samples(report.inputs, seed))
    else:
        source = open_calibration(data, model, config or QuantConfig())
        samples = list(source.take(QuantConfig().verify_samples))
    try:
        recovered = recover_float_model(model, plan)
    except VerificationError as error:
        return (*digests, CheckReport(name="the file holds the plan", passed=False, detail=str(error)))
    libraries = () if config is None else config.custom_ops
    verification = verify_model(recovered, folder / MODEL_FILE, plan, samples, strict=False, custom_ops=libraries)
    checks = (*digests, *verification.checks)
    if not (bundled and has_conformance(folder)):
        return checks
    return (*checks, check_standard(folder, recovered, plan), check_conformance(folder))


def verify_archive(
    path: pathlib.Path,
    data: object = None,
    *,
    config: QuantConfig | None = None,
    progress: NullProgress | None = None,
    public_key: str | None = None,
) -> tuple[CheckReport, ...]:
    """Verifies a bundle in one file, in a temporary folder; arguments and result as of :func:`verify_folder`.

    Raises:
        ModelError: If the archive is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="postquant-") as temporary:
        folder = pathlib.Path(temporary) / "bundle"
        folder.mkdir()
        extract_archive(path, folder)
        archive = CheckReport(name="the archive is that of its files", passed=True, detail=path.name)
        return (archive, *verify_folder(folder, data, config=config, progress=progress, public_key=public_key))


def check_report_files(folder: pathlib.Path, report: Report) -> CheckReport:
    """Whether the files of a result have the digests that its report says."""
    wrong = []
    for name, digest in report.files.items():
        try:
            if digest_file(folder / name) != digest:
                wrong.append(f"{name} is not the file that the report is about")
        except OSError as error:
            wrong.append(f"{name}: {error.strerror or error}")
    unknown = [name for name in (MODEL_FILE, PLAN_FILE) if name not in report.files]
    wrong += [f"the report has no digest of {name}" for name in unknown]
    detail = ", ".join(wrong) if wrong else ", ".join(report.files)
    return CheckReport(name="files are those of the report", passed=not wrong, detail=detail)


def random_samples(inputs: Sequence[InputReport], seed: int) -> Iterator[dict[str, npt.NDArray[np.generic]]]:
    """Seeded random samples in the ranges that calibration saw.

    Raises:
        ModelError: If the report holds no ranges.
    """
    rng = np.random.default_rng(seed)
    for _ in range(_RANDOM_SAMPLES):
        sample: dict[str, npt.NDArray[np.generic]] = {}
        for spec in inputs:
            if spec.low is None or spec.high is None:
                raise ModelError("the report holds no range of an input", where=spec.name, hint="give --data")
            dtype = np.dtype(spec.dtype)
            if dtype.kind == "f":
                sample[spec.name] = rng.uniform(spec.low, spec.high, spec.sample_shape).astype(dtype)
            else:
                integers = rng.integers(int(spec.low), int(spec.high), spec.sample_shape, endpoint=True)
                sample[spec.name] = integers.astype(dtype)
        yield sample


def compared_with(bundle: pathlib.Path, outputs: pathlib.Path) -> Result:
    """Compares a receiver's arrays with a bundle whose files are those of its manifest.

    Args:
        bundle: A folder or an archive.
        outputs: The receiver's folder.

    Raises:
        VerificationError: If a file of the bundle has changed.
        ModelError: If the bundle or an array is damaged, or nothing in ``outputs`` belongs to the bundle.
    """
    with contextlib.ExitStack() as stack:
        folder = bundle
        if bundle.is_file():
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="postquant-"))) / "bundle"
            folder.mkdir()
            extract_archive(bundle, folder)
        for check in check_files(folder):
            if not check.passed:
                raise VerificationError("the bundle has changed", where=str(bundle), found=check.detail)
        return compare_outputs(folder, outputs)
