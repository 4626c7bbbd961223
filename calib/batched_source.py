"""Feeds for a model with a fixed batch size, joined from consecutive samples: :class:`BatchedSource`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from postquant.calib.input_spec import InputSpec, Sample
from postquant.calib.source import CalibrationSource
from postquant.runtime_ops.errors import CalibrationError


class BatchedSource(CalibrationSource):
    """``batch`` consecutive samples of another source, joined along the first axis.

    Samples at the end that do not fill a batch are not used; a note says so.

    Args:
        source: Whose samples have a first axis of size 1.
        batch: Samples per feed, at least 2.
        inputs: What the model expects.
        where: The data, for messages.

    Raises:
        CalibrationError: If the source does not fill a single batch, or samples of different shapes meet in one.
    """

    def __init__(self, source: CalibrationSource, batch: int, inputs: Sequence[InputSpec], *, where: str) -> None:
        if len(source) < batch:
            raise CalibrationError(
                "the calibration data do not fill a single batch of the model",
                where=where,
                expected=f"at least {batch} samples, the model's fixed batch size",
                found=str(len(source)),
            )
        notes = list(source.notes)
        unused = len(source) % batch
        if unused:
            notes.append(f"{unused} of {len(source)} calibration samples are not used: the model's batch is {batch}")
        super().__init__(inputs, notes=notes)
        self._source = source
        self._batch = batch

    def __len__(self) -> int:
        """Number of complete batches."""
        return len(self._source) // self._batch

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :meth:`CalibrationSource.read`."""
        rows = [i * self._batch + j for i in indices for j in range(self._batch)]
        stream = self._source.read(rows)
        for i in indices:
            group = list(itertools.islice(stream, self._batch))
            yield {spec.name: self._join([row[spec.name] for row in group], spec.name, i) for spec in self.inputs}

    def _join(self, rows: Sequence[npt.NDArray[np.generic]], name: str, index: int) -> npt.NDArray[np.generic]:
        shapes = {row.shape for row in rows}
        if len(shapes) > 1:
            raise CalibrationError(
                "samples of different shapes cannot share a batch",
                where=f"input {name!r}, batch {index}",
                found=", ".join(str(list(shape)) for shape in sorted(shapes)),
            )
        return np.concatenate(rows)
