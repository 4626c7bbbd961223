"""Mirrored and shifted copies of images: :class:`Augmentation`.

The whole network is learned from the outputs of the float network, which needs no labels: an image that looks like the
calibration images, such as a mirrored one, says as much as another image would. Shifts move by up to an eighth of the
height and width; what comes in at the edge is mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from postquant.calib.input_spec import InputSpec

Tensor = torch.Tensor
# Smaller inputs than this are maps of something, and a shift by an eighth of them is less than two pixels.
_LEAST_SIZE = 16
_CHANNELS = frozenset({1, 3, 4})
_SHIFT = 8


def image_axes(spec: InputSpec) -> tuple[int, int] | None:
    """The axes of height and width of an input.

    Args:
        spec: The input.

    Returns:
        (2, 3) or (1, 2), or None where the input is no float tensor of rank 4 with 1, 3 or 4 channels on the axis that
        remains.

    >>> import numpy as np
    >>> image_axes(InputSpec("x", np.dtype(np.float32), (None, 3, 32, 32)))
    (2, 3)
    """
    if spec.shape is None or len(spec.shape) != 4 or spec.dtype.kind != "f":
        return None
    if spec.shape[1] in _CHANNELS:
        return 2, 3
    return (1, 2) if spec.shape[3] in _CHANNELS else None


def large_enough(shape: Sequence[int], axes: tuple[int, int]) -> bool:
    """Whether images are mirrored and shifted at all.

    Args:
        shape: Of a batch.
        axes: Height and width.
    """
    return min(shape[axis] for axis in axes) >= _LEAST_SIZE


class Augmentation:
    """Random mirrored and shifted copies of a batch.

    Args:
        axes: Height and width.
        generator: Of the choices; on the CPU.
    """

    def __init__(self, axes: tuple[int, int], generator: torch.Generator) -> None:
        self._axes = axes
        self._generator = generator

    @classmethod
    def of(cls, inputs: Sequence[InputSpec], generator: torch.Generator) -> Augmentation | None:
        """The augmentation of a network whose only input is an image; else None.

        Args:
            inputs: The network's inputs.
            generator: Of the choices.
        """
        axes = image_axes(inputs[0]) if len(inputs) == 1 else None
        return None if axes is None else cls(axes, generator)

    def __call__(self, images: Tensor) -> Tensor:
        """A copy of every image: mirrored from left to right or not, shifted or not.

        Args:
            images: (N, C, H, W) or (N, H, W, C) float32; as it is where H or W is below 16.

        Returns:
            The same shape.
        """
        if not large_enough(images.shape, self._axes):
            return images
        return torch.cat([self._one(images[index : index + 1]) for index in range(len(images))])

    def _one(self, image: Tensor) -> Tensor:
        if self._draw(2):
            image = image.flip(self._axes[1])
        for axis in self._axes:
            size = image.shape[axis]
            most = size // _SHIFT
            places = torch.arange(size, device=image.device) + self._draw(2 * most + 1) - most
            # Mirrored at the edges: -1 is 1, and size is size - 2.
            places = (size - 1) - (places.abs() - (size - 1)).abs()
            image = image.index_select(axis, places)
        return image

    def _draw(self, count: int) -> int:
        return int(torch.randint(0, count, (), generator=self._generator))
