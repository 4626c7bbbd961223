"""Learned adaptive steps: :class:`AdaptiveActivation`, a differentiable simulation of AdaptiveQuantize.

ASQ's idea (arXiv 2504.17263), for learning after training: the step of sample n is ``s beta_n``, with one linear layer
of statistics that are standardized over the first batch,

    beta_n = clip(1 + v . (f_n - mean) / deviation, 1/2, 2)

with f the channel means, the standard deviation, the largest magnitude, or some of them. v starts at 0, so that
everything starts as it was, and a penalty keeps beta near 1: a few hundred samples do not determine it. Gradients, with
``r = x / (s beta_n)``: to s and beta_n as to any step (LSQ), summed over the sample; none through the statistics.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from postquant.calib.learn.quantizers import DropMasks, LearnedScale, fake_quantize
from postquant.runtime_ops.adaptive_module import AdaptiveModule
from postquant.runtime_ops.law_adaptive import Feature
from postquant.runtime_ops.quantizer import TensorQuantizer

Tensor = torch.Tensor
BETA_MIN, BETA_MAX = 0.5, 2.0
# Weight of the mean of (beta - 1)^2 against the relative output error.
_PENALTY = 1e-3
# A statistic that hardly varies is not magnified: its deviation counts as at least this share of its mean.
_LEAST_DEVIATION = 0.02


class AdaptiveActivation:
    """One layer's input quantizer with a step per sample.

    Args:
        quantizer: The plan's; it has an adaptive step, that of :func:`neutral_module` where the factor is learned.
        device: Where it is learned.
        learned: Whether the factor is learned; False keeps the network that the plan has.

    Attributes:
        scale: The step at the factor 1.
        weights: (F,): v, leaf.
    """

    def __init__(self, quantizer: TensorQuantizer, device: torch.device, *, learned: bool) -> None:
        module = quantizer.adaptive
        assert module is not None
        self._quantizer, self._features = quantizer, module.features
        self._high = float(quantizer.spec.qmax)
        self.scale = LearnedScale(quantizer, device)
        self.weights = torch.zeros(module.w1.shape[1], device=device, requires_grad=learned)
        self._limits = module.beta_min, module.beta_max
        self._network = [torch.as_tensor(array, device=device) for array in module.network().values()]
        self._learned, self._standardized = learned, False
        self._mean = torch.zeros_like(self.weights)
        self._deviation = torch.ones_like(self.weights)

    def advance(self, share: float) -> None:
        """Told the share of the iterations that are done: nothing changes."""

    @property
    def settled(self) -> bool:
        """Whether a run has given the statistics their mean and deviation, or none is needed."""
        return self._standardized or not self._learned

    def simulate(self, x: Tensor, masks: DropMasks | None, penalties: list[Tensor] | None = None) -> Tensor:
        """``x`` behind the quantizer.

        Args:
            x: (N, C, ...) float32.
            masks: Where they drop, ``x`` stays float.
            penalties: Gets what the factors add to the loss, () float32, mean over the samples.
        """
        beta = self._factor(x).clamp(*self._limits)
        if penalties is not None:
            penalties.append(_PENALTY * (beta - 1).square().mean())
        step = (self.scale.value() * beta).view(-1, *([1] * (x.ndim - 1)))
        return fake_quantize(x, step, 0.0, self._high, None if masks is None else masks.like(x))

    def learned(self) -> TensorQuantizer:
        """The quantizer with the learned step and network."""
        old = self._quantizer.adaptive
        assert old is not None
        if self._learned:
            parts = (self.weights, self._mean, self._deviation)
            weights, mean, deviation = (tensor.detach().cpu().numpy().astype(np.float64) for tensor in parts)
            scaled = weights / deviation
            old = dataclasses.replace(
                old, w1=scaled[np.newaxis].astype(np.float32), b1=np.array([1 - scaled @ mean], np.float32)
            )
        return dataclasses.replace(self._quantizer, scale=self.scale.numpy(), adaptive=old)

    def _factor(self, x: Tensor) -> Tensor:
        """beta in front of its limits, (N,)."""
        with torch.no_grad():
            statistics = self._statistics(x)
            if not self._learned:
                w1, b1, w2, b2 = self._network
                return ((statistics @ w1.T + b1).clamp_min(0) @ w2.T + b2)[:, 0]
            if not self._standardized:
                self._standardized = True
                self._mean = statistics.mean(0)
                spread = statistics.std(0, unbiased=False)
                self._deviation = torch.maximum(spread, _LEAST_DEVIATION * self._mean.abs()).clamp_min(1e-12)
        return 1 + ((statistics - self._mean) / self._deviation) @ self.weights

    def _statistics(self, x: Tensor) -> Tensor:
        """(N, F) in the order of the law."""
        flat, parts = x.flatten(2) if x.ndim > 2 else x[..., np.newaxis], []
        if self._features & Feature.MEANS:
            parts.append(flat.mean(2))
        if self._features & Feature.DEVIATION:
            parts.append(flat.flatten(1).std(1, unbiased=False, keepdim=True))
        if self._features & Feature.MAXIMUM:
            parts.append(flat.abs().amax((1, 2))[:, np.newaxis])
        return torch.cat(parts, 1)


def neutral_module(channels: int, features: Feature) -> AdaptiveModule:
    """The factor 1 for every sample.

    >>> neutral_module(3, Feature.MEANS | Feature.MAXIMUM).w1.shape
    (1, 4)
    """
    count = channels * bool(features & 1) + bool(features & 2) + bool(features & 4)
    return AdaptiveModule(
        w1=np.zeros((1, count), np.float32),
        b1=np.ones(1, np.float32),
        w2=np.ones((1, 1), np.float32),
        b2=np.zeros(1, np.float32),
        features=features,
        beta_min=BETA_MIN,
        beta_max=BETA_MAX,
    )
