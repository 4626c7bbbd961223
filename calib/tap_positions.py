"""Which input each kernel tap of Conv and ConvTranspose reads at each output position: :func:`tap_positions`."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Taps:
    """Where each tap of each output position reads.

    Attributes:
        out: Output size.
        taps: Per spatial axis, (out, kernel) input coordinates, -1 outside.
        size: Input size.
        pointwise: Whether position p reads exactly input position p.
    """

    out: tuple[int, ...]
    taps: tuple[IntArray, ...]
    size: tuple[int, ...]
    pointwise: bool

    def source(self, position: IntArray) -> IntArray:
        """(P, taps) flat input positions; those outside are the input's size."""
        coordinates = np.unravel_index(position, self.out)
        rank = len(self.out)
        flat = np.zeros((len(position), *[1] * rank), np.int64)
        outside = np.zeros_like(flat, bool)
        for axis in range(rank):
            shape = [len(position), *[1] * rank]
            shape[axis + 1] = -1
            index = self.taps[axis][coordinates[axis]].reshape(shape)
            outside = outside | (index < 0)
            flat = flat * self.size[axis] + index
        return np.where(outside, math.prod(self.size), flat).reshape(len(position), -1)


@functools.lru_cache(maxsize=256)
def tap_positions(
    transposed: bool,
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[int, ...],
    auto_pad: str,
    output_padding: tuple[int, ...],
    output_shape: tuple[int, ...],
) -> Taps:
    """Output size and tap positions, as the ONNX operators Conv and ConvTranspose define them."""
    rank = len(kernel)
    out: list[int] = []
    taps: list[IntArray] = []
    for i in range(rank):
        reach = (kernel[i] - 1) * dilations[i] + 1
        begin, end = pads[i], pads[i + rank]
        if transposed:
            full = (size[i] - 1) * strides[i] + reach + output_padding[i]
            if output_shape or auto_pad.startswith("SAME"):
                length = output_shape[-rank + i] if output_shape else size[i] * strides[i]
                total = max(full - length, 0)
                begin = total - total // 2 if auto_pad != "SAME_UPPER" else total // 2
                end = total - begin
            length = full - begin - end
            o = np.arange(length)[:, np.newaxis] + begin - np.arange(kernel[i]) * dilations[i]
            source = np.where((o % strides[i] == 0) & (o >= 0), o // strides[i], -1)
        else:
            if auto_pad.startswith("SAME"):
                length = -(-size[i] // strides[i])
                total = max((length - 1) * strides[i] + reach - size[i], 0)
                begin = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
            elif auto_pad == "VALID":
                begin = 0
                length = (size[i] - reach) // strides[i] + 1
            else:
                length = (size[i] + begin + end - reach) // strides[i] + 1
            source = np.arange(length)[:, np.newaxis] * strides[i] - begin + np.arange(kernel[i]) * dilations[i]
        taps.append(np.where((source >= 0) & (source < size[i]), source, -1))
        out.append(length)
    pointwise = tuple(out) == tuple(size) and all(
        t.shape[1] == 1 and (t[:, 0] == np.arange(n)).all() for t, n in zip(taps, size, strict=True)
    )
    return Taps(tuple(out), tuple(taps), tuple(size), pointwise)
