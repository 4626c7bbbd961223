"""Codes and scales of a layer for given levels, by the layer's output error: :class:`Rounder`.

    1. scales      of a grid, with nearest levels; the least-squares gain ``<o~, o> / <o~, o~>`` belongs to the score,
                   so that the winner is the one with the best cosine (EasyQuant's objective)
    2. compensated rounding at scales around the winner, the gain again
    3. coordinate descent over the codes, the gain again, twice

Every output channel keeps the best of all it has seen. A layer with few products per output (depthwise: 9) gets many
scales in step 2 and the descent at each, which comes close to an exhaustive search there.
"""

from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from postquant.calib.compensated_rounding import Compensation, Nearest
from postquant.runtime_ops.code_book import Table, half_steps, nearest_of_steps
from postquant.runtime_ops.quantizer import SMALLEST_SCALE

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

# Scales in units of the one that puts the largest weight on the largest level; the first where nothing is heard.
_MULTIPLES = (1.0, *np.linspace(1.1, 0.3, 17))
# Scales around the winner, for many and for few products per output.
_AROUND = (0.9, 1.0, 1.1)
_MANY_AROUND = tuple(np.linspace(0.7, 1.3, 13))
_FEW_PRODUCTS = 32
# Multiply-accumulates of one output error beyond which a layer is searched less: only the winner's scale is rounded at.
_LARGE = 1 << 30
# What a least-squares gain may change at once.
_LARGEST_GAIN = 2.0


@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """The values that weights may have, in units of their scale.

    Attributes:
        nearest: Float32 array -> nearest levels, as float32.
        top: Magnitude of the largest level.
    """

    nearest: Nearest
    top: float

    @classmethod
    def uniform(cls, qmin: int, qmax: int) -> Levels:
        """All integers from ``qmin`` to ``qmax``."""
        return cls(lambda ratio: np.clip(np.rint(ratio), np.float32(qmin), np.float32(qmax)), qmax)

    @classmethod
    def of_table(cls, table: Table) -> Levels:
        """The entries of a table."""
        top = float(np.abs(table.astype(np.int64)).max())
        nearest = nearest_of_steps(table).astype(np.float32)
        return cls(lambda ratio: nearest[half_steps(ratio)], max(top, 1.0))

    @classmethod
    def of_reals(cls, values: npt.NDArray[np.floating]) -> Levels:
        """Sorted real numbers, of which a table is made later."""
        exact = values.astype(np.float32)
        middles = (exact[1:] + exact[:-1]) / 2
        return cls(lambda ratio: exact[np.searchsorted(middles, ratio)], float(np.abs(exact).max()))


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """A quantized weight matrix.

    Attributes:
        levels: (G, K, M) float32.
        scale: (G, 1, M) float32, > 0.
        error: (G, M) output error.
    """

    levels: FloatArray
    scale: FloatArray
    error: DoubleArray

    @property
    def total(self) -> float:
        """Output error of all channels together."""
        return float(self.error.sum())

    def subset(self, channels: npt.NDArray[np.int64]) -> Codes:
        """Those output channels of every group."""
        return Codes(
            np.ascontiguousarray(self.levels[:, :, channels]),
            np.ascontiguousarray(self.scale[:, :, channels]),
            self.error[:, channels],
        )

    def or_better(self, other: Codes) -> Codes:
        """The better of the two, per channel; a tie keeps this one."""
        better = other.error < self.error
        wide = better[:, np.newaxis]
        return Codes(
            np.where(wide, other.levels, self.levels),
            np.where(wide, other.scale, self.scale),
            np.where(better, other.error, self.error),
        )


