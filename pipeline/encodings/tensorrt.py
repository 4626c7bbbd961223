"""TensorRT's calibration cache, and what explicit quantization needs beyond it.

The cache is text: a header ``TRT-<version>-<calibrator>``, then one line per tensor, its name and the eight hexadecimal
digits of a float32::

    TRT-8601-EntropyCalibration2
    image: 3c010a14

The float is the step of signed 8-bit codes with zero point 0, the largest magnitude divided by 127. It says nothing
about weights: in this *implicit* mode TensorRT takes their largest magnitude per output channel by itself. TensorRT 8
and 10 read the cache, 10 calls it deprecated. *Explicit* quantization reads ``model.qdq.onnx``, which holds
everything; :func:`write_explicit_advice` lists what TensorRT would refuse in it.

Sources: TensorRT's developer guide ("Calibration", "Explicit Versus Implicit Quantization"); NVIDIA's ModelOpt, whose
``import_scales_from_calib_cache`` decodes the float and takes it for the scale of QuantizeLinear. Not verified on
TensorRT itself.
"""

from __future__ import annotations

import pathlib
import re
import struct

from postquant.pipeline.encodings.entries import EncodingNote, Entries, Fidelity, symmetric_int8_scale
from postquant.pipeline.encodings.vendor import VendorEncodings, VendorTensor, read_text, wrong_file

HEADER = "TRT-8601-EntropyCalibration2"
_HEADER = re.compile(r"TRT-\d+-\w+$")
_LINE = re.compile(r"(?P<name>.+): *(?P<bits>[0-9a-fA-F]{1,8})$")


def write_cache(entries: Entries, path: pathlib.Path) -> tuple[int, list[EncodingNote]]:
    """Writes a calibration cache: one line per activation.

    Args:
        entries: What the plan says.
        path: The file.

    Returns:
        How many tensors it says, and what it does not say exactly.
    """
    notes: list[EncodingNote] = list(entries.notes)
    lines = [HEADER]
    for entry in entries.activations:
        if any(text in entry.name for text in ("\n", "\r", ": ")):
            split = "its name has a line break, or a colon and a space"
            notes.append(EncodingNote(entry.name, Fidelity.LEFT_OUT, split))
            continue
        scale, reason = symmetric_int8_scale(entry.quantizer)
        lines.append(f"{entry.name}: {struct.pack('>f', scale).hex()}")
        if reason is not None:
            notes.append(EncodingNote(entry.name, Fidelity.APPROXIMATED, reason))
    implicit = "a cache has no weights: TensorRT takes their largest magnitude per output channel"
    notes.extend(EncodingNote(weight.name, Fidelity.LEFT_OUT, implicit) for weight in entries.weights)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines) - 1, notes


def write_explicit_advice(entries: Entries, path: pathlib.Path) -> tuple[int, list[EncodingNote]]:
    """Writes what to know before ``model.qdq.onnx`` is given to TensorRT, as text for people.

    Args:
        entries: What the plan says.
        path: The file.

    Returns:
        How many tensors TensorRT would refuse as they are, each of them a note.
    """
    notes = []
    for entry in entries.activations:
        spec = entry.quantizer.spec
        if not spec.signed or int(entry.quantizer.zero_point):
            reason = "TensorRT reads signed codes with zero point 0 only"
            notes.append(EncodingNote(entry.name, Fidelity.LEFT_OUT, reason))
        elif spec.bits != 8:
            reason = f"TensorRT has no activations of {spec.bits} bits"
            notes.append(EncodingNote(entry.name, Fidelity.LEFT_OUT, reason))
    for weight in entries.weights:
        if weight.quantizer.zero_point.any() or not weight.quantizer.spec.signed:
            reason = "TensorRT reads weights with signed codes and zero point 0 only"
            notes.append(EncodingNote(weight.name, Fidelity.LEFT_OUT, reason))
    channelwise = [w for w in entries.weights if w.quantizer.spec.axis is not None]
    lines = [
        "Explicit quantization with TensorRT: give it model.qdq.onnx (trtexec --onnx=model.qdq.onnx --int8).",
        "",
        f"Weights with a scale per output channel, which a calibration cache cannot hold: {len(channelwise)}",
        *(f"  {w.name}  axis {w.quantizer.spec.axis}, {w.quantizer.scale.size} scales" for w in channelwise),
        "",
        f"Tensors that TensorRT would refuse: {len(notes)}",
        *(f"  {note.tensor}: {note.reason}" for note in notes),
    ]
    if notes:
        lines += ["", "Quantize with --target tensorrt to get none of them."]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(notes), notes


def read_cache(path: pathlib.Path) -> VendorEncodings:
    """Reads a calibration cache.

    Raises:
        ConfigError: If it has no header, or a line is not ``name: hexadecimal float32``; the text names the line.
    """
    header, *lines = read_text(path).splitlines() or [""]
    if not _HEADER.match(header.strip()):
        raise wrong_file(path, f'"{header[:40]}"', "a first line like TRT-8601-EntropyCalibration2")
    tensors = {}
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        match = _LINE.match(line.rstrip())
        if match is None:
            raise wrong_file(path, f'line {number}: "{line[:60]}"', "name: eight hexadecimal digits")
        (scale,) = struct.unpack(">f", bytes.fromhex(match["bits"].zfill(8)))
        tensors[match["name"]] = VendorTensor.symmetric(scale)
    return VendorEncodings("TensorRT calibration cache", tensors=tensors)
