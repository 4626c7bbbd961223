"""Streaming second moments of a layer's inputs: the exact output error of any weight, with no activation stored.

With rows ``x`` that reach the layer through the quantized network and its own activation quantizer, ``H = mean x' x``
(the covariance, when the bias takes care of the mean) gives for weights ``w~`` in place of ``w``, per output channel,

    |o~ - o|^2 = (w~ - w)' H (w~ - w)      <o~, o> = w~' H w      |o~|^2 = w~' H w~

so that every candidate weight is judged over ALL samples at the cost of one K x K matrix (one per group for grouped
convolutions: 9 x 9 for a depthwise 3 x 3). Where K is too large for that, ``H`` is kept in diagonal blocks of b x b: a
group's K inputs count as K / b groups of b inputs, and products of inputs of different blocks as zero.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

# Rows are gathered until so many wait: one product of large matrices instead of many of small ones.
_CHUNK_ROWS = 512
# Values whose squares float32 can add up, with room to spare.
_LARGEST = 1e15


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Means over rows; G counts the blocks of all groups, and K is the size of a block.

    Attributes:
        rows: Number of rows.
        mean: (G, K) mean of ``x``.
        square: (G, K, K) mean of ``x' x``.
    """

    rows: int
    mean: DoubleArray
    square: DoubleArray

    def centred(self) -> Moments:
        """Covariances instead of second moments: what remains after the bias has removed the mean error."""
        outer = self.mean[:, :, np.newaxis] * self.mean[:, np.newaxis, :]
        return dataclasses.replace(self, square=np.subtract(self.square, outer, out=outer))


def block_depth(depth: int, limit: int) -> int:
    """Size of the blocks in which second moments are kept: the largest divisor of K within the limit.

    >>> block_depth(576, 2048), block_depth(4096, 2048), block_depth(25088, 2048)
    (576, 2048, 1792)
    """
    return next(size for size in range(max(min(depth, limit), 1), 0, -1) if depth % size == 0)


class MomentSums:
    """Accumulates :class:`Moments`.

    Args:
        groups: G.
        depth: K.
        block: Inputs whose products are kept together, a divisor of ``depth``; all of a group when None.
    """

    def __init__(self, groups: int, depth: int, block: int | None = None) -> None:
        block = block or depth
        groups = groups * depth // block
        self._rows = 0
        self._mean = np.zeros((groups, block))
        self._square = np.zeros((groups, block, block))
        self._waiting: list[FloatArray] = []
        self._waiting_rows = 0

    def update(self, rows: FloatArray) -> None:
        """Adds (P, G, K) rows."""
        self._waiting.append(rows)
        self._waiting_rows += len(rows)
        if self._waiting_rows >= _CHUNK_ROWS:
            self._add()

    def _add(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting)
        rows = rows.reshape(len(rows), *self._mean.shape)
        self._waiting, self._waiting_rows = [], 0
        self._rows += len(rows)
        self._mean += rows.sum(0, dtype=np.float64)
        # Products of large values, added up, do not fit float32.
        large = max(float(rows.max(initial=0.0)), -float(rows.min(initial=0.0))) > _LARGEST
        by_group = rows.transpose(1, 2, 0)
        if large or len(by_group) > 1:  # one matrix BLAS takes as it lies
            by_group = np.ascontiguousarray(by_group, np.float64 if large else np.float32)
        self._square += np.matmul(by_group, by_group.transpose(0, 2, 1))

    def result(self) -> Moments:
        """The moments of the rows so far."""
        self._add()
        count = max(self._rows, 1)
        return Moments(self._rows, self._mean / count, self._square / count)
