"""Positions of the binary point for Vitis AI: ``x = code * 2^-position`` with signed codes.

The file has the structure of vai_q_pytorch's ``quant_info.json``: in ``param``, ``output`` and ``input`` a list of
``[bits, position]`` per tensor. Its keys are names in the ONNX model, not those of a PyTorch module, so it serves to
compare and to set positions by hand; AMD's ONNX flow reads ``model.qdq.onnx`` with power-of-two scales.

Only scales that *are* powers of two, one per tensor and with zero point 0, have a position. Moving another scale to
one would be another model, so it is left out: quantize with ``--target vitis-ai``.

Source: ``vai_q_pytorch`` (``pytorch_nndct/quantization/quantizerbase.py``, ``get_fix_position``) in AMD's Vitis-AI
repository, and its user guide UG1414. Not verified on a device.
"""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
import onnx_ir as ir

from postquant.pipeline.encodings.entries import EncodingNote, Entries, Fidelity
from postquant.pipeline.encodings.vendor import VendorEncodings, VendorTensor, float32_scales, read_json, wrong_file
from postquant.runtime_ops.quantizer import TensorQuantizer

_SECTIONS = ("param", "output", "input")


def position(quantizer: TensorQuantizer) -> int | str:
    """Position of the binary point of a tensor's codes, or why it has none.

    >>> from postquant.runtime_ops.spec import QuantSpec
    >>> spec = QuantSpec(8, signed=True, symmetric=True)
    >>> position(TensorQuantizer(spec, np.array(0.125, np.float32), np.array(0, np.int32)))
    3
    """
    spec = quantizer.spec
    zero = np.atleast_1d(quantizer.zero_point)
    if not spec.signed or zero.any():
        return "only signed codes with zero point 0 have a position"
    scales = np.atleast_1d(quantizer.scale)
    if (scales != scales[0]).any():
        return "its channels have different scales"
    mantissa, exponent = math.frexp(float(scales[0]))
    return 1 - exponent if mantissa == 0.5 else "its scale is no power of two"


def write_positions(entries: Entries, path: pathlib.Path, inputs: frozenset[str]) -> tuple[int, list[EncodingNote]]:
    """Writes positions.

    Args:
        entries: What the plan says.
        path: The file.
        inputs: Names of the graph's inputs.

    Returns:
        How many tensors it says, and what it does not say.
    """
    notes: list[EncodingNote] = list(entries.notes)
    sections: dict[str, dict[str, list[list[int]]]] = {name: {} for name in _SECTIONS}
    tensors = [(a.name, a.quantizer, "input" if a.name in inputs else "output") for a in entries.activations]
    tensors += [(w.name, w.quantizer, "param") for w in entries.weights]
    for name, quantizer, section in tensors:
        found = position(quantizer)
        if isinstance(found, str):
            notes.append(EncodingNote(name, Fidelity.LEFT_OUT, found))
        else:
            bits = 8 if quantizer.spec.has_table else quantizer.spec.bits
            sections[section][name] = [[bits, found]]
    for weight in entries.weights:
        if weight.bias is not None:
            reason = "it is int32 in units of input step times weight step; Vitis AI chooses its position itself"
            notes.append(EncodingNote(weight.bias, Fidelity.LEFT_OUT, reason))
    content = {**sections, "fast_finetuned": False, "bias_corrected": True}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return sum(len(section) for section in sections.values()), notes


def graph_inputs(model: ir.Model) -> frozenset[str]:
    """Names of a model's inputs."""
    return frozenset(value.name or "" for value in model.graph.inputs)


def read_positions(path: pathlib.Path) -> VendorEncodings:
    """Reads positions.

    Raises:
        ConfigError: If the file is another one.
    """
    data = read_json(path)
    tensors = {}
    try:
        for section in _SECTIONS:
            for name, ((bits, place),) in data[section].items():
                scale = float32_scales(math.ldexp(1.0, -int(place)))
                tensors[name] = VendorTensor(scale, np.zeros(1, np.int32), int(bits), True)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise wrong_file(path, f"{error!r}", 'tables "param", "output" and "input" of [[bits, position]]') from None
    return VendorEncodings("Vitis AI positions", tensors=tensors)
