"""Candidates for the range of an activation, and which of them see more samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from postquant.calib.observers import Range
from postquant.calib.output_error import SampleError, combined_error
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.spec import QuantSpec

# Candidates whose effect is so much larger than the best one's on half of the screening samples see no more of them.
HOPELESS = 1.5
# On fewer samples nothing is settled.
_FEWEST = 8
# What an end of a range is multiplied by.
LOW_FACTORS = (0.35, 0.5, 0.7, 0.85)
HIGH_FACTORS = (0.7, 0.85)


def candidate_quantizers(spec: QuantSpec, ranges: Mapping[str, Range]) -> dict[str, TensorQuantizer]:
    """Quantizers for the observers' ranges, widths in between, and narrower ones; duplicates dropped.

    Args:
        spec: The format.
        ranges: Observer name -> (low, high).
    """
    by_width = sorted(ranges.items(), key=lambda item: (item[1][1] - item[1][0], item[0]))
    narrowest = by_width[0][1]
    named: list[tuple[str, Range]] = [
        (f"{by_width[0][0]} x {factor:g}", (narrowest[0] * factor, narrowest[1] * factor))
        for factor in ((0.5, 0.65, 0.8, 0.9) if spec.bits < 7 else (0.9,))
    ]
    for (name, bounds), following in zip(by_width, [*by_width[1:], None], strict=True):
        named.append((name, bounds))
        if following is None:
            continue
        other_name, other = following
        width, other_width = bounds[1] - bounds[0], other[1] - other[0]
        steps = 0 if width <= 0 else min(round(math.log(other_width / width) / math.log(1.25)) - 1, 3)
        for step in range(1, steps + 1):
            t = step / (steps + 1)
            between = (bounds[0] * (1 - t) + other[0] * t, bounds[1] * (1 - t) + other[1] * t)
            named.append((f"{name} .. {other_name} {t:.2f}", between))
    result: dict[str, TensorQuantizer] = {}
    seen: list[tuple[float, int]] = []
    for name, (low, high) in named:
        quantizer = TensorQuantizer.from_range(spec, low, high)
        scale, zero = float(quantizer.scale), int(quantizer.zero_point)
        if all(abs(scale / s - 1) > 0.02 or abs(zero - z) > 2 for s, z in seen):
            result[name] = quantizer
            seen.append((scale, zero))
    return result


def hopeful(effects: Mapping[str, float]) -> list[str]:
    """Candidates that may still win, and the neighbours of the best.

    Args:
        effects: Name -> effect, from the widest range to the narrowest.
    """
    names = list(effects)
    best = min(range(len(names)), key=lambda index: effects[names[index]])
    limit = HOPELESS * effects[names[best]]
    return [name for index, name in enumerate(names) if abs(index - best) <= 1 or effects[name] <= limit]


def settled(errors: Sequence[Sequence[SampleError]]) -> bool:
    """Whether one candidate is better than each other one by three standard errors of the paired differences."""
    best = min(errors, key=combined_error)
    if len(best) < _FEWEST:
        return len(errors) == 1
    differences = [[o.relative - b.relative for o, b in zip(e, best, strict=True)] for e in errors if e is not best]
    return all(np.mean(d) > 3 * np.std(d, ddof=1) / math.sqrt(len(d)) for d in differences)


def finalists(effects: Mapping[str, float], count: int) -> list[str]:
    """The best candidates of the screening and, from two on, the next wider one than the best.

    Args:
        effects: Name -> effect, from the widest range to the narrowest.
        count: How many.
    """
    names = list(effects)
    ranked = sorted(names, key=effects.__getitem__)
    wider = names[max(names.index(ranked[0]) - 1, 0)]
    taken = list(dict.fromkeys([ranked[0], wider, *ranked]))[:count]
    return [name for name in names if name in taken]


def indistinguishable(wider: Sequence[SampleError], best: Sequence[SampleError]) -> bool:
    """Whether a candidate's mean error exceeds another's by at most one standard error of the paired differences."""
    if len(best) < 2:
        return False
    differences = np.array([w.relative - b.relative for w, b in zip(wider, best, strict=True)])
    return float(differences.mean()) <= float(differences.std(ddof=1)) / math.sqrt(len(best))


def moved_ends(name: str, quantizer: TensorQuantizer) -> dict[str, TensorQuantizer]:
    """Quantizers whose range has one end moved inwards; none where the range has one sign only or is symmetric."""
    low, high = (float(end) for end in quantizer.range())
    if quantizer.spec.symmetric or not low < 0 < high:
        return {}
    ends = {f"low end x {f:g}": (low * f, high) for f in LOW_FACTORS}
    ends |= {f"high end x {f:g}": (low, high * f) for f in HIGH_FACTORS}
    return {f"{name}, {how}": TensorQuantizer.from_range(quantizer.spec, *range_) for how, range_ in ends.items()}
