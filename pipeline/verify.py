"""Does a quantized model do what its plan says, on onnxruntime, and how good is it? :func:`verify_model`.

1. ``onnx.checker`` accepts it, with shape inference.
2. onnxruntime loads and runs it.
3. The file holds the plan: every scale, zero point, code, bias (:mod:`postquant.pipeline.plan_check`).
4. onnxruntime's integers are the simulation's: the codes of every stored tensor, run with all optimizations, equal
   the NumPy law's, except next to documented rounding ties (:mod:`postquant.pipeline.simulate`).
5. Looking at the codes changes nothing: with and without them as outputs, the model's outputs are the same bits.
6. Nodes that the plan leaves in float run in float.
7. Outputs are finite; their quality against the float model is measured, and that of every stored tensor.

See ``docs/verification.md`` for how to read the numbers.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from postquant.passes.free_memory import give_back_memory, release_weights
from postquant.passes.lut_expansion import with_qdq
from postquant.passes.plan import QuantPlan
from postquant.passes.session import Session, custom_operators, first_sentence
from postquant.pipeline.integer_check import TensorAgreement, check_integers
from postquant.pipeline.kernels import Coverage, integer_coverage, observed_session
from postquant.pipeline.load import load_model, save_model
from postquant.pipeline.measure import Similarity, SimilarityMeter, jsonable
from postquant.pipeline.plan_check import differences
from postquant.pipeline.quality import TensorQuality, file_bytes, float_session, stored_tensor_quality, weight_bytes
from postquant.pipeline.report import CheckReport, OutputReport
from postquant.pipeline.simulate import Simulation
from postquant.runtime_ops.errors import ModelError, VerificationError

Feed = Mapping[str, npt.NDArray[Any]]


# Weights of a model that is written for the verification only, beyond which they go to a file of their own.
_LARGEST_INLINE = 128 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of :func:`verify_model`.

    Attributes:
        checks: Every check, with its outcome in words.
        tensors: Agreement of onnxruntime's codes with the simulation, per stored tensor, in graph order.
        quality: SQNR and cosine of every stored tensor against the float model.
        outputs: Quality of the model's outputs.
        kernels: What onnxruntime runs: operator type -> number.
        coverage: Which weighted nodes run on integers.
        integer_samples: Samples on which integers were compared.
        quality_samples: Samples on which the outputs were measured.
        float_bytes: Size of the float model's weights, in bytes.
        file_bytes: Size of the quantized file with its external data, in bytes.
        notes: What else must not go unsaid.
    """

    checks: tuple[CheckReport, ...]
    tensors: tuple[TensorAgreement, ...]
    quality: tuple[TensorQuality, ...]
    outputs: tuple[OutputReport, ...]
    kernels: Mapping[str, int]
    coverage: Coverage
    integer_samples: int
    quality_samples: int
    float_bytes: int
    file_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def failure(self) -> VerificationError | None:
        """The first failed check as an error, None when all passed."""
        failed = next((check for check in self.checks if not check.passed), None)
        if failed is None:
            return None
        return VerificationError(
            "the quantized model does not do what the plan says",
            where=failed.name,
            found=failed.detail.rstrip("."),
            hint="do not use it; please report this",
        )

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        result = jsonable(self)
        result["passed"] = self.passed
        assert isinstance(result, dict)
        return result


