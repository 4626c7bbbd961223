"""Means of the float input rows of every layer, where no scale search has collected them: :func:`input_means`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.layers import layers_of
from postquant.calib.prefix import spaced
from postquant.calib.source import CalibrationSource
from postquant.passes.plan import QuantPlan
from postquant.passes.session import make_session

FloatArray = npt.NDArray[np.float32]


def input_means(
    model: ir.Model,
    plan: QuantPlan,
    source: CalibrationSource,
    *,
    samples: int = 64,
    positions: int = 64,
    threads: int = 1,
) -> dict[str, FloatArray]:
    """(G, K) mean of the float rows of each layer with a quantized weight and a bias.

    Args:
        model: The simplified float model.
        plan: Tells which weights are quantized.
        source: Calibration data.
        samples: How many samples, evenly spaced.
        positions: Output positions per sample, evenly spaced.
        threads: Threads of onnxruntime.

    Returns:
        Node name -> means.
    """
    layers = [layer for layer in layers_of(model) if layer.weight in plan.weights and layer.bias is not None]
    totals = {layer.name: np.zeros((layer.groups, layer.depth)) for layer in layers}
    counts = dict.fromkeys(totals, 0)
    inputs = list(dict.fromkeys(layer.input for layer in layers))
    if not inputs:
        return {}
    session = make_session(model, outputs=inputs, threads=threads)
    for number, sample in enumerate(source.read(spaced(len(source), samples))):
        values = session.run(sample)
        for layer in layers:
            x = values[layer.input]
            count = layer.positions(x.shape)
            # Another phase for every sample, so that all positions are seen.
            step = max(count // positions, 1)
            rows = layer.rows(x, np.arange(number % step, count, step))
            totals[layer.name] += rows.sum(0, dtype=np.float64)
            counts[layer.name] += len(rows)
    return {name: (total / max(counts[name], 1)).astype(np.float32) for name, total in totals.items()}
