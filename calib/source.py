"""Calibration data as a re-iterable stream of samples: :class:`CalibrationSource`.

A sample is one feed of the model: a dict from input name to array, batch axis included. Sources hold one sample at a
time in memory; whatever they come from, the same samples have the same digest.
"""

from __future__ import annotations

import abc
import hashlib
import struct
from collections.abc import Iterator, Sequence

import numpy as np

from postquant.calib.input_spec import InputSpec, Sample, check_sample


class CalibrationSource(abc.ABC):
    """Samples that can be iterated any number of times, always the same ones in the same order.

    A subclass implements ``__len__`` and :meth:`read`. The samples fit the model's inputs and hold no NaN or
    infinity: :func:`postquant.calib.open_source.open_source` has checked them all before any work.

    Args:
        inputs: What the model expects.
        notes: What a report must not be silent about, such as samples that do not fill a batch.

    Attributes:
        inputs: What the model expects.
        notes: Remarks for the report.
    """

    def __init__(self, inputs: Sequence[InputSpec], *, notes: Sequence[str] = ()) -> None:
        self.inputs = tuple(inputs)
        self.notes = tuple(notes)
        self._digest: str | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of samples, at least 1."""

    @abc.abstractmethod
    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """The samples at ``indices``, lazily.

        Args:
            indices: Increasing, each in ``range(len(self))``.

        Yields:
            Input name -> array, one dict per index. The arrays belong to the caller.

        Raises:
            CalibrationError: If the data cannot be read (any more).
        """

    def __iter__(self) -> Iterator[Sample]:
        """All samples in order."""
        return self.read(range(len(self)))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over every sample's input names, dtypes, shapes and bytes; computed once."""
        if self._digest is None:
            digest = SampleDigest()
            for sample in self:
                digest.add(sample)
            self._digest = digest.hexdigest()
        return self._digest

    def check(self) -> None:
        """Checks every sample against the model, and computes the digest in the same pass.

        Raises:
            CalibrationError: If a dtype or shape is wrong, a value is NaN or infinite, or data cannot be read.
        """
        digest = SampleDigest()
        for index, sample in enumerate(self):
            digest.add(check_sample(sample, self.inputs, index=index))
        self._digest = digest.hexdigest()

    def take(self, count: int) -> CalibrationSource:
        """The first ``count`` samples; the source itself when it has no more.

        Raises:
            ValueError: If ``count`` is not positive.
        """
        _check_count(count)
        return self if count >= len(self) else SubsetSource(self, range(count))

    def subset(self, count: int, seed: int) -> CalibrationSource:
        """``count`` samples drawn without replacement, in the source's order; the source itself when it has no more.

        Args:
            count: How many, at least 1.
            seed: Of the draw; the same seed gives the same samples.

        Raises:
            ValueError: If ``count`` is not positive.
        """
        _check_count(count)
        if count >= len(self):
            return self
        drawn = np.random.default_rng(seed).choice(len(self), size=count, replace=False)
        return SubsetSource(self, sorted(int(i) for i in drawn))


class SubsetSource(CalibrationSource):
    """Some samples of another source.

    Args:
        source: Where the samples come from.
        indices: Which ones, increasing.
    """

    def __init__(self, source: CalibrationSource, indices: Sequence[int]) -> None:
        super().__init__(source.inputs, notes=source.notes)
        self._source = source
        self._indices = tuple(indices)

    def __len__(self) -> int:
        """Number of chosen samples."""
        return len(self._indices)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :meth:`CalibrationSource.read`."""
        return self._source.read([self._indices[i] for i in indices])


class SampleDigest:
    """SHA-256 of a stream of samples, independent of how they are stored.

    >>> import numpy as np
    >>> digest = SampleDigest()
    >>> digest.add({"x": np.zeros((1, 2), np.float32)})
    >>> digest.hexdigest()[:8]
    '0c4aed10'
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, sample: Sample) -> None:
        """Takes in the next sample."""
        for name in sorted(sample):
            array = np.ascontiguousarray(sample[name])
            # Lengths first: no two different samples give the same bytes.
            for text in (name.encode(), array.dtype.str.encode()):
                self._hash.update(struct.pack("<Q", len(text)) + text)
            shape = sample[name].shape
            self._hash.update(struct.pack(f"<{len(shape) + 1}Q", len(shape), *shape))
            self._hash.update(array.reshape(-1).view(np.uint8).data)
        self._hash.update(b"\n")

    def hexdigest(self) -> str:
        """The digest so far, 64 hexadecimal digits."""
        return self._hash.hexdigest()


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"a number of samples is positive, not {count}")
