"""Streaming second moments of a layer's inputs: the exact output error of any weight, with no activation stored.

With rows ``x`` (float network) and ``x~`` (quantized network, through the layer's activation quantizer), centred by
their means when the bias will be corrected,

    C = sum x~' x        B = sum x~' x~

the output of weights ``w~`` against the float layer's ``w`` has, per output channel,

    <o~, o>  = w~' C w       <o~, o~> = w~' B w~

up to constants, so that every candidate weight is judged over ALL samples and positions at the cost of two K x K
matrices (K x K per group for grouped convolutions, so 9 x 9 for a depthwise 3 x 3).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Sums over rows, divided by their number.

    Attributes:
        rows: Number of rows.
        mean: (G, K) mean of the float rows.
        mean_quantized: (G, K) mean of the quantized rows.
        cross: (G, K, K) mean of ``x~' x``.
        auto: (G, K, K) mean of ``x~' x~``.
    """

    rows: int
    mean: DoubleArray
    mean_quantized: DoubleArray
    cross: DoubleArray
    auto: DoubleArray

    def centred(self) -> Moments:
        """Covariances instead of second moments: what remains after the bias has removed the mean error."""
        return dataclasses.replace(
            self,
            cross=self.cross - self.mean_quantized[:, :, np.newaxis] * self.mean[:, np.newaxis, :],
            auto=self.auto - self.mean_quantized[:, :, np.newaxis] * self.mean_quantized[:, np.newaxis, :],
        )


class MomentSums:
    """Accumulates :class:`Moments`; any split of the rows gives the same result up to float64 rounding.

    Args:
        groups: G.
        depth: K.
    """

    def __init__(self, groups: int, depth: int) -> None:
        self._rows = 0
        self._mean = np.zeros((groups, depth))
        self._mean_quantized = np.zeros((groups, depth))
        self._cross = np.zeros((groups, depth, depth))
        self._auto = np.zeros((groups, depth, depth))

    def update(self, x: FloatArray, quantized: FloatArray) -> None:
        """Adds rows.

        Args:
            x: (P, G, K) rows of the float network.
            quantized: (P, G, K) the same rows of the quantized network.
        """
        self._rows += len(x)
        self._mean += x.sum(0, dtype=np.float64)
        self._mean_quantized += quantized.sum(0, dtype=np.float64)
        by_group = np.ascontiguousarray(x.transpose(1, 0, 2))
        by_group_quantized = np.ascontiguousarray(quantized.transpose(1, 2, 0))
        self._cross += np.matmul(by_group_quantized, by_group)
        self._auto += np.matmul(by_group_quantized, by_group_quantized.transpose(0, 2, 1))

    def result(self) -> Moments:
        """The moments of the rows so far."""
        n = max(self._rows, 1)
        return Moments(
            self._rows, self._mean / n, self._mean_quantized / n, self._cross / n, self._auto / n
        )
