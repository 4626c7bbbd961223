"""A C header with everything that an integer engine needs: codes, tables, biases, multipliers and shifts.

:mod:`postquant.pipeline.encodings.fixed_layer` says what the numbers mean. The header needs nothing but ``stdint.h``;
``fixed_point_layer.c`` beside it runs any of its layers. Weights of 8 bits are one code per byte. Narrower ones are
packed, the first code in the lowest bits of a byte, and ``table`` says what a pattern stands for: two's complement for
uniform codes (TFLite's and CMSIS-NN's int4), the levels of the code book otherwise.

Weights lie as TFLite has them: (output, row, column, input), and (row, column, output) of a depthwise layer.

Sources: TensorFlow's ``lite/kernels/internal/reference/integer_ops/conv.h`` and ``quantization_util.cc``; CMSIS-NN's
``arm_convolve_s8`` and ``arm_nn_requantize``.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import pathlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from postquant.passes.plan import QuantPlan
from postquant.pipeline.encodings.entries import EncodingNote, Entries, Fidelity
from postquant.pipeline.encodings.fixed_layer import FixedLayer, NoFixedFormError, fixed_layer

PROGRAM = "fixed_point_layer.c"
# More weights would make a text that compilers choke on.
LARGEST_WEIGHTS = 1 << 24
_PER_LINE = 24

_DECLARATIONS = """\
#ifndef POSTQUANT_FIXED_POINT_H
#define POSTQUANT_FIXED_POINT_H

#include <stdint.h>

enum { PQ_OHWI = 0, PQ_HWC = 1 };

typedef struct {
    const char *name;
    int layout;                 /* of the weights: PQ_OHWI, or PQ_HWC for a depthwise layer */
    int weight_bits;            /* 8, or 4 or 2: indices of table, the first one in the lowest bits of a byte */
    int32_t in_channels, out_channels, groups;
    int32_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
    int32_t pad_top, pad_left, pad_bottom, pad_right;
    int32_t input_offset;       /* added to an int8 input code */
    int32_t output_offset;      /* added to a requantized sum */
    int32_t activation_min, activation_max;
    const uint8_t *weights;     /* the bytes of int8 codes where weight_bits is 8 */
    const int8_t *table;        /* NULL where weight_bits is 8 */
    const int32_t *bias, *multiplier, *shift;   /* one per output channel */
    double input_scale, output_scale;           /* real value of one step, for information */
} pq_layer;
"""


def write_header(entries: Entries, plan: QuantPlan, path: pathlib.Path) -> tuple[int, list[EncodingNote]]:
    """Writes the header, and the program that runs its layers beside it.

    Args:
        entries: What the plan says.
        plan: The plan.
        path: The header.

    Returns:
        How many layers it has, and which it has not.
    """
    # A layer's input codes are the requantized ones; who makes them is not in the header.
    caller = "the quantization of its input for this layer only is left to the caller"
    notes = [dataclasses.replace(n, reason=caller) if n.fidelity is Fidelity.LEFT_OUT else n for n in entries.notes]
    layers = []
    total = 0
    for entry in entries.weights:
        name = entry.node.name or ""
        try:
            layer = fixed_layer(entry, plan)
        except NoFixedFormError as reason:
            notes.append(EncodingNote(name, Fidelity.LEFT_OUT, str(reason)))
            continue
        total += layer.weights.size
        if total > LARGEST_WEIGHTS:
            notes.append(EncodingNote(name, Fidelity.LEFT_OUT, f"the header holds at most {LARGEST_WEIGHTS} weights"))
            total -= layer.weights.size
        else:
            layers.append(layer)
    if layers:
        path.write_text(_header(layers), encoding="ascii")
        program = importlib.resources.files("postquant.pipeline.encodings").joinpath(PROGRAM)
        path.with_name(PROGRAM).write_bytes(program.read_bytes())
    return len(layers), notes


def _header(layers: list[FixedLayer]) -> str:
    parts = [_DECLARATIONS]
    for number, layer in enumerate(layers):
        prefix = f"pq_{number}"
        parts.append(_array("uint8_t", f"{prefix}_weights", _bytes(layer)))
        if layer.table is not None:
            parts.append(_array("int8_t", f"{prefix}_table", layer.table))
        numbers = (("bias", layer.bias), ("multiplier", layer.multiplier), ("shift", layer.shift))
        parts.extend(_array("int32_t", f"{prefix}_{field}", values) for field, values in numbers)
    parts.append(f"#define PQ_LAYER_COUNT {len(layers)}u\n")
    rows = ",\n".join(_row(number, layer) for number, layer in enumerate(layers))
    parts.append(f"static const pq_layer pq_layers[PQ_LAYER_COUNT] = {{\n{rows}\n}};\n")
    parts.append("#endif\n")
    return "\n".join(parts)


def _bytes(layer: FixedLayer) -> npt.NDArray[np.uint8]:
    """The weights as they are stored."""
    if layer.bits == 8:
        return layer.packed.astype(np.int8).view(np.uint8)
    per_byte = 8 // layer.bits
    codes = layer.packed.astype(np.uint8)
    codes = np.concatenate([codes, np.zeros(-codes.size % per_byte, np.uint8)]).reshape(-1, per_byte)
    shifts = (np.arange(per_byte) * layer.bits).astype(np.uint8)
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(codes << shifts, axis=1).astype(np.uint8)
    return packed


def _array(kind: str, name: str, values: npt.NDArray[np.integer]) -> str:
    numbers = [_int32(value) if kind == "int32_t" else str(value) for value in values.tolist()]
    lines = (",".join(numbers[start : start + _PER_LINE]) for start in range(0, len(numbers), _PER_LINE))
    return f"static const {kind} {name}[{len(numbers)}] = {{\n" + ",\n".join(lines) + "\n};\n"


def _int32(value: int) -> str:
    """A literal; the smallest int32 is no literal in C."""
    return "(-2147483647 - 1)" if value == -(2**31) else str(value)


def _row(number: int, layer: FixedLayer) -> str:
    geometry, prefix = layer.geometry, f"pq_{number}"
    fields: Iterable[object] = (
        _string(layer.name),
        "PQ_HWC" if layer.depthwise else "PQ_OHWI",
        layer.bits,
        layer.in_channels,
        layer.bias.size,
        geometry.groups,
        *geometry.kernel,
        *geometry.strides,
        *geometry.dilations,
        *geometry.pads,
        layer.input_offset,
        layer.output_offset,
        layer.low,
        layer.high,
        f"{prefix}_weights",
        "0" if layer.table is None else f"{prefix}_table",
        f"{prefix}_bias",
        f"{prefix}_multiplier",
        f"{prefix}_shift",
        repr(layer.input_scale),
        repr(layer.output_scale),
    )
    return "    {" + ", ".join(str(field) for field in fields) + "}"


def _string(text: str) -> str:
    r"""A C string literal.

    >>> print(_string('a/"b"'))
    "a/\042b\042"
    """
    plain = "".join(
        chr(byte) if chr(byte).isalnum() or chr(byte) in "_./-: " else f"\\{byte:03o}" for byte in text.encode() if byte
    )
    return f'"{plain}"'
