"""Reads a vendor's encodings, whichever of the known formats they have: :func:`read_encodings`."""

from __future__ import annotations

import pathlib

from postquant.pipeline.encodings.aimet import read_aimet
from postquant.pipeline.encodings.ncnn import read_table
from postquant.pipeline.encodings.tensorrt import read_cache
from postquant.pipeline.encodings.vendor import VendorEncodings, read_text
from postquant.pipeline.encodings.vitis_ai import read_positions


def read_encodings(path: pathlib.Path) -> VendorEncodings:
    """Reads a file; its content tells the format.

    * JSON with ``encodings``, ``activation_encodings`` or ``param_encodings``: AIMET / QNN 0.6.1, 1.0.0, 2.0.0;
    * JSON with ``param`` and ``output``: Vitis AI positions;
    * a first line that begins with ``TRT-``: a TensorRT calibration cache;
    * any other text: an ncnn table.

    Args:
        path: The file.

    Raises:
        ConfigError: If it cannot be read or is none of these.
    """
    start = read_text(path).lstrip()
    if start.startswith("{"):
        aimet = any(f'"{key}"' in start for key in ("encodings", "activation_encodings", "param_encodings"))
        return read_aimet(path) if aimet or '"param"' not in start else read_positions(path)
    return read_cache(path) if start.startswith("TRT-") else read_table(path)
