"""Samples along the first axis of one array per input: :class:`StackedSource`; several such: :class:`ChainedSource`."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from postquant.calib.input_spec import InputSpec, Sample
from postquant.calib.row_cut import Cut, EntryArray, cutting
from postquant.calib.source import CalibrationSource


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryArray:
    """An array in memory that is read like one in a file.

    Attributes:
        array: The values.
        label: For messages.
    """

    array: npt.NDArray[np.generic]
    label: str

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of its elements."""
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array.shape

    def entries(self, indices: Sequence[int]) -> Iterator[npt.NDArray[np.generic]]:
        """Copies of ``array[i]``."""
        for i in indices:
            yield np.array(self.array[i], order="C")

    def whole(self) -> npt.NDArray[np.generic]:
        """A copy of the array."""
        return np.array(self.array, order="C")


class StackedSource(CalibrationSource):
    """The entries of one array per input, one sample in memory at a time.

    Args:
        arrays: Input name -> array, one for every input.
        inputs: What the model expects.
        bare: Whether an array may be one row without its batch axis.

    Attributes:
        batch: How many samples make one feed of a model with a fixed batch.

    Raises:
        CalibrationError: If dtypes, shapes or numbers of samples do not fit.
    """

    def __init__(self, arrays: Mapping[str, EntryArray], inputs: Sequence[InputSpec], *, bare: bool = False) -> None:
        super().__init__(inputs)
        cut = cutting(arrays, inputs, bare=bare)
        self.batch = cut.batch
        self._arrays = dict(arrays)
        self._cuts = cut.cuts
        self._entries = cut.entries

    def __len__(self) -> int:
        """Number of entries."""
        return self._entries

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :meth:`CalibrationSource.read`."""
        names = [spec.name for spec in self.inputs]
        streams = [self._stream(name, indices) for name in names]
        for arrays in zip(*streams, strict=True):
            yield dict(zip(names, arrays, strict=True))

    def _stream(self, name: str, indices: Sequence[int]) -> Iterator[npt.NDArray[np.generic]]:
        array = self._arrays[name]
        match self._cuts[name]:
            case Cut.BARE:
                yield from (array.whole()[None] for _ in indices)
            case Cut.ROWS:
                yield from (entry[None] for entry in array.entries(indices))
            case Cut.COMPLETE:
                yield from array.entries(indices)


class ChainedSource(CalibrationSource):
    """Several sources one after the other.

    Args:
        sources: At least one, all for the same inputs.
    """

    def __init__(self, sources: Sequence[CalibrationSource]) -> None:
        notes = dict.fromkeys(note for source in sources for note in source.notes)
        super().__init__(sources[0].inputs, notes=tuple(notes))
        self._sources = tuple(sources)
        self._ends = tuple(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        """Number of samples of all sources together."""
        return self._ends[-1]

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :meth:`CalibrationSource.read`."""
        for at, group in itertools.groupby(indices, key=lambda i: bisect.bisect_right(self._ends, i)):
            begin = self._ends[at] - len(self._sources[at])
            yield from self._sources[at].read([i - begin for i in group])
