"""All formats in one table, and the function that writes them: :func:`write_encodings`.

The folder holds ``model.float.onnx``, a file per format that says at least one tensor, and ``index.json``::

    {"schema_version": 1, "target": "...", "model": "model.float.onnx",
     "formats": [{"name": "aimet-1.0.0", "file": "aimet-1.0.0.encodings", "description": "...", "tensors": 41,
                  "notes": [{"tensor": "...", "fidelity": "approximated", "reason": "..."}]}]}

``file`` is null where a format says nothing; the notes then tell why. Equal plans give equal bytes.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from postquant.passes.plan import QuantPlan
from postquant.passes.target import Target
from postquant.pipeline.encodings.aimet import AimetVersion, write_aimet
from postquant.pipeline.encodings.entries import EncodingNote, Entries, Fidelity, collect_entries
from postquant.pipeline.encodings.fixed_point import write_header
from postquant.pipeline.encodings.float_model import float_model
from postquant.pipeline.encodings.ncnn import write_table
from postquant.pipeline.encodings.tensorrt import write_cache, write_explicit_advice
from postquant.pipeline.encodings.vitis_ai import graph_inputs, write_positions
from postquant.pipeline.save import save_model

SCHEMA_VERSION = 1
INDEX_FILE = "index.json"
MODEL_FILE = "model.float.onnx"


@dataclasses.dataclass(frozen=True, eq=False)
class _Source:
    """What writers read."""

    model: ir.Model
    plan: QuantPlan
    entries: Entries


# Writes a file; how many tensors (layers) it says, and what it does not say exactly.
_Writer = Callable[[_Source, pathlib.Path], tuple[int, list[EncodingNote]]]


@dataclasses.dataclass(frozen=True)
class EncodingFormat:
    """One format.

    Attributes:
        name: As in ``index.json``.
        file: Its file.
        description: Who reads it, for people.
        write: Its writer.
        advice: Whether the file is written even if it says nothing, because it is for people.
    """

    name: str
    file: str
    description: str
    write: _Writer
    advice: bool = False


def _aimet(version: AimetVersion) -> _Writer:
    return lambda source, path: write_aimet(source.entries, path, version)


FORMATS = (
    EncodingFormat(
        "aimet-0.6.1",
        "aimet-0.6.1.encodings",
        "QNN and SNPE converters: --quantization_overrides, older releases",
        _aimet(AimetVersion.V0_6_1),
    ),
    EncodingFormat(
        "aimet-1.0.0",
        "aimet-1.0.0.encodings",
        "QNN converters: --quantization_overrides; AIMET: load_encodings_to_sim",
        _aimet(AimetVersion.V1_0_0),
    ),
    EncodingFormat(
        "aimet-2.0.0",
        "aimet-2.0.0.encodings",
        "QAIRT converters and AIMET from 2.22 on",
        _aimet(AimetVersion.V2_0_0),
    ),
    EncodingFormat(
        "tensorrt-cache",
        "tensorrt.cache",
        "TensorRT up to 10, implicit quantization: trtexec --int8 --calib",
        lambda source, path: write_cache(source.entries, path),
    ),
    EncodingFormat(
        "tensorrt-explicit",
        "tensorrt-explicit.txt",
        "people: what TensorRT wants of model.qdq.onnx",
        lambda source, path: write_explicit_advice(source.entries, path),
        advice=True,
    ),
    EncodingFormat("ncnn", "ncnn.table", "ncnn2int8", lambda source, path: write_table(source.entries, path)),
    EncodingFormat(
        "vitis-ai",
        "vitis-ai.json",
        "positions of the binary point, in the structure of vai_q_pytorch's quant_info.json",
        lambda source, path: write_positions(source.entries, path, graph_inputs(source.model)),
    ),
    EncodingFormat(
        "fixed-point",
        "fixed_point.h",
        "C compilers: TFLite and CMSIS-NN arithmetic; fixed_point_layer.c runs a layer",
        lambda source, path: write_header(source.entries, source.plan, path),
    ),
)


@dataclasses.dataclass(frozen=True)
class WrittenFormat:
    """What was written in one format.

    Attributes:
        name: Of the format.
        file: Its file in the folder; None where the format says nothing of this plan.
        description: Who reads it.
        tensors: How many tensors (layers, in ``ncnn`` and ``fixed-point``) it says.
        notes: What it does not say exactly.
    """

    name: str
    file: str | None
    description: str
    tensors: int
    notes: tuple[EncodingNote, ...]

    def summary(self) -> str:
        """One line for a report."""
        counts = Counter(note.fidelity for note in self.notes)
        parts = [f"{self.tensors} said"]
        parts += [f"{counts[kind]} {kind.value}" for kind in Fidelity if counts[kind]]
        return f"{self.name}: {', '.join(parts)}" + ("" if self.file else "; no file")

    def to_json(self) -> dict[str, Any]:
        """An entry of ``index.json``."""
        notes = [{"tensor": n.tensor, "fidelity": n.fidelity.value, "reason": n.reason} for n in self.notes]
        return {
            "name": self.name,
            "file": self.file,
            "description": self.description,
            "tensors": self.tensors,
            "notes": notes,
        }


def write_encodings(
    folder: pathlib.Path, model: ir.Model, plan: QuantPlan, target: Target
) -> tuple[WrittenFormat, ...]:
    """Writes a plan in all formats.

    Args:
        folder: Where; it exists. Files of these names in it are replaced.
        model: The simplified model that the plan is about.
        plan: A decided plan.
        target: What the plan was placed for; named in ``index.json``.

    Returns:
        What was written, format by format.

    Raises:
        OutputError: If the model cannot be written.
        OSError: If another file cannot be written.
    """
    save_model(float_model(model, plan), folder / MODEL_FILE)
    source = _Source(model, plan, collect_entries(model, plan))
    written = []
    for form in FORMATS:
        path = folder / form.file
        count, notes = form.write(source, path)
        if not (count or form.advice):
            path.unlink(missing_ok=True)
        file = form.file if path.exists() else None
        written.append(WrittenFormat(form.name, file, form.description, count, tuple(notes)))
    index = {
        "schema_version": SCHEMA_VERSION,
        "target": target.name,
        "model": MODEL_FILE,
        "formats": [form.to_json() for form in written],
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return tuple(written)
