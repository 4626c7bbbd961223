"""How far to move scales from activations into weights: factors for :class:`postquant.passes.smooth.SmoothPass`.

For layers that read ``x`` with channels k, ``r_k = max |x_k|`` and ``v_k = max_m |w_km|``, two families of factors are
tried (``x`` is divided by them, the weight's rows are multiplied):

    balance   s_k = r_k^t / v_k^(1-t)          SmoothQuant's; t = 1 makes all channels of x equally large
    cap       s_k = max(1, r_k / c)            only channels larger than c, a quantile of r, give way

``balance`` suits LayerNormalization, where all channels are alive; ``cap`` suits Gelu, where one channel is large in
one token and most are nearly always zero. Each candidate is judged by what it is for: on sampled rows, ``x / s`` is
quantized with its best range and ``s W`` with a scale per column, and

    error = mean over rows of |o~ - o - d|^2 / (|o|^2 + median |o|^2)

is measured, with ``d = mean(x) (w~ - w)`` that bias correction removes. (A sum over rows would listen only to the few
tokens with huge outputs, [CLS] for one, and LayerNormalization takes their size away again.) Factors are kept where the
error falls by at least ``least_gain_db``; where a Mul has to be inserted for them, by ``inserted_gain_db``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.channel_statistics import ChannelStatistics
from postquant.calib.layers import Layer
from postquant.calib.prefix import spaced
from postquant.calib.source import CalibrationSource
from postquant.passes.free_memory import release_tensor
from postquant.passes.session import make_session
from postquant.passes.smooth import SmoothGroup
from postquant.runtime_ops.quantizer import SMALLEST_SCALE, TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

FloatArray = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float64]
Progress = Callable[[], None]

# Fewer rows than this judge nothing, whatever memory they take.
_FEWEST_ROWS = 32
# Magnitudes below this part of the median count as this part: a channel that is almost never alive, or a row of nearly
# zero weights, would get an enormous factor for nothing.
_SMALLEST_PART = 0.01


@dataclasses.dataclass(frozen=True)
class SmoothingOptions:
    """What is tried, and on how much data.

    Attributes:
        strengths: ``t`` of the balance family.
        quantiles: Of ``r`` that give ``c`` in the cap family.
        widths: Multiples of the full range that are tried as the range of ``x / s``.
        samples: Samples, evenly spaced, whose rows are used.
        rows: Rows per group.
        columns: Columns of each weight, evenly spaced, on which the error is measured.
        row_bytes: Bound of the memory for the rows of all groups.
        least_gain_db: By how much the error must fall where the factors are absorbed.
        inserted_gain_db: By how much it must fall where they cost a Mul; 6 dB are one bit.
        seed: Of the sampled rows.
    """

    strengths: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    quantiles: tuple[float, ...] = (0.5, 0.75, 0.9, 0.98)
    widths: tuple[float, ...] = (1.0, 0.9)
    samples: int = 64
    rows: int = 512
    columns: int = 256
    row_bytes: int = 64 << 20
    least_gain_db: float = 0.5
    inserted_gain_db: float = 6.0
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class SmoothChoice:
    """The best factors of one group.

    Attributes:
        group: The group.
        factors: (K,) float64 ``s`` > 0; all 1 where no candidate is better.
        candidate: Name of the candidate, "none" for ones.
        before_db: SQNR of the group's layers with the unchanged tensor, in dB.
        after_db: With the factors.
        kept: Whether the gain is worth it.
    """

    group: SmoothGroup
    factors: Vector
    candidate: str
    before_db: float
    after_db: float
    kept: bool


def kept_factors(choices: Iterable[SmoothChoice]) -> list[tuple[SmoothGroup, Vector]]:
    """The groups that gain, with their factors: what :class:`postquant.passes.smooth.SmoothPass` takes."""
    return [(choice.group, choice.factors) for choice in choices if choice.kept]


def measure_smoothing(
    model: ir.Model,
    source: CalibrationSource,
    groups: Sequence[SmoothGroup],
    *,
    abits: int = 8,
    wbits: int = 8,
    symmetric: bool = False,
    options: SmoothingOptions | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> list[SmoothChoice]:
    """The best factors of every group, and what they are worth.

    Args:
        model: The simplified float model; weights are read one group at a time.
        source: Calibration data.
        groups: Of :func:`postquant.passes.smooth.smooth_groups`.
        abits: Bits of the layers' inputs.
        wbits: Bits of their weights.
        symmetric: Whether activations have symmetric ranges.
        options: What is tried.
        threads: Threads of onnxruntime.
        progress: Called after every group.

    Returns:
        One choice per group, in their order.
    """
    options = options or SmoothingOptions()
    if not groups:
        return []
    activation = QuantSpec(abits, signed=False, symmetric=symmetric)
    nodes = {node.name: node for node in model.graph}
    data = _collect(model, source, groups, options, threads)
    choices = []
    for group in groups:
        rows, statistics = data.pop(group.value)
        layers = [_read(nodes[name], rows, wbits, options.columns) for name in group.layers]
        choices.append(_choose(group, rows, statistics, layers, activation, options))
        if progress is not None:
            progress()
    return choices


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    """One layer of a group.

    Attributes:
        weight: (K, m) float32 sampled columns.
        largest: (K,) largest magnitude of each row of the whole weight.
        target: (P, m) float output.
        importance: (P,) what a squared error of a row counts.
        levels: Largest weight code.
    """

    weight: FloatArray
    largest: Vector
    target: FloatArray
    importance: Vector
    levels: int

    def error(self, rows: FloatArray, mean: FloatArray, quantized: FloatArray, factors: Vector) -> float:
        """Relative squared output error of quantized rows (P, K) with this layer's quantized, scaled weight."""
        weight = self.quantized(factors)
        shift = mean @ (weight / factors.astype(np.float32)[:, np.newaxis] - self.weight)
        difference = quantized @ weight - self.target - shift
        return float(np.einsum("pm,pm->p", difference, difference, dtype=np.float64) @ self.importance)

    def quantized(self, factors: Vector) -> FloatArray:
        """``s W`` rounded to a scale per column."""
        scaled = self.weight * factors.astype(np.float32)[:, np.newaxis]
        step = np.maximum(np.abs(scaled).max(axis=0, initial=0.0) / np.float32(self.levels), SMALLEST_SCALE)
        return np.asarray(np.rint(scaled / step) * step, np.float32)


