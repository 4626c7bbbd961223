"""One line of the demo's table, measured on a plain onnxruntime: :func:`measure`.

accuracy   share of test images whose largest logit is the label's
agreement  share of test images whose largest logit is the float model's
sqnr_db    10 log10(sum ref^2 / sum (ref - out)^2) over all logits of the test images
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from postquant.pipeline.demo.digits import INPUT_NAME, Digits


@dataclasses.dataclass(frozen=True)
class Row:
    """One quantized model.

    Attributes:
        bits: "float", or bits of weights / activations ("4/8").
        quantizer: Who made it and how; None in the numbers says that this is not offered.
        accuracy: 0..1.
        agreement: With the float model, 0..1.
        sqnr_db: Of the logits; None for the float model.
        kilobytes: Size of the file, 1000 bytes.
        seconds: Time to quantize.
    """

    bits: str
    quantizer: str
    accuracy: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    kilobytes: float | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return dataclasses.asdict(self)


def logits(model: pathlib.Path, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(N, 10) float32 outputs of ``model`` on (N, 1, 8, 8) ``images``, with onnxruntime as anybody installs it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    result: npt.NDArray[np.float32] = session.run(None, {INPUT_NAME: images})[0]
    return result


def measure(
    model: pathlib.Path,
    digits: Digits,
    reference: npt.NDArray[np.float32],
    *,
    bits: str,
    quantizer: str,
    seconds: float | None = None,
) -> Row:
    """Runs ``model`` on the test images.

    Args:
        model: The file.
        digits: Test images and labels.
        reference: (N, 10) logits of the float model on the same images.
        bits: For the table.
        quantizer: For the table.
        seconds: How long the quantization took.
    """
    output = logits(model, digits.test)
    error = float(np.square(reference.astype(np.float64) - output).sum())
    return Row(
        bits=bits,
        quantizer=quantizer,
        accuracy=float((output.argmax(1) == digits.test_labels).mean()),
        agreement=float((output.argmax(1) == reference.argmax(1)).mean()),
        sqnr_db=10 * math.log10(float(np.square(reference.astype(np.float64)).sum()) / error) if error else None,
        kilobytes=model.stat().st_size / 1000,
        seconds=seconds,
    )
