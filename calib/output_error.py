"""How far outputs of a network are from what they should be: which outputs count, and their squared error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
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


@dataclasses.dataclass(frozen=True)
class SampleError:
    """What quantization did to the outputs for one sample.

    Attributes:
        signal: Energy of all expected outputs together.
        noise: Squared error of all outputs together.
        relative: Sum over outputs of squared error over energy, so that large outputs do not hide small ones.
    """

    signal: float
    noise: float
    relative: float

    @classmethod
    def of(cls, outputs: Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> SampleError:
        """Of pairs (what came, what was expected)."""
        signal = noise = relative = 0.0
        for got, expected in outputs:
            energy, error = squared_error(got, expected)
            signal, noise = signal + energy, noise + error
            relative += error / max(energy, 1e-30)
        return cls(signal, noise, relative)


def sqnr_db(samples: Sequence[SampleError]) -> float:
    """SQNR of all samples together, in dB.

    >>> sqnr_db([SampleError(90.0, 1.0, 0.0), SampleError(10.0, 0.0, 0.0)])
    20.0
    """
    signal, noise = sum(s.signal for s in samples), sum(s.noise for s in samples)
    return 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30))


def combined_error(samples: Sequence[SampleError]) -> float:
    """One number that decides between quantized networks: smaller is better; at least 1e-6, so that it has a logarithm.

    The geometric mean of the mean over samples of the root of the relative error (robust to single samples) and of
    the root of the relative error of all samples together (blind to none).

    >>> combined_error([SampleError(1.0, 0.01, 0.01), SampleError(1.0, 0.01, 0.01)])
    0.1
    """
    if not samples:
        return 1e-6
    robust = sum(math.sqrt(s.relative) for s in samples) / len(samples)
    return max(math.sqrt(robust * 10 ** (-sqnr_db(samples) / 20)), 1e-6)