def _read(node: ir.Node, rows: FloatArray, wbits: int, columns: int) -> _Reader:
    layer = Layer.of(node)
    assert layer is not None
    tensor = node.inputs[1].const_value if node.inputs[1] is not None else None
    assert tensor is not None
    matrix = layer.matrix(tensor.numpy())[0]
    largest = np.maximum(matrix.max(axis=1), -matrix.min(axis=1)).astype(np.float64)
    weight = np.ascontiguousarray(matrix[:, spaced(matrix.shape[1], columns)], np.float32)
    del matrix
    release_tensor(tensor)
    target = rows @ weight
    energy = np.einsum("pm,pm->p", target, target, dtype=np.float64)
    importance = 1.0 / np.maximum(energy + np.median(energy), 1e-30) / max(len(rows), 1)
    return _Reader(weight, largest, target, importance, 2 ** (wbits - 1) - 1)


def _choose(
    group: SmoothGroup,
    rows: FloatArray,
    statistics: ChannelStatistics,
    readers: Sequence[_Reader],
    activation: QuantSpec,
    options: SmoothingOptions,
) -> SmoothChoice:
    mean = rows.mean(axis=0)

    def error(factors: Vector) -> float:
        low, high = float((statistics.low / factors).min()), float((statistics.high / factors).max())
        scaled = (rows / factors).astype(np.float32)
        best = math.inf
        for width in options.widths:
            quantized = TensorQuantizer.from_range(activation, low * width, high * width).simulate(scaled)
            best = min(best, sum(reader.error(rows, mean, quantized, factors) for reader in readers))
        return best / len(readers)

    ones = np.ones(group.channels)
    before = error(ones)
    name, factors, after = "none", ones, before
    largest = np.max([reader.largest for reader in readers], axis=0)
    for candidate, tried in candidate_factors(statistics.magnitude, largest, options):
        found = error(tried)
        if found < after:
            name, factors, after = candidate, tried, found
    gain = options.least_gain_db if group.absorbed else options.inserted_gain_db
    before_db, after_db = _decibels(before), _decibels(after)
    return SmoothChoice(group, factors, name, before_db, after_db, name != "none" and after_db - before_db >= gain)


