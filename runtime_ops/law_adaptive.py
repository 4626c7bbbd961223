"""Quantization with a step per sample that is computed from the sample: AdaptiveQuantize, AdaptiveRequantize.

    f         = [channel means] [standard deviation] [largest magnitude]             of one sample
    beta      = clip(w2 relu(w1 f + b1) + b2, beta_min, beta_max)
    step_out  = step * beta
    codes     = clip(saturate(round_half_even(x / step_out) + zero_point), qmin, qmax)

Everything up to ``beta`` is float64, so that the order of a sum does not show: in the end ``beta`` is rounded to
float32, and two implementations differ only if the float64 value is within about 1e-13 of a rounding boundary of
float32. From there on it is float32, with a true division. One linear layer is the case H = 1, w2 = 1, b2 = 0:
``beta_min`` is positive, so the rectifier changes nothing.

The step follows the adaptive step of ASQ (arXiv 2504.17263), whose only feature are the channel means.
"""

from __future__ import annotations

import dataclasses
import enum
import math

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.errors import ModelError

Wide = npt.NDArray[np.float64]
Real = npt.NDArray[np.float32]


class Feature(enum.IntFlag):
    """Statistics of a sample, in the order in which they are concatenated."""

    MEANS = 1
    DEVIATION = 2
    MAXIMUM = 4


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptiveStep:
    """How a sample's step is computed, and the codes' range.

    Attributes:
        step: () float32, > 0, the step at ``beta`` = 1.
        zero_point: () uint8.
        w1: (H, F) float32, H >= 1, F from :meth:`feature_count`.
        b1: (H,) float32.
        w2: (1, H) float32.
        b2: (1,) float32.
        features: Which statistics.
        beta_min: Smallest ``beta``, > 0.
        beta_max: Largest ``beta``.
        qmin: Smallest code, >= 0.
        qmax: Largest code, <= 255.

    Raises:
        ModelError: If the parts do not fit together.
    """

    step: Real
    zero_point: npt.NDArray[np.uint8]
    w1: Real
    b1: Real
    w2: Real
    b2: Real
    features: Feature
    beta_min: float
    beta_max: float
    qmin: int
    qmax: int

    def __post_init__(self) -> None:
        if not 1 <= int(self.features) <= 7:
            raise ModelError("features is a set of 1, 2 and 4", where="attribute features", found=str(self.features))
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ModelError(
                "the range of beta is wrong",
                where="attributes beta_min and beta_max",
                expected="0 < beta_min <= beta_max",
                found=f"{self.beta_min} and {self.beta_max}",
            )
        check_code_range(self.qmin, self.qmax)
        hidden, count = self.w1.shape if self.w1.ndim == 2 else (0, 0)
        shapes = ((), (), (hidden, count), (hidden,), (1, hidden), (1,))
        names = ("step", "zero_point", "w1", "b1", "w2", "b2")
        for name, shape in zip(names, shapes, strict=True):
            array = getattr(self, name)
            dtype = np.dtype(np.uint8 if name == "zero_point" else np.float32)
            if array.dtype != dtype or array.shape != shape or hidden < 1:
                raise ModelError(
                    "the step's network does not fit together",
                    where=f"input {name}",
                    expected=f"{dtype} of shape {shape}" if hidden else "w1 of shape (H, F) with H >= 1",
                    found=f"{array.dtype} of shape {array.shape}",
                )
        if not (np.isfinite(self.step) and self.step > 0):
            raise ModelError("the step must be finite and positive", where="input step", found=str(self.step))

    def feature_count(self, channels: int) -> int:
        """F, the number of statistics of a sample of ``channels`` channels."""
        return channels * bool(self.features & 1) + bool(self.features & 2) + bool(self.features & 4)

    def steps(self, pooled: Wide) -> Real:
        """The step of each sample.

        Args:
            pooled: (N, F) float64 statistics.

        Returns:
            (N,) float32.
        """
        hidden = np.maximum(pooled @ self.w1.T.astype(np.float64) + self.b1, 0.0)
        raw = hidden @ self.w2.T.astype(np.float64) + self.b2
        lowest, highest = np.float64(np.float32(self.beta_min)), np.float64(np.float32(self.beta_max))
        beta = np.minimum(np.maximum(raw, lowest), highest)[:, 0].astype(np.float32)
        return np.asarray(self.step * beta, np.float32)

    def codes(self, real: Real, steps: Real) -> npt.NDArray[np.uint8]:
        """Codes of ``real`` (N, ...) with one step per sample."""
        ratio = np.asarray(real / steps.reshape(-1, *([1] * (real.ndim - 1))), np.float32)
        zero = np.float32(self.zero_point)
        # Saturate in float first: huge quotients do not fit int32.
        shifted = np.clip(np.rint(ratio), -zero, np.float32(255) - zero).astype(np.int32) + int(self.zero_point)
        return np.clip(shifted, self.qmin, self.qmax).astype(np.uint8)


