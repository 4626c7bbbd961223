"""Compares what a receiver computed with what it should have computed: :func:`compare_outputs`.

Each tensor is judged by the receiver's own codes in front of it, so a wrong layer does not make the layers behind it
wrong, and the first tensor that departs names the operator that is to blame. There, every rule of
:mod:`postquant.pipeline.conformance.rules` is tried; the one that explains most of the differences is named.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes import semantics
from postquant.passes.plan import QuantPlan
from postquant.passes.standard import without_borders
from postquant.pipeline.conformance.dumps import Dumps, OffGridError
from postquant.pipeline.conformance.expected import Conformance, ExpectedSample, ExpectedTensor
from postquant.pipeline.conformance.fused import Addend, unrounded_sums
from postquant.pipeline.conformance.result import OutputResult, Result, Status
from postquant.pipeline.conformance.rules import Site, Variant, variants
from postquant.pipeline.conformance.tally import Tally
from postquant.pipeline.kernels import observed_session
from postquant.pipeline.load import load_model
from postquant.pipeline.output import CONFORMANCE_DIRECTORY, PLAN_FILE, QDQ_FILE
from postquant.pipeline.recover import recover_float_model
from postquant.pipeline.simulate import Simulation
from postquant.pipeline.stored import Stored
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.integer import Affine, Prediction

Codes = npt.NDArray[np.int32]

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
        self.tensors = {tensor.codes: Tally(tensor) for tensor in expected.tensors}
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
        if site is not None:
            differs = tally.against_law(observed, site.limited)
            if differs and explain:
                tally.explain(observed, site.limited.codes, self._variants(tensor, site, sample, dumped))
            return tally.departed
        wanted = sample.codes.get(tensor.key)
        if wanted is not None:
            tally.against_expected(observed, wanted.astype(np.int32), touched=touched)
        if not (tally.departed and explain):
            return False
        # A runtime that fuses layers cannot dump what is inside: the law stands for it, to find the rule.
        filled = {**self._inner(tensor, sample, dumped), **dumped}
        site = self._site(tensor, sample, filled)
        if site is not None:
            tally.explain(observed, site.limited.codes, self._variants(tensor, site, sample, filled))
        return site is not None

    def _site(self, tensor: ExpectedTensor, sample: ExpectedSample, codes: Mapping[str, Codes]) -> Site | None:
        """The tensor as the law computes it from codes; None where they or the law are missing."""
        stored = self.stored.get(tensor.codes)
        raw = None if stored is None or not tensor.law else self._raw(stored, sample, codes)
        if stored is None or raw is None or raw.codes.shape != codes[tensor.codes].shape:
            return None
        arrays = self._arrays(stored, codes)
        return Site(
            group=None if stored.stored_codes is not None else self.simulation.group(stored, arrays, self.optimized),
            out=Affine.of(stored.quantizer),
            raw=raw,
            limited=self.simulation.limited(stored, raw),
            opset=self.simulation.opset,
            **_bounds(self.simulation, stored),
        )

    def _raw(self, stored: Stored, sample: ExpectedSample, codes: Mapping[str, Codes]) -> Prediction | None:
        """The law of a tensor from the codes in front of it, without clips; None where they are missing."""
        if any(name not in codes for name in stored.needs):
            return None
        return self.simulation.unlimited(stored, self._arrays(stored, codes), sample.inputs, self.optimized)

    def _arrays(self, stored: Stored, codes: Mapping[str, Codes]) -> dict[str, npt.NDArray[Any]]:
        """The codes in front of a tensor in their containers, and its own."""
        own = {stored.codes: codes[stored.codes]} if stored.codes in codes else {}
        return {name: codes[name].astype(self.stored[name].quantizer.spec.container) for name in stored.needs} | own

    def _product(self, name: str, sample: ExpectedSample, codes: Mapping[str, Codes]) -> Prediction | None:
        """The law, behind all clips, of a tensor that a weighted operator computes; None for others."""
        stored = self.stored.get(name)
        if stored is None or stored.node is None or stored.node.op_type not in semantics.WEIGHTED:
            return None
        raw = self._raw(stored, sample, codes)
        return None if raw is None else self.simulation.limited(stored, raw)

    def _inner(self, tensor: ExpectedTensor, sample: ExpectedSample, dumped: Mapping[str, Codes]) -> dict[str, Codes]:
        """Results of weighted operators that a tensor reads and that were not dumped, from the codes before them."""
        laws = {name: self._product(name, sample, dumped) for name in tensor.needs if name not in dumped}
        return {name: law.codes for name, law in laws.items() if law is not None}

    def _variants(
        self, tensor: ExpectedTensor, site: Site, sample: ExpectedSample, codes: Mapping[str, Codes]
    ) -> Iterator[Variant]:
        """What the tensor would be by every rule."""
        yield from variants(site)
        stored = self.stored[tensor.codes]
        if stored.node is None or stored.node.op_type != "Add" or len(stored.needs) != 2:
            return
        addends = []
        for name in stored.needs:
            part = self.stored[name]
            node = "" if part.node is None else part.node.name or ""
            law = self._product(name, sample, codes)
            addends.append(Addend.of(node, codes[name], Affine.of(part.quantizer), law))
        yield from unrounded_sums(site, addends)

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
