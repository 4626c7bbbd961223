"""Copies of images: which samples there are, that they are what NumPy makes of the image, and always the same."""

import itertools

import numpy as np
import pytest

from postquant.calib.input_spec import InputSpec
from postquant.calib.learn.copied_source import CopiedSource, copies_for
from postquant.calib.open_source import open_source
from postquant.calib.source import CalibrationSource


def _source(count: int, shape: tuple[int, ...] = (1, 3, 16, 24), name: str = "x") -> CalibrationSource:
    rng = np.random.default_rng(0)
    feeds = [{name: rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]
    return open_source(feeds, [InputSpec(name, np.dtype(np.float32), (None, *shape[1:]))])


def _mirrored_or_shifted(image: np.ndarray, copy: np.ndarray) -> bool:
    """Whether a copy is cut out of the image, or of its mirror image, continued by its mirror at every edge."""
    most = [size // 8 for size in image.shape[2:]]
    for one in (image, image[..., ::-1]):
        padded = np.pad(one, [(0, 0), (0, 0), *((m, m) for m in most)], mode="reflect")
        for top, left in itertools.product(*(range(2 * m + 1) for m in most)):
            if np.array_equal(copy, padded[:, :, top : top + image.shape[2], left : left + image.shape[3]]):
                return True
    return False


def test_every_image_that_does_not_judge_is_followed_by_its_copies() -> None:
    source = _source(5)
    copied = CopiedSource(source, {1, 4}, 2, seed=3)
    images = [sample["x"] for sample in source]
    found = [sample["x"] for sample in copied]
    assert len(copied) == len(found) == 3 * 3 + 2
    assert copied.judging == (3, 10)
    for image, place, copies in zip(images, (0, 3, 4, 7, 10), (2, 0, 2, 2, 0), strict=True):
        assert np.array_equal(found[place], image)
        for copy in found[place + 1 : place + 1 + copies]:
            assert _mirrored_or_shifted(image, copy)
    assert len({array.tobytes() for array in found}) > 8


def test_a_sample_does_not_depend_on_which_ones_are_read() -> None:
    copied = CopiedSource(_source(4), {0}, 3, seed=1)
    all_ = [sample["x"] for sample in copied]
    for chosen in ([2], [0, 3, 4], [5, 9, 12], [1, 2, 11]):
        for index, sample in zip(chosen, copied.read(chosen), strict=True):
            assert np.array_equal(sample["x"], all_[index])
    other = CopiedSource(_source(4), {0}, 3, seed=2)
    assert any(not np.array_equal(sample["x"], array) for sample, array in zip(other, all_, strict=True))


def test_arrays_belong_to_the_caller() -> None:
    copied = CopiedSource(_source(2), {1}, 1, seed=0)
    for sample in copied:
        sample["x"][:] = 0
    assert all(np.abs(sample["x"]).max() > 0 for sample in copied)


def test_without_copies_it_is_the_source() -> None:
    source = _source(3)
    copied = CopiedSource(source, {1}, 0, seed=0)
    assert copied.judging == (1,)
    assert copied.digest == source.digest


@pytest.mark.parametrize(("count", "worth", "copies"), [(256, 1.0, 1), (257, 1.0, 0), (32, 1.0, 1), (32, 82.0, 0)])
def test_few_images_get_a_copy(count: int, worth: float, copies: int) -> None:
    assert copies_for(_source(count), worth) == copies


@pytest.mark.parametrize("shape", [(1, 3, 15, 24), (1, 64, 16, 24), (1, 10)])
def test_what_is_no_image_has_none(shape: tuple[int, ...]) -> None:
    assert copies_for(_source(4, shape), 1.0) == 0
