"""onnxruntime's own quantizer beside our result, on the same samples: :func:`measure_peer`.

It calibrates on the samples that we calibrate on, and is measured on those that we are measured on, against the same
float model. That it cannot quantize a model is a line of the report and no error of ours.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterable

import onnxruntime

from postquant.calib.source import CalibrationSource
from postquant.passes.session import first_sentence, make_session
from postquant.pipeline.load import load_model
from postquant.pipeline.measure import SimilarityMeter
from postquant.pipeline.ort_quantizer import Feed, PeerMethod, nearest_offered, quantize_with_onnxruntime
from postquant.pipeline.quality import file_bytes, float_session
from postquant.pipeline.report import OutputReport, PeerReport
from postquant.pipeline.verify import output_report

_METHOD = PeerMethod.MIN_MAX  # its default, and the only one whose memory does not grow with the samples


def measure_peer(
    model: pathlib.Path, source: CalibrationSource, samples: Iterable[Feed], *, wbits: int, abits: int
) -> PeerReport:
    """Quantizes with onnxruntime and measures.

    Args:
        model: The float model.
        source: Calibration samples.
        samples: What outputs are measured on.
        wbits: Bits that weights should have; the nearest wider ones that onnxruntime offers are taken.
        abits: Bits that activations should have, likewise.

    Returns:
        The numbers, or the reason why there are none.
    """
    wbits, abits = nearest_offered(wbits, abits)
    name = f"onnxruntime {onnxruntime.__version__}, {_METHOD.value}"
    with tempfile.TemporaryDirectory(prefix="postquant.") as folder:
        result = pathlib.Path(folder) / "peer.onnx"
        try:
            quantize_with_onnxruntime(model, result, source, wbits=wbits, abits=abits, method=_METHOD)
            outputs = _measured(model, result, samples)
        except Exception as error:  # noqa: BLE001  # whatever another tool raises: its errors share no base class
            return PeerReport(quantizer=name, wbits=wbits, abits=abits, failure=first_sentence(error))
        size = file_bytes(result, load_model(result, check=False))
    return PeerReport(quantizer=name, wbits=wbits, abits=abits, size=size, outputs=outputs)


def _measured(model: pathlib.Path, result: pathlib.Path, samples: Iterable[Feed]) -> tuple[OutputReport, ...]:
    reference, quantized = float_session(load_model(model)), make_session(load_model(result, check=False))
    meters = {name: SimilarityMeter() for name in reference.output_names}
    for feed in samples:
        wanted, found = reference.run(feed), quantized.run(feed)
        for name, meter in meters.items():
            meter.add(wanted[name], found[name])
    return tuple(output_report(name, meter.result()) for name, meter in meters.items())
