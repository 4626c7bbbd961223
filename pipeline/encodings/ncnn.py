"""ncnn's int8 table (``ncnn2int8 net.param net.bin out.param out.bin net.table``), also EasyQuant's.

One line per layer and kind, numbers that real values are *multiplied* by (127 / threshold)::

    conv1_param_0 <one per output channel, or per group of a ConvolutionDepthWise>
    conv1 <one for the layer's input>

Codes are ``clip(round(x * number), -127, 127)``, zero point 0. A zero number makes every code zero, an infinite one
every code 127 (channels whose weights are all zero have such numbers in other tools' tables): neither is written here,
and both are refused when read. The layer's name is the ONNX node's: what ``onnx2ncnn`` and ``pnnx`` keep.

Source: ``tools/quantize/ncnn2int8.cpp`` (``read_int8scale_table``, ``quantize_convolution``,
``quantize_convolutiondepthwise``, ``quantize_innerproduct``) and ``ncnn2table.cpp`` (``save_table``) of ncnn.
"""

from __future__ import annotations

import math
import pathlib

import numpy as np
import numpy.typing as npt

from postquant.passes import semantics
from postquant.pipeline.encodings.entries import EncodingNote, Entries, Fidelity, WeightEntry, symmetric_int8_scale
from postquant.pipeline.encodings.vendor import VendorEncodings, VendorTensor, read_text, wrong_file
from postquant.runtime_ops.quantizer import SMALLEST_SCALE

_WEIGHTS = "_param_0"
_LONGEST_NAME = 255 - len(_WEIGHTS)
_LARGEST_FLOAT = float(np.finfo(np.float32).max)
# A layer that ncnn2int8 converts.
_OPERATORS = frozenset({"Conv", "Gemm", "MatMul"})


def write_table(entries: Entries, path: pathlib.Path) -> tuple[int, list[EncodingNote]]:
    """Writes a table: two lines per layer.

    Args:
        entries: What the plan says.
        path: The file.

    Returns:
        How many layers it says, and what it does not say exactly; a layer that is not in the table stays float in ncnn.
    """
    notes = [note for note in entries.notes if note.fidelity is not Fidelity.LEFT_OUT]
    weights, inputs = [], []
    for entry in entries.weights:
        name = entry.node.name or ""
        numbers = _weight_numbers(entry)
        if isinstance(numbers, str) or entry.source is None:
            reason = numbers if isinstance(numbers, str) else "its input stays in float"
            notes.append(EncodingNote(name, Fidelity.LEFT_OUT, reason))
            continue
        scale, reason_or_none = symmetric_int8_scale(entry.source)
        if reason_or_none is not None:
            notes.append(EncodingNote(name, Fidelity.APPROXIMATED, f"its input: {reason_or_none}"))
        weights.append(f"{name}{_WEIGHTS} {' '.join(_number(n) for n in numbers)}")
        inputs.append(f"{name} {_number(_reciprocal(scale))}")
    path.write_text("\n".join([*weights, *inputs]) + ("\n" if weights else ""), encoding="utf-8")
    return len(weights), notes


def _weight_numbers(entry: WeightEntry) -> list[float] | str:
    """The numbers of a weight, or why ncnn cannot have it."""
    node, quantizer = entry.node, entry.quantizer
    name = node.name or ""
    if not name or len(name.encode()) > _LONGEST_NAME or any(c.isspace() for c in name) or "_param_" in name:
        return "its name is empty, too long, or holds a space or _param_"
    if node.op_type not in _OPERATORS or entry.index != 1:
        return f"ncnn has no table for {node.op_type} with this weight"
    if not quantizer.spec.signed or quantizer.zero_point.any():
        return "ncnn has weights with signed codes and zero point 0 only"
    assert node.inputs[1] is not None
    assert node.inputs[1].const_value is not None
    shape = tuple(node.inputs[1].const_value.shape.numpy())
    if node.op_type != "Conv" and len(shape) != 2:
        return "its weight is no matrix"
    _, outputs = semantics.channel_counts(node, shape)
    scales = np.broadcast_to(np.atleast_1d(quantizer.scale), (outputs,)).astype(np.float64)
    groups = int(semantics.attribute(node, "group", 1)) if node.op_type == "Conv" else 1
    if groups > 1:
        per_group = scales.reshape(groups, -1)
        if (per_group != per_group[:, :1]).any():
            return "ncnn has one scale per group, the layer one per output channel"
        scales = per_group[:, 0]
    return [_reciprocal(float(scale)) for scale in scales]


def _reciprocal(scale: float) -> float:
    """``1 / scale``, finite and not zero in float32; an all-zero channel has the step 1."""
    if scale <= float(SMALLEST_SCALE):
        return 1.0
    return min(1.0 / scale, _LARGEST_FLOAT)


def _number(value: float) -> str:
    """A float32 in the fewest digits that give it back."""
    return repr(float(np.float32(value))) if not math.isinf(value) else repr(_LARGEST_FLOAT)


def read_table(path: pathlib.Path) -> VendorEncodings:
    """Reads a table.

    Raises:
        ConfigError: If a line is not a name and numbers; the text names the line.
    """
    inputs: dict[str, VendorTensor] = {}
    weights: dict[str, VendorTensor] = {}
    skipped = []
    for count, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name, *words = line.split()
        try:
            numbers: npt.NDArray[np.float64] = np.array([float(word) for word in words], np.float64)
        except ValueError:
            raise wrong_file(path, f'line {count}: "{line[:60]}"', "a name and numbers") from None
        if not words:
            raise wrong_file(path, f'line {count}: "{line[:60]}"', "a name and numbers")
        if not (np.isfinite(numbers).all() and (numbers > 0).all()):
            skipped.append(f"{name}: a number is zero, negative or infinite")
            continue
        layer, found, _ = name.partition("_param_")
        with np.errstate(over="ignore"):
            (weights if found else inputs)[layer] = VendorTensor.symmetric(1.0 / numbers)
    return VendorEncodings("ncnn table", layer_inputs=inputs, layer_weights=weights, skipped=tuple(skipped))
