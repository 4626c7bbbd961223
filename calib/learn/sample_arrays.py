"""Values for all samples, in memory up to a limit and in a file beyond it: :class:`SampleArrays`.

The file has no name: the system removes it when it is closed or the process ends, however that happens. It is read
piece by piece and never mapped, because mapped pages count as memory of the process.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from postquant.runtime_ops.errors import OutputError

_Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where an array lies in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Spool:
    """Takes arrays: in memory while there is room, in the file from then on.

    Args:
        folder: Existing folder for the file.
        memory: How many bytes may stay in memory, at least 0.
    """

    def __init__(self, folder: str | os.PathLike[str], memory: int) -> None:
        self._folder = os.fspath(folder)
        self._room = memory
        self._file: Any = None
        self._end = 0

    @property
    def spilled(self) -> int:
        """Bytes in the file."""
        return self._end

    def put(self, array: _Array) -> _Array | _Stored:
        """Keeps an array.

        Raises:
            OutputError: If the file cannot be written.
        """
        array = np.ascontiguousarray(array)
        if array.nbytes <= self._room:
            self._room -= array.nbytes
            return array
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, prefix="postquant-block-")  # noqa: SIM115
            self._file.write(array.tobytes())
            self._file.flush()
        except OSError as error:
            raise OutputError(
                "the inputs of a block cannot be set aside",
                where=self._folder,
                found=error.strerror or str(error),
                hint="free space there, or allow more memory (--memory)",
            ) from error
        stored = _Stored(self._end, array.shape, array.dtype)
        self._end += array.nbytes
        return stored

    def get(self, kept: _Array | _Stored) -> _Array:
        """An array again."""
        if isinstance(kept, np.ndarray):
            return kept
        data = bytearray(int(np.prod(kept.shape, dtype=np.int64)) * kept.dtype.itemsize)
        done = 0
        while done < len(data):  # a single read ends at 2 GB
            read = os.preadv(self._file.fileno(), [memoryview(data)[done:]], kept.offset + done)
            if not read:
                raise OutputError("the inputs of a block cannot be read back", where=self._folder)
            done += read
        return np.frombuffer(data, kept.dtype).reshape(kept.shape)

    def close(self) -> None:
        """Removes the file; what lies in it is gone."""
        if self._file is not None:
            self._file.close()
            self._file = None


class SampleArrays:
    """One value for every sample.

    Args:
        spool: Where the arrays are kept.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._kept: list[_Array | _Stored] = []

    def append(self, array: _Array) -> None:
        """Takes the next sample's array."""
        self._kept.append(self._spool.put(array))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._kept)

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of a sample's array, its own batch axis included."""
        return tuple(self._kept[index].shape)

    def take(self, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Arrays of some samples, one behind the other along axis 0.

        Args:
            indices: Samples whose arrays have equal shapes behind axis 0; at least one.

        Returns:
            A tensor that belongs to the caller.
        """
        chosen = [self._spool.get(self._kept[int(index)]) for index in indices]
        if chosen[0].ndim == 0:
            return torch.from_numpy(np.stack(chosen))
        return torch.from_numpy(np.concatenate(chosen, axis=0))
