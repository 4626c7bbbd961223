"""Receivers that break one rule each: onnxruntime on a model that was changed to compute what such a receiver does.

Nothing here uses the laws of the product: quantizers are replaced by functions of standard float or int64 operators,
weights and padding are changed in the file.
"""

from __future__ import annotations

import enum
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

Feed = Mapping[str, npt.NDArray[Any]]


class Fault(enum.Enum):
    """What is wrong with a receiver; the values are the names of the product's rules."""

    HALF_AWAY = "HALF_AWAY"
    TRUNCATION = "TRUNCATION"
    FIXED_POINT = "FIXED_POINT"
    SATURATION = "SATURATION"
    PER_TENSOR = "PER_TENSOR"
    PADDING = "PADDING"
    FUSED_SUM = "FUSED_SUM"
    FLOAT_BIAS = "FLOAT_BIAS"


_HALF_AWAY = """
    d = Div (x, s)
    a = Abs (d)
    h = Constant <value_float = 0.5> ()
    t = Add (a, h)
    f = Floor (t)
    g = Sign (d)
    r = Mul (g, f)
"""
_DOWN = """
    d = Div (x, s)
    r = Floor (d)
"""
_EVEN = """
    d = Div (x, s)
    r = Round (d)
"""
_SATURATE = """
    zf = Cast <to = 1> (z)
    y = Add (r, zf)
    lo = Constant <value_float = 0.0> ()
    hi = Constant <value_float = 255.0> ()
    c = Clip (y, lo, hi)
    q = Cast <to = 2> (c)
"""
_WRAP = """
    zf = Cast <to = 1> (z)
    y = Add (r, zf)
    i = Cast <to = 7> (y)
    n = Constant <value_int = 256> ()
    m = Mod (i, n)
    q = Cast <to = 2> (m)
"""
_GEMMLOWP = """
    quotient = Div (x, unit)
    whole = Round (quotient)
    acc = Cast <to = 7> (whole)
    p = Mul (acc, m)
    none = Constant <value_int = 0> ()
    negative = Less (p, none)
    up = Constant <value_int = 1073741824> ()
    down = Constant <value_int = -1073741823> ()
    nudge = Where (negative, down, up)
    nudged = Add (p, nudge)
    two31 = Constant <value_int = 2147483648> ()
    high = Div (nudged, two31)
    size = Abs (high)
    half = Div (power, two)
    two = Constant <value_int = 2> ()
    more = Add (size, half)
    shifted = Div (more, power)
    sign = Sign (high)
    r = Mul (sign, shifted)
    zi = Cast <to = 7> (z)
    y = Add (r, zi)
    most = Constant <value_int = 255> ()
    low = Max (y, none)
    c = Min (low, most)
    q = Cast <to = 2> (c)
""".replace(
    "    half = Div (power, two)\n    two = Constant <value_int = 2> ()\n",
    "    two = Constant <value_int = 2> ()\n    half = Div (power, two)\n",
)


def dump(
    path: pathlib.Path, fault: Fault | None, samples: Sequence[Feed], names: Sequence[str], to: pathlib.Path
) -> None:
    """Runs a receiver with a fault (None: without) and writes the codes of ``names`` as ``.npy`` files."""
    model = onnx.load(path)
    if fault is not None:
        _FAULTS[fault](model)
    own = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in own)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    for index, sample in enumerate(samples):
        place = to / str(index)
        place.mkdir(parents=True)
        for name, array in zip(outputs, session.run(outputs, dict(sample)), strict=True):
            np.save(place / (name.replace("/", "_").replace(":", "_") + ".npy"), array)


