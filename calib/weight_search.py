"""EasyQuant's search of weight scales against the layer's output (algorithm 1 of the paper, weights).

For every output channel the candidates are ``S = S0 * linspace(alpha, beta, n)``, with ``S = 1 / scale`` and ``S0``
from the largest magnitude. All channels are searched at once; a candidate's output is judged by

    cosine  <o~, o> / (|o~| |o|)          or          mse  |o~ - o|^2

from second moments (:mod:`postquant.calib.moments`) over all samples. Cosine does not see a gain, so the winner's
scale is then multiplied by the least-squares gain ``<o~, o> / <o~, o~>``: its codes stay, its error becomes the
smallest that these codes can have.
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
import numpy.typing as npt

from postquant.calib.layers import Layer
from postquant.calib.moments import Moments
from postquant.runtime_ops.quantizer import SMALLEST_SCALE, TensorQuantizer

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]


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

    def multiples(self) -> DoubleArray:
        """The candidates' multiples of ``S0``, with 1 (the start) in front so that it wins ties."""
        grid = np.linspace(self.alpha, self.beta, self.candidates)
        return np.concatenate([[1.0], grid])


@dataclasses.dataclass(frozen=True, eq=False)
class OutputError:
    """Per output channel, (G, M): energy of the float output and squared error of the quantized one."""

    energy: DoubleArray
    error: DoubleArray

    @property
    def sqnr(self) -> float:
        """Over all channels, in dB."""
        return float(10 * np.log10(max(self.energy.sum(), 1e-300) / max(self.error.sum(), 1e-300)))


def quantize_matrix(matrix: FloatArray, scale: npt.NDArray[np.floating], qmin: int, qmax: int) -> FloatArray:
    """Integer codes (as float32) of a (G, K, M) matrix with (G, 1, M) scales, rounded to nearest."""
    return np.clip(np.rint(matrix / scale), np.float32(qmin), np.float32(qmax))


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
        exact = self.matrix.astype(np.float64)
        self._auto = moments.auto.astype(np.float32)
        # With w~ = w + d: <o~,o> = w'Cw + d'(Cw) and <o~,o~> = w'Bw + 2 d'(Bw) + d'Bd; the small parts keep their digits.
        self._cross_w = moments.cross @ exact
        self._auto_w = moments.auto @ exact
        self._inner0 = np.einsum("gkm,gkm->gm", exact, self._cross_w)
        self._norm0 = np.einsum("gkm,gkm->gm", exact, self._auto_w)

    def products(self, candidate: FloatArray) -> tuple[DoubleArray, DoubleArray]:
        """``<o~, o>`` and ``<o~, o~>`` per output channel, (G, M), of a candidate (G, K, M)."""
        d = candidate - self.matrix
        inner = self._inner0 + np.einsum("gkm,gkm->gm", d, self._cross_w)
        norm = self._norm0 + 2 * np.einsum("gkm,gkm->gm", d, self._auto_w)
        norm += np.einsum("gkm,gkm->gm", d, self._auto @ d, dtype=np.float64)
        return inner, norm


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
        A quantizer with scales (and, for cosine, explicit codes). Channels whose error no candidate lowers keep ``start``.
    """
    problem = WeightProblem(layer, weight, moments.centred() if options.centred else moments)
    spec = start.spec
    scale0 = layer.per_output(start.scale).astype(np.float32)
    per_tensor = spec.axis is None
    best_score = np.full(problem.matrix.shape[::2], -1e300)
    best_scale = np.broadcast_to(scale0, (scale0.shape[0], 1, problem.matrix.shape[2])).copy()
    best_gain = np.ones_like(best_score)
    for multiple in options.multiples():
        scale = np.maximum(scale0 / np.float32(multiple), SMALLEST_SCALE)
        codes = quantize_matrix(problem.matrix, scale, spec.qmin, spec.qmax)
        inner, norm = problem.products(codes * scale)
        score, gain = _score(inner, norm, options.objective)
        if per_tensor:  # one scale: one score
            total = (inner**2 / np.maximum(norm, 1e-300)).sum() if options.objective is Objective.COSINE else score.sum()
            score = np.full_like(score, total)
            gain = np.full_like(gain, inner.sum() / max(norm.sum(), 1e-300))
        # A tie keeps the earlier candidate, so the start wins unless something is better.
        better = score > best_score + 1e-9 * np.abs(best_score)
        best_score = np.where(better, score, best_score)
        best_scale = np.where(better[:, np.newaxis], scale, best_scale)
        best_gain = np.where(better, gain, best_gain)
    return _with_gain(layer, problem, start, best_scale, best_gain if options.objective is Objective.COSINE else None)


def _score(inner: DoubleArray, norm: DoubleArray, objective: Objective) -> tuple[DoubleArray, DoubleArray]:
    """A score to maximise, and the least-squares gain."""
    safe = np.maximum(norm, 1e-300)
    gain = np.where((norm > 0) & (inner > 0), inner / safe, 1.0)
    if objective is Objective.MSE:
        return 2 * inner - norm, np.ones_like(gain)
    # Maximising cos is maximising <o~,o>^2 / <o~,o~>; |o| is the same for all candidates.
    return np.where(inner > 0, inner**2 / safe, 0.0), gain


def _with_gain(
    layer: Layer, problem: WeightProblem, start: TensorQuantizer, scale: FloatArray, gain: DoubleArray | None
) -> TensorQuantizer:
    spec = start.spec
    codes = quantize_matrix(problem.matrix, scale, spec.qmin, spec.qmax)
    final = scale if gain is None else scale * np.clip(gain, 0.5, 2.0)[:, np.newaxis].astype(np.float32)
    final = np.maximum(final, SMALLEST_SCALE)
    if spec.axis is None:
        scales = np.float32(final.reshape(-1)[0])
    else:
        scales = layer.per_scale(final).astype(np.float32)
    explicit = None if gain is None else layer.tensor(codes).astype(spec.container)
    return dataclasses.replace(start, scale=scales, codes=explicit)


def output_error(
    layer: Layer, weight: FloatArray, quantizer: TensorQuantizer, moments: Moments, *, centred: bool
) -> OutputError:
    """Error of the layer's output with quantized weights and inputs, per output channel.

    The energy is that of the float weights on the quantized inputs, which differs from the float network's by the
    error of the inputs.
    """
    problem = WeightProblem(layer, weight, moments.centred() if centred else moments)
    candidate = layer.matrix(quantizer.simulate(weight)).astype(np.float32)
    exact = problem.matrix
    d = candidate - exact
    error = np.einsum("gkm,gkm->gm", d, problem._auto @ d, dtype=np.float64)
    return OutputError(problem._norm0, np.maximum(error, 0.0))
