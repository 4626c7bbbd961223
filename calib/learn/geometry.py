"""Where the windows of convolutions and pools lie: paddings of ONNX in numbers.

    size of the output = floor or ceil((n + begin + end - ((k - 1) * d + 1)) / s) + 1

for n elements, k taps with distance d, step s. ``auto_pad`` SAME_UPPER and SAME_LOWER choose begin + end such that the
output has ceil(n / s) elements; what is odd goes to the end (UPPER) or to the beginning (LOWER).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from postquant.calib.learn.op import integer, integers, text


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows along each spatial axis.

    Attributes:
        kernel: Taps.
        strides: Steps between windows.
        dilations: Distances between taps.
        begins: Padding in front; negative paddings cut.
        ends: Padding behind, as the node says it.
        sizes: Number of windows.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def symmetric(self) -> bool:
        """Whether both sides are padded alike, with nothing cut."""
        return self.begins == self.ends and min(self.begins, default=0) >= 0

    def reach(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Padding behind that makes the last window end with the data: ``ends``, less what no window sees.

        Args:
            spatial: Sizes of the input.

        Returns:
            Per axis; negative where the last elements are in no window.
        """
        return tuple(
            (size - 1) * s + (k - 1) * d + 1 - n - begin
            for size, s, k, d, n, begin in zip(
                self.sizes, self.strides, self.kernel, self.dilations, spatial, self.begins, strict=True
            )
        )

    def grows(self, spatial: Sequence[int]) -> bool:
        """Whether ``ceil_mode`` made windows that end behind the padding."""
        return any(reach > end for reach, end in zip(self.reach(spatial), self.ends, strict=True))


def windows(node: ir.Node, spatial: Sequence[int], kernel: Sequence[int]) -> Windows:
    """The windows of a Conv or of a pool.

    Args:
        node: Its attributes strides, dilations, pads, auto_pad and ceil_mode count.
        spatial: Sizes of the input's spatial axes.
        kernel: Number of taps per axis.
    """
    rank = len(spatial)
    strides = integers(node, "strides") or [1] * rank
    dilations = integers(node, "dilations") or [1] * rank
    mode = text(node, "auto_pad", "NOTSET")
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        sizes = [-(-n // s) for n, s in zip(spatial, strides, strict=True)]
        total = [max((o - 1) * s + e - n, 0) for o, s, e, n in zip(sizes, strides, extents, spatial, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        begins, ends = (small, large) if mode == "SAME_UPPER" else (large, small)
    else:
        pads = integers(node, "pads") if mode == "NOTSET" else None
        begins, ends = (pads[:rank], pads[rank:]) if pads else ([0] * rank, [0] * rank)
        ceil = bool(integer(node, "ceil_mode", 0))
        sizes = [
            _size(n, e, s, begin, end, ceil=ceil)
            for n, e, s, begin, end in zip(spatial, extents, strides, begins, ends, strict=True)
        ]
    return Windows(*(tuple(part) for part in (kernel, strides, dilations, begins, ends, sizes)))


def _size(n: int, extent: int, stride: int, begin: int, end: int, *, ceil: bool) -> int:
    room = n + begin + end - extent
    size = (-(-room // stride) if ceil else room // stride) + 1
    # A window that would start in the padding behind the data does not count.
    if ceil and (size - 1) * stride >= n + begin:
        size -= 1
    return size


def torch_padding(begins: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Paddings as torch's ``pad`` wants them: last axis first."""
    return [amount for begin, end in zip(reversed(begins), reversed(ends), strict=True) for amount in (begin, end)]
