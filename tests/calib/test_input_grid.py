"""Grids of image inputs: found through float32 preprocessing, refused for everything else."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from postquant.calib.input_grid import find_grids
from postquant.calib.input_spec import InputSpec
from postquant.calib.open_source import open_source
from postquant.calib.source import CalibrationSource
from postquant.passes.input_levels import InputGrid

Array = npt.NDArray[np.float32]
MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
F32 = np.dtype(np.float32)

PREPROCESSINGS: dict[str, tuple[Callable[[Array], Array], Sequence[float], Sequence[float], bool]] = {
    # name: (float32 function, step per channel, level of x = 0 per channel, one scale and zero point are enough)
    "torchvision": (
        lambda p: (p / np.float32(255) - MEAN) / STD,
        list(1 / (255 * STD.ravel().astype(float))),
        list(255 * MEAN.ravel().astype(float)),
        False,
    ),
    "folded": (
        lambda p: p * (1 / (np.float32(255) * STD)) - MEAN / STD,
        list(1 / (255 * STD.ravel().astype(float))),
        list(255 * MEAN.ravel().astype(float)),
        False,
    ),
    "caffe": (lambda p: p - np.float32(255) * MEAN, [1.0] * 3, list(255 * MEAN.ravel().astype(float)), False),
    "raw": (lambda p: p, [1.0] * 3, [0.0] * 3, True),
    "unit": (lambda p: p / np.float32(255), [1 / 255] * 3, [0.0] * 3, True),
    "signed unit": (lambda p: p / np.float32(127.5) - 1, [1 / 127.5] * 3, [127.5] * 3, False),
    "rfb": (lambda p: (p - 127) / np.float32(128), [1 / 128] * 3, [127.0] * 3, True),
}


def images(count: int, low: int = 0, high: int = 255, channels: int = 3, size: int = 16, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.integers(low, high + 1, (count, channels, size, size)).astype(np.float32)


def source(array: npt.NDArray[np.generic], rank: int = 4) -> CalibrationSource:
    return open_source({"x": array}, [InputSpec("x", array.dtype, (None,) * rank)])


def grid(array: npt.NDArray[np.generic], rank: int = 4) -> InputGrid | None:
    return find_grids(source(array, rank), ["x"]).get("x")


@pytest.mark.parametrize("name", PREPROCESSINGS)
def test_preprocessing_is_recognised(name: str) -> None:
    preprocess, step, zeros, uniform = PREPROCESSINGS[name]
    pixels = images(12)
    x = preprocess(pixels).astype(np.float32)
    found = grid(x)
    assert found is not None
    np.testing.assert_allclose(found.step, step, rtol=1e-6)
    np.testing.assert_allclose(found.zeros, zeros, atol=1e-4)
    assert found.levels == 256
    assert found.uniform is uniform
    # The levels are the original pixels.
    levels = (x - found.offset[:, None, None]) / found.step[:, None, None]
    assert np.abs(levels - pixels).max() < 1e-3


@pytest.mark.parametrize("name", ["unit", "raw", "rfb"])
def test_one_scale_and_zero_point_are_exact_on_a_uniform_grid(name: str) -> None:
    pixels = images(12)
    x = PREPROCESSINGS[name][0](pixels).astype(np.float32)
    found = grid(x)
    assert found is not None
    quantizer = found.quantizer()
    assert quantizer is not None
    np.testing.assert_array_equal(quantizer.quantize(x), pixels.astype(np.uint8))
    np.testing.assert_allclose(quantizer.simulate(x), x, rtol=1e-6, atol=1e-6)


def test_kernels_that_round_differently_are_the_same_grid() -> None:
    pixels = images(8)
    mixed = np.concatenate([PREPROCESSINGS[name][0](pixels) for name in ("torchvision", "folded")])
    found = grid(mixed.astype(np.float32))
    assert found is not None
    assert len(np.unique(mixed[:, 0])) > 256
    np.testing.assert_allclose(found.zeros, PREPROCESSINGS["torchvision"][2], atol=1e-4)


def test_unseen_levels_lie_on_both_sides() -> None:
    found = grid(PREPROCESSINGS["torchvision"][0](images(8, low=3, high=250)).astype(np.float32))
    assert found is not None
    # 8 levels were not seen: 4 of them go below, which is 1 more than there are.
    np.testing.assert_allclose(found.zeros, np.array(PREPROCESSINGS["torchvision"][2]) + 1, atol=1e-4)


@pytest.mark.parametrize(("low", "high"), [(0, 200), (20, 255), (40, 90)])
def test_the_natural_zero_is_kept_where_there_is_one(low: int, high: int) -> None:
    found = grid(images(8, low, high) / np.float32(255))
    assert found is not None
    np.testing.assert_allclose(found.zeros, 0, atol=1e-3)
    assert found.levels == high + 1
    assert found.uniform


def test_few_levels_and_one_channel() -> None:
    found = grid(images(8, 0, 16, channels=1, size=8) / np.float32(16))
    assert found is not None
    np.testing.assert_allclose((found.step[0], found.offset[0]), (1 / 16, 0), atol=1e-9)
    assert (found.levels, found.uniform) == (17, True)
    normalised = grid((images(8, channels=1) / np.float32(255) - np.float32(0.1307)) / np.float32(0.3081))
    assert normalised is not None
    assert not normalised.uniform  # 0.1307 * 255 = 33.33 is no level


def test_channels_last_share_a_grid_or_have_none() -> None:
    pixels = images(6, size=24)
    assert find_grids(source((pixels / np.float32(255)).transpose(0, 2, 3, 1).copy()), ["x"])["x"].uniform
    assert grid(PREPROCESSINGS["torchvision"][0](pixels).astype(np.float32).transpose(0, 2, 3, 1).copy()) is None


def refused() -> dict[str, npt.NDArray[np.generic]]:
    rng = np.random.default_rng(1)
    pixels = images(6) / np.float32(255)
    noise = rng.standard_normal(pixels.shape).astype(np.float32)
    constant = PREPROCESSINGS["torchvision"][0](images(6)).astype(np.float32)
    constant[:, 1] = 0.25
    mean = ((pixels[..., ::2] + pixels[..., 1::2] + pixels[..., ::2] * 3) / 5).astype(np.float32)
    late = pixels.copy()
    late[5, 2, 3, 4] += np.float32(0.4 / 255)
    return {
        "noise": pixels + noise * np.float32(25 / 255),
        "features": noise,
        "few features": noise[:2, :, :3, :3].copy(),
        "one constant channel": constant,
        "all constant": np.zeros((3, 3, 8, 8), np.float32),
        "resized in float": mean,
        "too many levels": images(12, 0, 300),
        "16 bits": images(40, 0, 65535),
        "one pixel off the grid": late,
        "two levels": images(4, 0, 1),
    }


@pytest.mark.parametrize("name", refused())
def test_everything_else_is_refused(name: str) -> None:
    assert grid(refused()[name]) is None


def test_other_ranks_types_and_names_are_refused() -> None:
    assert grid(images(4).reshape(4, -1), rank=2) is None
    assert grid(images(4).astype(np.float64)) is None
    assert grid(images(4).astype(np.int64)) is None
    assert find_grids(source(images(4)), []) == {}


def test_noise_ends_the_reading_early() -> None:
    class Counting(CalibrationSource):
        reads = 0

        def __len__(self) -> int:
            return 50

        def read(self, indices: Sequence[int]):  # type: ignore[no-untyped-def]
            for _ in indices:
                type(self).reads += 1
                yield {"x": np.random.default_rng(0).standard_normal((1, 3, 80, 80)).astype(np.float32)}

    assert find_grids(Counting([InputSpec("x", F32, (1, 3, 80, 80))]), ["x"]) == {}
    assert Counting.reads == 1


@pytest.mark.parametrize(
    ("dataset", "zeros"),
    [
        ("cifar10", [123.675, 116.28, 103.53]),
        ("cifar10_raw", [0, 0, 0]),
        ("face", [127, 127, 127]),
        ("vww", [0, 0, 0]),
        ("denoise", None),
    ],
)
def test_real_inputs(shared_data: pathlib.Path, dataset: str, zeros: list[float] | None) -> None:
    spec = importlib.util.spec_from_file_location("shared_eval", shared_data / "eval.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    feeds = list(module.batches(dataset, "calib", batch=1, limit=32))
    (name,) = feeds[0]
    found = find_grids(open_source(feeds, [InputSpec(name, F32, (None,) * 4)]), [name]).get(name)
    if zeros is None:
        assert found is None
        return
    assert found is not None
    np.testing.assert_allclose(found.zeros, zeros, atol=1e-4)
    assert found.levels == 256


def test_example_of_the_documentation() -> None:
    page = pathlib.Path(__file__).resolve().parents[2] / "docs" / "input-grid.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(block, page.name, "exec"), {})