def verify_model(
    float_model: ir.Model,
    emitted: str | os.PathLike[str] | ir.Model,
    plan: QuantPlan,
    samples: Iterable[Feed],
    *,
    integer_samples: int = 2,
    tensor_samples: int = 8,
    threads: int = 1,
    strict: bool = True,
    reference: ir.Model | None = None,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
) -> Verification:
    """Verifies a quantized model.

    Args:
        float_model: The simplified model that the plan is about.
        emitted: The quantized model, or its file.
        plan: The plan that it was emitted from.
        samples: Feeds, at least one; all of them measure the outputs. They are iterated twice, in order: a list or a
            CalibrationSource.
        integer_samples: How many of them are compared integer by integer.
        tensor_samples: How many of them measure the stored tensors.
        threads: Threads within one operator.
        strict: Raise on a failed check, instead of returning it.
        reference: The float model that outputs are measured against; by default ``float_model``.
        custom_ops: Libraries of custom operators that the models need.

    Raises:
        VerificationError: If a check fails and ``strict`` is set, or if there is no sample.
        ModelError: If the file cannot be read.
    """
    if isinstance(samples, Iterator):
        samples = list(samples)
    with custom_operators(custom_ops), tempfile.TemporaryDirectory(prefix="postquant-") as folder:
        if isinstance(emitted, ir.Model):
            path = pathlib.Path(folder) / "model.onnx"
            # A large model keeps its weights beside it, so that reading it again maps them instead of loading them.
            save_model(emitted, path, external=weight_bytes(emitted) > _LARGEST_INLINE)
        else:
            path = pathlib.Path(emitted)
        model = load_model(path, check=False)
        work = _Verifier(float_model, model, plan, path, threads, reference or float_model)
        result = work.run(samples, integer_samples, tensor_samples)
    if strict and result.failure is not None:
        raise result.failure
    return result


