"""Per-channel statistics of activations over a stream of samples: range, mean and variance of every channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from postquant.calib.input_spec import Sample

DoubleArray = npt.NDArray[np.float64]


@dataclasses.dataclass
class ChannelStatistics:
    """Statistics of one tensor, per channel.

    Attributes:
        low: (C,) smallest value.
        high: (C,) largest value.
        total: (C,) sum.
        square: (C,) sum of squares.
        count: Values per channel.
    """

    low: DoubleArray
    high: DoubleArray
    total: DoubleArray
    square: DoubleArray
    count: int

    @classmethod
    def empty(cls, channels: int) -> ChannelStatistics:
        """Statistics of nothing."""
        return cls(np.full(channels, np.inf), np.full(channels, -np.inf), np.zeros(channels), np.zeros(channels), 0)

    def update(self, columns: npt.NDArray[np.float32]) -> None:
        """Adds values.

        Args:
            columns: (C, n) float32.
        """
        if columns.shape[1] == 0:
            return
        self.low = np.minimum(self.low, columns.min(1))
        self.high = np.maximum(self.high, columns.max(1))
        # One sample's sums in float32 are exact enough, and several times as fast.
        self.total += columns.sum(1)
        self.square += np.einsum("cn,cn->c", columns, columns)
        self.count += columns.shape[1]

    @property
    def magnitude(self) -> DoubleArray:
        """(C,) largest absolute value."""
        return np.maximum(np.maximum(-self.low, self.high), 0.0)

    @property
    def mean(self) -> DoubleArray:
        """(C,) mean."""
        return self.total / max(self.count, 1)

    @property
    def variance(self) -> DoubleArray:
        """(C,) variance."""
        return np.maximum(self.square / max(self.count, 1) - self.mean**2, 0.0)


def collect_channels(
    run: Callable[[Sample], Mapping[str, npt.NDArray[np.generic]]],
    samples: Iterable[Sample],
    names: Sequence[str],
    *,
    last_axis: bool = False,
) -> dict[str, ChannelStatistics]:
    """Statistics of several tensors in one pass.

    Args:
        run: Returns the tensors for a feed.
        samples: Feeds.
        names: Which tensors; rank 2 and more.
        last_axis: Whether channels lie on the last axis (MatMul) instead of axis 1.
    """
    found: dict[str, ChannelStatistics] = {}
    for sample in samples:
        values = run(sample)
        for name in names:
            array = np.asarray(values[name], np.float32)
            columns = np.moveaxis(array, -1 if last_axis else 1, 0)
            columns = columns.reshape(columns.shape[0], -1)
            found.setdefault(name, ChannelStatistics.empty(len(columns))).update(columns)
    return found
