"""What goes into the pipeline and what comes out: :class:`Job` and :class:`Outcome`."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from postquant.calib.source import CalibrationSource
from postquant.passes.plan import QuantPlan
from postquant.passes.target import Target
from postquant.pipeline.checkpoint import NullCheckpoint
from postquant.pipeline.config import QuantConfig
from postquant.pipeline.encodings.vendor import VendorEncodings
from postquant.pipeline.progress import NullProgress
from postquant.pipeline.report import Report
from postquant.pipeline.tensor_statistics import Statistics
from postquant.runtime_ops.errors import VerificationError


@dataclasses.dataclass(frozen=True)
class Job:
    """One quantization to do.

    Attributes:
        model: The model as loaded; the pipeline may change it.
        source: Calibration data, already limited to ``config.samples`` and checked against the inputs.
        config: Settings.
        target: What the result is made for; ``config.target`` is where it came from.
        report: What is known before any work: names, digests, settings, versions, inputs and their ranges, notes
            about the data. The pipeline returns it with the rest filled in (:func:`dataclasses.replace`).
        checkpoint: Where finished stages are kept.
        progress: Who is told.
        encodings: A vendor's numbers to start from.
    """

    model: ir.Model
    source: CalibrationSource
    config: QuantConfig
    target: Target
    report: Report
    checkpoint: NullCheckpoint = dataclasses.field(default_factory=NullCheckpoint)
    progress: NullProgress = dataclasses.field(default_factory=NullProgress)
    encodings: VendorEncodings | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the pipeline made.

    Attributes:
        model: The quantized model.
        plan: The plan that it was emitted from.
        report: The job's report, filled in except ``size_after`` and ``files``, which are known after writing.
        statistics: What the report's pictures are drawn from.
        failure: Why the verification failed, or None.
    """

    model: ir.Model
    plan: QuantPlan
    report: Report
    statistics: Statistics
    failure: VerificationError | None = None