def check_code_range(qmin: int, qmax: int) -> None:
    """Raises :class:`ModelError` unless ``0 <= qmin < qmax <= 255``."""
    if not 0 <= qmin < qmax <= 255:
        raise ModelError(
            "the range of codes is wrong",
            where="attributes qmin and qmax",
            expected="0 <= qmin < qmax <= 255",
            found=f"{qmin} and {qmax}",
        )


def adaptive_quantize(x: Real, settings: AdaptiveStep) -> tuple[npt.NDArray[np.uint8], Real]:
    """AdaptiveQuantize.

    Args:
        x: (N, C, ...) float32, at least one element per sample.
        settings: Network, range and zero point.

    Returns:
        Codes of the shape of ``x``, and the step of each sample, (N,) float32.

    Raises:
        ModelError: If ``x`` does not fit the network.

    >>> one, none = np.float32([[1]]), np.float32([0])
    >>> s = AdaptiveStep(np.float32(0.5), np.uint8(0), one, none, one, none, Feature.MAXIMUM, 0.5, 2.0, 0, 15)
    >>> codes, steps = adaptive_quantize(np.float32([[1, 0.5], [9, 4]]), s)
    >>> codes.tolist(), steps.tolist()
    ([[2, 1], [9, 4]], [0.5, 1.0])
    """
    pooled = _pooled(x.astype(np.float64), 1.0, settings)
    steps = settings.steps(pooled)
    return settings.codes(x, steps), steps


def adaptive_requantize(
    x: npt.NDArray[np.uint8], x_scale: Real, x_zero_point: npt.NDArray[np.uint8], settings: AdaptiveStep
) -> tuple[npt.NDArray[np.uint8], Real]:
    """AdaptiveRequantize: the sums are integers, hence exact.

    Args:
        x: (N, C, ...) uint8 codes, at least one per sample.
        x_scale: () float32, > 0.
        x_zero_point: () uint8.
        settings: Network, range and zero point of the output.

    Returns:
        Codes of the shape of ``x``, and the step of each sample, (N,) float32.

    Raises:
        ModelError: If ``x`` does not fit the network.
    """
    centered = x.astype(np.int32) - np.int32(x_zero_point)
    pooled = _pooled(centered.astype(np.float64), float(x_scale), settings)
    steps = settings.steps(pooled)
    return settings.codes(np.asarray(centered.astype(np.float32) * x_scale, np.float32), steps), steps


def _pooled(wide: Wide, unit: float, settings: AdaptiveStep) -> Wide:
    """(N, F) statistics of ``wide * unit``; the unit is applied last, so that sums of integers stay integers."""
    if wide.ndim < 2 or 0 in wide.shape[1:]:
        raise ModelError("a sample has channels and no dimension of 0", where="input x", found=f"shape {wide.shape}")
    samples, channels = wide.shape[:2]
    if settings.w1.shape[1] != settings.feature_count(channels):
        raise ModelError(
            "the statistics do not fit w1",
            where="input w1",
            expected=f"{settings.feature_count(channels)} columns",
            found=f"{settings.w1.shape[1]}",
        )
    flat = wide.reshape(samples, channels, math.prod(wide.shape[2:]))
    parts = []
    if settings.features & Feature.MEANS:
        parts.append(flat.sum(axis=2) / flat.shape[2] * unit)
    if settings.features & Feature.DEVIATION:
        count = channels * flat.shape[2]
        mean, square = flat.sum(axis=(1, 2)) / count, (flat * flat).sum(axis=(1, 2)) / count
        parts.append((np.sqrt(np.maximum(square - mean * mean, 0.0)) * unit)[:, None])
    if settings.features & Feature.MAXIMUM:
        parts.append((np.abs(flat).max(axis=(1, 2)) * unit)[:, None])
    return np.concatenate(parts, axis=1)
