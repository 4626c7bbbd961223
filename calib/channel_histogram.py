"""Histograms of a tensor's channels over one range that is known: :class:`ChannelHistogram`.

Of the range ``[low, high]``, which holds 0, bins have the width ``w = (high - low) / 1024`` and hold the values with
``trunc(x / w) = k``; bin 0 has those around zero. Values beyond an end count as the end. Counts are integers, so that
they do not depend on the order of samples.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_BINS = 1024
# Positions of a channel, and of a tensor that is counted as one channel, that enter from one sample.
_POSITIONS = 512
_ELEMENTS = 1 << 15


class ChannelHistogram:
    """Counts of every channel's values.

    Args:
        low: The range's smallest value, <= 0, units of the tensor.
        high: Its largest value, >= 0.
        channels: How many channels; 1 counts the whole tensor as one.
        axis: The axis of the channels; None where the whole tensor counts as one.

    Attributes:
        counts: (channels, bins) int32.

    Raises:
        ValueError: If 0 is not in the range, or it is not finite.

    >>> found = ChannelHistogram(0.0, 1024.0, 2, axis=1)
    >>> found.update(np.float32([[0.0, 3.5], [1.0, 9999.0]]))
    >>> [row.nonzero()[0].tolist() for row in found.counts]
    [[0, 1], [3, 1024]]
    """

    def __init__(self, low: float, high: float, channels: int = 1, axis: int | None = None) -> None:
        if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high):
            raise ValueError(f"a range around 0 is needed, not [{low}, {high}]")
        self._low, self._high, self._axis = np.float32(low), np.float32(high), axis
        self._width = max((high - low) / _BINS, 1e-30)
        self._first = math.trunc(low / self._width)
        self._samples = 0
        self.counts = np.zeros((channels, math.trunc(high / self._width) - self._first + 1), np.int32)

    def update(self, values: npt.NDArray[np.floating]) -> None:
        """Takes in the tensor of one sample.

        Args:
            values: Any shape with the channels on their axis, float, finite. Large tensors enter at some positions,
                others in every sample.
        """
        x = values.reshape(1, -1) if self._axis is None else np.moveaxis(values, self._axis, 0)
        x = x.reshape(len(x), -1)
        x = x[:, self._positions(x.shape[1])]
        bins = self.counts.shape[1]
        index = (np.clip(x, self._low, self._high) / self._width).astype(np.intp) - self._first
        np.clip(index, 0, bins - 1, out=index)  # a rounded quotient may be one beyond
        index += np.arange(len(x))[:, None] * bins
        self.counts += np.bincount(index.ravel(), minlength=self.counts.size).reshape(self.counts.shape)
        self._samples += 1

    def values(self) -> npt.NDArray[np.float64]:
        """What the values of every bin are taken as, (bins,): its middle, and 0 where it holds zero."""
        bins = np.arange(self.counts.shape[1]) + self._first
        return (bins + 0.5 * np.sign(bins)) * self._width

    def _positions(self, count: int) -> slice:
        most = _ELEMENTS if self._axis is None else _POSITIONS
        if count <= most:
            return slice(None)
        stride = -(-count // most)
        # A stride that shares a factor with a dimension would see some columns only.
        while math.gcd(stride, count) > 1:
            stride += 1
        return slice(self._samples % stride, None, stride)
