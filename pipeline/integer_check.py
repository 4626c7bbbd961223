"""Compares onnxruntime's codes with the simulation's, tensor by tensor: :func:`check_integers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.session import Session
from postquant.pipeline.chunks import chunked, element_counts
from postquant.pipeline.kernels import OptimizedGraph, observed_session
from postquant.pipeline.measure import SimilarityMeter
from postquant.pipeline.simulate import Simulation
from postquant.pipeline.stored import Stored
from postquant.runtime_ops.integer import Affine, Agreement, Prediction, compare_codes, quantized

# Where onnxruntime fuses less when it is observed, ties may fall on the other side; outputs must still agree this well.
_LEAST_DB = 30.0

Feed = Mapping[str, npt.NDArray[Any]]
Outputs = Mapping[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorAgreement:
    """Codes of one stored tensor.

    Attributes:
        name: Value in the float model.
        codes_name: Codes in the emitted model.
        op_type: Operator that computes it; "input" for a graph input, "requantize" for a second quantization.
        kernel: What onnxruntime runs for it.
        law: "kernel": predicted from the codes in front of the operator. "quantize": no law describes the operator, so
            only its quantization was predicted, from onnxruntime's own float value.
        codes: Number of codes compared.
        ties: Codes that differ by one next to a documented rounding tie.
        mismatches: Other codes that differ: must be 0.
        worst: Largest difference of a code.
    """

    name: str
    codes_name: str
    op_type: str
    kernel: str
    law: str
    codes: int
    ties: int
    mismatches: int
    worst: int


@dataclasses.dataclass(frozen=True)
class IntegerCheck:
    """The result of :func:`check_integers`.

    Attributes:
        tensors: One entry per stored tensor.
        problem: The first mismatch in words, None without one.
        summary: Totals in words.
        disturbance: How observing the codes changed the model, None if it did not.
        undisturbed: What was compared for that, in words.
        notes: What a report must not be silent about.
    """

    tensors: tuple[TensorAgreement, ...]
    problem: str | None
    summary: str
    disturbance: str | None
    undisturbed: str
    notes: tuple[str, ...] = ()


def check_integers(
    model: ir.Model,
    simulation: Simulation,
    samples: Sequence[Feed],
    outputs: Sequence[Outputs],
    *,
    deployed: OptimizedGraph,
    threads: int = 1,
) -> IntegerCheck:
    """Runs the quantized model with all optimizations and compares the codes of every stored tensor.

    Args:
        model: The quantized model.
        simulation: Predicts its codes.
        samples: Samples to compare on, at least one.
        outputs: What the model gives for them when nothing is observed.
        deployed: onnxruntime's graph when nothing is observed.
        threads: Threads within one operator.
    """
    return _IntegerCheck(model, simulation, samples, outputs, deployed, threads).run()


class _IntegerCheck:
    def __init__(
        self,
        model: ir.Model,
        simulation: Simulation,
        samples: Sequence[Feed],
        outputs: Sequence[Outputs],
        deployed: OptimizedGraph,
        threads: int,
    ) -> None:
        self.model, self.simulation, self.samples, self.outputs = model, simulation, samples, outputs
        self.deployed, self.threads = deployed, threads
        self.totals: dict[str, Agreement] = {}
        self.laws: dict[str, str] = {}
        self.kernels: dict[str, str] = {}
        self.problem: str | None = None
        self.disturbance: str | None = None
        self.notes: list[str] = []

    def run(self) -> IntegerCheck:
        stored = {tensor.codes: tensor for tensor in self.simulation.stored}
        counts = element_counts(self.model, list(stored), self.samples[0], threads=self.threads) if stored else {}
        unknown: list[str] = []
        for chunk in chunked(list(stored), counts, 1):
            unknown += self._by_kernel([stored[name] for name in chunk])
        for chunk in chunked(unknown, counts, 5):
            self._by_quantizer([stored[name] for name in chunk])
        tensors = tuple(self._entry(tensor) for tensor in stored.values() if tensor.codes in self.totals)
        total = sum((self.totals[t.codes_name] for t in tensors), Agreement())
        summary = f"{total.codes} codes of {len(tensors)} tensors, {total.ties} at rounding ties"
        where = "outputs compared bit by bit" if not self.notes else self.notes[0]
        return IntegerCheck(tensors, self.problem, summary, self.disturbance, where, tuple(self.notes))

    def _entry(self, tensor: Stored) -> TensorAgreement:
        total = self.totals[tensor.codes]
        op_type = "input" if tensor.node is None else tensor.node.op_type
        return TensorAgreement(
            name=tensor.value.name or "",
            codes_name=tensor.codes,
            op_type="requantize" if tensor.stored_codes is not None else op_type,
            kernel=self.kernels.get(tensor.codes, ""),
            law=self.laws[tensor.codes],
            codes=total.codes,
            ties=total.ties,
            mismatches=total.mismatches,
            worst=total.worst,
        )

    def _by_kernel(self, tensors: list[Stored]) -> list[str]:
        """Compares with the law of the kernel; returns the codes that no law describes."""
        names = dict.fromkeys(name for t in tensors for name in (*t.needs, t.codes))
        session, optimized = observed_session(self.model, list(names), threads=self.threads)
        unknown: dict[str, None] = {}
        for index, feed in enumerate(self.samples):
            arrays = session.run(feed)
            self._compare_outputs(session, optimized, arrays, index)
            for tensor in tensors:
                prediction = self.simulation.predict(tensor, arrays, feed, optimized)
                if prediction is None:
                    unknown[tensor.codes] = None
                else:
                    self._record(tensor, prediction, arrays[tensor.codes], index, "kernel", optimized)
        return list(unknown)

    def _by_quantizer(self, tensors: list[Stored]) -> None:
        """Compares with the quantization of onnxruntime's own float values."""
        names = dict.fromkeys(name for t in tensors for name in (t.source, t.codes))
        session, optimized = observed_session(self.model, list(names), threads=self.threads)
        for index, feed in enumerate(self.samples):
            arrays = session.run(feed)
            for tensor in tensors:
                law = quantized(arrays[tensor.source], Affine.of(tensor.quantizer))
                prediction = self.simulation.limited(tensor, law)
                self._record(tensor, prediction, arrays[tensor.codes], index, "quantize", optimized)

    def _record(
        self,
        tensor: Stored,
        prediction: Prediction,
        observed: npt.NDArray[Any],
        sample: int,
        law: str,
        optimized: OptimizedGraph,
    ) -> None:
        self.laws[tensor.codes] = law
        if tensor.node is not None and tensor.codes not in self.kernels:
            self.kernels[tensor.codes] = optimized.kernel_of(tensor.node)
        name = tensor.value.name
        if prediction.codes.shape != observed.shape:
            shapes = f"shape {prediction.codes.shape} was expected, {observed.shape} found"
            agreement = Agreement(codes=observed.size, mismatches=observed.size)
            problem = f"tensor {name}, sample {sample}: {shapes}"
        else:
            agreement = compare_codes(prediction, observed.astype(np.int32))
            problem = ""
            if agreement.first is not None:
                index, expected, found = agreement.first
                problem = (
                    f"tensor {name}, sample {sample}: {agreement.mismatches} of {agreement.codes} codes differ, the "
                    f"first at {list(index)}: expected {expected}, found {found}"
                )
        if problem and self.problem is None:
            self.problem = problem + self.simulation.remark(tensor, optimized)
        self.totals[tensor.codes] = self.totals.get(tensor.codes, Agreement()) + agreement

    def _compare_outputs(self, session: Session, optimized: OptimizedGraph, arrays: Outputs, index: int) -> None:
        """Outputs of the observed model against those of the model as it is deployed."""
        wanted = self.outputs[index]
        if all(np.array_equal(arrays[name], array) for name, array in wanted.items()):
            return
        if optimized.computing == self.deployed.computing:
            self.disturbance = self.disturbance or f"the outputs of sample {index} change although the kernels do not"
            return
        if optimized.integer > self.deployed.integer:
            lost = optimized.integer - self.deployed.integer
            self.disturbance = self.disturbance or (
                f"onnxruntime removes quantizers when nobody looks: {lost} integer kernels fewer, other outputs"
            )
            return
        for name, array in wanted.items():
            meter = SimilarityMeter()
            meter.add(array, arrays[name])
            if meter.result().sqnr_db < _LEAST_DB:
                self.disturbance = self.disturbance or f"output {name} of sample {index} changes"
                return
        note = (
            f"observed, onnxruntime runs {optimized.integer} integer kernels instead of {self.deployed.integer}; "
            "outputs then differ by rounding ties"
        )
        if note not in self.notes:
            self.notes.append(note)
