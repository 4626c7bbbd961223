"""onnxruntime's own static quantizer, for comparison: :func:`quantize_with_onnxruntime`.

It is used as its documentation recommends: pre-processing first, QDQ format, weights per channel. It knows weights of
8 and 4 bits; its 4-bit activations exist only together with 4-bit weights; there is nothing between 4 and 8.
"""

from __future__ import annotations

import contextlib
import enum
import io
import logging
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnxruntime.quantization as ort_quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from postquant.pipeline.demo.digits import INPUT_NAME


class PeerMethod(enum.Enum):
    """onnxruntime's calibration methods that the demo compares with."""

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"


_CALIBRATION = {
    PeerMethod.MIN_MAX: ort_quantization.CalibrationMethod.MinMax,
    PeerMethod.PERCENTILE: ort_quantization.CalibrationMethod.Percentile,
}
_WEIGHT_TYPE = {8: ort_quantization.QuantType.QInt8, 4: ort_quantization.QuantType.QInt4}
_ACTIVATION_TYPE = {8: ort_quantization.QuantType.QUInt8, 4: ort_quantization.QuantType.QUInt4}
OFFERED = ((8, 8), (4, 8), (4, 4))


class _Reader(ort_quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not typed
    """Feeds one image at a time."""

    def __init__(self, images: npt.NDArray[np.float32]) -> None:
        self._feeds = iter([{INPUT_NAME: images[i : i + 1]} for i in range(len(images))])

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        """The next feed, or None."""
        return next(self._feeds, None)


def quantize_with_onnxruntime(
    model: pathlib.Path,
    result: pathlib.Path,
    images: npt.NDArray[np.float32],
    *,
    wbits: int,
    abits: int,
    method: PeerMethod,
) -> None:
    """Writes ``result``.

    Args:
        model: The float model.
        result: File to write.
        images: (N, 1, 8, 8) float32 calibration images.
        wbits: Bits of weights.
        abits: Bits of activations; the two together in :data:`OFFERED`.
        method: How ranges are found.
    """
    with _silence(), tempfile.TemporaryDirectory() as folder:
        prepared = pathlib.Path(folder) / "prepared.onnx"
        quant_pre_process(str(model), str(prepared))
        ort_quantization.quantize_static(
            str(prepared),
            str(result),
            _Reader(images),
            quant_format=ort_quantization.QuantFormat.QDQ,
            per_channel=True,
            weight_type=_WEIGHT_TYPE[wbits],
            activation_type=_ACTIVATION_TYPE[abits],
            calibrate_method=_CALIBRATION[method],
        )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """onnxruntime's quantizer prints and logs its steps; the demo's output is its table."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
