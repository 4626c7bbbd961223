"""Sums that a receiver makes part of a convolution without rounding its result first: :func:`unrounded_sums`.

A file says ``code = saturate(round((s_a * (round(d_a)) + s_b * (q_b - z_b)) / s) + z)``: the result of the convolution,
``d_a`` in units of ``s_a``, is quantized, then added. A kernel that holds it in a register may add ``d_a`` itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from postquant.pipeline.conformance.rules import Rule, Site, Variant
from postquant.runtime_ops.integer import Affine, Prediction

Reals = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Addend:
    """One operand of an Add.

    Attributes:
        node: Node that computes it.
        real: What its codes stand for.
        unrounded: The same before it was rounded, where a Conv, ConvTranspose, Gemm or MatMul computes it; else None.
    """

    node: str
    real: Reals
    unrounded: Reals | None

    @classmethod
    def of(cls, node: str, codes: npt.NDArray[np.integer], numbers: Affine, law: Prediction | None) -> Addend:
        """An operand.

        Args:
            node: Node that computes it.
            codes: Its codes.
            numbers: Their scale and zero point.
            law: What the law says about it, behind all clips, where it is the result of a product.
        """
        unrounded = None
        if law is not None:
            unrounded = (law.value.astype(np.float64) - float(numbers.zero_point)) * float(numbers.scale)
        return cls(node, numbers.real(codes).astype(np.float64), unrounded)


def unrounded_sums(site: Site, addends: Sequence[Addend]) -> Iterator[Variant]:
    """What a receiver gets that leaves out the rounding of one of the operands, or of all that it could.

    Args:
        site: The sum.
        addends: Its operands.
    """
    able = [addend for addend in addends if addend.unrounded is not None]
    for chosen in [*([addend] for addend in able), *([able] if len(able) > 1 else [])]:
        parts = [addend.unrounded if addend in chosen else addend.real for addend in addends]
        total = np.sum([part for part in parts if part is not None], axis=0)
        codes = np.rint(total / float(site.out.scale)) + float(site.out.zero_point)
        detail = f"of the result of {' and '.join(addend.node for addend in chosen)}"
        yield Variant(Rule.FUSED_SUM, detail, site.saturated(codes))
