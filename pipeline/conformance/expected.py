"""The folder ``conformance/`` of a bundle: what a receiver should compute (:class:`Conformance`).

``index.json`` lists samples, stored tensors and outputs; each sample has a folder ``0/``, ``1/`` ... with
``inputs.npz``, ``codes.npz`` (integers by the tensor's key) and ``outputs.npz``. ``docs/conformance.md`` describes it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping

from postquant.pipeline.conformance.arrays import Arrays, read_arrays, write_arrays
from postquant.pipeline.kernels import OptimizedGraph
from postquant.runtime_ops.errors import ModelError

SCHEMA_VERSION = 1
INDEX_FILE = "index.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedTensor:
    """One tensor that the quantized model stores as codes.

    Attributes:
        key: Its name in ``codes.npz``, usable as a file name.
        name: The value in the float model.
        codes: The codes in ``model.qdq.onnx``.
        operator: Operator that computes it; "input" for a graph input, "requantize" for a second quantization.
        node: Its name; "" for an input.
        kernel: What onnxruntime ran for it.
        law: Whether its codes follow from the codes in front of it by one formula (docs/verification.md).
        dtype: NumPy type of the codes.
        scale: Scale.
        zero_point: Zero point.
        needs: Codes in front of it, by their names in the model.
        shapes: Its shape on each sample.
        held: Whether ``codes.npz`` holds it; too large tensors are left out.
    """

    key: str
    name: str
    codes: str
    operator: str
    node: str
    kernel: str
    law: bool
    dtype: str
    scale: float
    zero_point: int
    needs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    held: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedOutput:
    """One output of the model.

    Attributes:
        name: Output name.
        tolerance: Largest absolute difference that is no error, in units of the output.
        reason: Why it is not smaller.
    """

    name: str
    tolerance: float
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conformance:
    """What ``index.json`` says.

    Attributes:
        samples: Number of samples.
        source: Where the inputs come from.
        tensors: Stored tensors in the order of computation.
        outputs: Outputs of the model.
        kernels: Node -> what onnxruntime ran for it, which decides how a sum is rounded.
        tolerance: How codes are compared, in words.
    """

    samples: int
    source: str
    tensors: tuple[ExpectedTensor, ...]
    outputs: tuple[ExpectedOutput, ...]
    kernels: Mapping[str, str]
    tolerance: str

    def optimized(self) -> OptimizedGraph:
        """onnxruntime's graph as the laws ask for it."""
        by_value = {tensor.codes: tensor.kernel for tensor in self.tensors}
        return OptimizedGraph({}, dict(self.kernels), by_value)

    def to_bytes(self) -> bytes:
        """The content of ``index.json``."""
        data = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def load(cls, folder: pathlib.Path) -> Conformance:
        """Reads the index of a folder.

        Raises:
            ModelError: If it is missing, damaged, or of another schema version.
        """
        path = folder / INDEX_FILE
        try:
            data = json.loads(path.read_bytes())
        except OSError as error:
            raise ModelError(
                "the bundle has no conformance data", where=str(path), found=error.strerror or str(error)
            ) from None
        except ValueError as error:
            raise ModelError("the conformance index is damaged", where=str(path), found=str(error)) from None
        version = data.pop("schema_version", None) if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ModelError(
                "the conformance index has another format",
                where=str(path),
                expected=f"schema_version {SCHEMA_VERSION}",
                found="none" if version is None else str(version),
                hint="use the version of postquant that wrote it, or a newer one",
            )
        try:
            tensors = tuple(
                ExpectedTensor(
                    **{**tensor, "needs": tuple(tensor["needs"]), "shapes": tuple(map(tuple, tensor["shapes"]))}
                )
                for tensor in data.pop("tensors")
            )
            outputs = tuple(ExpectedOutput(**output) for output in data.pop("outputs"))
            result = cls(tensors=tensors, outputs=outputs, **data)
            dict(result.kernels)
            range(result.samples)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ModelError("the conformance index is damaged", where=str(path), found=str(error)) from None
        return result


@dataclasses.dataclass(frozen=True, eq=False)
class ExpectedSample:
    """One sample: its inputs, the codes by key, and the outputs."""

    inputs: Arrays
    codes: Arrays
    outputs: Arrays

    @classmethod
    def load(cls, folder: pathlib.Path, index: int) -> ExpectedSample:
        """Reads one sample of a conformance folder.

        Raises:
            ModelError: If a file is missing or damaged.
        """
        return cls(*(read_arrays(folder / str(index) / name) for name in _FILES))

    def save(self, folder: pathlib.Path, index: int) -> None:
        """Writes it; the same arrays give the same bytes."""
        place = folder / str(index)
        place.mkdir(parents=True)
        for name, arrays in zip(_FILES, (self.inputs, self.codes, self.outputs), strict=True):
            write_arrays(place / name, arrays)


_FILES = ("inputs.npz", "codes.npz", "outputs.npz")
