"""EasyQuant's search of weight scales against the layer's output (algorithm 1 of the paper, weights).

For every output channel the candidates are ``S = S0 * linspace(alpha, beta, n)``, with ``S = 1 / scale`` and ``S0``
from the largest magnitude. All channels are searched at once; a candidate's output is judged by

    cosine  <o~, o> / (|o~| |o|)          or          mse  |o~ - o|^2

from second moments (:mod:`postquant.calib.moments`) over all samples, with ``o`` the output of the float weights on the
same, quantized inputs. (The paper compares with the float network's output. On MobileNetV2 that is harmful: the scales
then make up for what clipping did to a few samples upstream, at the expense of all others; see docs/easyquant.md.)
Cosine does not see a gain, so the winner's scale is then multiplied by the least-squares gain ``<o~, o> / <o~, o~>``:
its codes stay, its error becomes the smallest that these codes can have.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from postquant.calib.layers import Layer
from postquant.calib.moments import Moments
from postquant.runtime_ops.quantizer import SMALLEST_SCALE, TensorQuantizer

F = TypeVar("F", bound=np.floating)
FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

_COARSE = 5
# Second moments below 2^96 are taken as they are: float32 ends at 2^128, and products with weights are added up.
_MOST_BINARY_DIGITS = 96
# Smallest |o~|^2 / |o|^2 of a candidate that has a direction; gains are limited to 2, so less is useless anyway.
LEAST_OUTPUT = 1e-4


class Objective(enum.Enum):
    """How a layer's quantized output is compared with its float output."""

    COSINE = "cosine"
    MSE = "mse"


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """Settings of the scale search, with the paper's defaults.

    Attributes:
        objective: What is maximised (cosine) or minimised (mse).
        alpha: Smallest multiple of ``S0``, > 0.
        beta: Largest multiple of ``S0``.
        candidates: Number of candidates, >= 2.
        rounds: Alternations of weights and activation; None goes on until nothing changes.
        centred: Whether mean errors are left to the bias correction.
    """

    objective: Objective = Objective.COSINE
    alpha: float = 0.5
    beta: float = 2.0
    candidates: int = 100
    rounds: int | None = None
    centred: bool = True


def quantize_matrix(matrix: FloatArray, scale: npt.NDArray[np.floating], qmin: int, qmax: int) -> FloatArray:
    """Integer codes (as float32) of a (G, K, M) matrix with (G, 1, M) scales, rounded to nearest."""
    codes: FloatArray = np.clip(np.rint(matrix / scale), np.float32(qmin), np.float32(qmax)).astype(
        np.float32, copy=False
    )
    return codes


class WeightProblem:
    """The output error of one layer as a function of its weights.

    Args:
        layer: The layer.
        weight: Its float weight tensor.
        moments: Of its inputs; centred already if mean errors do not count.
    """

    def __init__(self, layer: Layer, weight: FloatArray, moments: Moments) -> None:
        self.layer = layer
        self.matrix = layer.matrix(weight).astype(np.float32)
        self.moments = moments
        square = moments.square / _unit(moments.square)
        self._square = square.astype(np.float32)
        # With w~ = w + d: <o~,o> = w'Hw + d'(Hw), |o~|^2 = w'Hw + 2 d'(Hw) + d'Hd; the small parts keep their digits.
        exact = self.matrix.astype(np.float64)
        response = _by_block(square, exact)
        self.energy = np.einsum("gkm,gkm->gm", exact, response)
        self._response = response.astype(np.float32)

    def products(self, candidate: FloatArray) -> tuple[DoubleArray, DoubleArray]:
        """``<o~, o>`` and ``|o~|^2`` per output channel, (G, M), of a candidate (G, K, M)."""
        d = candidate - self.matrix
        linear = np.einsum("gkm,gkm->gm", d, self._response)
        return self.energy + linear, self.energy + 2 * linear + np.einsum("gkm,gkm->gm", d, _by_block(self._square, d))

    def error(self, candidate: FloatArray) -> DoubleArray:
        """``|o~ - o|^2`` per output channel, (G, M)."""
        d = candidate - self.matrix
        error: DoubleArray = np.maximum(np.einsum("gkm,gkm->gm", d, _by_block(self._square, d)), 0.0).astype(np.float64)
        return error


def _unit(square: DoubleArray) -> float:
    """What errors of large inputs are counted in, so that float32 holds them; 1 for all others.

    A power of two, so that nothing is rounded; errors are compared with each other and with ``energy`` only.
    """
    _, exponent = math.frexp(float(np.abs(square).max(initial=0.0)))
    return 2.0 ** max(0, exponent - _MOST_BINARY_DIGITS)


def _by_block(square: npt.NDArray[F], matrix: npt.NDArray[F]) -> npt.NDArray[F]:
    """``H m`` of (G, K, M) matrices, with the blocks of H along its first axis."""
    blocks, depth, _ = square.shape
    product: npt.NDArray[F] = np.matmul(square, matrix.reshape(blocks, depth, -1)).reshape(matrix.shape)
    return product


def problem_of(layer: Layer, weight: FloatArray, moments: Moments, options: SearchOptions) -> WeightProblem:
    """The problem as the options see it: without the mean where the bias will be corrected."""
    return WeightProblem(layer, weight, moments.centred() if options.centred else moments)