def candidate_factors(magnitude: Vector, largest: Vector, options: SmoothingOptions) -> Iterator[tuple[str, Vector]]:
    """The factors to try, with names.

    Args:
        magnitude: (K,) ``r``, largest magnitude of each channel.
        largest: (K,) ``v``, largest magnitude of the weights that multiply it.
        options: The strengths and quantiles.

    Yields:
        Names and (K,) positive factors; nothing for a tensor or weights that are all zero.

    >>> options = SmoothingOptions(strengths=(0.5,), quantiles=(0.5,))
    >>> for name, s in candidate_factors(np.array([1.0, 1.0, 4.0]), np.ones(3), options):
    ...     print(name, (s / s[0]).tolist())
    balance 0.5 [1.0, 1.0, 2.0]
    cap 0.5 [1.0, 1.0, 4.0]
    """
    if not (magnitude.any() and largest.any()):
        return
    r, v = _floored(magnitude), _floored(largest)
    for strength in options.strengths:
        factors = r**strength / v ** (1 - strength)
        yield f"balance {strength:g}", factors / np.exp(np.log(factors).mean())
    for quantile in options.quantiles:
        yield f"cap {quantile:g}", np.maximum(1.0, r / np.quantile(r, quantile))


def _floored(values: Vector) -> Vector:
    return np.maximum(values, _SMALLEST_PART * np.median(values[values > 0]))


def _decibels(error: float) -> float:
    return -10 * math.log10(max(error, 1e-30))


def _collect(
    model: ir.Model,
    source: CalibrationSource,
    groups: Sequence[SmoothGroup],
    options: SmoothingOptions,
    threads: int,
) -> dict[str, tuple[FloatArray, ChannelStatistics]]:
    """Sampled rows, and statistics of all rows of all samples, of every group's tensor in one pass.

    The largest magnitude of a channel that is rarely alive needs all the samples there are: a quarter of them costs
    MiniLM 0.8 dB, and 7 with the balance family alone.
    """
    depths = {group.value: group.channels for group in groups}
    indices = spaced(len(source), options.samples)
    number = {index: position for position, index in enumerate(indices)}
    rows = min(options.rows, max(options.row_bytes // (4 * sum(depths.values())), _FEWEST_ROWS))
    statistics = {name: ChannelStatistics.empty(depth) for name, depth in depths.items()}
    parts: dict[str, list[FloatArray]] = {name: [] for name in depths}
    session = make_session(model, outputs=list(depths), threads=threads)
    for index, sample in enumerate(source):
        values: Mapping[str, npt.NDArray[np.generic]] = session.run(sample)
        for name, depth in depths.items():
            array = np.asarray(values[name], np.float32).reshape(-1, depth)
            statistics[name].update(np.ascontiguousarray(array.T))
            if index not in number:
                continue
            # So many rows until now, so many with this sample: no rounding loses any.
            position = number[index]
            wanted = rows * (position + 1) // len(indices) - rows * position // len(indices)
            generator = np.random.default_rng([options.seed, index, len(array)])
            chosen = generator.choice(len(array), min(wanted, len(array)), replace=False)
            parts[name].append(array[np.sort(chosen)])
    return {name: (np.concatenate(parts[name]), statistics[name]) for name in depths}
