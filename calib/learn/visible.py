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

import onnx_ir as ir
import torch

from postquant.calib.learn.read_keys import integer_nodes, stored_key
from postquant.passes.plan import QuantPlan

Tensor = torch.Tensor


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
        """e of the module docstring, of any shape.

        >>> Visible(-1.0, 2.0).error(torch.tensor([5.0, 1.5, 5.0]), torch.tensor([3.0, 3.0, 1.0])).tolist()
        [0.0, -0.5, 4.0]
        """
        if not self.limited:
            return got - wanted
        seen = self.clip(wanted)
        error = got - seen
        error = torch.where(wanted >= self.high, error.clamp(max=0), error)
        return torch.where(wanted <= self.low, error.clamp(min=0), error)


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
