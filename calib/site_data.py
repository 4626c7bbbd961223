"""What scale search keeps of the samples: moments of all rows, and some rows as they are (:class:`SiteData`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from postquant.calib.layers import Layer
from postquant.calib.moments import Moments, MomentSums, block_depth
from postquant.runtime_ops.quantizer import TensorQuantizer

FloatArray = npt.NDArray[np.float32]

# Moments taken at another activation scale are not used when it moved by more than this.
_SCALE_MOVED = 0.1
# Fractions whose multiples spread evenly over [0, 1): the golden ratio, and the plastic number.
_GOLDEN, _PLASTIC = 0.6180339887498949, 0.7548776662466927


@dataclasses.dataclass(frozen=True)
class WorkLimits:
    """How much data the search sees.

    Attributes:
        positions_per_sample: Output positions of a sample that enter second moments.
        sampled_samples: Samples of which positions are taken where a layer has more positions than that.
        search_samples: Samples whose rows judge activation candidates.
        search_rows: Rows that judge activation candidates, over all samples.
        search_elements: Bound of rows times row length, for wide layers.
        block: Largest number of inputs whose second moments are kept together; a layer with a larger K has several
            blocks of them.
        search_work: Multiply-accumulates that the search of all weights may cost; more is reduced
            (:mod:`postquant.calib.search_effort`).
        seed: Of the sampled positions.
    """

    positions_per_sample: int = 49
    sampled_samples: int = 128
    search_samples: int = 64
    search_rows: int = 8192
    search_elements: int = 1 << 18
    block: int = 2048
    search_work: float = 1.5e13
    seed: int = 0


class SiteData:
    """What one pass over the samples leaves for the layers of a site."""

    def __init__(self, layers: Sequence[Layer], quantizer: TensorQuantizer, limits: WorkLimits) -> None:
        self.exact = {layer.name: True for layer in layers}
        self._quantizer = quantizer
        self._limits = limits
        self._sums = {layer.name: self._empty(layer) for layer in layers}
        self._moments: dict[str, Moments] = {}
        self._rows: dict[str, list[tuple[FloatArray, FloatArray]]] = {layer.name: [] for layer in layers}
        self._total = {layer.name: np.zeros((layer.groups, layer.depth)) for layer in layers}
        self._count = dict.fromkeys(self._total, 0)

    def add(self, layer: Layer, rows: FloatArray, float_rows: FloatArray | None, *, complete: bool) -> None:
        """Adds the rows of one sample: behind the quantized prefix and, for some samples, in float."""
        name = layer.name
        self.exact[name] &= complete
        self._sums[name].update(self._quantizer.simulate(rows))
        if float_rows is not None and len(rows):
            self._total[name] += float_rows.sum(0, dtype=np.float64)
            self._count[name] += len(float_rows)
            most = min(self._limits.search_rows, self._limits.search_elements // (layer.groups * layer.depth))
            few = max(most // self._limits.search_samples, 8)
            spread = np.arange(min(few, len(rows))) * len(rows) // min(few, len(rows))
            self._rows[name].append((float_rows[spread], rows[spread]))

    def moments(self, layer: Layer, quantizer: TensorQuantizer) -> Moments:
        """Moments over all samples, the same object for the same rows.

        They were taken at the start's activation scale. Another scale changes the rounding noise in them, which
        matters little to a weight; the search rows take its place when the scale moved by more than a tenth.
        """
        name = layer.name
        moved = abs(float(quantizer.scale / self._quantizer.scale) - 1.0) > _SCALE_MOVED
        if not (moved and self._enough_rows(layer)):
            if name not in self._moments:
                self._moments[name] = self._sums.pop(name).result()
            return self._moments[name]
        sums = self._empty(layer)
        sums.update(quantizer.simulate(self.search_rows(layer)[1]))
        return sums.result()

    def _empty(self, layer: Layer) -> MomentSums:
        return MomentSums(layer.groups, layer.depth, block_depth(layer.depth, self._limits.block))

    def _enough_rows(self, layer: Layer) -> bool:
        return sum(len(part[0]) for part in self._rows[layer.name]) >= 8 * layer.depth

    def search_rows(self, layer: Layer) -> tuple[FloatArray, FloatArray, npt.NDArray[np.int64]]:
        """(P, G, K) rows in float and behind the prefix, and where each sample starts."""
        parts = self._rows[layer.name]
        lengths = [len(part[0]) for part in parts]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), starts

    def float_mean(self, layer: Layer) -> FloatArray:
        """(G, K) mean of the float rows."""
        return (self._total[layer.name] / max(self._count[layer.name], 1)).astype(np.float32)


def sampled_positions(
    layer: Layer, shape: Sequence[int], limit: int, seed: int, index: int
) -> npt.NDArray[np.int64] | None:
    """A seeded choice of output positions of one sample, spread over all of them; None for all.

    The offset within the grid goes through the golden ratio's multiples, so that the samples together see positions
    evenly.
    """
    count = layer.positions(shape)
    if count <= limit:
        return None
    offset = (index * _GOLDEN + seed * _PLASTIC) % 1.0
    return ((np.arange(limit) + offset) * count / limit).astype(np.int64)
