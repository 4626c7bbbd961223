"""From a loaded model to the simplified one that every later stage works on, and the proof that they agree.

    constants out of the inputs -> inline functions -> raise the opset -> onnxsim -> folds -> normal form

The result is compared with the original on onnxruntime, on samples. Folding rounds weights anew, so equality
is up to float32 noise: a signal to noise ratio of at least 80 dB at every output (50 dB for float16), and 99 %
of the entries of integer outputs. The best 8-bit model is at about 35 dB. Where the result differs more,
simplification is dropped step by step, first onnxsim, then the folds, then the raised opset, each with a note.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.passes.fold import fold
from postquant.passes.inline import inline_functions, note_subgraphs
from postquant.passes.normalize import FreeInputsPass, LiftConstantsPass, fix_names, normalize
from postquant.passes.opset import LEAST_OPSET, WANTED_OPSET, opset_of, raise_opset
from postquant.passes.session import make_session
from postquant.passes.simplify import needs_onnxsim, run_onnxscript, run_onnxsim
from postquant.passes.spill import settle_lazy_tensors
from postquant.runtime_ops.errors import ModelError

LEAST_SQNR_DB = 80.0
LEAST_SQNR_HALF_DB = 50.0
LEAST_AGREEMENT = 0.99

# Models beyond this are compared without onnxruntime's optimizations.
_LARGE_BYTES = 256 << 20

Feeds = Mapping[str, npt.NDArray[Any]]
Outputs = list[dict[str, npt.NDArray[Any]]]

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """The simplified model.

    Attributes:
        model: In the normal form of :mod:`postquant.passes.normalize`.
        max_abs_error: Largest difference of an output from the original on the samples; 0 without samples.
        relative_error: The same, divided by the largest magnitude of that output.
        sqnr_db: Smallest signal to noise ratio of an output, in dB; infinite where all are equal.
        notes: What the report must not be silent about.
    """

    model: ir.Model
    max_abs_error: float
    relative_error: float
    sqnr_db: float
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far results are from the reference.

    Attributes:
        max_abs: Largest difference of an entry.
        relative: Largest difference of an entry over the largest magnitude of its output.
        sqnr_db: Smallest ratio over the float outputs.
        failure: What is out of tolerance, or None.
    """

    max_abs: float = 0.0
    relative: float = 0.0
    sqnr_db: float = math.inf
    failure: str | None = None


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """One way to prepare a model, and what is said when a simpler one has to be tried."""

    convert: bool
    onnxsim: bool
    folds: bool
    dropped: str


def prepare(
    model: ir.Model,
    samples: Sequence[Feeds],
    *,
    opset: int = WANTED_OPSET,
    simplify: bool = True,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
    folder: str | os.PathLike[str] | None = None,
    threads: int = 1,
) -> Prepared:
    """Simplifies a model and checks the result against it.

    Args:
        model: As loaded; it is not changed, its tensors are shared.
        samples: A few feeds, input name -> array, on which to compare; one or two are enough.
        opset: Least operator set of the result.
        simplify: Whether to run onnxsim and the folds; otherwise the model is only brought into normal form.
        custom_ops: Libraries of custom operators.
        folder: Where large weights that a fold has changed are kept; it must outlive the result. None: a
            temporary folder that does.
        threads: Threads of onnxruntime.

    Returns:
        The model, how far it is from the original, and notes.

    Raises:
        ModelError: If the model does not run on the samples, or no way to prepare it leaves its outputs equal.
    """
    libraries = tuple(os.fspath(library) for library in custom_ops)
    random = any(node.op_type in _RANDOM for node in ir.traversal.RecursiveGraphIterator(model.graph))
    checked = bool(samples) and not random
    reference = _run(model, samples, libraries, threads) if checked else []
    notes = [] if checked else [_unchecked(random)]

    start = model.clone()
    notes.extend(_free_inputs(start))
    fix_names(start)
    LiftConstantsPass()(start)  # so that weights in Constant nodes are set aside like any others
    # A library may bring kernels for operators that are functions too; which ones, only it knows.
    keep = frozenset(function.domain for function in start.functions.values()) if libraries else frozenset()
    notes.extend(inline_functions(start, keep_domains=keep))

    failure = ""
    for recipe in _recipes(start, opset, simplify):
        try:
            candidate, found = _follow(recipe, start.clone(), opset, libraries)
            settle_lazy_tensors(candidate, folder)
            results = _run(candidate, samples, libraries, threads) if checked else []
            difference = compare(reference, results)
            failure = difference.failure or ""
        except ModelError as error:
            if recipe.convert and not recipe.folds and opset_of(start) < LEAST_OPSET:
                raise
            candidate, found, difference = start, (), Difference()
            failure = error.found or error.what
        if not failure:
            notes.extend((*found, *note_subgraphs(candidate)))
            return Prepared(
                candidate, difference.max_abs, difference.relative, difference.sqnr_db, tuple(dict.fromkeys(notes))
            )
        notes.append(f"{recipe.dropped}: {failure}")
    raise ModelError(
        "the model cannot be brought into the form that quantization needs without changing its outputs",
        found=failure,
        hint=f"export it again with opset {opset} or above",
    )


