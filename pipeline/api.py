"""``postquant.quantize``: a model and calibration data in; a quantized model, its plan and a report out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator

import onnx_ir as ir

from postquant.passes.plan import QuantPlan, write_atomically
from postquant.passes.session import custom_operators
from postquant.passes.target import Target, load_target
from postquant.pipeline.broken_weights import broken_weights_told
from postquant.pipeline.budget_report import with_budget
from postquant.pipeline.bundle.build import CALIBRATION_DATA, CONFORMANCE_SAMPLES, write_bundle
from postquant.pipeline.bundle.manifest import Manifest
from postquant.pipeline.checkpoint import Checkpoint
from postquant.pipeline.config import QuantConfig
from postquant.pipeline.encodings.read import read_encodings
from postquant.pipeline.fingerprint import digest_file, digest_model, fingerprint, package_versions
from postquant.pipeline.html.folder import WHAT_IS_MISSING, folder_page, pages_available, write_page
from postquant.pipeline.inputs import ModelInput, external_files, model_file, open_calibration, read_data
from postquant.pipeline.job import Job, Outcome
from postquant.pipeline.learning import check_learning
from postquant.pipeline.load import load_model, save_model
from postquant.pipeline.output import (
    MANIFEST_FILE,
    MODEL_FILE,
    PAGE_FILE,
    PLAN_FILE,
    REPORT_FILE,
    RUN_FILE,
    SIGNATURE_FILE,
    STATISTICS_FILE,
    check_inputs_stay,
    check_own,
    check_space,
    is_disk_full,
    output_error,
    output_folder,
    publish,
    put_aside,
)
from postquant.pipeline.placement import check_widths
from postquant.pipeline.progress import NullProgress
from postquant.pipeline.report import Report, RunStats
from postquant.pipeline.run_costs import StageClock
from postquant.pipeline.run_stats import StopWatch
from postquant.pipeline.setting_files import setting_files
from postquant.pipeline.stages import run_pipeline, verification_samples
from postquant.runtime_ops.errors import ConfigError, VerificationError

# A larger model is bundled only when that is asked for.
_LARGEST_BUNDLED = 256 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizationResult:
    """A verified quantized model.

    Attributes:
        plan: Every decision that the model was written from.
        report: What was done, and how good the result is.
        stats: What the run cost.
        folder: Where ``model.onnx``, ``plan.safetensors`` and ``report.json`` are: ``out``, or a temporary folder
            that is there as long as this object.
    """

    plan: QuantPlan
    report: Report
    stats: RunStats
    folder: pathlib.Path

    @functools.cached_property
    def model(self) -> ir.Model:
        """The model as it was written; weights in external data are read from ``folder`` when somebody wants them."""
        return load_model(self.folder / MODEL_FILE, check=False)

    def save(self, out: str | os.PathLike[str]) -> None:
        """Writes the result, with its bundle if it has one, to another folder.

        Raises:
            OutputError: If the folder cannot be written.
        """
        target = pathlib.Path(out)
        with output_folder(target), _disk_full_told(target), Checkpoint(target, "", NullProgress().say) as checkpoint:
            staging = checkpoint.staging()
            for name in _files_of(self):
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, staging / name)
            publish(staging, target)


def _files_of(result: QuantizationResult) -> list[str]:
    """Names of the files of a result; a later signature is part of it."""
    if not (result.folder / MANIFEST_FILE).is_file():
        return [*result.report.files, REPORT_FILE]
    manifest = Manifest.load(result.folder)
    return [*manifest.files, MANIFEST_FILE, *([] if manifest.signer is None else [SIGNATURE_FILE])]


def quantize(
    model: ModelInput,
    calibration: object,
    config: QuantConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    progress: NullProgress | None = None,
    target: Target | None = None,
) -> QuantizationResult:
    """Quantizes a model.

    Args:
        model: Path, bytes, ``onnx.ModelProto`` or ``onnx_ir.Model``; never changed.
        calibration: Path of a ``.npz`` or ``.npy`` file or of a folder of them or of images; an iterable of feeds
            (input name -> array); an onnxruntime ``CalibrationDataReader``; or a ``CalibrationSource``.
        config: Settings; the defaults where None.
        out: Folder for the result. A run that was interrupted goes on where it stopped when it is started again with
            the same arguments and the same folder.
        progress: Who is told what happens; nobody by default.
        target: A target to use instead of ``config.target``.

    Returns:
        The result; it has passed its verification.

    Raises:
        PostquantError: If the model, the data, a setting or the folder is wrong; the text is one sentence.
        VerificationError: If the written model does not do what the plan says. With ``out``, the files are in
            ``out/failed-verification``.
    """
    watch = StopWatch()
    config = config or QuantConfig()
    target = target or load_target(config.target)
    clock = StageClock(progress or NullProgress())
    _check_libraries(config)
    check_learning(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(custom_operators(config.custom_ops))
        folder = None
        if out is not None:
            folder = pathlib.Path(out)
            stack.enter_context(_disk_full_told(folder))
            stack.enter_context(output_folder(folder))
        path = stack.enter_context(model_file(model))
        clock.stage("read model")
        job = open_job(path, calibration, config, target, clock, folder)
        with broken_weights_told(job.model):
            plan, report, folder = _run_in_memory(job, path) if folder is None else _run_into(folder, job, path)
        stats = watch.read()
        clock.read(stats).save(folder / RUN_FILE)
    result = QuantizationResult(plan, report, stats, folder)
    if out is None:
        weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
    return result


def _check_libraries(config: QuantConfig) -> None:
    for library in config.custom_ops:
        if not pathlib.Path(library).is_file():
            raise ConfigError("there is no such library of custom operators", where="custom_ops", found=library)


def open_job(
    path: pathlib.Path,
    calibration: object,
    config: QuantConfig,
    target: Target,
    progress: NullProgress,
    folder: pathlib.Path | None,
) -> Job:
    """Reads and checks everything that a run depends on; the folder, if there is one, is checked for it.

    Raises:
        PostquantError: If the model or the data cannot be used, or the folder has no room or holds the model.
    """
    check_widths(config, target)
    model = load_model(path)
    external = external_files(model)
    size = sum(file.stat().st_size for file in (path, *external))
    named = setting_files(config)
    if folder is not None:
        data = [pathlib.Path(calibration)] if isinstance(calibration, (str, os.PathLike)) else []
        check_inputs_stay(folder, (path, *external, *(file.path for file in named), *data))
        if _bundled(config, size):
            check_own(folder)
        check_space(folder, size // 8)  # two-bit weights stored as such would take that much
    encodings = None if config.encodings is None else read_encodings(pathlib.Path(config.encodings))
    source = open_calibration(calibration, model, config)
    data_digest, inputs = read_data(source, progress)
    report = Report(
        model=path.name,
        model_sha256=digest_model(path, external),
        data_sha256=data_digest,
        samples=len(source),
        target=target.name,
        settings=config.to_json(),
        setting_files=tuple(file.digested() for file in named),
        versions=package_versions(),
        size_before=size,
        inputs=inputs,
        notes=source.notes,
    )
    return Job(model, source, config, target, report, progress=progress, encodings=encodings)


def _bundled(config: QuantConfig, size: int) -> bool:
    """Whether a bundle is written; of a large model only when it is asked for: it has the weights three times."""
    return size < _LARGEST_BUNDLED if config.bundle is None else config.bundle


def _run_into(folder: pathlib.Path, job: Job, path: pathlib.Path) -> tuple[QuantPlan, Report, pathlib.Path]:
    """Runs with checkpoints, and publishes the result or puts it aside."""
    key = fingerprint(job.report.model_sha256, job.report.data_sha256, job.config, job.target)
    with Checkpoint(folder, key, job.progress.say) as checkpoint:
        outcome = _with_peer(run_pipeline(dataclasses.replace(job, checkpoint=checkpoint)), job, path)
        staging = checkpoint.staging()
        report = _write(outcome, staging, job.progress)
        if outcome.failure is None:
            if _bundled(job.config, job.report.size_before):
                job.progress.stage("bundle")
                picked = job.source.subset(CONFORMANCE_SAMPLES, job.config.seed)
                write_bundle(staging, list(picked), job.target, source=CALIBRATION_DATA)
            elif job.config.bundle is None:
                job.progress.say("the model is large: `postquant bundle` writes the hand-over bundle")
            publish(staging, folder)
            return outcome.plan, report, folder
        aside = put_aside(staging, folder, str(outcome.failure))
    failure = outcome.failure
    raise VerificationError(
        failure.what,
        where=failure.where,
        expected=failure.expected,
        found=failure.found,
        hint=f"the files are kept aside in {aside}",
    )


def _run_in_memory(job: Job, path: pathlib.Path) -> tuple[QuantPlan, Report, pathlib.Path]:
    """Runs without checkpoints; the result goes to a temporary folder."""
    outcome = _with_peer(run_pipeline(job), job, path)
    if outcome.failure is not None:
        raise outcome.failure
    folder = pathlib.Path(tempfile.mkdtemp(prefix="postquant."))
    return outcome.plan, _write(outcome, folder, job.progress), folder


def _with_peer(outcome: Outcome, job: Job, path: pathlib.Path) -> Outcome:
    """The outcome with onnxruntime's quantizer beside it, where that is asked for."""
    if outcome.failure is not None or not job.config.compare_onnxruntime:
        return outcome
    from postquant.pipeline.peer import measure_peer  # onnxruntime's quantizer takes a second to import

    job.progress.stage("compare with onnxruntime's quantizer")
    samples = verification_samples(job.source, job.config)
    peer = measure_peer(path, job.source, samples, wbits=job.config.wbits, abits=job.config.abits)
    return dataclasses.replace(outcome, report=dataclasses.replace(outcome.report, peer=peer))


