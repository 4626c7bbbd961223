"""Calibration images with mirrored and shifted copies: :class:`CopiedSource`.

A block with few samples for its weights fits them. The float network says what should come out for a copy as well as
for the image, so that copies are further samples; they are alike, and count less than as many others would.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch

from postquant.calib.input_spec import Sample
from postquant.calib.learn.augment import Augmentation, image_axes, large_enough
from postquant.calib.source import CalibrationSource

# So many samples have a copy each; more need none, and three of each gain no more (docs/learning.md, "Copies").
_FEW = 256


def copies_for(source: CalibrationSource, worth: float) -> int:
    """How many copies of an image blocks are learned from besides.

    Args:
        source: Calibration data; copies are made of images only.
        worth: As how many samples one counts, at least 1: an image that shows every layer many positions says as much
            as several small ones.

    Returns:
        0 or 1.
    """
    axes = image_axes(source.inputs[0]) if len(source.inputs) == 1 else None
    if axes is None or not large_enough(next(source.read([0]))[source.inputs[0].name].shape, axes):
        return 0
    return int(len(source) * worth <= _FEW)


class CopiedSource(CalibrationSource):
    """Another source's images, each in front of its copies; those that judge have none.

    Args:
        source: Images: its only input has a height and a width (:func:`postquant.calib.learn.augment.image_axes`).
        judging: Indices of those that judge.
        copies: Of every other image, at least 0.
        seed: Of the copies.

    Attributes:
        judging: Indices of the images that judge, among those of this source.
        copies: Of every other image.
    """

    def __init__(self, source: CalibrationSource, judging: Collection[int], copies: int, seed: int) -> None:
        super().__init__(source.inputs, notes=source.notes)
        judges = frozenset(judging)
        self._source = source
        self._seed = seed
        self.copies = copies
        # (image, copy) of every sample; copy 0 is the image itself.
        self._places = [(i, c) for i in range(len(source)) for c in range(1 if i in judges else 1 + copies)]
        self.judging = tuple(place for place, (image, _) in enumerate(self._places) if image in judges)

    def __len__(self) -> int:
        """Number of images and copies."""
        return len(self._places)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :meth:`CalibrationSource.read`."""
        chosen = [self._places[index] for index in indices]
        images = self._source.read(list(dict.fromkeys(image for image, _ in chosen)))
        at, sample = -1, {}
        for image, copy in chosen:
            if image != at:
                at, sample = image, next(images)
            yield {name: self._copy(array, image, copy) for name, array in sample.items()}

    def _copy(self, array: np.ndarray, image: int, copy: int) -> np.ndarray:
        if copy == 0:
            return np.array(array)
        axes = image_axes(self.inputs[0])
        assert axes is not None
        # Every copy has its own seed: it does not depend on what was read before.
        (seed,) = np.random.SeedSequence([self._seed, image, copy]).generate_state(1)
        augmentation = Augmentation(axes, torch.Generator().manual_seed(int(seed)))
        return augmentation(torch.from_numpy(np.array(array))).numpy()
