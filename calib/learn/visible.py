"""What the readers of a tensor see of its errors: :class:`Visible`, :func:`visible_part`.

Where every reader of a value y reads it through a quantizer, the narrowest of these ranges ``[low, high]`` is what they
have in common. With ``y`` from the float network and ``y'`` from the quantized one, the error is

    e = y' - y                      low < y < high
        min(y' - high, 0)           high <= y
        max(y' - low, 0)            y <= low

Networks without normalization between their blocks have a few values that are far larger than the others (the ends of
MobileNetV2's late blocks: one value in a hundred holds four fifths of the squared error at 4 bits). They are clipped
wherever they are read at a low width, and a loss that counts them learns nothing else (docs/learning.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from postquant.calib.learn.pieces import pieces
from postquant.calib.learn.read_keys import integer_nodes, stored_key
from postquant.passes.plan import QuantPlan

Tensor = torch.Tensor
# The smallest difference of two float32 of usual size, times this, is larger than any error.
_BEYOND = 1e30


@dataclasses.dataclass(frozen=True)
class Visible:
    """The part of a tensor's values that all of its readers can tell apart.

    Attributes:
        low: Smaller values are like this one; -inf where all count.
        high: Larger values are like this one, >= low; inf where all count.
    """

    low: float = -math.inf
    high: float = math.inf

    @property
    def limited(self) -> bool:
        """Whether something is not seen."""
        return math.isfinite(self.low) or math.isfinite(self.high)

    def clip(self, x: Tensor) -> Tensor:
        """What is seen of ``x``."""
        return x.clamp(self.low, self.high) if self.limited else x

    def error(self, got: Tensor, wanted: Tensor) -> Tensor:
        """e of the module docstring, of any shape, differentiable.

        >>> Visible(-1.0, 2.0).error(torch.tensor([5.0, 1.5, 5.0]), torch.tensor([3.0, 3.0, 1.0])).tolist()
        [0.0, -0.5, 4.0]
        """
        found: Tensor = _error(got, wanted, self)
        return found

    def squares(self, got: Tensor, wanted: Tensor) -> Tensor:
        """Sum of e squared, (), differentiable."""
        found: Tensor = _squares(got, wanted, self)
        return found


def _errors(got: Tensor, wanted: Tensor, visible: Visible) -> Tensor:
    """e of the module docstring.

    Comparisons and choices, and what torch makes of their gradients, take longer than a block's convolutions: this is
    arithmetic, on pieces that stay in the cache.
    """
    error = torch.empty_like(got)
    for y, target, e in pieces(got, wanted, error):
        torch.sub(y, visible.clip(target), out=e)
        # At most 0 where target >= high, and at most more than any elsewhere.
        if math.isfinite(visible.high):
            torch.minimum(e, (visible.high - target).mul_(_BEYOND).clamp_(min=0), out=e)
        if math.isfinite(visible.low):
            torch.maximum(e, (visible.low - target).mul_(_BEYOND).clamp_(max=0), out=e)
    return error


class _Error(torch.autograd.Function):
    """e."""

    @staticmethod
    def forward(ctx: Any, got: Tensor, wanted: Tensor, visible: Visible) -> Tensor:
        """The module docstring's."""
        error = _errors(got, wanted, visible)
        ctx.save_for_backward(error)
        return error

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """To ``got``: that of e, where there is an error."""
        (error,) = ctx.saved_tensors
        result = torch.empty_like(error)
        for e, g, to_e in pieces(error, grads[0], result):
            torch.mul(e.sign().square_(), g, out=to_e)
        return result, None, None


class _Squares(torch.autograd.Function):
    """Sum of e squared."""

    @staticmethod
    def forward(ctx: Any, got: Tensor, wanted: Tensor, visible: Visible) -> Tensor:
        """The sum of pieces' sums."""
        error = _errors(got, wanted, visible)
        ctx.save_for_backward(error)
        return torch.stack([e.square().sum() for (e,) in pieces(error)]).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """To ``got``: what is not seen has no error and no gradient."""
        (error,) = ctx.saved_tensors
        return error * (2 * grads[0]), None, None


_error: Callable[..., Tensor] = _Error.apply
_squares: Callable[..., Tensor] = _Squares.apply


def visible_part(model: ir.Model, plan: QuantPlan, name: str) -> Visible:
    """What all readers of a value see of it.

    Args:
        model: The simplified float model.
        plan: A decided plan.
        name: Name of the value.

    Returns:
        Everything, where the value is an output of the network or somebody reads it as a float.
    """
    value = next(value for node in model.graph for value in node.outputs if value.name == name)
    if value.is_graph_output() or not value.uses():
        return Visible()
    integer = integer_nodes(model, plan)
    low, high = -math.inf, math.inf
    for use in value.uses():
        stored = stored_key(use.node, value, plan, integer)
        keys = [f"{use.node.name}:{use.idx}", *([] if stored is None else [stored])]
        found = [quantizer for key in keys if (quantizer := plan.input_quantizer(key)) is not None]
        if not found:
            return Visible()
        for quantizer in found:
            # Where the step adapts to its sample, what the widest one shows.
            widest = 1.0 if quantizer.adaptive is None else quantizer.adaptive.beta_max
            least, most = (widest * float(bound) for bound in quantizer.range())
            low, high = max(low, least), min(high, most)
    return Visible(low, high)
