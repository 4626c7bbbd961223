"""Every decision about a model's quantization, in one frozen value: :class:`QuantPlan`.

A plan starts with formats only (:class:`QuantSpec`, made by placement); calibration replaces them by
quantizers with numbers (:class:`TensorQuantizer`). It reaches the graph at *emit* and nowhere earlier, so
that comparing two plans explains what a stage did and a stage can resume from the plan on disk.

Keys are names in the simplified model: values for activations and biases, initializers for weights, and
``"<node>:<input index>"`` for a quantizer that belongs to one input of one node.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from postquant.runtime_ops.adaptive_module import AdaptiveModule
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.law_feedback import Feedback
from postquant.runtime_ops.quantizer import TensorQuantizer
from postquant.runtime_ops.rounding_border import RoundingBorder
from postquant.runtime_ops.spec import QuantSpec

Entry = QuantSpec | TensorQuantizer
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class QuantPlan:
    """All decisions.

    Attributes:
        target: Name of the target that the plan was placed for.
        activations: Value name -> how the tensor is stored between nodes (one scale per tensor).
        shared: Value name -> name of the value in ``activations`` whose quantizer it uses: outputs of
            pass-through nodes (Reshape, MaxPool, ...) and Concat inputs that share one scale.
        requants: ``"node:input"`` -> a second, usually narrower quantizer applied to the stored tensor just
            before that input (a residual sum stored at 8 bits that a 4-bit convolution reads).
        weights: Initializer name -> format of the weight; every quantized weight has exactly one consumer.
        biases: Initializer name -> float32 values to write instead of the model's own (bias correction).
        int_biases: Bias initializer -> (key of the input quantizer: a value name or "node:input",
            weight initializer name); emitted as int32 with scale ``s_x * s_w``.
        floats: Node name -> why it stays in float.
        notes: What else a report must not be silent about, in the order in which it happened.
        rounded_inputs: Quantized graph inputs whose float readers read the dequantized value too.
    """

    target: str
    activations: Mapping[str, Entry] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    requants: Mapping[str, Entry] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, Entry] = dataclasses.field(default_factory=dict)
    biases: Mapping[str, npt.NDArray[np.float32]] = dataclasses.field(default_factory=dict)
    int_biases: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    floats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rounded_inputs: tuple[str, ...] = ()

    @property
    def narrowest_bits(self) -> int:
        """Of its weights and activations; 8 where nothing has fewer."""
        tables = (self.activations, self.requants, self.weights)
        entries = [entry for table in tables for entry in table.values()]
        specs = [entry.spec if isinstance(entry, TensorQuantizer) else entry for entry in entries]
        return min([8, *(spec.bits for spec in specs)])

    def with_activation(self, name: str, entry: Entry) -> QuantPlan:
        """The plan with one stored activation decided."""
        return dataclasses.replace(self, activations={**self.activations, name: entry})

    def with_weight(self, name: str, entry: Entry) -> QuantPlan:
        """The plan with one weight decided."""
        return dataclasses.replace(self, weights={**self.weights, name: entry})

    def with_requant(self, key: str, entry: Entry) -> QuantPlan:
        """The plan with one requantization decided."""
        return dataclasses.replace(self, requants={**self.requants, key: entry})

    def with_bias(self, name: str, values: npt.NDArray[np.float32]) -> QuantPlan:
        """The plan with one corrected bias."""
        return dataclasses.replace(self, biases={**self.biases, name: values})

    def with_note(self, note: str) -> QuantPlan:
        """The plan with one more line for the report; a line is never repeated."""
        return self if note in self.notes else dataclasses.replace(self, notes=(*self.notes, note))

    def activation_entry(self, value: str) -> Entry | None:
        """Format or quantizer of a stored value, shared ones resolved; None where it stays float."""
        return self.activations.get(self.shared.get(value, value))

    def activation_quantizer(self, value: str) -> TensorQuantizer | None:
        """Quantizer of a stored value if it is decided, shared ones resolved."""
        entry = self.activation_entry(value)
        return entry if isinstance(entry, TensorQuantizer) else None

    def input_quantizer(self, key: str) -> TensorQuantizer | None:
        """Quantizer behind an ``int_biases`` key: a requantization ("node:input") or a stored value."""
        entry = self.requants.get(key)
        if entry is None:
            return self.activation_quantizer(key)
        return entry if isinstance(entry, TensorQuantizer) else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as safetensors with a JSON header, atomically and with reproducible bytes."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        header: dict[str, Any] = {"format_version": FORMAT_VERSION, "target": self.target}
        for field in ("activations", "requants", "weights"):
            table = {}
            for name, entry in sorted(getattr(self, field).items()):
                spec = entry.spec if isinstance(entry, TensorQuantizer) else entry
                table[name] = spec.to_json()
                if isinstance(entry, TensorQuantizer):
                    arrays[f"{field}/{name}/scale"] = entry.scale
                    arrays[f"{field}/{name}/zero_point"] = entry.zero_point
                    if entry.codes is not None:
                        arrays[f"{field}/{name}/codes"] = np.ascontiguousarray(entry.codes)
                    if entry.table is not None:
                        arrays[f"{field}/{name}/table"] = np.ascontiguousarray(entry.table)
                    if entry.table_axis is not None:
                        arrays[f"{field}/{name}/table_axis"] = np.array(entry.table_axis, np.int32)
                    if entry.copies > 1:
                        arrays[f"{field}/{name}/copies"] = np.array([entry.copies, entry.copy], np.int32)
                    if entry.feedback is not None:
                        for part, array in entry.feedback.arrays().items():
                            arrays[f"{field}/{name}/feedback/{part}"] = array
                        if entry.feedback.cell > 1:
                            arrays[f"{field}/{name}/feedback/cell"] = np.array(entry.feedback.cell, np.int32)
                    if entry.border is not None:
                        for part, array in entry.border.arrays().items():
                            arrays[f"{field}/{name}/border/{part}"] = array
                    if entry.adaptive is not None:
                        for part, array in entry.adaptive.arrays().items():
                            arrays[f"{field}/{name}/adaptive/{part}"] = array
            header[field] = table
        for name, values in self.biases.items():
            arrays[f"biases/{name}"] = np.ascontiguousarray(values, dtype=np.float32)
        header["shared"] = dict(sorted(self.shared.items()))
        header["int_biases"] = {k: list(v) for k, v in sorted(self.int_biases.items())}
        header["floats"] = dict(sorted(self.floats.items()))
        header["notes"] = list(self.notes)
        header["rounded_inputs"] = list(self.rounded_inputs)
        # One metadata key only: safetensors writes several in hash order, which is not reproducible.
        data = safetensors.numpy.save(
            dict(sorted(arrays.items())), metadata={"postquant": json.dumps(header, sort_keys=True)}
        )
        write_atomically(pathlib.Path(path), data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuantPlan:
        """Reads a saved plan.

        Raises:
            ModelError: If the file is not a plan or was written by a newer version.
        """
        try:
            with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {})["postquant"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise ModelError(
                "the plan cannot be read", where=os.fspath(path), found=str(error), hint="quantize the model again"
            ) from error
        if header["format_version"] != FORMAT_VERSION:
            raise ModelError(
                "the plan has another format",
                where=os.fspath(path),
                expected=f"version {FORMAT_VERSION}",
                found=f"version {header['format_version']}",
                hint="quantize the model again with this version",
            )

        def below(prefix: str) -> dict[str, npt.NDArray[Any]]:
            return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

        def border(prefix: str) -> RoundingBorder | None:
            parts = below(prefix)
            return RoundingBorder.from_arrays(parts) if parts else None

        def adaptive(prefix: str) -> AdaptiveModule | None:
            parts = below(prefix)
            return AdaptiveModule.from_arrays(parts) if parts else None

        def feedback(prefix: str) -> Feedback | None:
            parts = below(prefix)
            cell = int(parts.pop("cell", np.ones((), np.int32)))
            return dataclasses.replace(Feedback.from_arrays(parts), cell=cell) if parts else None

        def axis(name: str) -> int | None:
            return int(arrays[name]) if name in arrays else None

        def copies(name: str) -> dict[str, int]:
            return dict(zip(("copies", "copy"), arrays[name].tolist(), strict=True)) if name in arrays else {}

        def table(field: str) -> dict[str, Entry]:
            result: dict[str, Entry] = {}
            for name, data in header[field].items():
                spec = QuantSpec.from_json(data)
                key = f"{field}/{name}"
                result[name] = (
                    TensorQuantizer(
                        spec,
                        arrays[f"{key}/scale"],
                        arrays[f"{key}/zero_point"],
                        arrays.get(f"{key}/codes"),
                        arrays.get(f"{key}/table"),
                        border(f"{key}/border/"),
                        adaptive(f"{key}/adaptive/"),
                        axis(f"{key}/table_axis"),
                        feedback(f"{key}/feedback/"),
                        **copies(f"{key}/copies"),
                    )
                    if f"{key}/scale" in arrays
                    else spec
                )
            return result

        return cls(
            target=header["target"],
            activations=table("activations"),
            shared=header["shared"],
            requants=table("requants"),
            weights=table("weights"),
            biases={n.removeprefix("biases/"): a for n, a in arrays.items() if n.startswith("biases/")},
            int_biases={k: (v[0], v[1]) for k, v in header["int_biases"].items()},
            floats=header["floats"],
            notes=tuple(header["notes"]),
            rounded_inputs=tuple(header.get("rounded_inputs", ())),
        )


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes ``data`` so that ``path`` either has its old content or all of the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
