"""One layer's weights at several widths, judged by the layer's output: :func:`weights_at_widths`.

With ``H`` the second moments of the layer's float inputs (:mod:`postquant.calib.moments`), the relative output error of
weights ``w~`` in place of ``w`` is

    e(b) = sum_m (w~_m - w_m)' H (w~_m - w_m)  /  sum_m w_m' H w_m

At every width the scales are searched and the codes are rounded with compensation, at 2 and 4 bits every format that
the target has (uniform, POST, a learned table) is tried, as the scale search does later: what matters is how good a
width can be, not how good nearest rounding is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.calib.code_book import CodeBooks, choose_code_book, takes_code_book
from postquant.calib.compensated_rounding import compensate
from postquant.calib.layers import Layer
from postquant.calib.moments import Moments, MomentSums, block_depth
from postquant.calib.prefix import spaced
from postquant.calib.site_data import sampled_positions
from postquant.calib.source import CalibrationSource
from postquant.calib.weight_search import SearchOptions, problem_of, search_problem
from postquant.calib.weight_start import max_abs
from postquant.passes.session import make_session
from postquant.runtime_ops.code_book import CodeBook
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

# Samples, and output positions of each, that enter the moments.
_SAMPLES, _POSITIONS = 64, 49
# Largest number of inputs whose second moments are kept together.
_BLOCK = 2048
# Moments of so many bytes are collected in one pass over the samples.
_PASS_BYTES = 256 << 20
# No error at all, in dB.
EXACT_DB = 200.0


@dataclasses.dataclass(frozen=True, eq=False)
class WeightWidth:
    """A layer's weight at one width.

    Attributes:
        quantizer: In the best format, with codes.
        formats: Format -> SQNR of the layer's output, in dB, by the weights alone.
    """

    quantizer: TensorQuantizer
    formats: Mapping[CodeBook, float]

    @property
    def db(self) -> float:
        """SQNR of the layer's output in the chosen format, in dB."""
        return self.formats[self.quantizer.spec.code_book]


def weights_at_widths(
    layer: Layer,
    weight: npt.NDArray[np.float32],
    moments: Moments,
    spec: QuantSpec,
    widths: Iterable[int],
    options: SearchOptions,
    books: CodeBooks,
) -> dict[int, WeightWidth]:
    """The best weights of each width.

    Args:
        layer: The layer.
        weight: Its float weight tensor.
        moments: Of its float inputs.
        spec: Format of the weight; its width is replaced.
        widths: Bits, each 2 to 8.
        options: Of the scale search.
        books: Formats that weights of 2 and 4 bits may have.

    Returns:
        Bits -> weights.
    """
    problem = problem_of(layer, weight, moments, options)
    energy = float(problem.energy.sum())
    whole = len(problem.moments.square) == len(problem.matrix)
    found = {}
    for bits in widths:
        start = search_problem(problem, max_abs(dataclasses.replace(spec, bits=bits), weight), options)
        if whole and takes_code_book(layer, start):
            choice = choose_code_book(layer, problem, start, books)
            formats = {book: candidate.db for book, candidate in choice.candidates.items()}
            found[bits] = WeightWidth(choice.quantizer, formats)
        else:
            quantizer = compensate(layer, problem, start)
            error = float(problem.error(layer.matrix(quantizer.simulate(weight)).astype(np.float32)).sum())
            db = EXACT_DB if error <= 0 or energy <= 0 else min(10 * math.log10(energy / error), EXACT_DB)
            found[bits] = WeightWidth(quantizer, {CodeBook.UNIFORM: db})
    return found


def float_moments(
    model: ir.Model, layers: Sequence[Layer], source: CalibrationSource, *, seed: int = 0
) -> Iterator[tuple[Layer, Moments]]:
    """Second moments of the float inputs of each layer, over evenly spaced samples and positions.

    Args:
        model: The simplified float model.
        layers: Layers of it.
        source: Calibration data; it is read once for every 256 MiB of moments.
        seed: Of the sampled positions.

    Yields:
        The layers in their order, with their moments.
    """
    for part in _passes(layers):
        sums = {la.name: MomentSums(la.groups, la.depth, block_depth(la.depth, _BLOCK)) for la in part}
        session = make_session(model, outputs=list(dict.fromkeys(layer.input for layer in part)))
        for index, sample in enumerate(source.read(spaced(len(source), _SAMPLES))):
            values = session.run(sample)
            for layer in part:
                x = values[layer.input]
                sums[layer.name].update(layer.rows(x, sampled_positions(layer, x.shape, _POSITIONS, seed, index)))
        del session
        for layer in part:
            yield layer, sums.pop(layer.name).result()


def _passes(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    part: list[Layer] = []
    size = 0
    for layer in layers:
        needed = 8 * layer.groups * layer.depth * block_depth(layer.depth, _BLOCK)
        if part and size + needed > _PASS_BYTES:
            yield part
            part, size = [], 0
        part.append(layer)
        size += needed
    if part:
        yield part