def _write(outcome: Outcome, folder: pathlib.Path, progress: NullProgress) -> Report:
    """Writes model, plan, statistics, report and page; returns the report as written."""
    save_model(outcome.model, folder / MODEL_FILE)
    size = sum(path.stat().st_size for path in folder.iterdir())
    outcome.plan.save(folder / PLAN_FILE)
    write_atomically(folder / STATISTICS_FILE, outcome.statistics.to_bytes())
    digests = {path.name: digest_file(path) for path in sorted(folder.iterdir())}
    report = with_budget(dataclasses.replace(outcome.report, size_after=size, files=digests))
    write_atomically(folder / REPORT_FILE, report.to_bytes())
    if pages_available():
        write_page(folder_page(folder), folder / PAGE_FILE)
        report = dataclasses.replace(report, files={**digests, PAGE_FILE: digest_file(folder / PAGE_FILE)})
        write_atomically(folder / REPORT_FILE, report.to_bytes())
    else:
        progress.say(f"{PAGE_FILE} is left out: {WHAT_IS_MISSING}")
    return Report.load(folder / REPORT_FILE)


@contextlib.contextmanager
def _disk_full_told(folder: pathlib.Path) -> Iterator[None]:
    """Says in one sentence that the disk is full, whoever notices it."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise output_error(error, folder) from error
        raise
