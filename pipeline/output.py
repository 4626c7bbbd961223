"""The output folder: checked before any work, changed only when a whole result is there.

A result is prepared in a staging folder on the same file system and moved file by file. ``report.json`` is removed
first and comes last, so a folder with a report holds a complete result.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator

from postquant.runtime_ops.errors import OutputError

WORK_DIRECTORY = ".postquant-work"
FAILED_DIRECTORY = "failed-verification"
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
PLAN_FILE = "plan.safetensors"
STATISTICS_FILE = "statistics.json"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
# Time and memory: written behind a result, part of none.
RUN_FILE = "run.json"
QDQ_FILE = "model.qdq.onnx"
SETTINGS_FILE = "quant.toml"
ENCODINGS_DIRECTORY = "encodings"
CONFORMANCE_DIRECTORY = "conformance"
README_FILE = "README.md"
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.sig"
# What a bundle adds to the three files of a result; an older bundle's are replaced or removed.
BUNDLE_NAMES = (
    QDQ_FILE,
    f"{QDQ_FILE}.data",
    SETTINGS_FILE,
    ENCODINGS_DIRECTORY,
    CONFORMANCE_DIRECTORY,
    README_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
)
# What a run replaces or removes besides.
_RESULT_NAMES = (
    MODEL_FILE,
    DATA_FILE,
    PLAN_FILE,
    STATISTICS_FILE,
    REPORT_FILE,
    PAGE_FILE,
    RUN_FILE,
    FAILED_DIRECTORY,
    WORK_DIRECTORY,
)
_README = "README.txt"
_PROBE_BYTES = 1 << 16


@contextlib.contextmanager
def output_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes the output folder, and removes it again if it was made here and is empty in the end.

    Finds out by writing whether a result can be written there.

    Raises:
        OutputError: If it is no folder, not writable, or full.
    """
    made = not os.path.exists(out)  # pathlib's raises where a parent may not be looked into
    try:
        _make(out)
        yield out
    finally:
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()


def _make(out: pathlib.Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"\0" * _PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise OutputError("the output folder is a file", where=str(out), hint="choose another --out") from None
    except OSError as error:
        raise output_error(error, out) from None


def check_space(out: pathlib.Path, needed_bytes: int) -> None:
    """Checks that the disk has room for a result.

    Raises:
        OutputError: If it has not.
    """
    free = shutil.disk_usage(out).free
    if free < needed_bytes:
        raise OutputError(
            "the disk of the output folder is too full",
            where=str(out),
            expected=f"at least {needed_bytes / 1e6:.1f} MB free",
            found=f"{free / 1e6:.1f} MB",
        )


def check_inputs_stay(out: pathlib.Path, inputs: Iterable[pathlib.Path]) -> None:
    """Checks that the result will not replace a file that the run reads, nor remove a folder with one in it.

    Raises:
        OutputError: If it would.
    """
    for path in inputs:
        for name in (*_RESULT_NAMES, *BUNDLE_NAMES):
            if _is_within(path, out / name):
                raise OutputError(
                    "the result would replace a file that the run reads", where=str(path), hint="choose another --out"
                )


def _is_within(path: pathlib.Path, place: pathlib.Path) -> bool:
    """Whether a path is a file, or lies in a folder, directly or through links."""
    if not (place.exists() and path.exists()):
        return False
    return os.path.samefile(place, path) or any(
        p.is_relative_to(q) for p, q in ((path.absolute(), place.absolute()), (path.resolve(), place.resolve()))
    )


def check_own(out: pathlib.Path) -> None:
    """Checks that the files that a bundle would replace in the output folder are those of an older bundle.

    Raises:
        OutputError: If one is not: somebody's own README.md, for example.
    """
    own = _bundled(out)
    for name in BUNDLE_NAMES:
        if os.path.lexists(out / name) and name not in own:
            raise OutputError(
                "the bundle would replace a file that is not of an older bundle",
                where=str(out / name),
                hint="choose another --out, or leave the bundle out with --no-bundle",
            )


def _bundled(out: pathlib.Path) -> set[str]:
    """The names at the top of a folder that its manifest speaks of, and the manifest; empty without one."""
    try:
        data = json.loads((out / MANIFEST_FILE).read_bytes())
        listed = {str(name).split("/")[0] for name in data["files"]} & set(BUNDLE_NAMES)
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return listed | {MANIFEST_FILE, SIGNATURE_FILE}


def is_disk_full(error: OSError) -> bool:
    """Whether there is no room left, on the disk or in the user's quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def output_error(error: OSError, out: pathlib.Path) -> OutputError:
    """An operating system error on the output folder in one sentence."""
    where = str(out)
    if is_disk_full(error):
        return OutputError(
            "the disk of the output folder is full", where=where, hint="free some space and run the same command again"
        )
    reason = {
        errno.EACCES: "no permission",
        errno.EPERM: "no permission",
        errno.EROFS: "a read-only file system",
        errno.ENOTDIR: "a file where a folder is needed",
    }.get(error.errno or 0, error.strerror or str(error))
    return OutputError("the output folder cannot be written", where=where, found=reason, hint="choose another --out")


def publish(staging: pathlib.Path, out: pathlib.Path) -> None:
    """Moves a verified result to its place; replaces an earlier result and an earlier failure.

    Raises:
        OSError: If a file cannot be moved.
    """
    old = _bundled(out)
    (out / REPORT_FILE).unlink(missing_ok=True)
    names = [p.name for p in sorted(staging.iterdir())]
    # The new manifest first: whatever happens, the next run knows which files are a bundle's.
    for name in sorted(names, key=lambda n: (n == REPORT_FILE, n == MODEL_FILE, n != MANIFEST_FILE, n)):
        if (staging / name).is_dir():
            _remove(out / name)
        os.replace(staging / name, out / name)
    for name in (DATA_FILE, PAGE_FILE, RUN_FILE):
        if name not in names:
            (out / name).unlink(missing_ok=True)
    for name in old.difference(names):
        _remove(out / name)
    failed = out / FAILED_DIRECTORY
    if (failed / _README).exists():
        shutil.rmtree(failed)
    _sync(out)


def put_aside(staging: pathlib.Path, out: pathlib.Path, reason: str) -> pathlib.Path:
    """Moves a result that failed its verification to ``out/failed-verification``; an earlier result stays.

    Returns:
        Where the files are.

    Raises:
        OSError: If a file cannot be moved.
    """
    failed = out / FAILED_DIRECTORY
    (staging / _README).write_text(
        f"Do not use these files: the verification of the quantized model failed.\n{reason}\n", encoding="utf-8"
    )
    if failed.exists():
        shutil.rmtree(failed)
    os.replace(staging, failed)
    _sync(out)
    return failed


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: pathlib.Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
