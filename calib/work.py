"""How much arithmetic one run of a network is, to bound how often it is run: :func:`forward_work`."""

from __future__ import annotations

import onnx_ir as ir

from postquant.calib.layers import layers_of
from postquant.calib.source import CalibrationSource
from postquant.passes.session import make_session


def forward_work(model: ir.Model, source: CalibrationSource, *, threads: int = 1) -> float:
    """Multiply-accumulates of the weighted layers for the first sample."""
    layers = layers_of(model)
    if not layers:
        return 0.0
    outputs = list(dict.fromkeys(layer.output for layer in layers))
    values = make_session(model, outputs=outputs, threads=threads).run(next(iter(source.read([0]))))
    return float(sum(values[layer.output].size * layer.depth for layer in layers))
