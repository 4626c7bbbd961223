"""How long and how fast a block is learned: :class:`Recipe`, by effort and bit width (:func:`recipe_for`).

The start is QDrop's recipe (Wei et al. 2022) with Genie's learned weight step; docs/learning.md has the trials behind
every number that differs.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # It brings onnxruntime, and settings need only the enums.
    from postquant.calib.work import ForwardWork


class Effort(enum.Enum):
    """How much time learning may take."""

    FAST = "fast"
    NORMAL = "normal"
    MAX = "max"


class Rounding(enum.Enum):
    """How codes of weights are learned (:mod:`postquant.calib.learn.weights`)."""

    NEIGHBOURS = "neighbours"
    FREE = "free"


class Borders(enum.Enum):
    """What is learned of rounding borders (:mod:`postquant.calib.learn.borders`)."""

    OFF = "off"
    OWN = "own"
    NEIGHBOURS = "neighbours"


class Device(enum.Enum):
    """Where blocks are learned."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of one block's reconstruction.

    Attributes:
        iterations: Steps of the optimizer.
        rounding: How codes of weights are learned.
        batch: Samples per step.
        damping: Stiffness of the springs that hold latent weights at their levels, in units of the loss's curvature
            (free rounding only); 0 for none.
        rounding_rate: Learning rate (Adam) of the rounding variables; where rounding is free it falls to zero along a
            cosine.
        bias_rate: Of biases, in units of the root mean square of the block's output.
        weight_scale_rate: Of the factors of weight scales.
        step_rate: Of the factors of activation steps; falls to zero along a cosine.
        regularisation: Weight of the rounding regulariser (neighbours only), mean over the weights, against the
            relative output error.
        warm_up: Share of the iterations without regulariser.
        beta: Exponent of the regulariser behind the warm-up and at the end.
        keep: Share of activations that QDrop quantizes, and of inputs that come from the quantized prefix.
        exact: Whether all inputs come from the float network.
        validation: Share of the samples that only judge.
        borders: What is learned of rounding borders.
        border_rate: Of their coefficients and strengths; falls to zero along a cosine.
        adaptive: Statistics by which a step adapts to its sample, a sum as in AdaptiveQuantize; 0 for none. Inputs that
            have an adaptive step have no border.
        adaptive_rate: Of the weights of these statistics; falls to zero along a cosine.
        features: Weight of the errors between blocks where the whole network is learned, against those of its outputs.
        judged: Shares of the iterations at which the state is judged, increasing, the last 1.
        hopeless: Learning ends where the judged loss is so many times the best one.
        temperature: Of the borders' soft gradient at the start and at the end; None for straight through.
    """

    iterations: int
    rounding: Rounding = Rounding.FREE
    batch: int = 32
    damping: float = 0.5
    rounding_rate: float = 1e-2
    bias_rate: float = 3e-3
    weight_scale_rate: float = 3e-3
    step_rate: float = 1e-3
    regularisation: float = 5.0
    warm_up: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    keep: float = 1.0
    exact: bool = False
    validation: float = 0.125
    borders: Borders = Borders.OFF
    border_rate: float = 1e-2
    adaptive: int = 0
    adaptive_rate: float = 1e-2
    features: float = 0.0
    judged: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    hopeless: float = 1.5
    temperature: tuple[float, float] | None = (0.2, 0.05)


def judging_samples(count: int, share: float) -> list[int]:
    """Indices of the samples that only judge, evenly spaced, at least one.

    Args:
        count: Number of samples.
        share: Share of them, in (0, 1).

    >>> judging_samples(16, 0.125)
    [4, 12]
    """
    judges = max(round(count * share), 1)
    return [(2 * index + 1) * count // (2 * judges) for index in range(judges)]


# Steps per block, multiply-accumulates that the forward runs of all blocks may take (large networks get smaller batches
# and then fewer steps, but some), and those that the forward runs of the whole network may take in the end.
_ITERATIONS = {Effort.FAST: 500, Effort.NORMAL: 1000, Effort.MAX: 5000}
_BLOCK_WORK = {Effort.FAST: 7.5e11, Effort.NORMAL: 2e12, Effort.MAX: 1e13}
_FEWEST_ITERATIONS = 200
_NETWORK_ITERATIONS = {Effort.FAST: 1000, Effort.NORMAL: 2000, Effort.MAX: 10000}
_NETWORK_WORK = {Effort.FAST: 1.5e12, Effort.NORMAL: 4e12, Effort.MAX: 2e13}
# Where the whole network is learned, more multiply-accumulates per sample mean smaller batches: a step costs the same.
_BATCH_WORK = 3.2e9
_MOST_BATCH = 32
# But so many samples that every layer sees so many positions, and no more than a layer that sees one needs.
_POSITIONS = 392
_LEAST_BATCH = 8
# A block needs no more than this where its own layers see enough of a sample.
_LEAST_BLOCK_BATCH = 4
# Fewer steps of the whole network than this change nothing.
_LEAST_STEPS = 50
# From so many bits on little error is left to learn away, and what weights change at full rates is more than that
# (docs/learning.md, "Rates of the whole network"): the share of the rates, and of the steps.
_FINE_BITS = 4
_FINE_RATES = 1 / 4
_FINE_STEPS = 1 / 2
# QDrop, and the bits below which no values are float while a block learns.
_KEEP = 0.5
_KEEP_BITS = 4
# Rows of learning samples per weight of an output below which a block fits the errors of its inputs by heart.
_ROWS = 32.0


def recipe_for(effort: Effort, work: ForwardWork) -> Recipe:
    """How blocks are learned: as many steps as the effort stands for, of batches as large as its work then allows.

    Args:
        effort: The user's choice.
        work: What one sample costs, and how many positions it shows every layer.
    """
    products = max(work.products, 1.0)
    least = min(least_batch(work.positions), _LEAST_BLOCK_BATCH)
    batch = int(min(max(_BLOCK_WORK[effort] / (products * _ITERATIONS[effort]), least), _MOST_BATCH))
    affordable = max(int(_BLOCK_WORK[effort] / (products * batch)), _FEWEST_ITERATIONS)
    return Recipe(min(_ITERATIONS[effort], affordable), batch=batch, keep=_KEEP)


def block_recipe(recipe: Recipe, positions: int, bits: int, weight_bits: int, rows: float) -> Recipe:
    """How one of the blocks is learned: batches that show every layer enough, masks from 4 bits on, and which inputs.

    A block that always sees the same rounding errors of the same samples learns to undo these, which helps no other
    sample; fewer bits round so coarsely that half of the values in float are another network. With few rows for its
    weights, it learns the errors of its inputs by heart even so, and gets these as the float network has them; but what
    weights of fewer bits make of them must be repaired, whatever is learned with it.

    Args:
        recipe: How blocks are learned (:func:`recipe_for`).
        positions: Output positions per sample of the block's layer that has the fewest, at least 1.
        bits: Of the narrowest activation whose step the block learns; 8 where it learns none.
        weight_bits: Of the narrowest weight.
        rows: Output positions of all samples that are learned from, per weight of an output, of the layer that has the
            fewest.
    """
    keep = recipe.keep if bits >= _KEEP_BITS else 1.0
    exact = recipe.exact or (rows < _ROWS and min(bits, weight_bits) >= _KEEP_BITS)
    return dataclasses.replace(recipe, batch=max(recipe.batch, least_batch(positions)), keep=keep, exact=exact)


def least_batch(positions: int) -> int:
    """Samples that a step needs at least.

    An image shows every layer of a network that gives an image tens of thousands of positions; a classifier's last
    layer sees one.

    Args:
        positions: Output positions per sample of the layer that has the fewest, at least 1.

    >>> least_batch(1), least_batch(121), least_batch(180 * 180)
    (8, 4, 1)
    """
    return min(math.ceil(_POSITIONS / positions), _LEAST_BATCH)


def sample_worth(positions: int) -> float:
    """As how many samples one counts that shows every layer so many positions.

    Args:
        positions: Output positions per sample of the layer that has the fewest, at least 1.

    >>> sample_worth(49), sample_worth(3920)
    (1.0, 10.0)
    """
    return max(positions / _POSITIONS, 1.0)


def network_recipe(effort: Effort, work: ForwardWork, bits: int) -> Recipe | None:
    """How the whole network is learned in the end; None where the effort does not allow enough steps.

    Args:
        effort: The user's choice.
        work: What one sample costs, and how many positions it shows every layer.
        bits: Of the narrowest weight or activation.
    """
    batch = int(min(max(_BATCH_WORK / max(work.products, 1.0), least_batch(work.positions)), _MOST_BATCH))
    # Smaller batches have noisier gradients, and Adam makes steps of the same size of them. A sample that shows every
    # layer as many positions as several must show counts as so many.
    samples = batch * sample_worth(work.positions)
    rate = min(samples, _MOST_BATCH) / _MOST_BATCH
    steps = int(_NETWORK_WORK[effort] / (max(work.products, 1.0) * batch))
    if steps < _LEAST_STEPS:
        return None
    steps = min(steps, _NETWORK_ITERATIONS[effort])
    if bits >= _FINE_BITS:
        rate, steps = rate * _FINE_RATES, max(round(steps * _FINE_STEPS), _LEAST_STEPS)
    return Recipe(
        steps,
        batch=batch,
        damping=0.0,
        rounding_rate=1.5e-2 * rate,
        bias_rate=1e-3 * rate,
        weight_scale_rate=2e-3 * rate,
        step_rate=2e-3 * rate,
        features=1.0,
        # Rates that are too high show early.
        judged=(0.125, 0.25, 0.5, 0.75, 1.0),
        # A few judging samples whose class changes on the way can double the error of outputs behind a Softmax.
        hopeless=2.5,
    )
