"""A folder of images as calibration data: :class:`ImageFolderSource` (extra ``image``, which is Pillow)."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence

from postquant.calib.image_preprocess import ImagePreprocess, Layout, Resize
from postquant.calib.input_spec import InputSpec, Sample
from postquant.calib.row_cut import fixed_batch
from postquant.calib.source import CalibrationSource
from postquant.runtime_ops.errors import CalibrationError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolderSource(CalibrationSource):
    """One sample per image, decoded and preprocessed each time it is read.

    Args:
        folder: Searched with its subfolders; files are taken in the order of their paths.
        preprocess: How an image becomes an input.
        inputs: What the model expects: one input of rank 4.

    Attributes:
        batch: How many samples make one feed of a model with a fixed batch.

    Raises:
        CalibrationError: If Pillow is not installed, the folder holds no images, or the preprocessing does not give
            the model's shape.
    """

    def __init__(self, folder: pathlib.Path, preprocess: ImagePreprocess, inputs: Sequence[InputSpec]) -> None:
        super().__init__(inputs)
        _require_pillow()
        if len(inputs) != 1 or (inputs[0].shape is not None and len(inputs[0].shape) != 4):
            raise CalibrationError(
                "a folder of images cannot feed this model",
                where=str(folder),
                expected="a model with one input of rank 4",
                found=", ".join(f"{spec.name!r} {spec}" for spec in inputs),
            )
        self.batch = fixed_batch(inputs)
        self._spec = inputs[0]
        self._preprocess = preprocess
        self._size = _target_size(preprocess, self._spec, where=str(folder))
        self._files = sorted(
            path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES
        )
        if not self._files:
            raise CalibrationError(
                "the calibration folder holds no images", where=str(folder), expected=" ".join(IMAGE_SUFFIXES)
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self._files)

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        """See :meth:`CalibrationSource.read`."""
        from PIL import Image

        for i in indices:
            path = self._files[i]
            try:
                with Image.open(path) as image:
                    array = self._preprocess.apply(image, self._size, self._spec.dtype)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise CalibrationError(
                    "an image cannot be used",
                    where=str(path),
                    found=str(error),
                    hint="take it out of the folder, or replace it",
                ) from error
            # The first image that does not fit is named, not only its number; a batch axis is joined later.
            if self._spec.shape is not None and not self._spec.fits((self.batch, *array.shape[1:])):
                raise CalibrationError(
                    "the image preprocessing does not give the model's input shape",
                    where=f"input {self._spec.name!r}, {path}",
                    expected=str(self._spec),
                    found=str(list(array.shape)),
                    hint="set size, resize, channels and layout as the model needs them",
                )
            yield {self._spec.name: array}


def _target_size(preprocess: ImagePreprocess, spec: InputSpec, *, where: str) -> tuple[int, int] | None:
    """(height, width) from the preprocessing or else from the model; None keeps each image's."""
    if preprocess.resize is Resize.NONE:
        return None
    if preprocess.size is not None:
        return preprocess.size
    axes = (2, 3) if preprocess.layout is Layout.NCHW else (1, 2)
    height, width = (spec.shape[axis] for axis in axes) if spec.shape is not None else (None, None)
    if height is None or width is None:
        raise CalibrationError(
            "the image preprocessing does not say the size, and the model's input has none",
            where=f"input {spec.name!r}, {where}",
            found=str(spec),
            hint='set size = [height, width], or resize = "none" if the images have it',
        )
    shorter = preprocess.shorter_side
    if shorter is not None and shorter < max(height, width):
        raise CalibrationError(
            "the image preprocessing makes images smaller than the model's input",
            where=where,
            expected=f"shorter_side of at least {max(height, width)}",
            found=str(shorter),
        )
    return height, width


def _require_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise CalibrationError(
            "reading images needs Pillow, which is not installed", hint='run: pip install "postquant[image]"'
        ) from None