def _replace_quantizers(body: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        _add_function(model, "Quantize", "x, s, z", body)
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                node.op_type, node.domain = "Quantize", "receiver"
                del node.attribute[:]

    return change


def _add_function(model: onnx.ModelProto, name: str, inputs: str, body: str) -> None:
    version = next(entry.version for entry in model.opset_import if not entry.domain)
    text = f'<domain: "receiver", opset_import: ["" : {version}]>\n{name} ({inputs}) => (q)\n{{{body}}}'
    model.functions.append(onnx.parser.parse_function(text))
    model.opset_import.append(helper.make_opsetid("receiver", 1))
    model.ir_version = max(model.ir_version, 8)


class _Graph:
    """Constants and producers of a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.made = {name: node for node in model.graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def array(self, name: str) -> npt.NDArray[Any]:
        return numpy_helper.to_array(self.constants[name])

    def add(self, name: str, array: npt.NDArray[Any]) -> str:
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def weighted(self) -> list[onnx.NodeProto]:
        """Conv and Gemm whose weights are constants behind a DequantizeLinear."""
        found = [n for n in self.model.graph.node if n.op_type in ("Conv", "Gemm")]
        return [n for n in found if n.input[1] in self.made and self.made[n.input[1]].input[0] in self.constants]

    def scales(self, node: onnx.NodeProto) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Scale of the input and of the weight."""
        x, w = self.made[node.input[0]], self.made[node.input[1]]
        return self.array(x.input[1]), self.array(w.input[1])


def _fixed_point(model: onnx.ModelProto) -> None:
    graph = _Graph(model)
    _add_function(model, "Requantize", "x, unit, m, power, z", _GEMMLOWP)
    weighted = {node.output[0]: node for node in graph.weighted()}
    for node in model.graph.node:
        source = weighted.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if source is None:
            continue
        x, w = graph.scales(source)
        unit = x.astype(np.float64) * w.astype(np.float64)
        mantissa, exponent = np.frexp(unit / float(graph.array(node.input[1])))
        assert (exponent <= 0).all(), "a multiplier above one needs a shift to the left"
        numbers: dict[str, npt.NDArray[Any]] = {
            "unit": unit.astype(np.float32),
            "m": np.rint(mantissa * 2.0**31).astype(np.int64),
            "power": (np.int64(1) << -exponent.astype(np.int64)),
        }
        shape = (-1, 1, 1) if source.op_type == "Conv" else (-1,)
        names = [
            graph.add(f"{node.name}_{key}", np.broadcast_to(array, unit.shape).reshape(shape).copy())
            for key, array in numbers.items()
        ]
        arguments = [node.input[0], *names, node.input[2]]
        del node.input[:]
        node.input.extend(arguments)
        node.op_type, node.domain = "Requantize", "receiver"


def _per_tensor(model: onnx.ModelProto) -> None:
    graph = _Graph(model)
    for node in graph.weighted():
        x, w = graph.scales(node)
        reader = graph.made[node.input[1]]
        if w.ndim == 0 or w.size < 2:
            continue
        codes = graph.array(reader.input[0])
        axis = next((a.i for a in reader.attribute if a.name == "axis"), 1)
        shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
        real = codes.astype(np.float64) * w.reshape(shape)
        again = np.clip(np.rint(real / w.max()), -128, 127).astype(codes.dtype)
        graph.constants[reader.input[0]].CopyFrom(numpy_helper.from_array(again, reader.input[0]))
        one = np.full(w.shape, w.max(), np.float32)
        graph.constants[reader.input[1]].CopyFrom(numpy_helper.from_array(one, reader.input[1]))
        if len(node.input) > 2 and node.input[2] in graph.made:
            bias = graph.made[node.input[2]]
            old, new = graph.array(bias.input[1]), np.asarray(x * one, np.float32)
            moved = np.rint(graph.array(bias.input[0]).astype(np.float64) * old / new).astype(np.int32)
            graph.constants[bias.input[0]].CopyFrom(numpy_helper.from_array(moved, bias.input[0]))
            graph.constants[bias.input[1]].CopyFrom(numpy_helper.from_array(new, bias.input[1]))


def _padding(model: onnx.ModelProto) -> None:
    graph = _Graph(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        pads = next((a for a in node.attribute if node.op_type == "Conv" and a.name == "pads" and any(a.ints)), None)
        if pads is not None:
            x = graph.made[node.input[0]]
            wrong = -float(graph.array(x.input[2])) * float(graph.array(x.input[1]))
            rank = len(pads.ints) // 2
            sizes = [0, 0, *pads.ints[:rank], 0, 0, *pads.ints[rank:]]
            names = [
                graph.add(f"{node.name}_pads", np.asarray(sizes, np.int64)),
                graph.add(f"{node.name}_value", np.asarray(wrong, np.float32)),
            ]
            nodes.append(helper.make_node("Pad", [node.input[0], *names], [f"{node.name}_padded"]))
            node.input[0] = f"{node.name}_padded"
            pads.ints[:] = [0] * len(pads.ints)
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _fused_sum(model: onnx.ModelProto) -> None:
    """A sum of a convolution reads its result before QuantizeLinear, clipped to the range that codes stand for."""
    graph = _Graph(model)
    convolutions = {node.output[0] for node in graph.weighted()}
    for node in [node for node in model.graph.node if node.op_type == "Add"]:
        for index, name in enumerate(node.input):
            quantizer = graph.made.get(graph.made[name].input[0]) if name in graph.made else None
            if quantizer is None or quantizer.op_type != "QuantizeLinear" or quantizer.input[0] not in convolutions:
                continue
            scale, zero = (graph.array(key) for key in quantizer.input[1:])
            bounds = (np.array([0, 255], np.float32) - np.float32(zero)) * scale
            names = [graph.add(f"{node.name}_bound{k}", np.asarray(b, np.float32)) for k, b in enumerate(bounds)]
            clip = helper.make_node("Clip", [quantizer.input[0], *names], [f"{node.name}_{index}_wide"])
            node.input[index] = clip.output[0]
            at = next(k for k, other in enumerate(model.graph.node) if other.name == node.name)
            model.graph.node.insert(at, clip)
            break  # one of two convolutions has the sum; the other one's result is in memory


def _float_bias(model: onnx.ModelProto) -> None:
    """A Max of one value in front of a layer, behind which onnxruntime leaves float biases alone."""
    for node in _Graph(model).weighted():
        copy = helper.make_node("Max", [node.input[0]], [f"{node.name}_input"])
        node.input[0] = copy.output[0]
        at = next(k for k, other in enumerate(model.graph.node) if other.name == node.name)
        model.graph.node.insert(at, copy)


_FAULTS: Mapping[Fault, Callable[[onnx.ModelProto], None]] = {
    Fault.HALF_AWAY: _replace_quantizers(_HALF_AWAY + _SATURATE),
    Fault.TRUNCATION: _replace_quantizers(_DOWN + _SATURATE),
    Fault.FIXED_POINT: _fixed_point,
    Fault.SATURATION: _replace_quantizers(_EVEN + _WRAP),
    Fault.PER_TENSOR: _per_tensor,
    Fault.PADDING: _padding,
    Fault.FUSED_SUM: _fused_sum,
    Fault.FLOAT_BIAS: _float_bias,
}
assert TensorProto.UINT8 == 2
