"""Mirrored and shifted images, against NumPy."""

import itertools

import numpy as np
import pytest
import torch

from postquant.calib.input_spec import InputSpec
from postquant.calib.learn.augment import Augmentation, image_axes

FLOAT = np.dtype(np.float32)


@pytest.mark.parametrize(
    ("shape", "dtype", "axes"),
    [
        ((None, 3, 224, 224), FLOAT, (2, 3)),
        ((1, 1, None, None), FLOAT, (2, 3)),
        ((None, 96, 96, 3), FLOAT, (1, 2)),
        ((None, 64, 56, 56), FLOAT, None),
        ((None, 3, 224, 224), np.dtype(np.int64), None),
        ((None, 3, 224), FLOAT, None),
        (None, FLOAT, None),
    ],
)
def test_what_is_an_image(
    shape: tuple[int | None, ...] | None, dtype: np.dtype[np.generic], axes: tuple[int, int] | None
) -> None:
    assert image_axes(InputSpec("x", dtype, shape)) == axes


def _copies(image: np.ndarray) -> list[np.ndarray]:
    """All that may come of (H, W): mirrored or not, and up to an eighth out of the middle of itself and its mirrors."""
    found = []
    most = tuple(size // 8 for size in image.shape)
    for one in (image, image[:, ::-1]):
        padded = np.pad(one, [(m, m) for m in most], mode="reflect")
        for top, left in itertools.product(*(range(2 * m + 1) for m in most)):
            found.append(padded[top : top + image.shape[0], left : left + image.shape[1]])
    return found


@pytest.mark.parametrize("last", [False, True])
def test_every_image_is_mirrored_and_shifted_by_itself(last: bool) -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((40, 16, 24)).astype(np.float32)
    fed = np.stack([images, 2 * images, -images], axis=3 if last else 1)
    augmentation = Augmentation((1, 2) if last else (2, 3), torch.Generator().manual_seed(0))
    result = augmentation(torch.from_numpy(fed)).numpy()
    assert result.shape == fed.shape
    first, second, third = np.moveaxis(result, 3 if last else 1, 0)
    assert np.array_equal(second, 2 * first)
    assert np.array_equal(third, -first)
    chosen = []
    for image, copy in zip(images, first, strict=True):
        chosen.append(next(index for index, one in enumerate(_copies(image)) if np.array_equal(one, copy)))
    # 2 x 5 x 7 copies, all equally likely: 40 draws give 30 different ones.
    assert len(set(chosen)) > 20
    mirrored = np.mean(np.array(chosen) >= 35)
    assert 0.2 < mirrored < 0.8


def test_small_maps_stay() -> None:
    images = torch.rand(4, 3, 8, 32)
    assert Augmentation((2, 3), torch.Generator())(images) is images


def test_networks_with_other_inputs_are_left_alone() -> None:
    image = InputSpec("x", FLOAT, (None, 3, 32, 32))
    generator = torch.Generator()
    assert Augmentation.of([image], generator) is not None
    assert Augmentation.of([image, InputSpec("size", FLOAT, (1, 2))], generator) is None
    assert Augmentation.of([InputSpec("ids", np.dtype(np.int64), (1, 7))], generator) is None
