"""EasyQuant's search of an activation's scale against the outputs of its readers (algorithm 1, activations).

Candidates are ``S = S0 * linspace(alpha, beta, n)``, ``S = 1 / scale``; the zero point moves with the scale so that
the range keeps its proportion of negative values. Each is judged by the layers' outputs on sampled rows,

    score = mean over layers and samples of cos(o, o~)        (or minus the relative squared error)

where a sample's rows form one vector: a sample with huge values counts as much as any other, which keeps ranges from
following a few outliers. The grid is searched coarse to fine: every tenth candidate, every third around the best, then
its neighbours. Where that costs much, the first two see a part of the rows, and behind the first alternation with the
weights, when an optimum has hardly moved, the first step is left out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from postquant.calib.layers import Layer
from postquant.calib.weight_search import Objective, SearchOptions
from postquant.runtime_ops.quantizer import TensorQuantizer

FloatArray = npt.NDArray[np.float32]

_STEPS = (10, 3, 1)
# Steps that are wider than one see at most every fourth row of a sample, and about so many rows at least, where judging
# one candidate takes more than so many multiply-accumulates; quantizing a value takes as long as so many of them.
_THINNING, _FEW_ROWS, _CHEAP, _QUANTIZING = 4, 256, 3e7, 16


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """One layer that reads the tensor, with sampled rows.

    Attributes:
        layer: The layer.
        target: (P, G, M) output of the float network, bias excluded.
        rows: (P, G, K) rows behind the quantized prefix, before this tensor's quantizer.
        starts: (samples,) index of each sample's first row.
        matrix: (G, K, M) the layer's weights as quantized so far.
        ceiling: Bounds that a following Relu or Clip puts on ``output + bias``: (low, high), or None.
        bias: (G, M) float bias, used only with ``ceiling``.
    """

    layer: Layer
    target: FloatArray
    rows: FloatArray
    starts: npt.NDArray[np.int64]
    matrix: FloatArray
    ceiling: tuple[float, float] | None = None
    bias: FloatArray | None = None

    @functools.cached_property
    def thinned(self) -> Reader:
        """The same with a part of every sample's rows, where there are many and it costs much to see all."""
        stride = min(len(self.rows) // _FEW_ROWS, _THINNING)
        if stride <= 1 or self.rows.size * (self.matrix.shape[2] + _QUANTIZING) <= _CHEAP:
            return self
        lengths = np.diff([*self.starts, len(self.rows)])
        within = np.arange(len(self.rows)) - np.repeat(self.starts, lengths)
        taken = within % stride == 0
        counts = -(-lengths // stride)
        starts = np.cumsum(counts) - counts
        return dataclasses.replace(self, target=self.target[taken], rows=self.rows[taken], starts=starts)

    @functools.cached_property
    def energy(self) -> npt.NDArray[np.float64]:
        """(samples,) squared length of the target, the same for all candidates."""
        return _per_sample(self.target, self.target, self.starts)


def scaled(start: TensorQuantizer, multiple: float) -> TensorQuantizer:
    """The quantizer with ``S = S0 * multiple``, a range ``1 / multiple`` times as wide.

    The range's ends are the real ones behind the rounded zero point, so a multiple of 1 changes nothing.
    """
    spec = start.spec
    if spec.symmetric:
        # Not its range: that of signed codes has one step more below zero than above.
        top = start.scale * np.float32(spec.qmax if spec.signed else spec.qmax - 2 ** (spec.bits - 1)) / multiple
        return TensorQuantizer.from_range(spec, -top, top)
    low, high = start.range()
    return TensorQuantizer.from_range(spec, low / multiple, high / multiple)


def score_of(quantizer: TensorQuantizer, readers: Sequence[Reader], objective: Objective) -> float:
    """Mean over readers and samples of the cosine, or of minus the relative squared error."""
    total = 0.0
    for reader in readers:
        rows = quantizer.simulate(reader.rows)
        by_group = np.matmul(rows.transpose(1, 0, 2), reader.matrix).transpose(1, 0, 2)
        target, output = reader.target, by_group
        if reader.ceiling is not None and reader.bias is not None:
            output = np.clip(output + reader.bias, *reader.ceiling)
        inner = _per_sample(target, output, reader.starts)
        norm = _per_sample(output, output, reader.starts)
        energy = reader.energy
        if objective is Objective.COSINE:
            # The paper's code adds a little to both vectors where one is zero; a floor does the same.
            total += float(np.mean((inner + 1e-12) / np.sqrt((norm + 1e-12) * (energy + 1e-12))))
        else:
            total -= float(np.mean((energy - 2 * inner + norm) / (energy + 1e-12)))
    return total / len(readers)


def _per_sample(a: FloatArray, b: FloatArray, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Inner products of the rows of each sample."""
    flat = np.einsum("pgm,pgm->p", a, b).astype(np.float64)
    if not np.isfinite(flat).all():  # products of large values do not fit float32
        flat = np.einsum("pgm,pgm->p", a, b, dtype=np.float64)
    return np.add.reduceat(flat, starts)


def search_activation(
    start: TensorQuantizer, readers: Sequence[Reader], options: SearchOptions, *, near: bool = False
) -> tuple[TensorQuantizer, float, float]:
    """The best quantizer on the grid.

    Args:
        start: The quantizer with ``S0``.
        readers: The layers that read the tensor; at least one.
        options: Settings.
        near: Whether ``start`` is the result of a search: if a search costs much, it looks around that only.

    Returns:
        The best quantizer (``start`` unless a candidate is better), its score, and the score of ``start``.
    """
    multiples = np.linspace(options.alpha, options.beta, options.candidates)
    scores: dict[tuple[int, bool], float] = {}

    def score(index: int, *, thinned: bool = False) -> float:
        if (index, thinned) not in scores:
            seen = [reader.thinned for reader in readers] if thinned else readers
            scores[index, thinned] = score_of(scaled(start, float(multiples[index])), seen, options.objective)
        return scores[index, thinned]

    steps: tuple[int, ...] = _STEPS if len(multiples) > 4 * _STEPS[0] else (1,)
    best, reach = len(multiples) // 2, len(multiples)
    if near and len(steps) > 1 and any(reader.thinned is not reader for reader in readers):
        best, reach, steps = int(np.argmin(np.abs(multiples - 1.0))), steps[0], steps[1:]
    for step in steps:
        first, last = max(best - reach + 1, 0), min(best + reach, len(multiples))
        best = max((best, *range(first, last, step)), key=functools.partial(score, thinned=step > 1))
        reach = step
    at_start = score_of(start, readers, options.objective)
    # Cosines within 1e-6 are a tie: it goes to the start.
    if score(best) <= at_start + 1e-6:
        return start, at_start, at_start
    return scaled(start, float(multiples[best])), score(best), at_start