class Rounder:
    """One layer, or some output channels of it.

    Args:
        matrix: (G, K, M) float weights.
        moments: (G, K, K) second moments (or covariances) of the inputs.
    """

    def __init__(self, matrix: FloatArray, moments: npt.NDArray[np.floating]) -> None:
        self.matrix = matrix
        self._moments = moments.astype(np.float32)
        self._compensation = Compensation(moments)

    @property
    def large(self) -> bool:
        """Whether the layer's own size asks for less effort."""
        groups, depth, outputs = self.matrix.shape
        return bool(groups * depth * depth * outputs > _LARGE)

    @functools.cached_property
    def response(self) -> FloatArray:
        """(G, K, M) ``H w``."""
        response: FloatArray = np.matmul(self._moments, self.matrix)
        return response

    def subset(self, channels: npt.NDArray[np.int64]) -> Rounder:
        """Those output channels of every group, with the same moments."""
        part = copy.copy(self)
        part.__dict__.pop("response", None)
        part.matrix = np.ascontiguousarray(self.matrix[:, :, channels])
        return part

    def codes(self, levels: FloatArray, scale: FloatArray) -> Codes:
        """Levels and scales with their output error."""
        d = levels * scale - self.matrix
        error = np.einsum("gkm,gkm->gm", d, np.matmul(self._moments, d), dtype=np.float64)
        return Codes(levels, scale, np.maximum(error, 0.0))

    def fitted(self, levels: FloatArray, scale: FloatArray) -> Codes:
        """Levels with the scales that suit them best."""
        inner = np.einsum("gkm,gkm->gm", levels, self.response, dtype=np.float64)
        norm = np.einsum("gkm,gkm->gm", levels, np.matmul(self._moments, levels), dtype=np.float64)
        old = scale[:, 0].astype(np.float64)
        best = np.divide(inner, norm, out=old.copy(), where=(inner > 0) & (norm > 0))
        best = np.maximum(np.clip(best, old / _LARGEST_GAIN, old * _LARGEST_GAIN), SMALLEST_SCALE)
        return self.codes(levels, best[:, np.newaxis].astype(np.float32))

    def quadratic(self, parts: FloatArray) -> tuple[DoubleArray, DoubleArray]:
        """The output error of ``parts @ t`` as a function of ``t``: ``t' A t - 2 b' t`` plus what does not change.

        Args:
            parts: (G, K, M, n) float32.

        Returns:
            A (n, n) and b (n,).
        """
        groups, depth, _, count = parts.shape
        heard = np.matmul(self._moments, parts.reshape(groups, depth, -1)).reshape(-1, count)
        square = parts.reshape(-1, count).T @ heard
        return square.astype(np.float64), (self.response.reshape(-1) @ parts.reshape(-1, count)).astype(np.float64)

    def nearest(self, format: Levels) -> Codes:
        """Nearest levels at the best scale of a grid."""
        top = np.abs(self.matrix).max(axis=1, keepdims=True, initial=0.0)
        unit = np.maximum(top / np.float32(format.top), SMALLEST_SCALE)
        best: Codes | None = None
        for multiple in _MULTIPLES:
            scale = unit * np.float32(multiple)
            found = self.fitted(format.nearest(self.matrix / scale), scale)
            best = found if best is None else best.or_better(found)
        assert best is not None
        return best

    def compensated(self, start: Codes, format: Levels) -> Codes:
        """The start, or what compensated rounding makes of it."""
        few = self.matrix.shape[1] <= _FEW_PRODUCTS
        best = start
        for multiple in _MANY_AROUND if few else (1.0,) if self.large else _AROUND:
            scale = np.maximum(start.scale * np.float32(multiple), SMALLEST_SCALE)
            found = self.fitted(self._compensation.round(self.matrix / scale, format.nearest), scale)
            best = best.or_better(self.descended(found, format) if few else found)
        return best

    def descended(self, start: Codes, format: Levels, *, sweeps: int = 2) -> Codes:
        """The start after coordinate descent over its codes, with the scales that suit them best."""
        levels = self._compensation.descend(self.matrix / start.scale, start.levels, format.nearest, sweeps=sweeps)
        return start.or_better(self.fitted(levels, start.scale))

    def best(self, format: Levels, start: Codes | None = None) -> tuple[Codes, Codes]:
        """The best nearest levels, and the best levels of any rounding.

        Args:
            format: The values that weights may have.
            start: Codes that the result must not be worse than.
        """
        nearest = self.nearest(format)
        found = nearest if start is None else start.or_better(nearest)
        found = self.compensated(found, format)
        for _ in range(2):
            found = self.descended(found, format)
        return nearest, found
