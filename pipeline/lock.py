"""One run per output folder: :class:`DirectoryLock`, an operating system lock that dies with its process."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys

from postquant.runtime_ops.errors import OutputError

if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        os.lseek(handle, 1 << 20, os.SEEK_SET)  # a byte behind the text, so that others can read who holds it
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class DirectoryLock:
    """The lock file ``<folder>/lock``. The operating system frees it when its process ends, however it ends.

    Args:
        folder: Folder to lock; made when the lock is taken.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._handle: int | None = None
        self.path = folder / "lock"

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            OutputError: If a running process holds it.
        """
        while True:
            self._folder.mkdir(exist_ok=True)
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # the run that held it has just removed the folder
                continue
            if not _try_lock(handle):
                owner = os.read(handle, 32).decode("ascii", "replace").strip()
                os.close(handle)
                raise OutputError(
                    "another run is writing to the output folder",
                    where=str(self._folder.parent),
                    found=f"process {owner}" if owner else None,
                    hint="wait for it to end, or choose another --out",
                )
            if self._is_current(handle):
                break
            os.close(handle)  # locked a file that its last owner has already removed
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        self._handle = handle

    def _is_current(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def remove_with_folder(self) -> None:
        """Removes the folder and everything in it; the lock must be held."""
        if sys.platform == "win32":
            self.release()  # open files cannot be removed there
        shutil.rmtree(self._folder, ignore_errors=True)

    def release(self) -> None:
        """Gives the lock back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
