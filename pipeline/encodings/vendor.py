"""What a file of encodings says, whichever format it has: :class:`VendorEncodings`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.errors import ConfigError


@dataclasses.dataclass(frozen=True, eq=False)
class VendorTensor:
    """The numbers of one tensor: ``x = (code - zero_point) * scale``.

    Attributes:
        scale: (n,) float32; n is 1 for one scale.
        zero_point: (n,) int32.
        bits: Width of a code.
        signed: Whether codes are signed.
        axis: Channel axis; None where there is one scale, or where the file does not say it.
    """

    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int32]
    bits: int
    signed: bool
    axis: int | None = None

    @classmethod
    def symmetric(cls, scale: npt.ArrayLike) -> VendorTensor:
        """Signed 8-bit codes with zero point 0."""
        scales = float32_scales(scale)
        return cls(scales, np.zeros(scales.shape, np.int32), 8, True)


@dataclasses.dataclass(frozen=True, eq=False)
class VendorEncodings:
    """The content of a file.

    Attributes:
        format: Name of the format, with its version.
        tensors: Name of a value or initializer -> numbers.
        layer_inputs: Name of a node -> numbers of its input (ncnn names layers, not tensors).
        layer_weights: Name of a node -> numbers of its weight.
        skipped: What the file says that is no integer encoding, one clause each.
    """

    format: str
    tensors: Mapping[str, VendorTensor] = dataclasses.field(default_factory=dict)
    layer_inputs: Mapping[str, VendorTensor] = dataclasses.field(default_factory=dict)
    layer_weights: Mapping[str, VendorTensor] = dataclasses.field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """How many tensors it is about."""
        return len(self.tensors) + len(self.layer_inputs) + len(self.layer_weights)


def float32_scales(scale: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """(n,) float32 of one scale or several; what float32 does not hold becomes infinite or zero, and is refused later.

    Raises:
        ValueError: If it is no number or vector.
    """
    with np.errstate(over="ignore"):
        scales: npt.NDArray[np.float32] = np.atleast_1d(np.asarray(scale, np.float64)).astype(np.float32)
    if scales.ndim != 1 or not scales.size:
        raise ValueError(f"scales of shape {scales.shape}")
    return scales


def int32_zero_points(zero_point: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """(n,) int32 of one zero point or several.

    Raises:
        ValueError: If one is not whole or does not fit int32.
    """
    zeros = np.atleast_1d(np.asarray(zero_point, np.float64))
    if not (np.abs(zeros) < 2.0**31).all() or (zeros != np.rint(zeros)).any():
        raise ValueError("a zero point is not whole or too large")
    return zeros.astype(np.int32)


def wrong_file(path: pathlib.Path, found: str, expected: str | None = None) -> ConfigError:
    """The error of a file that is not what it should be."""
    return ConfigError("the encodings cannot be read", where=str(path), expected=expected, found=found)


def read_text(path: pathlib.Path) -> str:
    """The text of a file of encodings.

    Raises:
        ConfigError: If it cannot be read or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise wrong_file(path, error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise wrong_file(path, "a binary file", "text") from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: If it cannot be read, or holds no object.
    """
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise wrong_file(path, f"no JSON ({error})") from None
    if not isinstance(data, dict):
        raise wrong_file(path, "another JSON value", "an object")
    return data
