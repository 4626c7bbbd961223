"""Differences of one tensor of a receiver, over all samples: :class:`Tally`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from postquant.pipeline.conformance.expected import ExpectedTensor
from postquant.pipeline.conformance.result import Fit, Status, TensorResult
from postquant.pipeline.conformance.rules import Rule, Variant
from postquant.runtime_ops.integer import Prediction, compare_codes

Codes = npt.NDArray[np.int32]

# Share of a tensor's codes that may lie on the other side of a rounding tie.
_TIES = 1e-3
# Share that may differ, and by how much, where a tensor can only be compared with the expected codes: while everything
# in front of it is equal, and when small differences in front of it may have travelled and grown.
_UNTOUCHED = (1e-2, 1)
_TRAVELLED = (1e-1, 4)
# A rule is named where it explains this share of the differences.
_EXPLAINED = 0.8


class Tally:
    """Collects them.

    Args:
        tensor: Which tensor.
    """

    def __init__(self, tensor: ExpectedTensor) -> None:
        self.tensor = tensor
        self.codes = self.ties = self.mismatches = self.worst = 0
        self.differences = 0
        self.first: tuple[tuple[int, ...], int, int] | None = None
        self.problem: tuple[Status, str] | None = None
        self.layout = self.basis = ""
        self.departed = False
        # (rule, detail) -> differences that are left if the receiver did that.
        self.left: dict[tuple[Rule, str], int] = {}
        self.tried = 0

    def fail(self, status: Status, text: str) -> None:
        """The array of a sample could not be compared."""
        self.problem = (status, text)

    def against_law(self, observed: Codes, law: Prediction) -> bool:
        """Compares with the law; whether any code of this sample differs."""
        self.basis = "the receiver's codes in front of it"
        agreement = compare_codes(law, observed)
        self.codes += agreement.codes
        self.ties += agreement.ties
        self.mismatches += agreement.mismatches
        self.worst = max(self.worst, agreement.worst)
        departs = agreement.mismatches > 0 or agreement.ties > max(1, _TIES * agreement.codes)
        if departs and self.first is None:
            self.first = agreement.first or _first(observed, law.codes)
        self.departed = self.departed or departs
        return agreement.mismatches + agreement.ties > 0

    def against_expected(self, observed: Codes, wanted: Codes, *, touched: bool) -> None:
        """Compares with the expected codes, which small differences in front of the tensor change too."""
        self.basis = "the expected codes"
        difference = np.abs(observed - wanted)
        differing = int(np.count_nonzero(difference))
        worst = int(difference.max(initial=0))
        self.codes += difference.size
        self.worst = max(self.worst, worst)
        share, most = _TRAVELLED if touched else _UNTOUCHED
        if worst > most or differing > max(1, share * difference.size):
            self.mismatches += differing
            self.first = self.first or _first(observed, wanted)
            self.departed = True
        else:
            self.ties += differing

    def explain(self, observed: Codes, right: Codes, variants: Iterable[Variant]) -> None:
        """Tries every rule on the differences of one sample from what is ``right``."""
        self.tried += int(np.count_nonzero(observed != right))
        for variant in variants:
            key = (variant.rule, variant.detail)
            left = int(np.count_nonzero(observed != variant.codes))
            self.left[key] = self.left.get(key, 0) + left

    def result(self) -> TensorResult:
        """What was found."""
        if self.problem is not None:
            status, detail = self.problem
        else:
            detail = ""
            status = Status.MISSING
            if self.basis:
                status = Status.DEPARTS if self.departed else Status.TIES if self.ties else Status.EQUAL
        return TensorResult(
            tensor=self.tensor,
            status=status,
            detail=detail,
            basis=self.basis,
            layout=self.layout,
            codes=self.codes,
            ties=self.ties,
            mismatches=self.mismatches,
            worst=self.worst,
            first=self.first,
            fits=self._fits(),
        )

    def _fits(self) -> tuple[Fit, ...]:
        """The best variant of each rule that explains enough, the best rule first."""
        best: dict[Rule, Fit] = {}
        for (rule, detail), left in self.left.items():
            explained = 1.0 - left / self.tried if self.tried else 0.0
            if explained >= _EXPLAINED and (rule not in best or explained > best[rule].explained):
                best[rule] = Fit(rule, detail, explained)
        return tuple(sorted(best.values(), key=lambda fit: -fit.explained))


def _first(observed: Codes, wanted: Codes) -> tuple[tuple[int, ...], int, int] | None:
    where: Sequence[npt.NDArray[Any]] = np.nonzero(observed != wanted)
    if not where[0].size:
        return None
    index = tuple(int(axis[0]) for axis in where)
    return index, int(wanted[index]), int(observed[index])
