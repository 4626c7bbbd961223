"""The demo's model and samples: :func:`load_digits`."""

from __future__ import annotations

import dataclasses
import importlib.resources

import numpy as np
import numpy.typing as npt

INPUT_NAME = "image"
_GREY_LEVELS = np.float32(16)


@dataclasses.dataclass(frozen=True, eq=False)
class Digits:
    """Everything that the demo reads.

    Attributes:
        model: The trained network as ONNX: input ``image`` (N, 1, 8, 8) float32 in 0..1, output (N, 10) logits.
        calibration: (256, 1, 8, 8) float32 in 0..1.
        calibration_labels: (256,) int64 in 0..9; quantization does not need them.
        test: (900, 1, 8, 8) float32 in 0..1, disjoint from the calibration and training images.
        test_labels: (900,) int64 in 0..9.
    """

    model: bytes
    calibration: npt.NDArray[np.float32]
    calibration_labels: npt.NDArray[np.int64]
    test: npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int64]


def load_digits() -> Digits:
    """Reads the files that are shipped beside this module."""
    folder = importlib.resources.files("postquant.pipeline.demo")
    with folder.joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        return Digits(
            model=folder.joinpath("digits.onnx").read_bytes(),
            calibration=arrays["calibration_x"].astype(np.float32) / _GREY_LEVELS,
            calibration_labels=arrays["calibration_y"].astype(np.int64),
            test=arrays["test_x"].astype(np.float32) / _GREY_LEVELS,
            test_labels=arrays["test_y"].astype(np.int64),
        )
