"""Error-compensated rounding of weights against second moments (GPTQ, Frantar et al. 2022, also for convolutions).

With ``H = E[x~' x~]`` per group, rounding row k of the (K, M) weight matrix to ``q_k`` changes the output by
``x_k (q_k - w_k)``; the rows that are not rounded yet take up what they can:

    H^-1 = U' U (U upper triangular)      e_k = (w_k - s q_k) / U_kk      w_j -= U_kj e_k  for j > k

All output channels are rounded at once; rows go in the order of falling ``H_kk``, so that the large ones still find
others to compensate for them. Then every code is looked at again, given all others (coordinate descent):

    q_k = nearest(w_k / s - sum_{j != k} H_kj (q_j - w_j / s) / H_kk)

which never raises the output error, whatever the levels are. The scale stays; the caller keeps the result only where
the output error falls.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import scipy.linalg

from postquant.calib.layers import Layer
from postquant.calib.weight_search import WeightProblem, quantize_matrix
from postquant.runtime_ops.quantizer import SMALLEST_SCALE, TensorQuantizer

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
# Integer levels (as float32) nearest to weights in units of their scale.
Nearest = Callable[[FloatArray], FloatArray]

# Share of the mean diagonal added to it, as in GPTQ.
DAMPING = 0.01
# An input with less energy than this share of the largest keeps its nearest codes: nothing hears it.
_SILENT = 1e-9


class Compensation:
    """Rounds weights of one layer against its moments.

    Args:
        moments: (G, K, K) second moments (or covariances) of the inputs.
        block: Rows between two updates of all later rows.
    """

    def __init__(self, moments: npt.NDArray[np.floating], *, block: int = 64) -> None:
        self._moments = moments
        self._block = block
        diagonal = np.einsum("gkk->gk", moments)
        self._order = np.argsort(-diagonal, axis=1, kind="stable")
        self._inverse_order = np.argsort(self._order, axis=1, kind="stable")

    @functools.cached_property
    def _factor(self) -> FloatArray:
        """(G, K, K) upper triangular U of the reordered, damped inverse."""
        groups, depth, _ = self._moments.shape
        factor = np.empty((groups, depth, depth), np.float32)
        for group in range(groups):
            order = self._order[group]
            factor[group] = _factor_of_inverse(self._moments[group][np.ix_(order, order)].astype(np.float64))
        return factor

    @functools.cached_property
    def _permuted(self) -> FloatArray:
        """(G, K, K) float32 moments in the order in which rows go."""
        order = self._order
        rows = np.take_along_axis(self._moments, order[:, :, np.newaxis], axis=1)
        return np.ascontiguousarray(np.take_along_axis(rows, order[:, np.newaxis, :], axis=2), np.float32)

    def round(self, ratio: FloatArray, nearest: Nearest) -> FloatArray:
        """Compensated levels.

        Args:
            ratio: (G, K, M) weights in units of their scale.
            nearest: The format.

        Returns:
            (G, K, M) float32 levels.
        """
        depth, factor = ratio.shape[1], self._factor
        work = self._forth(ratio)
        codes = np.empty_like(work)
        for begin in range(0, depth, self._block):
            end = min(begin + self._block, depth)
            errors = np.empty((work.shape[0], end - begin, work.shape[2]), np.float32)
            for k in range(begin, end):
                codes[:, k] = nearest(work[:, k])
                error = (work[:, k] - codes[:, k]) / factor[:, k, k, np.newaxis]
                work[:, k + 1 : end] -= factor[:, k, k + 1 : end, np.newaxis] * error[:, np.newaxis]
                errors[:, k - begin] = error
            if end < depth:
                work[:, end:] -= np.matmul(factor[:, begin:end, end:].transpose(0, 2, 1), errors)
        return self._back(codes)

    def descend(self, ratio: FloatArray, levels: FloatArray, nearest: Nearest, *, sweeps: int) -> FloatArray:
        """Improves levels one row at a time, each given all others, until nothing changes.

        Args:
            ratio: (G, K, M) weights in units of their scale.
            levels: (G, K, M) start.
            nearest: The format.
            sweeps: At most so many passes over all rows.

        Returns:
            (G, K, M) float32 levels with an output error that is not larger.
        """
        moments = self._permuted
        work, codes = self._forth(ratio), self._forth(levels)
        diagonal = np.einsum("gkk->gk", moments)
        heard = diagonal > _SILENT * diagonal.max(axis=1, keepdims=True, initial=0.0)
        inverse = np.where(heard, 1 / np.where(heard, diagonal, 1), 0).astype(np.float32)
        depth = work.shape[1]
        for _ in range(sweeps):
            gradient = np.matmul(moments, codes - work)
            changed = False
            for begin in range(0, depth, self._block):
                end = min(begin + self._block, depth)
                before = codes[:, begin:end].copy()
                for k in range(begin, end):
                    # Where nothing hears the row, the gradient is 0 and the level stays what it is.
                    found = nearest(codes[:, k] - gradient[:, k] * inverse[:, k, np.newaxis])
                    step = (found - codes[:, k]) * heard[:, k, np.newaxis]
                    if step.any():
                        codes[:, k] += step
                        gradient[:, k:end] += moments[:, k, k:end, np.newaxis] * step[:, np.newaxis]
                moved = codes[:, begin:end] - before
                if moved.any():
                    changed = True
                    if end < depth:
                        gradient[:, end:] += np.matmul(moments[:, end:, begin:end], moved)
            if not changed:
                break
        return self._back(codes)

    def _forth(self, rows: FloatArray) -> FloatArray:
        return np.take_along_axis(rows, self._order[:, :, np.newaxis], axis=1).astype(np.float32)

    def _back(self, rows: FloatArray) -> FloatArray:
        return np.take_along_axis(rows, self._inverse_order[:, :, np.newaxis], axis=1)


def _factor_of_inverse(moments: DoubleArray) -> DoubleArray:
    """``U`` of the damped moments (K, K); the identity, which compensates nothing, where they tell nothing.

    Inputs that never change leave only the rounding noise of a covariance, which need not be positive definite, and
    squares of enormous inputs are infinite.

    Matrices are overwritten, ``moments`` too: a few copies of the largest layer's would be the peak of the whole run.
    LAPACK does so in Fortran's order only, in which the transpose of a symmetric matrix is the matrix itself.
    """
    depth = len(moments)
    if not np.isfinite(moments).all():
        return np.eye(depth)
    moments[np.diag_indices(depth)] += max(DAMPING * float(np.mean(np.diag(moments))), 1e-12)
    try:
        lower = scipy.linalg.cho_factor(moments.T, lower=True, overwrite_a=True)
        inverse = scipy.linalg.cho_solve(lower, np.eye(depth).T, overwrite_b=True)
        del lower
        inverse = inverse + inverse.T
        inverse /= 2
        return np.asarray(scipy.linalg.cholesky(inverse.T, lower=False, overwrite_a=True))
    except np.linalg.LinAlgError:
        return np.eye(depth)


def compensate(layer: Layer, problem: WeightProblem, quantizer: TensorQuantizer) -> TensorQuantizer:
    """Rounds with compensation and refits the scale, in every output channel where that lowers the output error.

    Args:
        layer: The layer.
        problem: Its weights and moments.
        quantizer: The searched quantizer; its scales are the start.

    Returns:
        A quantizer with explicit codes; never worse than the given one on the moments.
    """
    spec = quantizer.spec
    scale = np.ascontiguousarray(layer.per_output(quantizer.scale), np.float32)
    if quantizer.codes is None:
        nearest = quantize_matrix(problem.matrix, scale, spec.qmin, spec.qmax)
    else:
        nearest = layer.matrix(quantizer.codes).astype(np.float32)
    # Where second moments are kept in blocks, errors are compensated within each of them.
    square = problem.moments.square
    by_block = problem.matrix.reshape(*square.shape[:2], -1)
    steps = np.repeat(scale, len(square) // len(scale), axis=0)
    codes = (
        Compensation(square)
        .round(by_block / steps, lambda ratio: np.clip(np.rint(ratio), np.float32(spec.qmin), np.float32(spec.qmax)))
        .reshape(problem.matrix.shape)
    )
    new_scale, free = scale, spec.axis is not None and not spec.power_of_two
    if free:
        inner, norm = problem.products(codes * scale)
        gain = np.where((inner > 0) & (norm > 0), inner / np.maximum(norm, 1e-300), 1.0)
        new_scale = np.maximum(scale * np.clip(gain, 0.5, 2.0)[:, np.newaxis].astype(np.float32), SMALLEST_SCALE)
    better = problem.error(codes * new_scale) < problem.error(nearest * scale)
    if spec.axis is None:
        better = np.full_like(better, problem.error(codes * scale).sum() < problem.error(nearest * scale).sum())
    chosen = np.where(better[:, np.newaxis], codes, nearest)
    if free:
        scales = layer.per_scale(np.where(better[:, np.newaxis], new_scale, scale))
        quantizer = dataclasses.replace(quantizer, scale=scales)
    return dataclasses.replace(quantizer, codes=layer.tensor(chosen).astype(spec.container))
