"""Streaming comparison of two tensors: SQNR, cosine, largest error, agreement of the largest class.

SQNR = 10 log10(sum of x^2 / sum of (y - x)^2)          x reference, y compared; over all samples together
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from postquant.pipeline.report import LARGEST_SQNR_DB

_BLOCK = 1 << 18  # elements converted to float64 at a time


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How one tensor resembles its reference.

    Attributes:
        sqnr_db: Signal to quantization noise ratio in dB, at most 200 (an exact copy).
        cosine: Cosine similarity of all elements of all samples.
        max_abs_error: Largest absolute difference.
        agreement: Share of samples with the same largest class; None where that means nothing.
        elements: Number of elements compared.
    """

    sqnr_db: float
    cosine: float
    max_abs_error: float
    agreement: float | None
    elements: int


class SimilarityMeter:
    """Collects a :class:`Similarity` over samples; holds a few numbers, whatever the number of samples."""

    def __init__(self) -> None:
        self._signal = self._noise = self._power = self._product = 0.0
        self._largest = 0.0
        self._elements = 0
        self._same = self._rows = 0
        self._classes = True

    def add(self, reference: npt.NDArray[Any], compared: npt.NDArray[Any]) -> None:
        """Adds one sample (or batch).

        Args:
            reference: Any shape and numeric type.
            compared: The same shape.

        Raises:
            ValueError: If the shapes differ.
        """
        if reference.shape != compared.shape:
            raise ValueError(f"shape {reference.shape} against {compared.shape}")
        flat, other = reference.reshape(-1), compared.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            x = flat[start : start + _BLOCK].astype(np.float64)
            y = other[start : start + _BLOCK].astype(np.float64)
            error = y - x
            self._signal += float(x @ x)
            self._noise += float(error @ error)
            self._power += float(y @ y)
            self._product += float(x @ y)
            self._largest = max(self._largest, float(np.abs(error).max()))
        self._elements += flat.size
        if reference.ndim == 2 and reference.shape[1] > 1 and np.issubdtype(reference.dtype, np.floating):
            self._same += int((reference.argmax(1) == compared.argmax(1)).sum())
            self._rows += reference.shape[0]
        else:
            self._classes = False

    def result(self) -> Similarity:
        """The similarity so far; of nothing, a perfect one."""
        norm = math.sqrt(self._signal) * math.sqrt(self._power)
        cosine = self._product / norm if norm else float(self._signal == self._power)
        agreement = self._same / self._rows if self._classes and self._rows else None
        return Similarity(
            decibels(self._signal, self._noise), min(1.0, cosine), self._largest, agreement, self._elements
        )


def decibels(signal: float, noise: float) -> float:
    """Signal to noise ratio in dB, within +-200; 200 without noise.

    >>> round(decibels(100.0, 1.0), 3), decibels(1.0, 0.0), decibels(0.0, 1.0)
    (20.0, 200.0, -200.0)
    """
    if noise <= 0.0:
        return LARGEST_SQNR_DB
    if signal <= 0.0:
        return -LARGEST_SQNR_DB
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return -LARGEST_SQNR_DB
    return max(-LARGEST_SQNR_DB, min(LARGEST_SQNR_DB, 10.0 * math.log10(signal / noise)))


def jsonable(value: Any) -> Any:
    """Frozen dataclasses, mappings and tuples as JSON values; six significant digits for floats."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{float(value):.6g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
