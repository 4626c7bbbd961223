"""How many samples the measuring of effects on the outputs may cost: :func:`affordable_effect`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import onnx_ir as ir

from postquant.calib.output_effect import EffectOptions, OutputEffect
from postquant.calib.source import CalibrationSource
from postquant.calib.work import forward_work

# Multiply-accumulates that measuring effects may cost; MobileNetV2 at 224 x 224 takes a third of it.
EFFECT_WORK = 3.0e12
_CANDIDATES = 8
_MOST_SAMPLES = 192


def effect_options(work: float, tensors: int, samples: int, *, budget: float = EFFECT_WORK) -> EffectOptions | None:
    """As many samples as the budget allows, or None where not even the fewest fit.

    Args:
        work: Multiply-accumulates of one run of the network.
        tensors: Number of tensors to decide.
        samples: Number of calibration samples.
        budget: Multiply-accumulates in all; a candidate costs half a run, on average.
    """
    least, default = EffectOptions(samples=8, screening=3), EffectOptions()
    for count in (_MOST_SAMPLES, 128, 96, 64, 48, 32, 24, default.samples, 12, least.samples):
        screening = max(least.screening, count // 6)
        runs = screening * _CANDIDATES + (count - screening) * default.finalists + count
        if tensors * runs * work / 2 <= budget * (1.0 if count <= default.samples else 0.2):
            return EffectOptions(samples=min(count, samples), screening=min(screening, samples))
    return None


def affordable_effect(
    model: ir.Model,
    source: CalibrationSource,
    tensors: int,
    *,
    floats: Collection[str] = (),
    rounded: Collection[str] = (),
    samples: int | None = None,
    threads: int = 1,
) -> tuple[OutputEffect | None, str | None]:
    """Measures effects on as much data as the budget allows.

    Args:
        model: The simplified float model.
        source: Calibration data.
        tensors: Number of tensors to decide.
        floats: Names of the nodes that stay in float.
        rounded: Values that these read behind their quantization.
        samples: How many samples see every candidate; as many as the budget allows when None.
        threads: How many samples are run at the same time; never changes the result.

    Returns:
        What measures, or None where even the least costs too much; and a note for the report, or None.
    """
    options = effect_options(forward_work(model, source).products, tensors, len(source))
    if options is None:
        return None, "ranges were chosen by tensor error: measuring effects on the outputs would cost too much"
    if samples is not None:
        options = dataclasses.replace(options, samples=samples, screening=samples)
    return OutputEffect(model, source, options, floats=floats, rounded=rounded, threads=threads), None
