"""Compares what a receiver computed with what it should have computed: :func:`compare_outputs`.

Each tensor is judged by the receiver's own codes in front of it, so a wrong layer does not make the layers behind it
wrong, and the first tensor that departs names the operator that is to blame. There, every rule of
:mod:`postquant.pipeline.conformance.rules` is tried; the one that explains most of the differences is named.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.plan import QuantPlan
from postquant.passes.standard import without_borders
from postquant.pipeline.conformance.dumps import Dumps, OffGridError
from postquant.pipeline.conformance.expected import Conformance, ExpectedSample, ExpectedTensor
from postquant.pipeline.conformance.result import Fit, OutputResult, Result, Status, TensorResult
from postquant.pipeline.conformance.rules import Rule, Site, variants
from postquant.pipeline.kernels import observed_session
from postquant.pipeline.load import load_model
from postquant.pipeline.output import CONFORMANCE_DIRECTORY, PLAN_FILE, QDQ_FILE
from postquant.pipeline.recover import recover_float_model
from postquant.pipeline.simulate import Simulation
from postquant.pipeline.stored import Stored
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.integer import Affine, Prediction, compare_codes

Codes = npt.NDArray[np.int32]

# Share of a tensor's codes that may lie on the other side of a rounding tie.
_TIES = 1e-3
# Share that may differ, and by how much, where a tensor can only be compared with the expected codes: while everything
# in front of it is equal, and when small differences in front of it may have travelled and grown.
_UNTOUCHED = (1e-2, 1)
_TRAVELLED = (1e-1, 4)
# A rule is named where it explains this share of the differences.
_EXPLAINED = 0.8
# Tensors, from the first departing one on, at which rules are tried: the first decides, others confirm.
_TRIED = 8


def compare_outputs(bundle: pathlib.Path, outputs: pathlib.Path) -> Result:
    """Compares dumped arrays with a bundle.

    Args:
        bundle: A folder with ``model.qdq.onnx``, ``plan.safetensors`` and ``conformance/``.
        outputs: The receiver's folder (:mod:`postquant.pipeline.conformance.dumps`).

    Raises:
        ModelError: If the bundle holds no conformance data, a file is damaged, or nothing in ``outputs`` has a name
            that the bundle knows.
        VerificationError: If the model and the plan of the bundle do not belong together.
    """
    work, _ = _open(bundle)
    for index in range(work.expected.samples):
        dumps = Dumps(outputs, index)
        if len(dumps):
            work.add(index, ExpectedSample.load(bundle / CONFORMANCE_DIRECTORY, index), dumps)
    return work.result(outputs)


def compare_onnxruntime(bundle: pathlib.Path) -> Result:
    """Compares onnxruntime, on this machine, with a bundle.

    Args:
        bundle: As for :func:`compare_outputs`.

    Raises:
        PostquantError: As for :func:`compare_outputs`, or if onnxruntime does not run the model.
    """
    work, model = _open(bundle)
    session, _ = observed_session(model, [tensor.codes for tensor in work.expected.tensors])
    for index in range(work.expected.samples):
        sample = ExpectedSample.load(bundle / CONFORMANCE_DIRECTORY, index)
        work.add(index, sample, Dumps.of(session.run(sample.inputs)))
    return work.result(bundle)


def _open(bundle: pathlib.Path) -> tuple[_Comparison, ir.Model]:
    expected = Conformance.load(bundle / CONFORMANCE_DIRECTORY)
    model = load_model(bundle / QDQ_FILE, check=False)
    plan = without_borders(QuantPlan.load(bundle / PLAN_FILE))
    return _Comparison(expected, Simulation(recover_float_model(model, plan), model, plan)), model


class _Comparison:
    def __init__(self, expected: Conformance, simulation: Simulation) -> None:
        self.expected, self.simulation = expected, simulation
        self.stored = {tensor.codes: tensor for tensor in simulation.stored}
        self.optimized = expected.optimized()
        self.tensors = {tensor.codes: _Tally(tensor) for tensor in expected.tensors}
        self.outputs: dict[str, OutputResult] = {}
        self.unknown: set[str] = set()
        self.samples = 0

    def add(self, index: int, sample: ExpectedSample, dumps: Dumps) -> None:
        """Compares one sample."""
        self.samples += 1
        dumped: dict[str, Codes] = {}
        for tensor in self.expected.tensors:
            try:
                found = dumps.codes(tensor, tensor.shapes[index], sample.codes.get(tensor.key))
            except OffGridError as error:
                self.tensors[tensor.codes].fail(Status.OFF_GRID, str(error))
                continue
            except ValueError as error:
                self.tensors[tensor.codes].fail(Status.UNREADABLE, str(error))
                continue
            if found is not None:
                dumped[tensor.codes], layout = found
                self.tensors[tensor.codes].layout = layout
        tried, before = 0, False
        for tensor in self.expected.tensors:
            if tensor.codes in dumped:
                tally = self.tensors[tensor.codes]
                tried += self._tensor(tensor, sample, dumped, explain=tried < _TRIED, touched=before)
                before = before or tally.ties + tally.mismatches > 0
        for output in self.expected.outputs:
            wanted = sample.outputs[output.name]
            try:
                got = dumps.output(output.name, wanted)
            except ValueError as error:
                self.outputs[output.name] = OutputResult(output.name, output.tolerance, None, str(error))
                continue
            if got is not None:
                worst = float(np.abs(got.astype(np.float64) - wanted).max(initial=0.0))
                earlier = self.outputs.get(output.name)
                known = 0.0 if earlier is None or earlier.worst is None else earlier.worst
                self.outputs[output.name] = OutputResult(output.name, output.tolerance, float(np.maximum(worst, known)))
        self.unknown.update(dumps.unused())

    def _tensor(
        self,
        tensor: ExpectedTensor,
        sample: ExpectedSample,
        dumped: Mapping[str, Codes],
        *,
        explain: bool,
        touched: bool,
    ) -> bool:
        """Judges one tensor, ``touched`` says that one in front of it differs; whether rules were tried for it."""
        tally, observed = self.tensors[tensor.codes], dumped[tensor.codes]
        site = self._site(tensor, sample, dumped)
        if site is None:
            wanted = sample.codes.get(tensor.key)
            if wanted is not None:
                tally.against_expected(observed, wanted.astype(np.int32), touched=touched)
            return False
        differs = tally.against_law(observed, site.limited)
        if differs and explain:
            tally.explain(observed, site)
        return tally.departed

    def _site(self, tensor: ExpectedTensor, sample: ExpectedSample, dumped: Mapping[str, Codes]) -> Site | None:
        """The tensor as the law computes it from dumped codes; None where they or the law are missing."""
        stored = self.stored.get(tensor.codes)
        if stored is None or not tensor.law or any(name not in dumped for name in stored.needs):
            return None
        arrays = {name: dumped[name].astype(self.stored[name].quantizer.spec.container) for name in stored.needs}
        arrays[tensor.codes] = dumped[tensor.codes]
        raw = self.simulation.unlimited(stored, arrays, sample.inputs, self.optimized)
        if raw is None or raw.codes.shape != dumped[tensor.codes].shape:
            return None
        return Site(
            group=None if stored.stored_codes is not None else self.simulation.group(stored, arrays, self.optimized),
            out=Affine.of(stored.quantizer),
            raw=raw,
            limited=self.simulation.limited(stored, raw),
            opset=self.simulation.opset,
            **_bounds(self.simulation, stored),
        )

    def result(self, outputs: pathlib.Path) -> Result:
        tensors = tuple(tally.result() for tally in self.tensors.values())
        if not self.samples or (not self.outputs and all(t.status is Status.MISSING for t in tensors)):
            raise ModelError(
                "nothing in the folder of outputs has the name of a tensor of the bundle",
                where=str(outputs),
                expected=f"files such as {self.expected.tensors[0].key}.npy" if self.expected.tensors else None,
                found=", ".join(sorted(self.unknown)[:5]) or "no array files",
                hint="conformance/index.json lists the names",
            )
        return Result(
            samples=self.samples,
            tensors=tensors,
            outputs=tuple(self.outputs.values()),
            unknown=tuple(sorted(self.unknown)),
        )


def _bounds(simulation: Simulation, stored: Stored) -> dict[str, int]:
    """The smallest and the largest code that a tensor may hold."""
    extremes = np.asarray([-(2**24), 2**24])
    limited = simulation.limited(stored, Prediction(extremes.astype(np.int32), extremes.astype(np.float64))).codes
    return {"low": int(limited[0]), "high": int(limited[1])}


class _Tally:
    """Differences of one tensor over all samples."""

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

    def explain(self, observed: Codes, site: Site) -> None:
        """Tries every rule on the differences of one sample."""
        self.tried += int(np.count_nonzero(observed != site.limited.codes))
        for variant in variants(site):
            key = (variant.rule, variant.detail)
            left = int(np.count_nonzero(observed != variant.codes))
            self.left[key] = self.left.get(key, 0) + left

    def result(self) -> TensorResult:
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
