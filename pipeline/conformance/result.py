"""What the comparison of a receiver with a bundle found, as values: :class:`Result`."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from postquant.pipeline.conformance.expected import ExpectedTensor
from postquant.pipeline.conformance.rules import Rule


class Status(enum.Enum):
    """How a tensor of the receiver compares."""

    EQUAL = "equal"
    TIES = "equal but for rounding ties"
    DEPARTS = "departs"
    OFF_GRID = "not quantized"
    UNREADABLE = "unreadable"
    MISSING = "not dumped"


@dataclasses.dataclass(frozen=True)
class Fit:
    """A rule that explains differences.

    Attributes:
        rule: The rule that the receiver seems to break.
        detail: In which way.
        explained: Share of the differing codes that it explains, 0..1.
    """

    rule: Rule
    detail: str
    explained: float

    @property
    def text(self) -> str:
        """The rule in words."""
        name = f"{self.rule.value} ({self.detail})" if self.detail else self.rule.value
        return f"{name}, which explains {100 * self.explained:.4g} % of the differences"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorResult:
    """One tensor.

    Attributes:
        tensor: Which one.
        status: How it compares.
        detail: What was wrong with the array, "" if nothing was.
        basis: What it was compared with, in words.
        layout: "channels last" where the array came so.
        codes: Codes compared.
        ties: Codes that differ by one next to a rounding tie, or that may have travelled from one.
        mismatches: Other codes that differ.
        worst: Largest difference.
        first: Index of the first difference, the right and the receiver's code.
        fits: Rules that explain the differences, the best one first.
    """

    tensor: ExpectedTensor
    status: Status
    detail: str
    basis: str
    layout: str
    codes: int
    ties: int
    mismatches: int
    worst: int
    first: tuple[tuple[int, ...], int, int] | None
    fits: tuple[Fit, ...]

    @property
    def failed(self) -> bool:
        """Whether the receiver computed something else."""
        return self.status in (Status.DEPARTS, Status.OFF_GRID, Status.UNREADABLE)

    @property
    def text(self) -> str:
        """What is wrong, in one line; "" if nothing is."""
        if not self.failed:
            return ""
        what = f"{self.tensor.codes} ({self.tensor.operator}{f' {self.tensor.node}' if self.tensor.node else ''})"
        if self.status is not Status.DEPARTS:
            return f"{what} is {self.status.value}: {self.detail}"
        differing = self.mismatches + self.ties
        share = 100 * differing / max(self.codes, 1)
        text = f"{what} departs: {differing} of {self.codes} codes ({share:.3g} %) differ, by at most {self.worst}"
        if self.first is not None:
            index, right, found = self.first
            text += f"; the first at {list(index)}: expected {right}, found {found}"
        if self.fits:
            return f"{text}; best fit: {self.fits[0].text}"
        return f"{text}; no rule that was tried explains it"

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "tensor": self.tensor.codes,
            "value": self.tensor.name,
            "operator": self.tensor.operator,
            "node": self.tensor.node,
            "status": self.status.value,
            "detail": self.detail or self.text,
            "compared_with": self.basis,
            "layout": self.layout,
            "codes": self.codes,
            "ties": self.ties,
            "mismatches": self.mismatches,
            "worst": self.worst,
            "first": None
            if self.first is None
            else {"index": list(self.first[0]), "expected": self.first[1], "found": self.first[2]},
            "rules": [
                {"rule": fit.rule.name.lower(), "text": fit.text, "explained": round(fit.explained, 6)}
                for fit in self.fits
            ],
        }


@dataclasses.dataclass(frozen=True)
class OutputResult:
    """One output of the model.

    Attributes:
        name: Output name.
        tolerance: Largest difference that is no error.
        worst: Largest absolute difference; None where the array could not be compared.
        detail: Why not.
    """

    name: str
    tolerance: float
    worst: float | None
    detail: str = ""

    @property
    def failed(self) -> bool:
        """Whether it differs too much; NaN does."""
        return self.worst is None or not self.worst <= self.tolerance

    @property
    def text(self) -> str:
        """What is wrong, in one line; "" if nothing is."""
        if not self.failed:
            return ""
        if self.worst is None:
            return f"output {self.name} is unreadable: {self.detail}"
        return f"output {self.name} differs by {self.worst:.4g}, allowed is {self.tolerance:.4g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The whole comparison.

    Attributes:
        samples: Samples that were dumped.
        tensors: All tensors of the bundle, in the order of computation.
        outputs: Outputs that were dumped.
        unknown: Names in the receiver's folder that the bundle does not know.
    """

    samples: int
    tensors: tuple[TensorResult, ...]
    outputs: tuple[OutputResult, ...]
    unknown: tuple[str, ...]

    @property
    def first(self) -> TensorResult | None:
        """The first tensor that departs."""
        return next((tensor for tensor in self.tensors if tensor.failed), None)

    @property
    def passed(self) -> bool:
        """Whether the receiver computes what it should, as far as it dumped it."""
        return self.first is None and not any(output.failed for output in self.outputs)

    @property
    def rule(self) -> Rule | None:
        """The rule that explains the first departure best."""
        return self.first.fits[0].rule if self.first is not None and self.first.fits else None

    @property
    def summary(self) -> str:
        """The result in one line."""
        compared = [tensor for tensor in self.tensors if tensor.status is not Status.MISSING]
        if self.first is not None:
            failed = sum(tensor.failed for tensor in self.tensors)
            return f"{failed} of {len(compared)} tensors depart; first: {self.first.text}"
        bad = next((output for output in self.outputs if output.failed), None)
        if bad is not None:
            return bad.text
        codes = sum(tensor.codes for tensor in compared)
        ties = sum(tensor.ties for tensor in compared)
        rules = {fit.rule for tensor in compared for fit in tensor.fits[:1]}
        why = f", as if {rules.pop().value}" if len(rules) == 1 else ""
        return (
            f"{codes} codes of {len(compared)} of {len(self.tensors)} tensors and {len(self.outputs)} outputs on "
            f"{self.samples} samples agree, {ties} codes at rounding ties{why}"
        )

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        first = self.first
        return {
            "passed": self.passed,
            "summary": self.summary,
            "samples": self.samples,
            "first_departure": None if first is None else first.to_json(),
            "rule": None if self.rule is None else self.rule.name.lower(),
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "outputs": [
                {"name": o.name, "tolerance": o.tolerance, "worst": o.worst, "passed": not o.failed, "detail": o.text}
                for o in self.outputs
            ],
            "unknown_names": list(self.unknown),
        }
