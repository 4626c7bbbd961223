"""One quantization in a process of its own: ``python bench/worker.py JOB``, where JOB is JSON (see :class:`Job`).

Prints one JSON line: CPU and wall seconds of the quantization itself (imports and pre-processing excluded), and the
peak memory of the process. The peak is VmHWM, not ``ru_maxrss``, which a process inherits from the one that starts it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import resource
import sys
import tempfile
import time
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker does.

    Attributes:
        quantizer: "postquant", "onnxruntime" or "onnxruntime-percentile".
        model: The float model.
        calibration: Folder of ``.npz`` files, one per feed.
        out: File to write.
        wbits: Bits of weights.
        abits: Bits of activations.
        options: Further fields of ``QuantConfig``; postquant only.
    """

    quantizer: str
    model: str
    calibration: str
    out: str
    wbits: int
    abits: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


class NotOfferedError(Exception):
    """The quantizer has no such widths."""


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock:
    """CPU (all threads) and wall seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Seconds so far."""
        return {"cpu_s": time.process_time() - self._cpu, "wall_s": time.perf_counter() - self._wall}


def run_postquant(job: Job) -> dict[str, float]:
    """Quantizes with postquant."""
    import postquant

    # What is measured is the quantization; the bundle is a copy of it for others.
    config = postquant.QuantConfig(wbits=job.wbits, abits=job.abits, bundle=False, **job.options)
    out = pathlib.Path(job.out)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        clock = Clock()
        postquant.quantize(job.model, job.calibration, config, out=folder)
        seconds = clock.read()
        for file in pathlib.Path(folder).glob("model.onnx*"):
            file.rename(out.parent / file.name.replace("model.onnx", out.name))
    return seconds


def run_onnxruntime(job: Job) -> dict[str, float]:
    """Quantizes with onnxruntime: QDQ, per channel, after its own pre-processing; 7 bits by ``reduce_range``."""
    import onnxruntime.quantization as ort_quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    kinds = ort_quantization.QuantType
    types = {(8, 8): (kinds.QInt8, kinds.QUInt8), (7, 7): (kinds.QInt8, kinds.QUInt8)}
    types |= {(4, 8): (kinds.QInt4, kinds.QUInt8), (4, 4): (kinds.QInt4, kinds.QUInt4)}
    if (job.wbits, job.abits) not in types:
        raise NotOfferedError
    weight_type, activation_type = types[job.wbits, job.abits]
    percentile = job.quantizer == "onnxruntime-percentile"
    methods = ort_quantization.CalibrationMethod

    class Reader(ort_quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not typed
        """Reads one feed at a time."""

        def __init__(self) -> None:
            self._files = iter(sorted(pathlib.Path(job.calibration).glob("*.npz")))

        def get_next(self) -> dict[str, Any] | None:
            """The next feed, or None."""
            file = next(self._files, None)
            return None if file is None else dict(np.load(file))

    with tempfile.TemporaryDirectory() as folder:
        prepared = str(pathlib.Path(folder) / "prepared.onnx")
        quant_pre_process(job.model, prepared)
        clock = Clock()
        ort_quantization.quantize_static(
            prepared,
            job.out,
            Reader(),
            quant_format=ort_quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=job.wbits == 7,
            weight_type=weight_type,
            activation_type=activation_type,
            calibrate_method=methods.Percentile if percentile else methods.MinMax,
        )
        return clock.read()


def main() -> None:
    """Does the job and prints its line last; what a quantizer prints goes to standard error."""
    job = Job(**json.loads(sys.argv[1]))
    run = run_postquant if job.quantizer == "postquant" else run_onnxruntime
    with contextlib.redirect_stdout(sys.stderr):
        try:
            seconds = run(job)
        except NotOfferedError:
            result: dict[str, Any] = {"not_offered": True}
        else:
            result = {**seconds, "peak_mb": peak_bytes() / 1e6}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
