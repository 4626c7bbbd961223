"""One run per output folder; a dead run leaves nothing locked."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from postquant.pipeline.lock import DirectoryLock
from postquant.runtime_ops.errors import OutputError

_HOLDER = """
import pathlib, sys, time
from postquant.pipeline.lock import DirectoryLock
DirectoryLock(pathlib.Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def _holder(folder: pathlib.Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_told_who_holds_the_folder(tmp_path: pathlib.Path) -> None:
    holder = _holder(tmp_path / "work")
    try:
        with pytest.raises(OutputError, match=f"another run is writing.*process {holder.pid}"):
            DirectoryLock(tmp_path / "work").acquire()
    finally:
        holder.kill()
        holder.communicate()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: pathlib.Path) -> None:
    holder = _holder(tmp_path / "work")
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    lock = DirectoryLock(tmp_path / "work")
    lock.acquire()
    assert lock.path.read_text() == str(os.getpid())
    lock.release()


def test_release_and_removal(tmp_path: pathlib.Path) -> None:
    lock = DirectoryLock(tmp_path / "work")
    lock.acquire()
    with pytest.raises(OutputError):
        DirectoryLock(tmp_path / "work").acquire()
    lock.release()
    again = DirectoryLock(tmp_path / "work")
    again.acquire()
    again.remove_with_folder()
    again.release()
    assert not (tmp_path / "work").exists()


def test_a_removed_lock_file_is_not_mistaken_for_the_current_one(tmp_path: pathlib.Path) -> None:
    first = DirectoryLock(tmp_path / "work")
    first.acquire()
    first.path.unlink()
    second = DirectoryLock(tmp_path / "work")
    second.acquire()  # a new file: the first lock no longer counts
    assert not first._is_current(first._handle or -1)
    assert second._is_current(second._handle or -1)
    first.release()
    second.release()
