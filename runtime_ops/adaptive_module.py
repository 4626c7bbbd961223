"""What a quantizer with a step per sample has beside step and zero point: :class:`AdaptiveModule`.

Its step is that of :func:`postquant.runtime_ops.law_adaptive.adaptive_quantize`, the law of AdaptiveQuantize: the fixed
step times a factor ``beta`` that a tiny network computes from statistics of the sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.law_adaptive import AdaptiveStep, Feature


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptiveModule:
    """The inputs 3 to 6 of AdaptiveQuantize, and its attributes but the range of codes.

    Attributes:
        w1: (H, F) float32.
        b1: (H,) float32.
        w2: (1, H) float32.
        b2: (1,) float32.
        features: Which statistics of a sample it sees.
        beta_min: Smallest factor, > 0.
        beta_max: Largest factor.
    """

    w1: npt.NDArray[np.float32]
    b1: npt.NDArray[np.float32]
    w2: npt.NDArray[np.float32]
    b2: npt.NDArray[np.float32]
    features: Feature
    beta_min: float
    beta_max: float

    def network(self) -> dict[str, npt.NDArray[np.float32]]:
        """The arrays by name, in the order of the operator's inputs."""
        return {name: np.ascontiguousarray(getattr(self, name), np.float32) for name in ("w1", "b1", "w2", "b2")}

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as arrays by name; :meth:`from_arrays` reads them back."""
        numbers = np.array([int(self.features), self.beta_min, self.beta_max], np.float64)
        return {**self.network(), "numbers": numbers}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> AdaptiveModule:
        """The inverse of :meth:`arrays`.

        Raises:
            ModelError: If an array is missing.
        """
        missing = [name for name in ("w1", "b1", "w2", "b2", "numbers") if name not in arrays]
        if missing:
            raise ModelError("a part of an adaptive step is missing", where=missing[0])
        features, low, high = arrays["numbers"].tolist()
        network = {name: arrays[name] for name in ("w1", "b1", "w2", "b2")}
        return cls(**network, features=Feature(int(features)), beta_min=low, beta_max=high)

    def law(
        self, scale: npt.NDArray[np.float32], zero_point: npt.NDArray[np.integer], qmin: int, qmax: int
    ) -> AdaptiveStep:
        """All numbers of AdaptiveQuantize.

        Args:
            scale: () float32, > 0, the step at the factor 1.
            zero_point: () in ``[qmin, qmax]``.
            qmin: Smallest code, >= 0.
            qmax: Largest code, <= 255.

        Raises:
            ModelError: If the parts do not fit together.
        """
        return AdaptiveStep(
            step=np.asarray(scale, np.float32),
            zero_point=np.asarray(zero_point, np.uint8),
            **self.network(),
            features=self.features,
            beta_min=self.beta_min,
            beta_max=self.beta_max,
            qmin=qmin,
            qmax=qmax,
        )
