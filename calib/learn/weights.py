"""What is learned of a weight: codes and scales, as a differentiable simulation of the law.

Codes are levels of a grid: integers, or the entries of a code book's table. There are two ways to learn them.

*Between neighbours* (:class:`NeighbourRounding`; AdaRound, Nagel et al. 2020). A weight lies between two neighbouring
levels ``lo`` and ``hi``, and the variable V decides between them; a regulariser drives h to 0 or 1:

    h = clip(1.2 sigmoid(V) - 0.1, 0, 1)        w~ = s (lo + h (hi - lo))

*Freely* (:class:`FreeRounding`; as AdaQuant, Hubara et al. 2020). A latent weight u, in units of the mean gap between
levels, is rounded to the nearest level c in every step, and gradients g pass through the rounding. It can reach any
level. Alone, that never rests: any g, however small, pushes u over the edge in the end, where the loss is higher and
pushes it back. A spring holds u at its level, as stiff as the loss bends there (h = d2L/du2, estimated once):

    L + damping * sum of h (u - c)^2 / 2

At rest ``u = c - g / (damping * h)``: with damping 1, u is where Newton's method would move that weight alone, and it
changes its code only where that lies nearer to another level.

Either starts at the codes that the plan has: those have seen the second moments of the layer's inputs. The scale of
every channel is learned beside the codes (Genie, Jeon et al. 2023).
"""

from __future__ import annotations

import abc
import dataclasses
import itertools

import numpy as np
import numpy.typing as npt
import torch

from postquant.calib.learn.pieces import pieces
from postquant.calib.learn.quantizers import LearnedScale
from postquant.calib.learn.recipe import Rounding
from postquant.runtime_ops.law import along_axis
from postquant.runtime_ops.quantizer import TensorQuantizer

Tensor = torch.Tensor
FloatArray = npt.NDArray[np.float32]

# The rectified sigmoid reaches 0 and 1 at finite V (Louizos et al. 2018).
_GAMMA, _ZETA = -0.1, 1.1
# h starts so far from the float weight's place between its neighbours towards the plan's code.
_TOWARDS_CODE = 0.8
# A latent weight starts at least so far, in mean gaps, from where its code would change.
_MARGIN = 0.2


class WeightQuantizer(abc.ABC):
    """Codes and scales of one weight.

    Args:
        weight: The float weight, any shape.
        quantizer: The plan's.
        device: Where it is learned.

    Attributes:
        variable: What the codes follow from, the shape of the weight; the optimizer sees it.
        scale: The scale of every channel, or of the tensor.
        stiffness: Second derivative of the loss along the variable, of its shape; 0 until somebody sets it.
    """

    variable: Tensor
    stiffness: Tensor

    def __init__(self, weight: FloatArray, quantizer: TensorQuantizer, device: torch.device) -> None:
        spec = quantizer.spec
        self._quantizer = quantizer
        self._point = int(np.max(quantizer.zero_point, initial=0))
        self._shape = [1] * weight.ndim
        if spec.axis is not None:
            self._shape[spec.axis] = -1
        self.stiffness = torch.zeros((), device=device)
        self.scale = LearnedScale(quantizer, device)

    @abc.abstractmethod
    def levels(self) -> Tensor:
        """The level of every weight, counted from the zero point, without gradient."""

    @abc.abstractmethod
    def relaxed(self) -> Tensor:
        """What stands for the levels while they are learned; differentiable."""

    @abc.abstractmethod
    def regulariser(self, beta: float) -> Tensor:
        """What the loss gets for codes that are far from a decision, () float32; ``beta`` >= 2 is an exponent."""

    def simulate(self, *, hard: bool) -> Tensor:
        """The weight that the layer computes with; ``hard`` takes the final levels."""
        levels = self.levels() if hard else self.relaxed()
        return levels * self.scale.value().view(self._shape)

    def learned(self) -> TensorQuantizer:
        """The quantizer with learned codes and scales."""
        levels = np.rint(self.levels().cpu().numpy()).astype(np.int32)
        codes = (levels + self._point).astype(self._quantizer.spec.container)
        return dataclasses.replace(self._quantizer, scale=self.scale.numpy(), codes=codes)