def search_weight(
    layer: Layer, weight: FloatArray, start: TensorQuantizer, moments: Moments, options: SearchOptions
) -> TensorQuantizer:
    """The best weight quantizer on the grid.

    Args:
        layer: The layer.
        weight: Float weight tensor.
        start: The quantizer with ``S0``: max-abs, in the wanted format.
        moments: Second moments of the layer's inputs.
        options: Settings.

    Returns:
        A quantizer with scales (and, for cosine, explicit codes). Channels whose error no candidate lowers keep
        ``start``.
    """
    return search_problem(problem_of(layer, weight, moments, options), start, options)


def search_problem(problem: WeightProblem, start: TensorQuantizer, options: SearchOptions) -> TensorQuantizer:
    """:func:`search_weight` of a problem that stands already."""
    layer, spec = problem.layer, start.spec
    scale0 = np.ascontiguousarray(layer.per_output(start.scale), np.float32)
    grid = np.linspace(options.alpha, options.beta, options.candidates)
    # Where the start wins, candidates next to it are looked at too.
    best = _Best(problem.matrix.shape[::2], scale0, int(np.argmin(np.abs(grid - 1))))

    def judge(index: npt.NDArray[np.int64] | None) -> None:
        multiple = np.float32(1.0) if index is None else grid[index].astype(np.float32)[:, np.newaxis]
        scale = np.maximum(scale0 / multiple, SMALLEST_SCALE)
        if spec.power_of_two:  # neighbours of the start on the grid of powers
            scale = np.exp2(np.rint(np.log2(scale)))
        codes = quantize_matrix(problem.matrix, scale, spec.qmin, spec.qmax)
        inner, norm = problem.products(codes * scale)
        energy = problem.energy
        if spec.axis is None:  # one scale: the outputs of all channels are one vector
            inner, norm, energy = (np.full_like(part, part.sum()) for part in (inner, norm, energy))
        score, gain = _score(inner, norm, energy, options.objective)
        best.offer(score, gain, scale, index)

    judge(None)
    step = _step(len(grid))
    for coarse in range(0, len(grid), step):
        judge(np.full(best.score.shape, coarse))
    around = best.index.copy()
    for offset in (*range(1 - step, 0), *range(1, step)):
        judge(np.clip(around + offset, 0, len(grid) - 1))
    best_scale, best_gain = best.scale, best.gain
    free = options.objective is Objective.COSINE and not spec.power_of_two
    return _with_gain(layer, problem, start, best_scale, best_gain if free else None)


def tried_candidates(candidates: int) -> int:
    """How many of a grid's candidates a search judges: every fifth, the neighbours of the best, and the start.

    >>> tried_candidates(100), tried_candidates(12)
    (29, 13)
    """
    step = _step(candidates)
    return 1 + len(range(0, candidates, step)) + 2 * (step - 1)


def _step(candidates: int) -> int:
    return _COARSE if candidates > 4 * _COARSE else 1


class _Best:
    """The best candidate of every channel so far. A tie keeps the earlier one, so the start wins unless beaten."""

    def __init__(self, shape: tuple[int, ...], scale: FloatArray, index: int) -> None:
        self.score = np.full(shape, -1e300)
        self.gain = np.ones(shape)
        self.scale = np.broadcast_to(scale, (shape[0], 1, shape[1])).copy()
        self.index = np.full(shape, index, np.int64)

    def offer(
        self, score: DoubleArray, gain: DoubleArray, scale: FloatArray, index: npt.NDArray[np.int64] | None
    ) -> None:
        better = score > self.score + 1e-9 * np.abs(self.score)
        self.score = np.where(better, score, self.score)
        self.gain = np.where(better, gain, self.gain)
        self.scale = np.where(better[:, np.newaxis], scale, self.scale)
        if index is not None:
            self.index = np.where(better, index, self.index)


def _score(
    inner: DoubleArray, norm: DoubleArray, energy: DoubleArray, objective: Objective
) -> tuple[DoubleArray, DoubleArray]:
    """A score to maximise, and the least-squares gain."""
    if objective is Objective.MSE:
        return 2 * inner - norm, np.ones_like(inner)
    # Weights that a coarse scale rounds to zero have no output: what is left of it is rounding noise of any direction.
    heard = (inner > 0) & (norm > LEAST_OUTPUT * energy)
    gain = np.divide(inner, norm, out=np.ones_like(inner), where=heard)
    # Maximising cos is maximising <o~,o>^2 / <o~,o~>; |o| is the same for all candidates.
    return np.where(heard, inner * gain, 0.0), gain


def _with_gain(
    layer: Layer, problem: WeightProblem, start: TensorQuantizer, scale: FloatArray, gain: DoubleArray | None
) -> TensorQuantizer:
    spec = start.spec
    codes = quantize_matrix(problem.matrix, scale, spec.qmin, spec.qmax)
    final = scale if gain is None else scale * np.clip(gain, 0.5, 2.0)[:, np.newaxis].astype(np.float32)
    final = np.maximum(final, SMALLEST_SCALE)
    scales = np.asarray(final.reshape(-1)[0] if spec.axis is None else layer.per_scale(final), np.float32)
    explicit = None if gain is None else layer.tensor(codes).astype(spec.container)
    return dataclasses.replace(start, scale=scales, codes=explicit)
