"""Error feedback in a differentiable simulation: :class:`FeedbackShift`.

What FeedbackRequantize takes off the codes of a channel before it looks for their levels depends on the rounding of
others: no gradient goes through it, as none goes through rounding. With the same integers as the law
(:mod:`postquant.runtime_ops.law_feedback`), so that what is learned is what is written.
"""

from __future__ import annotations

import numpy as np
import torch

from postquant.calib.learn.level_codes import LARGEST_CODE, LevelCodes
from postquant.calib.learn.native_levels import NativeFeedback
from postquant.runtime_ops.law_feedback import GROUPS, LARGEST_ERROR, LARGEST_SHIFT, Feedback

Tensor = torch.Tensor


class FeedbackShift:
    """The shifts of one activation.

    Args:
        feedback: Groups and coefficients.
        axis: The channels' axis, counted from the last one, -1.
        device: Where.

    Attributes:
        native: The coefficients for the native library, which computes the same.
        cell: The side of the cells whose places are the channels (:mod:`postquant.calib.learn.cells`); 1 for none.
    """

    def __init__(self, feedback: Feedback, axis: int, device: torch.device) -> None:
        order = np.argsort(feedback.group, kind="stable")
        sizes = np.bincount(feedback.group, minlength=GROUPS)

        def tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
            return torch.as_tensor(array.astype(np.float32), device=device)

        self.native = NativeFeedback(feedback)
        self.cell = feedback.cell
        self._axis = axis
        self._order = torch.as_tensor(order, device=device)
        self._back = torch.as_tensor(np.argsort(order), device=device)
        ends = np.cumsum(sizes)
        self._groups = [slice(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True) if size]
        self._left, self._left_scale = tensor(feedback.left[:, order]), tensor(feedback.left_scale)[:, None]
        self._right, self._right_scale = tensor(feedback.right[order]), tensor(feedback.right_scale[order])[:, None]

    def __call__(self, x: Tensor, levels: Tensor, mask: Tensor | None) -> Tensor:
        """What is taken off ``x``, in its units.

        Args:
            x: float32, C channels on the axis.
            levels: (C, n), every row sorted, with a zero.
            mask: Shape of ``x``, 0 where a value stays float: it has no error and is not shifted; all 1 when None.

        Returns:
            The shape of ``x``, without gradient.
        """
        with torch.no_grad():
            grid = LevelCodes(levels)
            nearest = grid.nearest_codes()[self._order]
            codes = (self._split(x) / grid.step + grid.zero).round_().clamp_(0, LARGEST_CODE)
            kept = None if mask is None else self._split(mask)
            shifts = torch.zeros_like(codes)
            total = codes.new_zeros(len(self._left), codes.shape[1])
            for index, group in enumerate(self._groups):
                own = codes[group]
                if index:
                    inner = (total * self._left_scale).round_().clamp_(-LARGEST_ERROR, LARGEST_ERROR)
                    shift = (self._right[group] @ inner).mul_(self._right_scale[group]).round_()
                    shifts[group] = shift.clamp_(-LARGEST_SHIFT, LARGEST_SHIFT)
                place = (own - shifts[group]).clamp_(0, LARGEST_CODE).long()
                error = (torch.gather(nearest[group], 1, place) - own).clamp_(-LARGEST_ERROR, LARGEST_ERROR)
                if kept is not None:
                    error.mul_(kept[group])
                if index + 1 < len(self._groups):
                    total.addmm_(self._left[:, group], error)
            if kept is not None:
                shifts.mul_(kept)
            return self._join(shifts.mul_(grid.step), x)

    def _split(self, x: Tensor) -> Tensor:
        """(C, positions), in the order of the groups."""
        return x.movedim(self._axis, 0).reshape(x.shape[self._axis], -1)[self._order]

    def _join(self, values: Tensor, like: Tensor) -> Tensor:
        """The inverse, in the memory order of another tensor."""
        moved = like.movedim(self._axis, 0)
        result = torch.empty_like(like)
        result.copy_(values[self._back].view(moved.shape).movedim(0, self._axis))
        return result
