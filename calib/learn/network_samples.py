"""What every sample feeds to the network: :class:`NetworkSamples`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from postquant.calib.learn.block_cache import equal_shapes
from postquant.calib.learn.sample_arrays import SampleArrays, Spool
from postquant.calib.source import CalibrationSource


class NetworkSamples:
    """All calibration samples; a context manager that frees them.

    Args:
        source: Calibration data.
        folder: Existing folder for what does not fit into memory.
        memory: How many bytes may stay in memory.

    Attributes:
        inputs: Input name -> values.
        groups: Samples whose arrays have equal shapes and can form a batch.
    """

    inputs: Mapping[str, SampleArrays]
    groups: tuple[tuple[int, ...], ...]

    def __init__(self, source: CalibrationSource, folder: str | os.PathLike[str], *, memory: int) -> None:
        self._spool = Spool(folder, memory)
        self.inputs = {spec.name: SampleArrays(self._spool) for spec in source.inputs}
        try:
            for sample in source:
                for name, values in self.inputs.items():
                    values.append(sample[name])
        except BaseException:
            self._spool.close()
            raise
        self.groups = equal_shapes(self.inputs.values())

    def __len__(self) -> int:
        """Number of samples."""
        return len(next(iter(self.inputs.values())))

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes what was spilled."""
        self._spool.close()
