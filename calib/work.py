"""How much one run of a network is: what it costs, and how much its layers see (:func:`forward_work`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from postquant.calib.layers import layers_of
from postquant.calib.source import CalibrationSource
from postquant.passes.session import make_session


@dataclasses.dataclass(frozen=True)
class ForwardWork:
    """What one sample is to the weighted layers of a network.

    Attributes:
        products: Multiply-accumulates of all layers, to bound how often the network is run.
        positions: Output positions of the layer that has the fewest: what every weight sees of one sample, at least.
            Pixels of a Conv's output, rows of a Gemm or MatMul; 1 where there is no layer.
        layers: Those of every layer, by its name.
    """

    products: float
    positions: int = 1
    layers: Mapping[str, int] = dataclasses.field(default_factory=dict)


def forward_work(model: ir.Model, source: CalibrationSource, *, threads: int = 1) -> ForwardWork:
    """Runs the first sample.

    Args:
        model: The simplified float model.
        source: Calibration data.
        threads: Of onnxruntime.
    """
    layers = layers_of(model)
    if not layers:
        return ForwardWork(0.0)
    outputs = list(dict.fromkeys(layer.output for layer in layers))
    values = make_session(model, outputs=outputs, threads=threads).run(next(iter(source.read([0]))))
    sizes = [values[layer.output].size for layer in layers]
    positions = {layer.name: max(size // layer.out_channels, 1) for size, layer in zip(sizes, layers, strict=True)}
    products = sum(size * layer.depth for size, layer in zip(sizes, layers, strict=True))
    return ForwardWork(float(products), min(positions.values()), positions)
