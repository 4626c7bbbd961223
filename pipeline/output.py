"""The output folder: checked before any work, changed only when a whole result is there.

A result is prepared in a staging folder on the same file system and moved file by file. ``report.json`` is removed
first and comes last, so a folder with a report holds a complete result.
"""

from __future__ import annotations

import contextlib
import errno
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
REPORT_FILE = "report.json"
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
    """Checks that the result will not replace a file that the run reads.

    Raises:
        OutputError: If it would.
    """
    inputs = tuple(inputs)
    for name in (MODEL_FILE, DATA_FILE, PLAN_FILE, REPORT_FILE):
        for path in inputs:
            if (out / name).exists() and path.exists() and os.path.samefile(out / name, path):
                raise OutputError(
                    "the result would replace a file that the run reads", where=str(path), hint="choose another --out"
                )


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
    (out / REPORT_FILE).unlink(missing_ok=True)
    names = [p.name for p in sorted(staging.iterdir())]
    for name in sorted(names, key=lambda n: (n == REPORT_FILE, n == MODEL_FILE, n)):
        os.replace(staging / name, out / name)
    if DATA_FILE not in names:
        (out / DATA_FILE).unlink(missing_ok=True)
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


def _sync(folder: pathlib.Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