def _recipes(model: ir.Model, opset: int, simplify: bool) -> Iterator[_Recipe]:
    if simplify and needs_onnxsim(model):
        yield _Recipe(True, True, True, "onnxsim is not used, its result differs from the original")
    if simplify:
        yield _Recipe(True, False, True, "the folds are not used, their result differs from the original")
    present = opset_of(model)
    yield _Recipe(True, False, False, f"the operator set stays at {present}, the conversion changes the outputs")
    if LEAST_OPSET <= present < opset:
        yield _Recipe(False, False, False, "the normal form differs from the original")


def _follow(
    recipe: _Recipe, model: ir.Model, opset: int, libraries: tuple[str, ...]
) -> tuple[ir.Model, tuple[str, ...]]:
    notes: list[str] = []
    if recipe.convert:
        raised = raise_opset(model, opset, custom_ops=libraries)
        model = raised.model
        notes.extend([raised.note] if raised.note else [])
    if recipe.onnxsim:
        try:
            model = run_onnxsim(model)
        except ModelError as error:
            notes.append(f"onnxsim is not used: {error.found or error.what}")
            run_onnxscript(model)
    if recipe.folds:
        notes.extend(fold(model))
    normalize(model)
    return model, tuple(notes)


def _free_inputs(model: ir.Model) -> list[str]:
    listed = sum(value.is_initializer() and value.const_value is not None for value in model.graph.inputs)
    FreeInputsPass()(model)
    if not listed:
        return []
    return [f"initializers that are also graph inputs in the file, and are constants now: {listed}"]


def _unchecked(random: bool) -> str:
    if random:
        return "the simplified model is not compared with the original: it draws random numbers"
    return "the simplified model is not compared with the original: there is no sample"


def _run(model: ir.Model, samples: Sequence[Feeds], libraries: tuple[str, ...], threads: int) -> Outputs:
    # Optimizing a large convolutional model copies its weights: fused, then in another layout.
    large = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    session = make_session(model, threads=threads, custom_ops=libraries, optimize=large < _LARGE_BYTES)
    return [session.run(sample) for sample in samples]


def compare(reference: Outputs, results: Outputs) -> Difference:
    """How far the outputs of a model are from those of the original.

    Args:
        reference: One mapping output name -> array per sample.
        results: The same for the other model.

    Returns:
        The difference over all samples and outputs.
    """
    total = Difference()
    for name in reference[0] if reference else ():
        pairs = [(np.asarray(a[name]), np.asarray(b[name])) for a, b in zip(reference, results, strict=True)]
        one = _compare_output(name, pairs)
        total = Difference(
            max(total.max_abs, one.max_abs),
            max(total.relative, one.relative),
            min(total.sqnr_db, one.sqnr_db),
            total.failure or one.failure,
        )
    return total


def _compare_output(name: str, pairs: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> Difference:
    if any(a.shape != b.shape for a, b in pairs):
        return Difference(failure=f"{name} has another shape")
    expected = np.concatenate([a.reshape(-1) for a, _ in pairs])
    found = np.concatenate([b.reshape(-1) for _, b in pairs])
    if expected.dtype.kind != "f":
        agreement = float(np.mean(expected == found)) if expected.size else 1.0
        failure = f"only {agreement:.1%} of {name} agree" if agreement < LEAST_AGREEMENT else None
        return Difference(failure=failure)
    half = expected.dtype == np.float16
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return Difference(failure=f"{name} is not finite at other places")
    signal, noise = expected[finite], found[finite] - expected[finite]
    if not np.any(noise):
        return Difference()
    power = float(np.sum(signal**2))
    sqnr = 10 * math.log10(power / float(np.sum(noise**2))) if power > 0 else -math.inf
    least = LEAST_SQNR_HALF_DB if half else LEAST_SQNR_DB
    largest = float(np.max(np.abs(noise)))
    return Difference(
        largest,
        largest / float(np.max(np.abs(signal))) if power > 0 else math.inf,
        sqnr,
        f"{name} is only {sqnr:.1f} dB above the difference, {least:.0f} dB are needed" if sqnr < least else None,
    )
