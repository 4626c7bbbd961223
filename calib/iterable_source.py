"""Python objects that yield feeds: :class:`RepeatedSource` asks again, :class:`SpooledSource` keeps them on disk.

Both check every sample and compute the digest in the first pass, which happens when they are made.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from postquant.calib.input_spec import InputSpec, Sample, check_sample
from postquant.calib.source import CalibrationSource, SampleDigest
from postquant.runtime_ops.errors import CalibrationError


class DataReader(Protocol):
    """What ``onnxruntime.quantization.CalibrationDataReader`` promises."""

    def get_next(self) -> Any:
        """The next feed, or None at the end."""


def reader_feeds(reader: DataReader) -> Iterator[object]:
    """The feeds of a reader from where it stands."""
    while (feed := reader.get_next()) is not None:
        yield feed


class RepeatedSource(CalibrationSource):
    """Feeds that a callable produces afresh for every pass.

    Nothing is stored; instead each pass must produce what the first one did, and a checksum per sample holds that.

    Args:
        make: Returns an iterable of feeds; called once per pass.
        inputs: What the model expects.
        where: The data, for messages.

    Raises:
        CalibrationError: If there are no samples or one does not fit the model.
    """

    def __init__(self, make: Callable[[], Iterable[object]], inputs: Sequence[InputSpec], *, where: str) -> None:
        super().__init__(inputs)
        self._make = make
        self._where = where
        digest = SampleDigest()
        checksums = []
        for index, feed in enumerate(make()):
            sample = check_sample(feed, self.inputs, index=index)
            digest.add(sample)
            checksums.append(_checksum(sample))
        self._checksums = tuple(checksums)
        self._digest = digest.hexdigest()
        if not checksums:
            raise no_samples(where)

    def __len__(self) -> int:
        """Number of samples of the first pass."""
        return len(self._checksums)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :meth:`CalibrationSource.read`."""
        feeds = iter(self._make())
        position = 0
        for i in indices:
            feed = next(itertools.islice(feeds, i - position, None), None)
            position = i + 1
            if feed is None:
                raise self._changed(i, "nothing")
            sample = check_sample(feed, self.inputs, index=i)
            if _checksum(sample) != self._checksums[i]:
                raise self._changed(i, "other values")
            yield sample

    def _changed(self, index: int, found: str) -> CalibrationError:
        return CalibrationError(
            "the calibration data changed between two passes",
            where=f"{self._where}, sample {index}",
            expected="the same samples in every pass",
            found=found,
            hint="make it deterministic, or pass a generator, whose samples are stored on disk",
        )


class SpooledSource(CalibrationSource):
    """Feeds that come only once, kept in a temporary file that disappears with the source.

    Args:
        feeds: Iterated once, now.
        inputs: What the model expects.
        where: The data, for messages.
        folder: Where the temporary file goes; None for the system's folder for such files.

    Raises:
        CalibrationError: If there are no samples, one does not fit the model, or the disk is full.
    """

    def __init__(
        self, feeds: Iterable[object], inputs: Sequence[InputSpec], *, where: str, folder: str | None = None
    ) -> None:
        super().__init__(inputs)
        digest = SampleDigest()
        self._offsets: list[int] = []
        with self._storing(folder):
            self._file = tempfile.TemporaryFile(prefix="postquant-", dir=folder)  # noqa: SIM115  (closed below)
        # Closed when the source goes, however that happens: an open file left to the garbage collector is a warning.
        weakref.finalize(self, self._file.close)
        # What the user's own iterator raises is not caught: it is not about storing.
        for index, feed in enumerate(feeds):
            sample = check_sample(feed, self.inputs, index=index)
            digest.add(sample)
            with self._storing(folder):
                self._offsets.append(self._file.tell())
                for spec in self.inputs:
                    np.lib.format.write_array(self._file, sample[spec.name], allow_pickle=False)
                self._file.flush()
        if not self._offsets:
            raise no_samples(where)
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        """Number of stored samples."""
        return len(self._offsets)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :meth:`CalibrationSource.read`."""
        for i in indices:
            # Another pass may have moved the file's position since the last sample.
            self._file.seek(self._offsets[i])
            yield {spec.name: np.lib.format.read_array(self._file, allow_pickle=False) for spec in self.inputs}

    @staticmethod
    @contextlib.contextmanager
    def _storing(folder: str | None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CalibrationError(
                "the calibration samples cannot be stored for a second pass",
                where=folder or tempfile.gettempdir(),
                found=str(error),
                hint=f"free space ({_free(folder)} left) or pass data that can be iterated twice",
            ) from error


def no_samples(where: str) -> CalibrationError:
    """The error for data without a single sample."""
    return CalibrationError("the calibration data hold no samples", where=where, expected="at least one sample")


def _checksum(sample: Sample) -> int:
    value = 0
    for name in sorted(sample):
        array = np.ascontiguousarray(sample[name])
        value = zlib.crc32(repr(sample[name].shape).encode(), value)
        value = zlib.crc32(array.reshape(-1).view(np.uint8).data, value)
    return value


def _free(folder: str | None) -> str:
    try:
        return f"{shutil.disk_usage(folder or tempfile.gettempdir()).free / 2**20:.0f} MiB"
    except OSError:
        return "unknown"