class _Verifier:
    def __init__(
        self,
        float_model: ir.Model,
        model: ir.Model,
        plan: QuantPlan,
        path: pathlib.Path,
        threads: int,
        reference: ir.Model,
    ) -> None:
        self.float_model, self.model, self.plan, self.path = float_model, model, plan, path
        self.threads, self.reference = threads, reference
        # What the file says, in standard operators; onnxruntime runs the file itself.
        self.groups = with_qdq(model)
        self.count = 0
        self.checks: list[CheckReport] = []
        self.notes: list[str] = []

    def check(self, name: str, problem: str | None, detail: str = "") -> bool:
        """Records a check; ``problem`` says what is wrong, None that nothing is."""
        self.checks.append(CheckReport(name=name, passed=problem is None, detail=problem or detail))
        return problem is None

    def run(self, samples: Iterable[Feed], integer_samples: int, tensor_samples: int) -> Verification:
        self.check("onnx checker", _checker_problem(self.path))
        nothing = Coverage({}, {})
        empty: dict[str, Any] = {"tensors": (), "quality": (), "outputs": (), "kernels": {}, "coverage": nothing}
        try:
            deployed, optimized = observed_session(self.model, threads=self.threads)
        except ModelError as error:
            self.check("onnxruntime loads it", str(error))
            return self._result(**empty, integer=0, measured=0)
        self.check("onnxruntime loads it", None, f"{sum(optimized.computing.values())} kernels")
        self.check("the file holds the plan", self._plan_problem())
        coverage = integer_coverage(self.model, optimized)
        self.check("float nodes stay float", self._float_problem(coverage))

        with tempfile.TemporaryFile(prefix="postquant-") as spool:
            held, first_outputs = self._run_all(samples, deployed, spool, integer_samples, tensor_samples)
            names = deployed.output_names
            # A session holds the weights, perhaps twice: never more than one at a time.
            del deployed
            outputs = self._measure(samples, names, spool)
        simulation = Simulation(self.float_model, self.groups, self.plan)
        integers = check_integers(
            self.model, simulation, held[:integer_samples], first_outputs, deployed=optimized, threads=self.threads
        )
        self.check("integers equal the simulation", integers.problem, integers.summary)
        self.check("observing changes nothing", integers.disturbance, integers.undisturbed)
        self.notes += integers.notes
        for model in (self.model, self.float_model):
            release_weights(model)
        give_back_memory()
        quality = stored_tensor_quality(
            self.float_model, self.model, simulation.stored, held[:tensor_samples], threads=self.threads
        )
        return self._result(
            tensors=integers.tensors,
            quality=quality,
            outputs=outputs,
            kernels=dict(optimized.counts),
            coverage=coverage,
            integer=min(self.count, integer_samples),
            measured=self.count,
        )

    def _run_all(
        self, samples: Iterable[Feed], deployed: Session, spool: IO[bytes], integer_samples: int, tensor_samples: int
    ) -> tuple[list[Feed], list[dict[str, npt.NDArray[Any]]]]:
        """Runs all samples and writes the outputs down; the first samples, and the outputs of the very first."""
        held: list[Feed] = []
        first: list[dict[str, npt.NDArray[Any]]] = []
        for feed in samples:
            got = deployed.run(feed)
            for name in deployed.output_names:
                np.save(spool, got[name], allow_pickle=False)
            if self.count < max(integer_samples, tensor_samples):
                held.append(feed)
            if self.count < integer_samples:
                first.append(got)
            self.count += 1
        if not self.count:
            raise VerificationError("there is no sample to verify the model with", hint="give at least one")
        return held, first

    def _measure(
        self, samples: Iterable[Feed], output_names: Sequence[str], spool: IO[bytes]
    ) -> tuple[OutputReport, ...]:
        """The quality of the outputs that :meth:`_run_all` has written down."""
        problem: str | None = None
        spool.seek(0)
        meters = {name: SimilarityMeter() for name in output_names}
        reference = float_session(self.reference, threads=self.threads)
        names = dict(zip(output_names, reference.output_names, strict=True))
        for index, feed in zip(range(self.count), samples, strict=False):
            wanted = reference.run(feed)
            for name, meter in meters.items():
                array = np.load(spool, allow_pickle=False)
                found = _output_problem(name, index, wanted[names[name]], array)
                if found is None or array.shape == wanted[names[name]].shape:
                    meter.add(wanted[names[name]], array)
                problem = problem or found
        self.check("outputs have the float model's shapes and are finite", problem, f"{self.count} samples")
        return tuple(output_report(name, meter.result()) for name, meter in meters.items())

    def _plan_problem(self) -> str | None:
        found = []
        try:
            for difference in differences(self.float_model, self.groups, self.plan):
                found.append(difference)
                if len(found) > 50:
                    break
        except VerificationError as error:
            return str(error)
        if not found:
            return None
        more = f" (and {'more than 50' if len(found) > 50 else len(found) - 1} other places)" if len(found) > 1 else ""
        return f"{found[0].where}: {found[0].what}{more}"

    def _float_problem(self, coverage: Coverage) -> str | None:
        for node in coverage.integer:
            if node in self.plan.floats and "MatMulNBits" not in coverage.integer[node]:
                return f"{node} runs as {coverage.integer[node]}: onnxruntime quantized its weights by itself"
        return None

    def _result(self, *, integer: int, measured: int, **parts: Any) -> Verification:
        return Verification(
            checks=tuple(self.checks),
            integer_samples=integer,
            quality_samples=measured,
            float_bytes=weight_bytes(self.float_model),
            file_bytes=file_bytes(self.path, self.model),
            notes=tuple(self.notes),
            **parts,
        )


def output_report(name: str, similarity: Similarity) -> OutputReport:
    """An output's similarity in the report's form."""
    return OutputReport(
        name=name,
        sqnr_db=similarity.sqnr_db,
        cosine=similarity.cosine,
        max_abs_error=similarity.max_abs_error,
        agreement=similarity.agreement,
    )


def _output_problem(name: str, index: int, wanted: npt.NDArray[Any], got: npt.NDArray[Any]) -> str | None:
    if got.shape != wanted.shape:
        return f"output {name} has shape {list(got.shape)} on sample {index}, the float model's {list(wanted.shape)}"
    if np.issubdtype(got.dtype, np.floating) and np.isfinite(wanted).all() and not np.isfinite(got).all():
        return f"output {name} is not finite on sample {index}"
    return None


def _checker_problem(path: pathlib.Path) -> str | None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return first_sentence(error)
    return None
