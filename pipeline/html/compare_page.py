"""The page about two models side by side: :func:`compare_page`."""

from __future__ import annotations

import pathlib

from postquant.pipeline.compare import Comparison, worst_layers
from postquant.pipeline.html.folder import require_pages
from postquant.pipeline.html.layer_chart import LayerPoints, layer_chart
from postquant.pipeline.html.page import fill

_WORST = 3


def compare_page(comparison: Comparison, fp32: str, quant: str) -> bytes:
    """The page; the same bytes for the same values.

    Args:
        comparison: What was measured.
        fp32: Path of the float model.
        quant: Path of the quantized model.

    Returns:
        HTML in UTF-8.

    Raises:
        ConfigError: If the template engine is missing.
    """
    require_pages()
    points = [LayerPoints(layer.name, (layer.sqnr_db,)) for layer in comparison.layers]
    return fill(
        "compare",
        comparison=comparison,
        fp32=pathlib.Path(fp32).name,
        quant=pathlib.Path(quant).name,
        lowest=worst_layers(comparison, _WORST),
        chart=layer_chart(points, ["result"]),
    )
