"""What ``postquant sensitivity`` finds out, as plain frozen values: :func:`measure_sensitivity`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from postquant.calib.sensitivity import LayerSensitivity, Sensitivity
from postquant.passes.session import custom_operators
from postquant.passes.target import load_target
from postquant.pipeline.allocation import Chosen, decibel
from postquant.pipeline.api import open_job
from postquant.pipeline.config import QuantConfig
from postquant.pipeline.inputs import ModelInput, model_file
from postquant.pipeline.progress import NullProgress
from postquant.pipeline.stages import study_bits


@dataclasses.dataclass(frozen=True)
class SensitivityRow:
    """One layer.

    Attributes:
        node: Name in the simplified model.
        op_type: Operator type.
        weights: Number of weights.
        work: Multiply-accumulates for one sample.
        weight_db: Bits of the weight -> SQNR of the network's outputs, in dB, with this weight alone quantized.
        input_db: Bits of the input -> the same with this input alone quantized; empty where that was not studied.
        own_db: Bits of the weight -> SQNR of the layer's own output, in dB.
        formats: Bits of the weight -> format -> SQNR of the layer's own output, in dB.
        measured: Bits of the weight that were tried end to end; the others follow from ``own_db``.
        wbits: Bits that the budget gives the weight; None without a budget.
        abits: Bits that the budget gives the input; None without a budget.
    """

    node: str
    op_type: str
    weights: int
    work: float
    weight_db: Mapping[int, float]
    input_db: Mapping[int, float]
    own_db: Mapping[int, float]
    formats: Mapping[int, Mapping[str, float]]
    measured: tuple[int, ...]
    wbits: int | None = None
    abits: int | None = None


@dataclasses.dataclass(frozen=True)
class SensitivityReport:
    """All layers, and what a budget makes of them.

    Attributes:
        model: Name of the model's file.
        samples: Number of calibration samples.
        rows: Layers in topological order.
        activations_db: SQNR of the outputs, in dB, with all activations quantized and float weights.
        budget: The budget as it was written, or None.
        kept: Whether the measured network is within the budget; None without one.
        predicted_db: SQNR of the outputs as the sum of the noises, in dB.
        sqnr_db: SQNR of the outputs as measured with quick scales, in dB.
        cost: Bytes of the file, or bit operations where these are the budget.
    """

    model: str
    samples: int
    rows: tuple[SensitivityRow, ...]
    activations_db: float
    budget: str | None = None
    kept: bool | None = None
    predicted_db: float | None = None
    sqnr_db: float | None = None
    cost: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values; numbers of bits are texts there."""
        return dataclasses.asdict(self)


def measure_sensitivity(
    model: ModelInput, calibration: object, config: QuantConfig | None = None, *, progress: NullProgress | None = None
) -> SensitivityReport:
    """What the width of each layer does to a model's outputs, and the widths that a budget would get.

    Args:
        model: Path, bytes, ``onnx.ModelProto`` or ``onnx_ir.Model``; never changed.
        calibration: As for :func:`postquant.quantize`.
        config: Settings; ``wbits`` and ``abits`` are the widest that are studied.
        progress: Who is told what happens.

    Raises:
        PostquantError: If the model, the data or a setting is wrong, or no choice keeps the budget.
    """
    config = config or QuantConfig()
    with contextlib.ExitStack() as stack:
        stack.enter_context(custom_operators(config.custom_ops))
        path = stack.enter_context(model_file(model))
        job = open_job(path, calibration, config, load_target(config.target), progress or NullProgress(), None)
        found, chosen = study_bits(job)
        return _report(path, len(job.source), found, chosen, config.budget)


def _report(
    path: str | os.PathLike[str], samples: int, found: Sensitivity, chosen: Chosen | None, budget: str | None
) -> SensitivityReport:
    rows = tuple(_row(layer, chosen) for layer in found.layers)
    name = pathlib.PurePath(path).name
    fixed = decibel(found.fixed)
    if chosen is None:
        return SensitivityReport(name, samples, rows, fixed)
    allocation = chosen.allocation
    return SensitivityReport(
        name,
        samples,
        rows,
        fixed,
        budget,
        allocation.kept,
        allocation.predicted_db,
        allocation.quick.outcome.sqnr_db,
        allocation.quick.cost,
    )


def _row(layer: LayerSensitivity, chosen: Chosen | None) -> SensitivityRow:
    bits = None if chosen is None else chosen.bits[layer.layer]
    return SensitivityRow(
        layer.layer,
        layer.op_type,
        layer.count,
        layer.work,
        {width: decibel(noise) for width, noise in layer.weight_noise.items()},
        {width: decibel(noise) for width, noise in layer.input_noise.items()},
        {width: found.db for width, found in layer.widths.items()},
        {width: {book.value: db for book, db in found.formats.items()} for width, found in layer.widths.items()},
        layer.measured,
        None if bits is None else bits.wbits,
        None if bits is None else bits.abits,
    )
