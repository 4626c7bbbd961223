"""Image folders: the preprocessing is what it says, and mistakes are explained."""

import pathlib
import sys

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from postquant.calib.image_preprocess import Channels, ImagePreprocess, Interpolation, Layout, Resize
from postquant.calib.input_spec import InputSpec
from postquant.calib.open_source import open_source
from postquant.runtime_ops.errors import CalibrationError

F32 = np.dtype(np.float32)
NCHW = (InputSpec("x", F32, (None, 3, 8, 6)),)


def f32(values: object) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def pixels(seed: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "class").mkdir()
    Image.fromarray(pixels(0, 8, 6)).save(tmp_path / "a.png")
    Image.fromarray(pixels(1, 8, 6)).save(tmp_path / "class" / "b.bmp")
    (tmp_path / "labels.txt").write_text("cat")
    return tmp_path


def test_images_without_resizing(folder: pathlib.Path) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    source = open_source(folder, NCHW, images=ImagePreprocess(resize=Resize.NONE, mean=mean, std=std))
    assert len(source) == 2
    for seed, sample in enumerate(source):
        expected = ((pixels(seed, 8, 6) / 255.0 - mean) / std).transpose(2, 0, 1)[None]
        found = sample["x"]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=0, atol=1e-6)


def test_channels_and_layout(folder: pathlib.Path) -> None:
    nhwc = (InputSpec("x", F32, (None, 8, 6, 3)),)
    table = {"resize": "none", "channels": "bgr", "layout": "nhwc", "scale": 1, "mean": [1, 2, 3], "std": 2}
    sample = next(iter(open_source(folder, nhwc, images=table)))
    np.testing.assert_array_equal(sample["x"], (pixels(0, 8, 6)[None, :, :, ::-1] - f32([1, 2, 3])) / 2)
    gray = (InputSpec("x", F32, (None, 1, 8, 6)),)
    sample = next(iter(open_source(folder, gray, images={"resize": "none", "channels": "gray", "scale": 1.0})))
    expected = np.asarray(Image.fromarray(pixels(0, 8, 6)).convert("L"), np.float32)
    np.testing.assert_array_equal(sample["x"][0, 0], expected)


def test_uint8_models(folder: pathlib.Path) -> None:
    spec = (InputSpec("x", np.dtype(np.uint8), (None, 8, 6, 3)),)
    table = {"resize": "none", "layout": "nhwc", "scale": 1}
    np.testing.assert_array_equal(next(iter(open_source(folder, spec, images=table)))["x"][0], pixels(0, 8, 6))
    with pytest.raises(
        CalibrationError, match=r"not whole numbers of uint8.*a\.png|a\.png.*not whole numbers of uint8"
    ):
        open_source(folder, spec, images={"resize": "none", "layout": "nhwc"})


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (8, 6), (5, 40)])
def test_crop_and_stretch(size: tuple[int, int], tmp_path: pathlib.Path) -> None:
    image = Image.fromarray(pixels(3, *size))
    image.save(tmp_path / "i.png")
    preprocess = ImagePreprocess(shorter_side=10, size=(8, 6), scale=1.0)
    found = next(iter(open_source(tmp_path, NCHW, images=preprocess)))["x"][0].transpose(1, 2, 0)
    short = min(image.size)
    width, height = (10 if s == short else 10 * s // short for s in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 6) / 2), round((resized.height - 8) / 2)
    np.testing.assert_array_equal(found, np.asarray(resized)[top : top + 8, left : left + 6])

    stretched = ImagePreprocess(resize=Resize.STRETCH, interpolation=Interpolation.NEAREST, scale=1.0)
    found = next(iter(open_source(tmp_path, NCHW, images=stretched)))["x"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(found, np.asarray(image.resize((6, 8), Image.Resampling.NEAREST)))


def test_fixed_batch(folder: pathlib.Path) -> None:
    spec = (InputSpec("x", F32, (2, 3, 8, 6)),)
    source = open_source(folder, spec, images={"resize": "none"})
    assert [sample["x"].shape for sample in source] == [(2, 3, 8, 6)]


def test_preprocessing_from_a_table() -> None:
    table = {"size": [8, 6], "shorter_side": 9, "interpolation": "bicubic", "mean": 0.5, "layout": "nhwc"}
    assert ImagePreprocess.from_mapping(table) == ImagePreprocess(
        size=(8, 6), shorter_side=9, interpolation=Interpolation.BICUBIC, mean=(0.5,), layout=Layout.NHWC
    )
    assert ImagePreprocess.from_mapping({}) == ImagePreprocess()
    assert ImagePreprocess(channels=Channels.GRAY).channel_count == 1


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"sizes": 3}, "'sizes'"),
        ({"size": 0}, "size must be positive"),
        ({"size": "big"}, "wrong"),
        ({"size": 8.5}, "wrong"),
        ({"size": [8, True]}, "whole number"),
        ({"resize": "squash"}, "squash"),
        ({"std": [1, 0, 1]}, "std must not be 0"),
        ({"mean": [1, 2]}, "mean needs 1 or 3"),
        ({"scale": 0}, "scale"),
        ({"scale": "a lot"}, "wrong"),
        ({"size": 224, "shorter_side": 100}, "smaller than the crop"),
        ({"resize": "stretch", "shorter_side": 100}, "belongs to resize = 'crop'"),
        ({"resize": "none", "size": 100}, "no meaning"),
    ],
)
def test_wrong_tables(table: dict[str, object], said: str, folder: pathlib.Path) -> None:
    with pytest.raises(CalibrationError, match=said):
        open_source(folder, NCHW, images=table)


@pytest.mark.parametrize(
    ("spec", "table", "said"),
    [
        (InputSpec("x", F32, (None, 3)), {}, "one input of rank 4"),
        (InputSpec("x", F32, (None, 3, None, None)), {}, "does not say the size"),
        (InputSpec("x", F32, (None, 3, 9, 9)), {"resize": "none"}, "does not give the model's input shape"),
        (InputSpec("x", F32, (None, 1, 8, 6)), {}, "does not give the model's input shape"),
        (InputSpec("x", F32, (None, 3, 8, 6)), {"shorter_side": 5}, "at least 8, found 5"),
    ],
)
def test_preprocessing_that_does_not_fit(
    spec: InputSpec, table: dict[str, object], said: str, folder: pathlib.Path
) -> None:
    with pytest.raises(CalibrationError, match=said):
        open_source(folder, (spec,), images=table)


def test_folder_without_images_and_broken_images(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CalibrationError, match="no images"):
        open_source(tmp_path, NCHW, images={})
    (tmp_path / "a.jpg").write_bytes(b"not a picture")
    with pytest.raises(CalibrationError, match=r"cannot be used \(.*a\.jpg\)"):
        open_source(tmp_path, NCHW, images={})
    with pytest.raises(CalibrationError, match="folder of images"):
        open_source(tmp_path / "a.jpg", NCHW, images={})
    with pytest.raises(CalibrationError, match="folder of images"):
        open_source(np.zeros((1, 3, 8, 6), np.float32), NCHW, images={})


def test_without_pillow(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(CalibrationError, match=r"needs Pillow.*postquant\[image\]"):
        open_source(folder, NCHW, images={})
