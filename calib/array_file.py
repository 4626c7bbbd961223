"""Arrays in .npy and .npz files, read entry by entry along their first axis: :class:`StoredArray`.

``numpy.load`` reads a member of an .npz whole, and the pages of a memory map count as resident memory. Here the header
is read once and each entry with one ``readinto``, compressed or not, so that memory holds one entry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.errors import CalibrationError

# What reading a broken .npy or .npz raises, by experiment and from NumPy's and zipfile's sources.
_BROKEN = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
)

# A compressed member is decompressed in pieces of this size: larger ones only cost memory.
_READ_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True, slots=True)
class StoredArray:
    """An array on disk; only its header has been read.

    Attributes:
        path: The .npy or .npz file.
        member: Name of the array in the .npz, None for an .npy file.
        dtype: Of its elements.
        shape: As stored.
        fortran: Whether the first axis varies fastest: entries are then not contiguous and the array is read whole.
    """

    path: pathlib.Path
    member: str | None
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    fortran: bool

    @property
    def label(self) -> str:
        """For messages: the file and the key."""
        return str(self.path) if self.member is None else f"{self.path}, key {self.member!r}"

    def entries(self, indices: Sequence[int]) -> Iterator[npt.NDArray[np.generic]]:
        """The entries ``array[i]`` for increasing indices, each an array of its own.

        Raises:
            CalibrationError: If the file cannot be read (any more).
        """
        with reading(self.path), contextlib.ExitStack() as stack:
            stream = _open(self.path, self.member, stack)
            _header(stream)
            if self.fortran:
                # A Fortran array on disk is its transpose in C order.
                whole = _read(stream, self.dtype, self.shape[::-1]).T
                for i in indices:
                    yield np.ascontiguousarray(whole[i])
                return
            size = math.prod(self.shape[1:]) * self.dtype.itemsize
            position = 0
            for i in indices:
                stream.seek((i - position) * size, io.SEEK_CUR)
                yield _read(stream, self.dtype, self.shape[1:])
                position = i + 1

    def whole(self) -> npt.NDArray[np.generic]:
        """The complete array.

        Raises:
            CalibrationError: If the file cannot be read (any more).
        """
        with reading(self.path), contextlib.ExitStack() as stack:
            stream = _open(self.path, self.member, stack)
            _header(stream)
            if self.fortran:
                return np.ascontiguousarray(_read(stream, self.dtype, self.shape[::-1]).T)
            return _read(stream, self.dtype, self.shape)


def stored_arrays(path: pathlib.Path) -> dict[str | None, StoredArray]:
    """Headers of the arrays of an .npz (by key) or of the one of an .npy file (under None).

    Raises:
        CalibrationError: If the file cannot be read or holds Python objects.
    """
    with reading(path):
        if path.suffix.lower() == ".npy":
            members: list[str | None] = [None]
        else:
            with zipfile.ZipFile(path) as archive:
                members = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        found = {}
        for member in members:
            with contextlib.ExitStack() as stack:
                shape, fortran, dtype = _header(_open(path, member, stack))
            if dtype.hasobject:
                raise CalibrationError(
                    "a calibration array holds Python objects",
                    where=str(path) if member is None else f"{path}, key {member!r}",
                    expected="numbers of one dtype and arrays of one shape",
                )
            found[member] = StoredArray(path, member, dtype, shape, fortran)
        return found


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Turns what a broken file raises into one sentence."""
    try:
        yield
    except _BROKEN as error:
        system = isinstance(error, OSError) and error.strerror
        raise CalibrationError(
            "a calibration file cannot be read",
            where=str(path),
            found=system or str(error) or type(error).__name__,
            hint=None if system else "it is truncated or damaged: copy it again, or save it again with NumPy",
        ) from error


def _open(path: pathlib.Path, member: str | None, stack: contextlib.ExitStack) -> io.BufferedIOBase:
    if member is None:
        return stack.enter_context(path.open("rb"))
    archive = stack.enter_context(zipfile.ZipFile(path))
    return stack.enter_context(archive.open(f"{member}.npy"))  # type: ignore[return-value]


def _header(stream: io.BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, Fortran order and dtype; the stream stands at the data afterwards."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    # Version 3 differs from 2 only in the encoding of the field names of structured dtypes.
    return np.lib.format.read_array_header_2_0(stream)


def _read(stream: io.BufferedIOBase, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    array = np.empty(shape, dtype)
    buffer = array.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done : done + _READ_BYTES])
        if not count:
            raise EOFError(f"{len(buffer) - done} bytes are missing")
        done += count
    return array
