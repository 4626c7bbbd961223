"""Error-compensated rounding of weights against second moments (GPTQ, Frantar et al. 2022, also for convolutions).

With ``H = E[x~' x~]`` per group, rounding row k of the (K, M) weight matrix to ``q_k`` changes the output by
``x_k (q_k - w_k)``; the rows that are not rounded yet take up what they can:

    H^-1 = U' U (U upper triangular)      e_k = (w_k - s q_k) / U_kk      w_j -= U_kj e_k  for j > k

All output channels are rounded at once; rows go in the order of falling ``H_kk``, so that the large ones still find
others to compensate for them. The scale stays; the caller keeps the result only where the output error falls.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import scipy.linalg

from postquant.calib.layers import Layer
from postquant.calib.weight_search import WeightProblem, quantize_matrix
from postquant.runtime_ops.quantizer import SMALLEST_SCALE, TensorQuantizer

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

# Share of the mean diagonal added to it, as in GPTQ.
DAMPING = 0.01


def compensated_codes(
    matrix: FloatArray, scale: FloatArray, moments: DoubleArray, qmin: int, qmax: int, *, block: int = 64
) -> FloatArray:
    """Integer codes of a weight matrix.

    Args:
        matrix: (G, K, M) float weights.
        scale: (G, 1, M) steps, > 0.
        moments: (G, K, K) second moments (or covariances) of the inputs.
        qmin: Smallest code.
        qmax: Largest code.
        block: Rows between two updates of all later rows.

    Returns:
        (G, K, M) float32 codes, integers in ``[qmin, qmax]``.
    """
    groups, depth, _ = matrix.shape
    diagonal = np.einsum("gkk->gk", moments)
    order = np.argsort(-diagonal, axis=1, kind="stable")
    inverse_order = np.argsort(order, axis=1, kind="stable")
    work = np.take_along_axis(matrix / scale, order[:, :, np.newaxis], axis=1).astype(np.float32)
    factor = np.empty((groups, depth, depth), np.float32)
    for group in range(groups):
        factor[group] = _factor_of_inverse(moments[group][np.ix_(order[group], order[group])])
    codes = np.empty_like(work)
    for begin in range(0, depth, block):
        end = min(begin + block, depth)
        errors = np.empty((groups, end - begin, work.shape[2]), np.float32)
        for k in range(begin, end):
            codes[:, k] = np.clip(np.rint(work[:, k]), qmin, qmax)
            error = (work[:, k] - codes[:, k]) / factor[:, k, k, np.newaxis]
            work[:, k + 1 : end] -= factor[:, k, k + 1 : end, np.newaxis] * error[:, np.newaxis]
            errors[:, k - begin] = error
        if end < depth:
            work[:, end:] -= np.matmul(factor[:, begin:end, end:].transpose(0, 2, 1), errors)
    return np.take_along_axis(codes, inverse_order[:, :, np.newaxis], axis=1)


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
    codes = compensated_codes(by_block, steps, square, spec.qmin, spec.qmax).reshape(problem.matrix.shape)
    new_scale = scale
    if spec.axis is not None:
        inner, norm = problem.products(codes * scale)
        gain = np.where((inner > 0) & (norm > 0), inner / np.maximum(norm, 1e-300), 1.0)
        new_scale = np.maximum(scale * np.clip(gain, 0.5, 2.0)[:, np.newaxis].astype(np.float32), SMALLEST_SCALE)
    better = problem.error(codes * new_scale) < problem.error(nearest * scale)
    if spec.axis is None:
        better = np.full_like(better, problem.error(codes * scale).sum() < problem.error(nearest * scale).sum())
    chosen = np.where(better[:, np.newaxis], codes, nearest)
    if spec.axis is not None:
        scales = layer.per_scale(np.where(better[:, np.newaxis], new_scale, scale))
        quantizer = dataclasses.replace(quantizer, scale=scales)
    return dataclasses.replace(quantizer, codes=layer.tensor(chosen).astype(spec.container))