class NeighbourRounding(WeightQuantizer):
    """Decides between two neighbouring levels; arguments as for :class:`WeightQuantizer`."""

    def __init__(self, weight: FloatArray, quantizer: TensorQuantizer, device: torch.device) -> None:
        super().__init__(weight, quantizer, device)
        grid, ratio, codes = _grid(quantizer), _ratio(weight, quantizer), _codes(weight, quantizer)
        # The pair holds the plan's code, and the level next to it on the side of the float weight.
        at = np.searchsorted(grid, codes)
        lower = np.clip(np.where(ratio >= codes, at, at - 1), 0, len(grid) - 2)
        low, high = grid[lower], grid[lower + 1]
        place = np.clip((ratio - low) / (high - low), 0, 1)
        share = _TOWARDS_CODE * (codes > low) + (1 - _TOWARDS_CODE) * place
        soft = (np.clip(share, 0.01, 0.99) - _GAMMA) / (_ZETA - _GAMMA)
        self._low = _tensor(low, device)
        self._gap = _tensor(high - low, device)
        self.variable = _tensor(np.log(soft / (1 - soft)), device).requires_grad_()

    def levels(self) -> Tensor:
        """The nearer of the two."""
        return self._low + (self.variable.detach() >= 0).float() * self._gap

    def relaxed(self) -> Tensor:
        """Between the two."""
        return self._low + self._h() * self._gap

    def regulariser(self, beta: float) -> Tensor:
        """``sum of 1 - |2 h - 1|^beta``: zero when every h is 0 or 1."""
        return (1 - (2 * self._h() - 1).abs().pow(beta)).sum()

    def _h(self) -> Tensor:
        return (torch.sigmoid(self.variable) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


class FreeRounding(WeightQuantizer):
    """Rounds a latent weight; arguments as for :class:`WeightQuantizer`."""

    def __init__(self, weight: FloatArray, quantizer: TensorQuantizer, device: torch.device) -> None:
        super().__init__(weight, quantizer, device)
        grid, ratio, codes = _grid(quantizer), _ratio(weight, quantizer), _codes(weight, quantizer)
        self._unit = float(grid[-1] - grid[0]) / (len(grid) - 1)
        self._ends = (float(grid[0]), float(grid[-1])) if np.all(np.diff(grid) == 1) else None
        middles = (grid[1:] + grid[:-1]) / 2
        bounds = np.concatenate([grid[:1] - self._unit / 2, middles, grid[-1:] + self._unit / 2])
        at = np.searchsorted(grid, codes)
        low, high = bounds[at], bounds[at + 1]
        margin = np.minimum(_MARGIN * self._unit, (high - low) * 0.49)
        self._grid: list[float] = grid.tolist()
        self._middles: list[float] = middles.tolist()
        start = np.clip(ratio, low + margin, high - margin)
        self.variable = _tensor(start / self._unit, device).requires_grad_()

    def levels(self) -> Tensor:
        """The nearest level; the one above in the middle."""
        latent = self.variable.detach() * self._unit
        if self._ends is not None:  # whole numbers; every step is exact, which adding 1/2 to latent weights is not
            return latent.mul_(2).floor_().add_(1).mul_(0.5).floor_().clamp_(*self._ends)
        return _nearest_of_few(latent, self._grid, self._middles)

    def relaxed(self) -> Tensor:
        """The nearest level, with the latent weight's gradient."""
        latent = self.variable * self._unit
        return latent + (self.levels() - latent).detach()

    def regulariser(self, beta: float) -> Tensor:
        """The springs: ``sum of h (u - c)^2 / 2``."""
        del beta
        return 0.5 * (self.stiffness * (self.variable - self.levels() / self._unit).square()).sum()


def _nearest_of_few(latent: Tensor, grid: list[float], middles: list[float]) -> Tensor:
    """The nearest level, float32; the one above in the middle.

    Args:
        latent: Any shape, float32.
        grid: Rising whole numbers, whose differences add up without rounding. Tables have 16 at most: a comparison with
            each, in the cache, takes a quarter of the time of a binary search for every weight.
        middles: Between each level and the next.
    """
    nearest = torch.full_like(latent, grid[0])
    for values, levels in pieces(latent, nearest):
        for middle, (below, above) in zip(middles, itertools.pairwise(grid), strict=True):
            levels.add_(torch.ge(values, middle, out=torch.empty_like(values)), alpha=above - below)
    return nearest


def weight_quantizer(
    rounding: Rounding, weight: FloatArray, quantizer: TensorQuantizer, device: torch.device
) -> WeightQuantizer:
    """The learner of one weight; the other arguments are those of :class:`WeightQuantizer`."""
    kind = NeighbourRounding if rounding is Rounding.NEIGHBOURS else FreeRounding
    return kind(weight, quantizer, device)


def _grid(quantizer: TensorQuantizer) -> FloatArray:
    """All levels, sorted, counted from the zero point; at least two."""
    spec = quantizer.spec
    if quantizer.table is not None:
        return np.unique(quantizer.table).astype(np.float32)
    point = int(np.max(quantizer.zero_point, initial=0))
    return np.arange(spec.qmin - point, spec.qmax - point + 1).astype(np.float32)


def _ratio(weight: FloatArray, quantizer: TensorQuantizer) -> FloatArray:
    return np.asarray(weight / along_axis(quantizer.scale, weight.ndim, quantizer.spec.axis), np.float32)


def _codes(weight: FloatArray, quantizer: TensorQuantizer) -> FloatArray:
    """The plan's levels, counted from the zero point."""
    codes = quantizer.quantize(weight) if quantizer.codes is None else quantizer.codes
    return codes.astype(np.float32) - np.float32(np.max(quantizer.zero_point, initial=0))


def _tensor(values: npt.NDArray[np.floating], device: torch.device) -> Tensor:
    return torch.as_tensor(values.astype(np.float32), device=device)
