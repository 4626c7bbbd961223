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
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy.typing as npt
import onnx
import onnxruntime
import onnxruntime.quantization as ort_quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

Feed = Mapping[str, npt.NDArray[Any]]


class PeerMethod(enum.Enum):
    """onnxruntime's calibration methods that we compare with."""

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"


_CALIBRATION = {
    PeerMethod.MIN_MAX: ort_quantization.CalibrationMethod.MinMax,
    PeerMethod.PERCENTILE: ort_quantization.CalibrationMethod.Percentile,
}
_WEIGHT_TYPE = {8: ort_quantization.QuantType.QInt8, 4: ort_quantization.QuantType.QInt4}
_ACTIVATION_TYPE = {8: ort_quantization.QuantType.QUInt8, 4: ort_quantization.QuantType.QUInt4}
OFFERED = ((8, 8), (4, 8), (4, 4))


def nearest_offered(wbits: int, abits: int) -> tuple[int, int]:
    """The narrowest widths of :data:`OFFERED` that are at least as wide as asked for; 8 bits where none are.

    >>> nearest_offered(4, 8), nearest_offered(7, 7), nearest_offered(2, 2), nearest_offered(8, 16)
    ((4, 8), (8, 8), (4, 4), (8, 8))
    """
    return next(((w, a) for w, a in reversed(OFFERED) if w >= wbits and a >= abits), OFFERED[0])


class _Reader(ort_quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not typed
    """Feeds one sample at a time."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """The next feed, or None."""
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)


def quantize_with_onnxruntime(
    model: pathlib.Path,
    result: pathlib.Path,
    feeds: Iterable[Feed],
    *,
    wbits: int,
    abits: int,
    method: PeerMethod = PeerMethod.MIN_MAX,
) -> None:
    """Writes ``result``.

    Args:
        model: The float model.
        result: File to write.
        feeds: Calibration samples, input name -> array.
        wbits: Bits of weights.
        abits: Bits of activations; the two together in :data:`OFFERED`.
        method: How ranges are found. The percentile method keeps every value of every tensor: gigabytes.

    Raises:
        Exception: Whatever onnxruntime raises; its errors share no base class.
    """
    with _silence(), tempfile.TemporaryDirectory() as folder:
        prepared = pathlib.Path(folder) / "prepared.onnx"
        # Where its symbolic shape inference fails, it leaves files in the working directory; ONNX's own is enough. But
        # without the symbolic one it loses external data.
        whole = pathlib.Path(folder) / "float.onnx"
        onnx.save_model(onnx.load(model), whole)
        quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
        ort_quantization.quantize_static(
            str(prepared),
            str(result),
            _Reader(feeds),
            quant_format=ort_quantization.QuantFormat.QDQ,
            per_channel=True,
            weight_type=_WEIGHT_TYPE[wbits],
            activation_type=_ACTIVATION_TYPE[abits],
            calibrate_method=_CALIBRATION[method],
        )


_WARNING, _FATAL = 2, 4  # severities of onnxruntime's log; warnings are its default


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """onnxruntime's quantizer prints, logs and warns of its steps; none of it belongs into our output."""
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)
        logging.disable(logging.NOTSET)
