"""Which values a layer's weights may have: uniform ones, the POST lattice, a learned table (:func:`choose_code_book`).

All three take as many bits and run equally fast, so the one with the smallest output error is taken, on the second
moments of the layer's inputs over all samples. A simpler one is preferred where the difference is nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from postquant.calib.layers import Layer
from postquant.calib.table_rounding import Codes, Levels, Rounder
from postquant.calib.table_search import LARGEST_LEVEL, learn_table, polished
from postquant.calib.weight_search import WeightProblem
from postquant.runtime_ops.code_book import CODE_BITS, CodeBook, Table, post_table
from postquant.runtime_ops.quantizer import TensorQuantizer

# Up to so many bits codes are searched one by one: beyond, compensated rounding alone is as good.
FEW_BITS = 4
# The simplest format whose output error exceeds the smallest by less than this is taken.
_SAME = 1.01


@dataclasses.dataclass(frozen=True)
class CodeBooks:
    """What may be chosen.

    Attributes:
        allowed: Code books. Uniform codes are taken where a layer can have no table, allowed or not.
        largest: Largest magnitude of a level.
    """

    allowed: frozenset[CodeBook] = frozenset({CodeBook.UNIFORM})
    largest: int = LARGEST_LEVEL

    def allow(self, book: CodeBook, bits: int) -> bool:
        """Whether a code book with a table may be chosen for a weight of ``bits`` bits."""
        if book is CodeBook.POST and np.abs(post_table(bits).astype(int)).max() > self.largest:
            return False
        return book in self.allowed


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Output SQNR of one code book, weights alone.

    Attributes:
        nearest_db: With nearest levels at the best scales, in dB.
        db: With the best codes found, in dB.
    """

    nearest_db: float
    db: float


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen for a layer, and why.

    Attributes:
        quantizer: The weight's quantizer, with codes.
        candidates: Every code book that was tried.
    """

    quantizer: TensorQuantizer
    candidates: Mapping[CodeBook, Candidate]


def takes_code_book(layer: Layer, quantizer: TensorQuantizer) -> bool:
    """Whether an operator with a table exists for a layer: Conv (1-D, 2-D), Gemm or MatMul, a scale per channel."""
    spec = quantizer.spec
    if spec.bits not in CODE_BITS or spec.axis is None or not spec.signed or spec.power_of_two:
        return False
    return layer.node.op_type in ("Gemm", "MatMul") or (layer.node.op_type == "Conv" and len(layer.shape) in (3, 4))


def choose_code_book(layer: Layer, problem: WeightProblem, start: TensorQuantizer, books: CodeBooks) -> Choice:
    """Codes, scales and, where it pays, a table for a weight of few bits.

    Args:
        layer: The layer.
        problem: Its weights and moments.
        start: A uniform quantizer with a scale per channel, from the scale search.
        books: What may be chosen; uniform codes are always tried.

    Returns:
        The choice; on the moments never worse than ``start`` if uniform codes are allowed.
    """
    rounder = Rounder(problem.matrix, problem.moments.square)
    energy = float(problem.energy.sum())
    found: dict[CodeBook, tuple[Codes, TensorQuantizer]] = {}
    candidates: dict[CodeBook, Candidate] = {}

    def offer(book: CodeBook, nearest: Codes, codes: Codes, table: Table | None) -> None:
        spec = dataclasses.replace(start.spec, code_book=book, narrow=start.spec.narrow and table is None)
        found[book] = (
            codes,
            TensorQuantizer(
                spec,
                layer.per_scale(codes.scale),
                np.zeros(codes.scale.size, np.int32),
                layer.tensor(codes.levels).astype(spec.container),
                table if book is CodeBook.LEARNED else None,
            ),
        )
        candidates[book] = Candidate(_db(energy, nearest), _db(energy, codes))

    qmin, qmax = start.spec.qmin, start.spec.qmax
    levels = layer.matrix(start.quantize(layer.tensor(problem.matrix)) if start.codes is None else start.codes)
    scale = np.ascontiguousarray(layer.per_output(start.scale), np.float32)
    given = rounder.codes(levels.astype(np.float32), scale)
    offer(CodeBook.UNIFORM, *rounder.best(Levels.uniform(qmin, qmax), given), None)
    if takes_code_book(layer, start):
        bits = start.spec.bits
        if books.allow(CodeBook.POST, bits):
            table = post_table(bits)
            offer(CodeBook.POST, *rounder.best(Levels.of_table(table)), table)
        if books.allow(CodeBook.LEARNED, bits):
            table = learn_table(rounder, bits, largest=books.largest)
            nearest, codes = rounder.best(Levels.of_table(table))
            table, codes = polished(rounder, table, codes, largest=books.largest)
            offer(CodeBook.LEARNED, nearest, codes, table)
    allowed = [book for book in found if book in books.allowed] or [CodeBook.UNIFORM]
    least = min(found[book][0].total for book in allowed)
    chosen = next(book for book in CodeBook if book in allowed and found[book][0].total <= least * _SAME)
    return Choice(found[chosen][1], candidates)


def _db(energy: float, codes: Codes) -> float:
    """SQNR in dB; 200 dB stand for no error at all."""
    if codes.total <= 0 or energy <= 0:
        return 200.0
    return 10 * math.log10(energy / codes.total)
