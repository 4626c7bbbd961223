"""What a quantizer with a rounding border of its own has beside scale and zero point: :class:`RoundingBorder`.

A quantizer with a border rounds by :func:`postquant.runtime_ops.law_border.border_quantize`, the law of BorderQuantize,
instead of to nearest. Its numbers do not depend on scale and zero point, so that a quantizer may take another scale and
keep its border.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.array_parts import ArrayParts
from postquant.runtime_ops.law_border import Border


@dataclasses.dataclass(frozen=True, eq=False)
class RoundingBorder(ArrayParts):
    """The inputs 3 to 9 of BorderQuantize, in this order; shapes and limits as in :class:`Border`.

    Attributes:
        border: (C, 1) float32, or (C, levels): one per integer part.
        window: (C, kh, kw) int8.
        window_scale: (C,) float32.
        left: (R, C) int8.
        left_scale: (R,) float32.
        right: (C, R) int8.
        right_scale: (C,) float32.
    """

    whole = "a rounding border"

    border: npt.NDArray[np.float32]
    window: npt.NDArray[np.int8]
    window_scale: npt.NDArray[np.float32]
    left: npt.NDArray[np.int8]
    left_scale: npt.NDArray[np.float32]
    right: npt.NDArray[np.int8]
    right_scale: npt.NDArray[np.float32]

    @property
    def channels(self) -> int:
        """C."""
        return len(self.window)

    @property
    def rank(self) -> int:
        """R, 0 where nothing is seen across channels."""
        return len(self.left)

    @property
    def has_window(self) -> bool:
        """Whether a value sees neighbours in its channel."""
        return self.window.shape[1:] != (1, 1)

    def law(self, scale: npt.NDArray[np.float32], zero_point: npt.NDArray[np.integer], qmin: int, qmax: int) -> Border:
        """All numbers of BorderQuantize.

        Args:
            scale: () float32, > 0.
            zero_point: () in ``[qmin, qmax]``.
            qmin: Smallest code, >= 0.
            qmax: Largest code, <= 255.

        Raises:
            ModelError: If the parts do not fit together.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Border(
            scale=np.asarray(scale, np.float32),
            zero_point=np.asarray(zero_point, np.uint8),
            qmin=qmin,
            qmax=qmax,
            **values,
        )
