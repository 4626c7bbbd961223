"""AIMET / QNN ``.encodings`` of versions 0.6.1, 1.0.0 and 2.0.0, for ``--quantization_overrides`` of QNN's converters.

In versions 0.6.1 and 1.0.0 a code is unsigned and its offset is added: ``x = (code + offset) * scale`` with ``code``
in ``[0, 2^bits - 1]``; ``is_symmetric`` (``is_sym``) says that codes are signed, which shifts both. Version 2.0.0 is
ONNX's QuantizeLinear: ``x = (code - y_zero_point) * y_scale``. So

    offset = -(zero_point + 2^(bits - 1))     signed codes
    offset = -zero_point                      unsigned codes

Sources: AIMET's "Encoding Format Specification" (``Docs/techniques/encoding_spec.rst``) and the code that reads and
writes it (``aimet_onnx/_encoding.py`` of aimet-onnx 2.42).
"""

from __future__ import annotations

import dataclasses
import enum
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from postquant.pipeline.encodings.entries import EncodingNote, Entries, Fidelity
from postquant.pipeline.encodings.vendor import (
    VendorEncodings,
    VendorTensor,
    float32_scales,
    int32_zero_points,
    read_json,
    wrong_file,
)
from postquant.runtime_ops.quantizer import TensorQuantizer

_BIAS_BITS = 32


class AimetVersion(enum.Enum):
    """Versions of the format."""

    V0_6_1 = "0.6.1"
    V1_0_0 = "1.0.0"
    V2_0_0 = "2.0.0"


# Widths that each version has.
_WIDTHS = {
    AimetVersion.V0_6_1: tuple(range(4, 33)),
    AimetVersion.V1_0_0: tuple(range(2, 33)),
    AimetVersion.V2_0_0: (2, 4, 8, 16, 32),
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Affine:
    """One entry: float32 ``scale`` (n,), int64 ``zero_point`` (n,) of codes of ``bits`` bits; no ``axis`` for n = 1."""

    name: str
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int64]
    bits: int
    signed: bool
    axis: int | None

    @classmethod
    def of(cls, name: str, quantizer: TensorQuantizer, bits: int) -> _Affine:
        """The entry of a quantizer; signed codes with a zero point are said as unsigned ones, which means the same."""
        zero = np.atleast_1d(quantizer.zero_point).astype(np.int64)
        signed = quantizer.spec.signed and not zero.any()
        if quantizer.spec.signed and not signed:
            zero = zero + (1 << (bits - 1))
        return cls(name, np.atleast_1d(quantizer.scale), zero, bits, signed, quantizer.spec.axis)

    @property
    def offset(self) -> npt.NDArray[np.int64]:
        """What is added to an unsigned code."""
        return -(self.zero_point + ((1 << (self.bits - 1)) if self.signed else 0))

    def to_json(self, version: AimetVersion) -> Any:
        """The entry's value in a version, without its name where the version has that as a key."""
        scales = [float(scale) for scale in self.scale]
        if version is AimetVersion.V0_6_1:
            top = (1 << self.bits) - 1
            return [
                {
                    "bitwidth": self.bits,
                    "dtype": "int",
                    "is_symmetric": str(self.signed),
                    "max": (top + int(offset)) * scale,
                    "min": int(offset) * scale,
                    "offset": int(offset),
                    "scale": scale,
                }
                for scale, offset in zip(scales, self.offset, strict=True)
            ]
        if version is AimetVersion.V1_0_0:
            return {
                "name": self.name,
                "enc_type": "PER_TENSOR" if self.axis is None else "PER_CHANNEL",
                "dtype": "INT",
                "bw": self.bits,
                "is_sym": self.signed,
                "scale": scales,
                "offset": [int(offset) for offset in self.offset],
            }
        entry: dict[str, Any] = {"name": self.name, "output_dtype": f"{'' if self.signed else 'u'}int{self.bits}"}
        zeros = [int(zero) for zero in self.zero_point]
        entry["y_scale"] = scales if self.axis is not None else scales[0]
        if any(zeros):
            entry["y_zero_point"] = zeros if self.axis is not None else zeros[0]
        if self.axis is not None:
            entry["axis"] = self.axis
        return entry


def write_aimet(entries: Entries, path: pathlib.Path, version: AimetVersion) -> tuple[int, list[EncodingNote]]:
    """Writes a file of encodings.

    Args:
        entries: What the plan says.
        path: The file.
        version: Of the format; int32 biases are said from 2.0.0 on, as AIMET does it.

    Returns:
        How many tensors it says, and what it does not say exactly.
    """
    notes: list[EncodingNote] = list(entries.notes)
    activations = []
    for entry in entries.activations:
        bits = entry.quantizer.spec.bits
        if bits in _WIDTHS[version]:
            activations.append(_Affine.of(entry.name, entry.quantizer, bits))
        else:
            reason = f"version {version.value} has no activations of {bits} bits"
            notes.append(EncodingNote(entry.name, Fidelity.LEFT_OUT, reason))
    weights = []
    for weight in entries.weights:
        spec = weight.quantizer.spec
        own = 8 if spec.has_table else spec.bits
        bits = next(width for width in _WIDTHS[version] if width >= own)
        if bits != spec.bits:
            what = "levels of its code book" if spec.has_table else f"{spec.bits}-bit codes"
            notes.append(EncodingNote(weight.name, Fidelity.APPROXIMATED, f"{what} are said as {bits}-bit codes"))
        weights.append(_Affine.of(weight.name, weight.quantizer, bits))
        if version is AimetVersion.V2_0_0 and weight.bias is not None and weight.bias_scale is not None:
            steps = np.atleast_1d(weight.bias_scale)
            axis = None if steps.size == 1 and spec.axis is None else 0
            weights.append(_Affine(weight.bias, steps, np.zeros(steps.size, np.int64), _BIAS_BITS, True, axis))
    content = {"version": version.value, **_sections(version, activations, weights)}
    if version is AimetVersion.V1_0_0:
        content["excluded_layers"] = list(entries.floats)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(activations) + len(weights), notes


