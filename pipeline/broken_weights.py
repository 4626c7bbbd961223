"""NaN in a weight, told as such: :func:`broken_weights_told`.

Calibration meets such a weight as an activation that is not finite and can only blame a sample. All weights are
searched then, and not before every run: reading those of a large model takes its time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from postquant.passes import semantics
from postquant.runtime_ops.errors import CalibrationError, ModelError

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})


@contextlib.contextmanager
def broken_weights_told(model: ir.Model) -> Iterator[None]:
    """Turns an error about the data into one about the model where a weight is to blame.

    Args:
        model: The model as loaded.

    Raises:
        ModelError: If calibration failed and a weight holds NaN, or infinity where no layer can use it.
    """
    try:
        yield
    except CalibrationError as error:
        found = _first_broken(model)
        if found is None:
            raise
        name, text = found
        raise ModelError(
            "a weight of the model holds NaN or infinity",
            where=name,
            found=text,
            hint="export the trained network again; training may have diverged",
        ) from error


def _first_broken(model: ir.Model) -> tuple[str, str] | None:
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype not in _FLOATS:
                continue
            array = tensor.numpy()
            nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
            # Infinity is a usual bound of a Clip, or a mask.
            if nan or (infinite and any(use.node.op_type in semantics.WEIGHTED for use in value.uses())):
                return value.name or "", f"{nan} NaN and {infinite} infinite of {array.size} values"
    return None
