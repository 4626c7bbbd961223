"""From an image file's pixels to a model's input: :class:`ImagePreprocess`.

    resize -> crop -> channels -> x = (pixel * scale - mean) / std -> layout

in float32, one image at a time. It is data (a table of a configuration file), so that a report can repeat it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.errors import CalibrationError

if TYPE_CHECKING:
    from PIL.Image import Image


class Resize(enum.Enum):
    """How an image gets the model's size."""

    CROP = "crop"  # the shorter side to `shorter_side`, then the centre of `size`
    STRETCH = "stretch"  # both sides, changing the aspect ratio
    NONE = "none"  # images have the size already


class Channels(enum.Enum):
    """Order of the colour channels."""

    RGB = "rgb"
    BGR = "bgr"
    GRAY = "gray"


class Layout(enum.Enum):
    """Order of the axes."""

    NCHW = "nchw"
    NHWC = "nhwc"


class Interpolation(enum.Enum):
    """Pillow's filter for resizing; all but nearest smooth while they shrink."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


@dataclasses.dataclass(frozen=True, slots=True)
class ImagePreprocess:
    """How images become inputs.

    Attributes:
        size: (height, width) of the result, or None to take it from the model's input.
        resize: How an image gets that size.
        shorter_side: With ``CROP``, what the shorter side is resized to before the crop (the longer one in
            proportion); None for the larger side of ``size``.
        interpolation: Filter of the resizing.
        channels: Order of the channels; ``GRAY`` gives one.
        layout: Order of the axes.
        scale: Factor of the pixel values 0 .. 255, applied first; not 0.
        mean: Subtracted after scaling, one value or one per channel in the order of ``channels``.
        std: Divided by after subtracting, likewise; not 0.

    Raises:
        ValueError: If a number makes no sense.
    """

    size: tuple[int, int] | None = None
    resize: Resize = Resize.CROP
    shorter_side: int | None = None
    interpolation: Interpolation = Interpolation.BILINEAR
    channels: Channels = Channels.RGB
    layout: Layout = Layout.NCHW
    scale: float = 1.0 / 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be positive, not {list(self.size)}")
        if self.shorter_side is not None:
            if self.resize is not Resize.CROP:
                raise ValueError(f"shorter_side belongs to resize = 'crop', not {self.resize.value!r}")
            if self.shorter_side < max(self.size or (1, 1)):
                raise ValueError(f"shorter_side {self.shorter_side} is smaller than the crop {list(self.size or ())}")
        if self.resize is Resize.NONE and self.size is not None:
            raise ValueError("size has no meaning with resize = 'none'")
        if not np.isfinite(self.scale) or self.scale == 0.0:
            raise ValueError(f"scale must be a finite number other than 0, not {self.scale}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (1, self.channel_count) or not np.isfinite(values).all():
                raise ValueError(f"{name} needs 1 or {self.channel_count} finite numbers, not {list(values)}")
        if 0.0 in self.std:
            raise ValueError("std must not be 0")

    @property
    def channel_count(self) -> int:
        """1 for grey images, otherwise 3."""
        return 1 if self.channels is Channels.GRAY else 3

    @classmethod
    def from_mapping(cls, table: Mapping[str, Any]) -> ImagePreprocess:
        """The preprocessing that a table of a configuration file describes.

        Keys are the attributes; enums are their values ("crop", "bgr"), ``size`` is one number or [height, width],
        ``mean`` and ``std`` one number or a list.

        Raises:
            CalibrationError: If a key is unknown or a value wrong.

        >>> ImagePreprocess.from_mapping({"size": 224, "shorter_side": 256, "channels": "bgr"}).size
        (224, 224)
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(table) - known)
        if unknown:
            raise CalibrationError(
                "the image preprocessing has an unknown key",
                expected=", ".join(sorted(known)),
                found=", ".join(repr(key) for key in unknown),
            )
        values = dict(table)
        kinds: dict[str, type[enum.Enum]] = {
            "resize": Resize,
            "channels": Channels,
            "layout": Layout,
            "interpolation": Interpolation,
        }
        try:
            for key, kind in kinds.items():
                if key in values and not isinstance(values[key], kind):
                    values[key] = kind(values[key])
            if values.get("size") is not None:
                size = values["size"]
                height, width = (size, size) if isinstance(size, int) else size
                values["size"] = (_whole(height), _whole(width))
            if values.get("shorter_side") is not None:
                values["shorter_side"] = _whole(values["shorter_side"])
            for key in ("mean", "std"):
                if key in values:
                    given = values[key]
                    values[key] = tuple(map(float, [given] if isinstance(given, int | float) else given))
            if "scale" in values:
                values["scale"] = float(values["scale"])
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise CalibrationError("the image preprocessing is wrong", found=str(error)) from error

    def apply(self, image: Image, size: tuple[int, int] | None, dtype: np.dtype[Any]) -> npt.NDArray[np.generic]:
        """The model's input for one image.

        Args:
            image: A Pillow image of any mode.
            size: (height, width) of the result; None keeps the image's.
            dtype: Of the result: a float type, or an integer type that holds the values exactly.

        Returns:
            (1, C, H, W) or (1, H, W, C).

        Raises:
            ValueError: If an integer type cannot hold the values.
        """
        image = self._resized(image.convert("L" if self.channels is Channels.GRAY else "RGB"), size)
        pixels = np.asarray(image, np.float32).reshape(image.height, image.width, self.channel_count)
        if self.channels is Channels.BGR:
            pixels = pixels[:, :, ::-1]
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        values: npt.NDArray[np.float32] = (pixels * np.float32(self.scale) - mean) / std
        if self.layout is Layout.NCHW:
            values = values.transpose(2, 0, 1)
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            if values.min() < limits.min or values.max() > limits.max or not np.array_equal(values, np.rint(values)):
                raise ValueError(f"the preprocessed values are not whole numbers of {dtype.name}; set scale = 1")
        return np.ascontiguousarray(values[None].astype(dtype))

    def _resized(self, image: Image, size: tuple[int, int] | None) -> Image:
        import PIL.Image

        if size is None or self.resize is Resize.NONE:
            return image
        height, width = size
        filters = {
            Interpolation.NEAREST: PIL.Image.Resampling.NEAREST,
            Interpolation.BILINEAR: PIL.Image.Resampling.BILINEAR,
            Interpolation.BICUBIC: PIL.Image.Resampling.BICUBIC,
        }
        chosen = filters[self.interpolation]
        if self.resize is Resize.STRETCH:
            return image.resize((width, height), chosen)
        side = max(self.shorter_side or 0, *size)
        short = min(image.size)
        # The longer side is truncated, as torchvision does, whose preprocessing most models were trained with.
        target = [side if length == short else int(side * length / short) for length in image.size]
        image = image.resize((target[0], target[1]), chosen)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a whole number")
    return value
