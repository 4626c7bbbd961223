"""Learned levels of activations as the written file has them, among the codes of 8 bits: :class:`LevelCodes`."""

from __future__ import annotations

import torch

Tensor = torch.Tensor
LARGEST_CODE = 255
# One per code, and one on each side for what lies outside of a channel's levels.
PLACES = LARGEST_CODE + 3


class LevelCodes:
    """Which level every code of 8 bits has, and between which levels it lies.

    Places are 0 below the first level of a channel, code + 1 from there to the last one, and 257 above it.

    Args:
        levels: (C, n) float32, every row sorted.

    Attributes:
        codes: (C, n), codes of the levels.
        low: (), what code 0 stands for.
        step: (), between two codes.
        zero: (), code of 0.
        per_unit: (), 1 / step.
    """

    def __init__(self, levels: Tensor) -> None:
        low = levels.min()
        self.step = ((levels.max() - low) / LARGEST_CODE).clamp_min(1e-30)
        self.zero = (-low / self.step).round()
        self.low = -self.zero * self.step
        self.per_unit = 1.0 / self.step
        self.codes = (levels / self.step + self.zero).round_().clamp_(0, LARGEST_CODE)
        self._every = torch.arange(LARGEST_CODE + 1, device=levels.device, dtype=levels.dtype)

    def nearest_codes(self) -> Tensor:
        """Code of the level that is nearest to every code, (C, 256)."""
        middles = (self.codes[:, 1:] + self.codes[:, :-1]) / 2
        every = self._every.expand(len(middles), -1).contiguous()
        return torch.gather(self.codes, 1, torch.searchsorted(middles.contiguous(), every, right=True))

    def nearest(self) -> Tensor:
        """What every place gets, (C, 258)."""
        codes = torch.cat((self.codes[:, :1], self.nearest_codes(), self.codes[:, -1:]), dim=1)
        return (codes - self.zero) * self.step

    def parts(self) -> tuple[Tensor, Tensor]:
        """What a place's gradients mean for the levels: how much of them is added up in which sum.

        Level j gets sum j minus sum j + 1 of its channel: what goes to both levels beside a code adds up to nothing,
        because the simulation follows x between them.

        Returns:
            (C, 258): float32 weights, and int64 numbers of sums, which have n + 1 per channel.
        """
        every = self._every.expand(len(self.codes), -1).contiguous()
        begun = torch.searchsorted(self.codes.contiguous(), every, right=True)
        left = (begun - 1).clamp_(0, self.codes.shape[1] - 2)
        below, above = torch.gather(self.codes, 1, left), torch.gather(self.codes, 1, left + 1)
        share = ((every - below) / (above - below).clamp_min(1e-30)).clamp_(0, 1)
        weights = torch.nn.functional.pad((share >= 0.5).to(share.dtype) - share, (1, 1), value=1.0)
        weights[:, -1] = -1.0
        bins = torch.nn.functional.pad(left + 1, (1, 1))
        bins[:, -1] = self.codes.shape[1]
        return weights, bins + torch.arange(len(bins), device=bins.device)[:, None] * (self.codes.shape[1] + 1)
