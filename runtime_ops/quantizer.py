"""A :class:`QuantSpec` with its numbers: :class:`TensorQuantizer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops import law
from postquant.runtime_ops.adaptive_module import AdaptiveModule
from postquant.runtime_ops.code_book import CodeBook, nearest_codes, nearest_levels, post_table, table_rows
from postquant.runtime_ops.law_adaptive import adaptive_quantize
from postquant.runtime_ops.law_border import border_quantize
from postquant.runtime_ops.law_feedback import Feedback, feedback_levels
from postquant.runtime_ops.rounding_border import RoundingBorder
from postquant.runtime_ops.spec import QuantSpec, Rounding

T = TypeVar("T", bound=np.generic)

# A step never gets smaller than this: a constant-zero tensor or channel still has a valid, harmless scale.
SMALLEST_SCALE = np.float32(1e-30)


def scale_and_zero_point(
    spec: QuantSpec, low: npt.ArrayLike, high: npt.ArrayLike
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Scale and zero point whose codes span ``[low, high]``, widened to contain 0, for many ranges at once.

    Args:
        spec: The format; its axis plays no part.
        low: Any shape, smallest value to represent.
        high: The shape of ``low``, largest value to represent.

    Returns:
        The scale (float32, > 0) and the zero point (int32), each of the shape of ``low``.
    """
    lo = np.minimum(np.asarray(low, np.float64), 0.0)
    hi = np.maximum(np.asarray(high, np.float64), 0.0)
    if spec.symmetric:
        top = np.maximum(-lo, hi)
        middle = 0 if spec.signed else 2 ** (spec.bits - 1)
        scale = top / (spec.qmax - middle)
        zero = np.full(scale.shape, middle)
        scale = np.maximum(scale, SMALLEST_SCALE)
        if spec.power_of_two:
            scale = 2.0 ** np.ceil(np.log2(scale))
    else:
        scale = np.maximum((hi - lo) / (spec.qmax - spec.qmin), SMALLEST_SCALE)
        if spec.power_of_two:
            scale = 2.0 ** np.ceil(np.log2(scale))
        zero = np.clip(np.rint(spec.qmin - lo / scale), spec.qmin, spec.qmax)
    return scale.astype(np.float32), zero.astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class TensorQuantizer:
    """Scale and zero point (and, for a weight with chosen rounding, the codes) of one tensor.

    Attributes:
        spec: The format.
        scale: () or (C,) float32, > 0, units of the tensor per step.
        zero_point: () or (C,) int32 within ``[spec.qmin, spec.qmax]``.
        codes: int8/uint8 codes of the weight when rounding is not nearest, else None; levels where there is a table.
        table: (2**bits,) sorted levels of a code book, int8 of a weight or uint8 of an activation; None for uniform
            codes. That of POST is filled in. (C, 2**bits), C > 1, where an activation's channels have their own.
        border: Rounds an unsigned activation of at most 8 bits otherwise than to nearest; None for nearest.
        adaptive: Gives such an activation, with the zero point 0, a step per sample: ``scale`` times a factor.
        table_axis: Axis of the activation's channels, counted from the last one, -1, where the table has a row for
            each; else None.
        feedback: How these channels make up for each other's errors; None where each is rounded to its nearest level.
        copies: Of how many copies of the channels, one behind the other, the rows and the feedback are: as many as the
            tensor has readers that make up for each other's errors; 1 where they all read the same codes.
        copy: The copy that this reader reads.
    """

    spec: QuantSpec
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int32]
    codes: npt.NDArray[np.integer] | None = None
    table: npt.NDArray[Any] | None = None
    border: RoundingBorder | None = None
    adaptive: AdaptiveModule | None = None
    table_axis: int | None = None
    feedback: Feedback | None = None
    copies: int = 1
    copy: int = 0

    def __post_init__(self) -> None:
        scale = np.asarray(self.scale, np.float32)
        zero_point = np.asarray(self.zero_point, np.int32)
        if scale.shape != zero_point.shape or scale.ndim != (0 if self.spec.axis is None else 1):
            raise ValueError(f"scale {scale.shape} and zero point {zero_point.shape} do not fit {self.spec}")
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError("scales must be finite and positive")
        if (zero_point < self.spec.qmin).any() or (zero_point > self.spec.qmax).any():
            raise ValueError(f"zero point outside [{self.spec.qmin}, {self.spec.qmax}]")
        if zero_point.any() and self.spec.has_table and self.spec.signed:
            raise ValueError("signed codes of a table have the zero point 0")
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero_point)
        object.__setattr__(self, "table", _table(self.spec, self.table, self.table_axis))
        rows = 0 if self.table is None or self.table_axis is None else len(self.table)
        if self.feedback is not None and rows != self.feedback.channels:
            raise ValueError(f"an error feedback of {self.feedback.channels} channels for {rows} rows of levels")
        if not 0 <= self.copy < self.copies or (self.copies > 1 and (not rows or rows % self.copies)):
            raise ValueError(f"copy {self.copy} of {self.copies} for {rows} rows of levels")
        if self.border is not None:
            if self.spec.signed or self.spec.bits > 8 or self.spec.axis is not None or self.codes is not None:
                raise ValueError("a rounding border exists only for unsigned activations of at most 8 bits")
            self.border.law(scale, zero_point, self.spec.qmin, self.spec.qmax)
        if self.adaptive is not None:
            plain = self.border is None and self.codes is None and self.spec.axis is None and not zero_point
            if self.spec.signed or self.spec.bits > 8 or not plain:
                raise ValueError("an adaptive step exists only for unsigned activations with the zero point 0")
            self.adaptive.law(scale, zero_point, self.spec.qmin, self.spec.qmax)

    @property
    def whole(self) -> TensorQuantizer:
        """The quantizer of all copies of a tensor together, concatenated along the axis of the channels."""
        return self if self.copies == 1 else dataclasses.replace(self, copies=1, copy=0)

    @classmethod
    def from_range(cls, spec: QuantSpec, low: npt.ArrayLike, high: npt.ArrayLike) -> TensorQuantizer:
        """The quantizer whose codes span ``[low, high]``, widened to contain 0.

        Args:
            spec: The format.
            low: () or (C,) smallest value to represent.
            high: () or (C,) largest value to represent.

        >>> q = TensorQuantizer.from_range(QuantSpec(8, signed=False, symmetric=False), -1.0, 4.1)
        >>> float(q.scale), int(q.zero_point)
        (0.019999999552965164, 50)
        """
        return cls(spec, *scale_and_zero_point(spec, low, high))

    def range(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The smallest and the largest representable value."""
        if self.table is not None and not self.spec.signed:
            return self.dequantize(self.table.min()), self.dequantize(self.table.max())
        low = (self.spec.qmin - self.zero_point).astype(np.float32) * self.scale
        high = (self.spec.qmax - self.zero_point).astype(np.float32) * self.scale
        return low, high

    def quantize(self, x: npt.NDArray[np.floating]) -> npt.NDArray[np.integer]:
        """Codes of ``x`` in the spec's container type (:func:`postquant.runtime_ops.law.quantize`).

        With a table: its nearest levels (:func:`postquant.runtime_ops.code_book.nearest_levels`, for activations
        :func:`postquant.runtime_ops.code_book.nearest_codes` of codes of 8 bits; a whole tensor where every channel has
        a row). With a border:
        :func:`postquant.runtime_ops.law_border.border_quantize`, which wants a whole tensor. With an adaptive step:
        :func:`postquant.runtime_ops.law_adaptive.adaptive_quantize`, which wants whole samples.
        """
        if self.table is not None:
            return self._levels(x)
        if self.border is not None:
            numbers = self.border.law(self.scale, self.zero_point, self.spec.qmin, self.spec.qmax)
            return border_quantize(np.asarray(x, np.float32), numbers)
        if self.adaptive is not None:
            return self._adapted(self.adaptive, x)[0]
        return self._apply(law.quantize, x).astype(self.spec.container)

    def dequantize(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Values of ``codes`` (:func:`postquant.runtime_ops.law.dequantize`).

        Raises:
            ValueError: If the step is adaptive: codes alone do not tell it.
        """
        if self.adaptive is not None:
            raise ValueError("codes of an adaptive step have no values without the steps of their samples")
        return law.dequantize(codes, self.scale, self.zero_point, axis=self.spec.axis)

    def simulate(self, x: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """``dequantize(quantize(x))``, or the chosen codes' values when the quantizer holds codes."""
        if self.codes is not None:
            return self.dequantize(self.codes)
        if self.table is not None:
            return self.dequantize(self._levels(x))
        if self.border is not None:
            return self.dequantize(self.quantize(x))
        if self.adaptive is not None:
            codes, steps = self._adapted(self.adaptive, x)
            return np.asarray(codes.astype(np.float32) * steps.reshape(-1, *([1] * (x.ndim - 1))), np.float32)
        return self._apply(law.simulate, x)

    def _adapted(
        self, module: AdaptiveModule, x: npt.NDArray[np.floating]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        numbers = module.law(self.scale, self.zero_point, self.spec.qmin, self.spec.qmax)
        return adaptive_quantize(np.asarray(x, np.float32), numbers)

    def _levels(self, x: npt.NDArray[np.floating]) -> npt.NDArray[np.integer]:
        assert self.table is not None
        if self.copies > 1:
            assert self.table_axis is not None
            together = self.whole.quantize(np.concatenate([x] * self.copies, axis=self.table_axis))
            copies: list[npt.NDArray[np.integer]] = np.split(together, self.copies, axis=self.table_axis)
            return copies[self.copy]
        if not self.spec.signed:
            codes, nearest = self._apply(law.quantize, x).astype(np.uint8), nearest_codes(self.table)
            if self.table_axis is None:
                return nearest[codes]
            if codes.ndim < -self.table_axis or codes.shape[self.table_axis] != len(nearest):
                raise ValueError(f"a tensor {codes.shape} has no {len(nearest)} channels on axis {self.table_axis}")
            if self.feedback is not None:
                return feedback_levels(codes, nearest, self.feedback, self.table_axis)
            return np.take(nearest, table_rows(len(nearest), self.table_axis) + codes)
        scale = law.along_axis(self.scale, x.ndim, self.spec.axis)
        return nearest_levels(np.asarray(x, np.float32) / scale, self.table)

    def _apply(self, function: Callable[..., npt.NDArray[T]], x: npt.NDArray[np.floating]) -> npt.NDArray[T]:
        """``function`` of ``x`` and all numbers: one of the laws that share their arguments."""
        return function(
            x,
            self.scale,
            self.zero_point,
            qmin=self.spec.qmin,
            qmax=self.spec.qmax,
            axis=self.spec.axis,
            half_away=self.spec.rounding is Rounding.HALF_AWAY,
        )


def _table(spec: QuantSpec, table: npt.NDArray[Any] | None, axis: int | None) -> npt.NDArray[Any] | None:
    """The table that belongs to a spec.

    Raises:
        ValueError: If it is missing, or is not that of the spec.
    """
    if axis is not None and (axis >= 0 or not spec.has_table or spec.signed):
        raise ValueError("only a code book of an activation has rows for channels, on an axis that is negative")
    if not spec.has_table:
        if table is not None:
            raise ValueError("uniform codes have no table")
        return None
    if spec.code_book is CodeBook.POST:
        if table is not None and not np.array_equal(table, post_table(spec.bits)):
            raise ValueError("the POST lattice has a table of its own")
        return post_table(spec.bits)
    count, rank = 1 << spec.bits, 1 if axis is None else 2
    fits = table is not None and table.ndim == rank and table.shape[-1] == count and (rank == 1 or len(table) > 1)
    if table is None or not fits or table.dtype != np.dtype(spec.container):
        rows = "" if axis is None else " for each of two and more channels"
        raise ValueError(f"a learned code book of {spec.bits} bits needs {count} {spec.container} levels{rows}")
    if (np.diff(table.astype(np.int16)) < 0).any():
        raise ValueError("the levels of a table are sorted")
    return table
