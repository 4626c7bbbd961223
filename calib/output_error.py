"""How far outputs of a network are from what they should be: which outputs count, and their squared error."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

_FLOATS = frozenset({None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})
_COUNTED = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.BOOL})


def float_outputs(model: ir.Model) -> list[str]:
    """Names of the graph's float outputs."""
    return [value.name or "" for value in model.graph.outputs if value.dtype in _FLOATS]


def measured_outputs(model: ir.Model) -> list[str]:
    """Names of the outputs that tell networks apart: the float ones; labels and the like only where there are none."""
    return float_outputs(model) or [value.name or "" for value in model.graph.outputs if value.dtype in _COUNTED]


def squared_error(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> tuple[float, float]:
    """Energy of an expected output, and the squared error of what came instead.

    Args:
        got: The output; where the number of results depends on the values (detections), its shape may be another one,
            and then nothing of it counts as right.
        expected: The float network's.

    Returns:
        Sum of the squares of ``expected``, and of the difference.

    >>> squared_error(np.array([1.0, 3.0]), np.array([1.0, 2.0]))
    (5.0, 1.0)
    >>> squared_error(np.array([1.0]), np.array([1.0, 2.0]))
    (5.0, 6.0)
    """
    exact = expected.astype(np.float64)
    signal = float(np.sum(np.square(exact)))
    if got.shape != expected.shape:
        return signal, signal + float(np.sum(np.square(got.astype(np.float64))))
    return signal, float(np.sum(np.square(got - exact)))
