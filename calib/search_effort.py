"""How much the scale search tries, so that it ends on large models too: :func:`choose_effort`.

Judging one candidate for a (K, M) weight costs K b M multiply-accumulates, with b the inputs whose second moments are
kept together. For a transformer with 600 million weights the complete search would take hours. So its work is estimated
first, and where that exceeds a limit the search takes the first of these reductions that fits:

    one alternation of weights and activation instead of as many as it takes
    fewer candidates, around the largest magnitude
    second moments in smaller blocks: products of inputs of different blocks count as zero

in this order, because compensated rounding comes after the search: it makes up for what fewer candidates lose, but it
lives on the products of inputs (docs/easyquant.md has the measurement).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from postquant.calib.layers import Layer
from postquant.calib.moments import block_depth
from postquant.calib.site_data import WorkLimits
from postquant.calib.weight_search import SearchOptions, tried_candidates

# Alternations that an unlimited search takes, on average.
_USUAL_ROUNDS = 2
# Judging costs several passes over the weights besides the product; in multiply-accumulates per weight.
_PASSES = 150
# Products of a layer besides those of candidates: one in double precision, compensated rounding, measured gains.
_FIXED_PRODUCTS = 8
# Two Cholesky factorizations and an inversion in double precision, as a multiple of b^3.
_FACTORIZATION = 5.4


@dataclasses.dataclass(frozen=True)
class SearchEffort:
    """What the search may try.

    Attributes:
        detail: In words, for the report.
        block: Largest number of inputs whose second moments are kept together.
        candidates: Most candidates per search.
        alpha: Least smallest multiple of ``S0``.
        beta: Largest multiple of ``S0`` at most.
        rounds: Most alternations; None for as many as it takes.
    """

    detail: str
    block: int
    candidates: int | None = None
    alpha: float = 0.0
    beta: float = float("inf")
    rounds: int | None = 1

    def options(self, options: SearchOptions) -> SearchOptions:
        """The options within this effort."""
        rounds = options.rounds if self.rounds is None else min(options.rounds or self.rounds, self.rounds)
        candidates = options.candidates if self.candidates is None else min(options.candidates, self.candidates)
        alpha, beta = max(options.alpha, self.alpha), min(options.beta, self.beta)
        return dataclasses.replace(options, alpha=alpha, beta=beta, candidates=candidates, rounds=rounds)


def efforts(block: int) -> tuple[SearchEffort, ...]:
    """From everything to the least, for moments in blocks of at most ``block`` inputs."""
    few = (4, 0.9, 1.5)
    return (
        SearchEffort("everything", block, rounds=None),
        SearchEffort("one alternation, 12 candidates", block, 12, 0.8, 1.5),
        SearchEffort("one alternation, 4 candidates", block, *few),
        *(
            SearchEffort(f"one alternation, 4 candidates, second moments in blocks of up to {b} inputs", b, *few)
            for b in (1024, 512, 256, 128)
            if b < block
        ),
    )


def layer_work(layer: Layer, effort: SearchEffort, options: SearchOptions, rows: int) -> float:
    """Multiply-accumulates that searching and rounding one layer's weights takes, about.

    Args:
        layer: The layer.
        effort: What is tried.
        options: Of the search, before they are reduced.
        rows: Rows that enter second moments.
    """
    reduced = effort.options(options)
    inputs = layer.groups * layer.depth
    weights = inputs * (layer.out_channels // layer.groups)
    block = block_depth(layer.depth, effort.block)
    rounds = _USUAL_ROUNDS if reduced.rounds is None else min(reduced.rounds, _USUAL_ROUNDS)
    products = rounds * tried_candidates(reduced.candidates) + _FIXED_PRODUCTS
    return float(weights) * products * (block + _PASSES) + inputs * block * (_FACTORIZATION * block + rows)


def choose_effort(
    layers: Sequence[Layer], options: SearchOptions, limits: WorkLimits, samples: int
) -> tuple[SearchEffort, tuple[str, ...]]:
    """The largest effort within ``limits.search_work``, the least one where none is.

    Args:
        layers: All layers whose weights are searched.
        options: Of the search.
        limits: Hold the limit, and the size of blocks of an unlimited search.
        samples: Number of calibration samples.

    Returns:
        The effort, and what the report must not be silent about.
    """
    choices = efforts(limits.block)
    rows = limits.positions_per_sample * samples
    works = [sum(layer_work(layer, effort, options, rows) for layer in layers) for effort in choices]
    index = next((i for i, work in enumerate(works) if work <= limits.search_work), len(works) - 1)
    effort = choices[index]
    notes = []
    if index > 0:
        notes.append(
            f"the scale search was reduced to {effort.detail}: {works[index]:.1e} multiply-accumulates instead of "
            f"{works[0]:.1e}, limit {limits.search_work:.1e}"
        )
    deep = [layer for layer in layers if block_depth(layer.depth, effort.block) < layer.depth]
    if deep:
        names = ", ".join(layer.name for layer in deep[:3]) + (", ..." if len(deep) > 3 else "")
        notes.append(
            f"second moments of {len(deep)} of {len(layers)} layers were kept in blocks of up to {effort.block} inputs "
            f"({names}); weights of few bits keep uniform codes there"
        )
    return effort, tuple(notes)
