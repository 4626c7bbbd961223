"""Finds out that float inputs were 8-bit images: :func:`find_grids`.

Preprocessing maps the 256 values of a channel to ``x = step * p + offset``. Whatever step and offset are, the distinct
values of a channel then lie on an arithmetic grid of at most 256 levels. With the smallest and the largest of them at
levels 0 and S,

    p = S (x - min) / (max - min)    must be close to an integer for every x

and the smallest S up to 255 for which that holds is the grid; least squares over all distinct values then gives step
and offset. Noise, features and images resized in float have no such S.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from postquant.calib.source import CalibrationSource
from postquant.passes.input_levels import GRID_LEVELS, GRID_TOLERANCE, InputGrid

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

# Fewer distinct values lie on some grid by chance, or say too little about the values still to come.
_FEWEST_LEVELS = 16
# float32 preprocessing may give one level several values, depending on the kernel that computed it.
_MOST_VALUES = 4096
# More entries along axis 1 are no channels; they are looked at together.
_MOST_CHANNELS = 16
_IMAGE_RANK = 4


def find_grids(source: CalibrationSource, names: Iterable[str]) -> dict[str, InputGrid]:
    """The grids of image inputs.

    Every sample is read once; memory does not depend on their number.

    Args:
        source: Calibration data.
        names: Inputs to look at; only float32 inputs of rank 4, (N, C, H, W), can be found on a grid.

    Returns:
        Input name -> grid, for the inputs that have one. Steps and offsets are per index of axis 1. Where all channels
        share a grid that one scale and zero point represent, it is :attr:`InputGrid.uniform`.
    """
    seen = {name: _Values() for name in names}
    for sample in source:
        for name, values in list(seen.items()):
            array = sample.get(name)
            if array is None or array.dtype != np.float32 or array.ndim != _IMAGE_RANK or not values.update(array):
                del seen[name]
        if not seen:
            break
    grids = {name: values.grid() for name, values in seen.items()}
    return {name: grid for name, grid in grids.items() if grid is not None}


class _Values:
    """The distinct values of each channel of one input."""

    def __init__(self) -> None:
        self._channels = 0
        self._distinct: list[FloatArray] = []

    def update(self, array: npt.NDArray[np.generic]) -> bool:
        """Adds (N, C, H, W); whether the input may still be on a grid."""
        channels = array.shape[1]
        if not self._distinct:
            self._channels = channels
            self._distinct = [np.zeros(0, np.float32)] * (channels if channels <= _MOST_CHANNELS else 1)
        if channels != self._channels:
            return False
        parts = [array] if len(self._distinct) == 1 else [array[:, c] for c in range(channels)]
        for index, part in enumerate(parts):
            merged = np.union1d(self._distinct[index], np.asarray(part, np.float32))
            if len(merged) > _MOST_VALUES:
                return False
            self._distinct[index] = merged
        return True

    def grid(self) -> InputGrid | None:
        """The grid of everything that was added; None where there is none."""
        if not self._distinct:
            return None
        together = _fit(np.unique(np.concatenate(self._distinct)).astype(np.float64))
        if together is not None:
            fits = [together] * self._channels
        else:
            each = [_fit(values.astype(np.float64)) for values in self._distinct]
            fits = [fit for fit in each if fit is not None]
            if len(fits) < self._channels:
                return None
        step, offset = (np.array([fit[i] for fit in fits], np.float64) for i in (0, 1))
        return InputGrid(step, offset, max(fit[2] for fit in fits))


def _fit(values: DoubleArray) -> tuple[float, float, int] | None:
    """Step, offset and number of levels (from 0 to the largest one seen) of sorted distinct values."""
    if len(values) < _FEWEST_LEVELS:
        return None
    spans = np.arange(_FEWEST_LEVELS - 1, GRID_LEVELS)
    unit = (values - values[0]) / (values[-1] - values[0])
    for span in spans:
        levels = np.rint(unit * span)
        if np.abs(unit * span - levels).max() <= GRID_TOLERANCE:
            break
    else:
        return None
    if len(np.unique(levels)) < _FEWEST_LEVELS:
        return None
    step, lowest = np.polynomial.Polynomial.fit(levels, values, 1, domain=[-1, 1], window=[-1, 1]).coef[::-1]
    first = _first_level(float(lowest / step), int(span))
    return float(step), float(lowest - first * step), first + int(span) + 1


def _first_level(lowest: float, span: int) -> int:
    """The level, 0 .. 255 - span, of the smallest value that was seen.

    Photographs hold both 0 and 255, which leaves no choice. Where they do not, 0 is at ``x = 0`` if that is the grid's
    natural end (raw pixels, pixels / 255), or else as many unseen levels are left below as above.

    Args:
        lowest: The smallest value, in steps.
        span: Number of steps from the smallest to the largest value.
    """
    spare = GRID_LEVELS - 1 - span
    nearest = round(lowest)
    if abs(lowest - nearest) <= GRID_TOLERANCE and 0 <= nearest <= spare:
        return nearest
    return spare // 2
