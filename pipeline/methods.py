"""The range method that a configuration names: :func:`range_method`."""

from __future__ import annotations

from postquant.calib.entropy import Entropy
from postquant.calib.lp_error import LpError
from postquant.calib.observers import MinMax, Percentile, RangeMethod
from postquant.pipeline.config import Method, QuantConfig


def range_method(config: QuantConfig) -> RangeMethod | None:
    """The method, or None for EasyQuant, which chooses per tensor by the effect on the outputs."""
    match config.method:
        case Method.MINMAX:
            return MinMax()
        case Method.MSE:
            return LpError(config.lp)
        case Method.ENTROPY:
            return Entropy()
        case Method.PERCENTILE:
            return Percentile(config.percentile)
    return None
