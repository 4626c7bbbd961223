"""``report.json``: what was done to a model and what it costs, as plain frozen values.

The content depends on the model, the data, the settings and the versions only: two equal runs write equal bytes. Time
and memory (:class:`RunStats`) are therefore printed, and not part of it. The format is documented in
``docs/report.md``; :data:`SCHEMA_VERSION` changes whenever a reader of the old format would misread the new one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import types
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from postquant.runtime_ops.errors import ModelError

SCHEMA_VERSION = 1
LARGEST_SQNR_DB = 200.0
_DIGITS = 6

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One quantized Conv, ConvTranspose, Gemm or MatMul.

    Attributes:
        node: Name in the simplified model.
        op_type: Operator type.
        wbits: Bits of the weight; None where both inputs are activations.
        abits: Bits of the input.
        weight_shape: Shape of the weight; None where there is none.
        weight_scales: Smallest and largest scale of the weight's channels.
        input_scale: Scale of the input.
        input_zero_point: Zero point of the input.
        sqnr_db: SQNR of the layer's output in the whole quantized model against the float model, in dB.
        cosine: Cosine similarity of the same two.
        gains: Stage -> what it gained for this layer, in dB of the layer's own output error.
        weights: Which values the weight has: "int", "post" or "lut".
        code_books: What each of them would give, for weights of few bits: the SQNR of the layer's output in dB, by the
            weights alone; "... nearest" without compensated rounding.
        sensitivity: SQNR of the network's outputs in dB with this layer alone quantized, by the width of its weight
            ("w4") or of its input ("a4"); where bits were allocated.
        history: Stage -> what ``sqnr_db`` was after it, on the same samples; without the last stage.
    """

    node: str
    op_type: str
    wbits: int | None = None
    abits: int | None = None
    weight_shape: tuple[int, ...] | None = None
    weight_scales: tuple[float, ...] | None = None
    input_scale: float | None = None
    input_zero_point: int | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    gains: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weights: str | None = None
    code_books: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sensitivity: Mapping[str, float] = dataclasses.field(default_factory=dict)
    history: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputReport:
    """One output of the model, quantized against float.

    Attributes:
        name: Output name.
        sqnr_db: SQNR in dB over all measured samples.
        cosine: Cosine similarity.
        max_abs_error: Largest absolute difference, in units of the output.
        agreement: Share of positions whose largest class (last axis) is the same, 0..1; None where that means nothing.
    """

    name: str
    sqnr_db: float
    cosine: float | None = None
    max_abs_error: float | None = None
    agreement: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerReport:
    """Another quantizer on the same model, calibration samples and measured samples.

    Attributes:
        quantizer: Name, version and method, for people.
        wbits: Bits of its weights.
        abits: Bits of its activations.
        size: Bytes of its file; 0 where it failed.
        outputs: Quality of its outputs, as :attr:`Report.outputs`.
        failure: Why it gave no result, "" where it did.
    """

    quantizer: str
    wbits: int
    abits: int
    size: int = 0
    outputs: tuple[OutputReport, ...] = ()
    failure: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatReport:
    """A node that stayed in float, and why."""

    node: str
    op_type: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageReport:
    """One stage, for the ablation.

    Attributes:
        name: Stage.
        kept: Whether its change was kept.
        sqnr_db: Output SQNR after it where it was measured, in dB.
        detail: What it did, one clause.
    """

    name: str
    kept: bool = True
    sqnr_db: float | None = None
    detail: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckReport:
    """One check of the verification."""

    name: str
    passed: bool
    detail: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputReport:
    """One input of the model, with the range that calibration saw (for ``postquant verify`` without data).

    Attributes:
        name: Input name.
        dtype: NumPy dtype.
        shape: Dimensions; strings and None are free.
        low: Smallest calibration value.
        high: Largest calibration value.
        sample_shape: Shape of the first calibration sample, batch axis included.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    low: float | None = None
    high: float | None = None
    sample_shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettingFile:
    """A file that a setting names: ``target``, ``encodings`` or ``custom_ops``.

    Attributes:
        setting: The setting.
        name: File name without folder.
        sha256: Digest of its content.
    """

    setting: str
    name: str
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything about one quantization.

    Attributes:
        model: Name of the source model: its file name, or the graph's name.
        model_sha256: Digest of the source model with its external data.
        data_sha256: Digest of the calibration data.
        samples: Calibration samples used.
        target: Name of the target.
        settings: :meth:`QuantConfig.to_json`.
        setting_files: Files that the settings name, with their digests.
        versions: Package -> version.
        size_before: Bytes of the source model with external data.
        size_after: Bytes of the result with external data.
        inputs: The model's inputs.
        layers: Quantized layers, in graph order.
        outputs: Quality of the outputs.
        floats: What stayed in float.
        stages: What happened, in order.
        checks: The verification.
        notes: What else must not go unsaid.
        peer: onnxruntime's own quantizer beside it; None where nobody asked.
        files: File name -> SHA-256 of the files of the result, this report excepted.
    """

    model: str
    model_sha256: str
    data_sha256: str
    samples: int
    target: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    size_before: int
    size_after: int = 0
    setting_files: tuple[SettingFile, ...] = ()
    inputs: tuple[InputReport, ...] = ()
    layers: tuple[LayerReport, ...] = ()
    outputs: tuple[OutputReport, ...] = ()
    floats: tuple[FloatReport, ...] = ()
    stages: tuple[StageReport, ...] = ()
    checks: tuple[CheckReport, ...] = ()
    notes: tuple[str, ...] = ()
    peer: PeerReport | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check of the verification passed."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values, with its schema version."""
        return {"schema_version": SCHEMA_VERSION, **encode_json(self)}

    def to_bytes(self) -> bytes:
        """The content of ``report.json``."""
        return (json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def load(cls, path: pathlib.Path) -> Report:
        """Reads ``report.json``.

        Raises:
            ModelError: If it is missing, damaged, or of another schema version.
        """
        return read_document(cls, path, "the report", SCHEMA_VERSION)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStats:
    """What one run cost; differs between runs, so it is printed and never stored.

    Attributes:
        seconds: Wall time.
        peak_bytes: Largest resident memory of the process; None where the system does not tell.
    """

    seconds: float
    peak_bytes: int | None


def read_document(kind: type[T], path: pathlib.Path, subject: str, version: int, *, plural: bool = False) -> T:
    """Reads a JSON file of a result, one object with a ``schema_version``, into a dataclass.

    Args:
        kind: The dataclass.
        path: The file.
        subject: What it is, for the sentences: "the report".
        version: The schema version that this package reads.
        plural: Whether ``subject`` is plural.

    Raises:
        ModelError: If it is missing, damaged, or of another schema version.
    """
    damaged = f"{subject} {'are' if plural else 'is'} damaged"
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        found = error.strerror or str(error)
        raise ModelError(f"{subject} cannot be read", where=str(path), found=found) from None
    except ValueError as error:
        raise ModelError(damaged, where=str(path), found=str(error)) from None
    found_version = data.pop("schema_version", None) if isinstance(data, dict) else None
    if found_version != version:
        raise ModelError(
            f"{subject} {'have' if plural else 'has'} another format",
            where=str(path),
            expected=f"schema_version {version}",
            found="none" if found_version is None else f"{found_version}",
        )
    try:
        result: T = decode_json(kind, data)
    except (TypeError, KeyError, AttributeError) as error:
        raise ModelError(damaged, where=str(path), found=str(error)) from None
    return result


def encode_json(value: Any) -> Any:
    """Dataclasses, mappings and sequences as JSON values; six significant digits for numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): encode_json(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode_json(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if hasattr(value, "__index__"):
        return int(value)
    return _number(float(value))


def _number(value: float) -> float | None:
    """Six significant digits; infinity, the SQNR of an exact result, becomes :data:`LARGEST_SQNR_DB`."""
    if math.isnan(value):
        return None
    if math.isinf(value):
        return math.copysign(LARGEST_SQNR_DB, value)
    return float(f"{value:.{_DIGITS}g}")


def decode_json(kind: Any, value: Any) -> Any:
    """The inverse of :func:`encode_json`, led by type hints.

    Raises:
        TypeError: If a value does not fit its type (KeyError and AttributeError likewise).
    """
    if isinstance(value, dict) and isinstance(kind, types.UnionType):  # a dataclass | None
        kind = next((part for part in get_args(kind) if dataclasses.is_dataclass(part)), kind)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: decode_json(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        return tuple(decode_json(get_args(kind)[0], item) for item in value)
    if isinstance(value, list):  # a tuple | None
        return tuple(value)
    return value