def _sections(version: AimetVersion, activations: Iterable[_Affine], weights: Iterable[_Affine]) -> dict[str, Any]:
    if version is AimetVersion.V2_0_0:
        return {"encodings": [entry.to_json(version) for entry in (*activations, *weights)]}
    sections: dict[str, Any] = {}
    for key, found in (("activation_encodings", activations), ("param_encodings", weights)):
        values = [(entry.name, entry.to_json(version)) for entry in found]
        sections[key] = dict(values) if version is AimetVersion.V0_6_1 else [value for _, value in values]
    return sections


def read_aimet(path: pathlib.Path) -> VendorEncodings:
    """Reads a file of encodings of any of the versions; blockwise and floating-point entries are skipped and named.

    Raises:
        ConfigError: If it is not one, or an entry is incomplete; the text names the entry.
    """
    data = read_json(path)
    version = str(data.get("version", ""))
    if "encodings" in data:
        found = _named(path, data["encodings"])
    elif "activation_encodings" in data or "param_encodings" in data:
        found = [
            *_named(path, data.get("activation_encodings", {})),
            *_named(path, data.get("param_encodings", {})),
        ]
    else:
        raise wrong_file(path, "neither", 'the key "encodings", or "activation_encodings" and "param_encodings"')
    tensors: dict[str, VendorTensor] = {}
    skipped = []
    for name, entry in found:
        try:
            tensor = _tensor(entry)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise wrong_file(path, f"an entry for {name} that is incomplete or wrong ({error!r})") from None
        if isinstance(tensor, str):
            skipped.append(f"{name}: {tensor}")
        else:
            tensors[name] = tensor
    return VendorEncodings(f"AIMET encodings {version or '0.6.1'}", tensors=tensors, skipped=tuple(skipped))


def _named(path: pathlib.Path, section: Any) -> list[tuple[str, Any]]:
    """Name and content of every entry of a section, which is a table or a list."""
    if isinstance(section, Mapping):
        return [(str(name), entry) for name, entry in section.items()]
    if not isinstance(section, list) or not all(isinstance(entry, dict) and "name" in entry for entry in section):
        raise wrong_file(path, "a section of another form", "entries with names")
    return [(str(entry["name"]), entry) for entry in section]


def _tensor(entry: Any) -> VendorTensor | str:
    """The numbers of an entry of any version, or why it is skipped."""
    if isinstance(entry, list):  # 0.6.1: one table per channel
        if not entry:
            raise ValueError("no encoding")
        if str(entry[0].get("dtype", "int")).lower() != "int":
            return "a floating-point format"
        bits = int(entry[0]["bitwidth"])
        signed = str(entry[0]["is_symmetric"]).lower() == "true"
        return _from_offsets([e["scale"] for e in entry], [e["offset"] for e in entry], bits, signed)
    if "bw" in entry:  # 1.0.0
        if str(entry["dtype"]).upper() != "INT":
            return "a floating-point format"
        if entry["enc_type"] not in ("PER_TENSOR", "PER_CHANNEL") or entry.get("zero_point_shift"):
            return f"{entry['enc_type']} is not supported"
        return _from_offsets(entry["scale"], entry["offset"], int(entry["bw"]), bool(entry["is_sym"]))
    dtype = str(entry["output_dtype"])
    if "float" in dtype:
        return "a floating-point format"
    if {"block_size", "per_block_int_scale"} & set(entry) or isinstance(entry.get("y_scale"), dict):
        return "blockwise scales are not supported"
    unsigned, _, bits_text = dtype.partition("int")
    scales = float32_scales(entry["y_scale"])
    zeros = np.asarray(entry.get("y_zero_point", 0), np.float64)
    if (zeros != np.rint(zeros)).any():
        return "fractional zero points are not supported"
    axis = int(entry["axis"]) if isinstance(entry["y_scale"], list) else None
    zero = np.broadcast_to(int32_zero_points(zeros), scales.shape)
    return VendorTensor(scales, zero, int(bits_text), not unsigned, axis)


def _from_offsets(scale: Any, offset: Any, bits: int, signed: bool) -> VendorTensor:
    scales = float32_scales(scale)
    if not 2 <= bits <= _BIAS_BITS:
        raise ValueError(f"{bits} bits")
    offsets = np.atleast_1d(np.asarray(offset, np.float64))
    zeros = int32_zero_points(-offsets - ((1 << (bits - 1)) if signed else 0))
    if scales.shape != zeros.shape:
        raise ValueError(f"{scales.size} scales, {zeros.size} offsets")
    return VendorTensor(scales, zeros, bits, signed)
