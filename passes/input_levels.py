"""Inputs that were integers before preprocessing, and the quantizers that lose nothing of them: :class:`InputGrid`.

    x_c = step_c * p + offset_c,    p = 0 .. levels - 1,    c an index of axis 1

If all channels have the same step and offset, and ``x = 0`` is a level, then one scale (the step) and one zero point
(that level) represent ``x`` exactly. Otherwise ``p`` itself is represented exactly, by scale 1 and zero point 0.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

Vector = npt.NDArray[np.float64]

GRID_LEVELS = 256
# Values this far from the grid, in steps, are still on it: float32 preprocessing is a hundred times as precise.
GRID_TOLERANCE = 0.01

U8 = QuantSpec(8, signed=False, symmetric=False)


@dataclasses.dataclass(frozen=True, eq=False)
class InputGrid:
    """Where the values of an input lie: ``x_c = step_c * p + offset_c`` with integers ``p``.

    Attributes:
        step: (C,) float64, > 0, input units per level, for each index of axis 1.
        offset: (C,) float64, value of the level 0.
        levels: ``p`` is in ``0 .. levels - 1``; 2 to 256.
    """

    step: Vector
    offset: Vector
    levels: int

    def __post_init__(self) -> None:
        if self.step.ndim != 1 or self.step.shape != self.offset.shape:
            raise ValueError(f"a step {self.step.shape} and an offset {self.offset.shape} per channel are needed")
        if not (np.isfinite(self.step).all() and np.isfinite(self.offset).all() and (self.step > 0).all()):
            raise ValueError("steps must be positive, steps and offsets finite")
        if not 2 <= self.levels <= GRID_LEVELS:
            raise ValueError(f"a grid has 2 to {GRID_LEVELS} levels, not {self.levels}")

    @property
    def zeros(self) -> Vector:
        """(C,) float64: the level, in general no integer, that stands for ``x = 0``."""
        return -self.offset / self.step

    @property
    def uniform(self) -> bool:
        """Whether one scale and zero point represent all channels as they are, so that the graph need not change.

        >>> InputGrid(np.full(3, 1 / 255), np.zeros(3), 256).uniform
        True
        >>> InputGrid(np.full(3, 1 / 127.5), -np.ones(3), 256).uniform  # zero is level 127.5
        False
        """
        zeros, step = self.zeros, float(self.step[0])
        drift = float(np.abs(self.step / step - 1).max()) * (self.levels - 1)
        zero = round(float(zeros[0]))
        same = drift <= GRID_TOLERANCE and bool((np.abs(zeros - zero) <= GRID_TOLERANCE).all())
        return same and 0 <= zero < GRID_LEVELS

    def quantizer(self, spec: QuantSpec = U8) -> TensorQuantizer | None:
        """The quantizer that is exact on the input itself (:attr:`uniform`) or on the aligned value; None if none is.

        Args:
            spec: The format that it must have.
        """
        if spec.axis is not None or spec.qmax - spec.qmin + 1 < self.levels:
            return None
        step, zero = (float(self.step[0]), round(float(self.zeros[0]))) if self.uniform else (1.0, 0)
        zero += spec.qmin
        if zero > spec.qmax or (spec.symmetric and zero != (0 if spec.signed else 2 ** (spec.bits - 1))):
            return None
        if spec.power_of_two and np.frexp(step)[0] != 0.5:
            return None
        return TensorQuantizer(spec, np.float32(step), np.int32(zero))  # type: ignore[arg-type]
