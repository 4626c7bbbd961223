"""A backend as data: what it quantizes, in which formats, and what it keeps in float (:class:`Target`).

A target is a TOML file, so that another backend needs no code. Keys that are not known are errors, because an option
that is read by nobody would silently produce a model that the backend does not run. A file may start from another
one (``extends = "onnxruntime"``) and name only what differs: tables merge, everything else replaces.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.resources
import os
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

from postquant.passes.target_table import TargetTable
from postquant.runtime_ops.errors import ConfigError
from postquant.runtime_ops.spec import QuantSpec

_BITS = (*range(2, 9), 16)


class Role(enum.Enum):
    """What a backend does with an operator type.

    * ``WEIGHTED``: multiplies activations by weights (or by activations) in an integer kernel.
    * ``ELEMENTWISE``: an integer kernel with its own output scale; used where it lies between integer tensors.
    * ``RANGE``: clips; the saturation of its output's quantizer stands for it.
    * ``PASS_THROUGH``: moves values; runs on codes with its input's scale.
    """

    WEIGHTED = "weighted"
    ELEMENTWISE = "elementwise"
    RANGE = "range"
    PASS_THROUGH = "pass_through"


class ConcatScales(enum.Enum):
    """Whether the inputs of a Concat keep their own scales or share the output's."""

    OWN = "own"
    SHARED = "shared"


class WeightStorage(enum.Enum):
    """Container of weight codes of 4 and fewer bits.

    * ``INT8``: one per byte, as plain QDQ; integer kernels everywhere.
    * ``INT4``: ONNX's packed INT4, for uniform codes.
    * ``PACKED``: packed, in operators of ``ai.postquant``, which have function bodies; ``INT8`` where there is none.
    """

    INT8 = "int8"
    INT4 = "int4"
    PACKED = "packed"


@dataclasses.dataclass(frozen=True)
class TensorFormat:
    """Formats that a backend has for one kind of tensor.

    Attributes:
        bits: Widths that exist.
        signed: Whether codes are signed.
        symmetric: Whether zero points are fixed.
        narrow: Whether the most negative code is left out.
        per_channel: Whether weights have a scale per output channel.
        power_of_two: Whether scales are powers of two.
        left_signed: Whether a constant left operand of MatMul is signed.
        max_bits: Widest width that is safe on this hardware; wider requests are lowered to it, and noted.
        max_bits_reason: Why, for the note.
    """

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    signed: bool = False
    symmetric: bool = False
    narrow: bool = False
    per_channel: bool = False
    power_of_two: bool = False
    left_signed: bool = True
    max_bits: int = 16
    max_bits_reason: str = ""

    def spec(
        self, bits: int, *, axis: int | None = None, symmetric: bool | None = None, left: bool = False
    ) -> QuantSpec:
        """The format of a tensor of ``bits`` bits.

        Args:
            bits: One of :attr:`bits`.
            axis: Channel axis; ignored by a format without scales per channel.
            symmetric: Overrides :attr:`symmetric`.
            left: Whether it is the constant left operand of a MatMul.

        Raises:
            ConfigError: If the backend has no such width.
        """
        if bits not in self.bits:
            raise ConfigError(
                "the target has no such bit width",
                expected=f"one of {', '.join(map(str, self.bits))}",
                found=str(bits),
            )
        signed = self.signed and (self.left_signed or not left)
        return QuantSpec(
            bits=bits,
            signed=signed,
            symmetric=self.symmetric if symmetric is None else symmetric,
            axis=axis if self.per_channel else None,
            narrow=self.narrow and signed,
            power_of_two=self.power_of_two,
        )


@dataclasses.dataclass(frozen=True)
class OpRule:
    """What the backend does with one operator type.

    Attributes:
        role: See :class:`Role`.
        inputs: Indices of the activation (or weight) inputs that are quantized; None for all of them.
        output_quantized: Whether the integer kernel exists only with a quantized output.
        accumulates: Whether an element-wise operator is the end of a convolution's kernel, which adds the other input
            before anything rounds: the result of the convolution is not stored then.
    """

    role: Role
    inputs: tuple[int, ...] | None = None
    output_quantized: bool = True
    accumulates: bool = False


@dataclasses.dataclass(frozen=True)
class Target:
    """One backend.

    Attributes:
        name: As written on the command line.
        description: One line for people.
        min_opset: Smallest opset of the emitted model.
        activations: Formats of activations.
        weights: Formats of weights.
        int32_bias: Whether biases become int32 with scale ``s_x * s_w``.
        concat_scales: How a Concat starts; calibration may change it for one Concat.
        weight_storage: Container of weights of 4 and fewer bits.
        integer_clips: Whether the backend runs Clip on codes; where not, Relu and Clip stay in front of their quantizer
            unless its saturation alone stands for them.
        ops: Operator type -> rule; every other type stays in float.
        float_reasons: Operator type -> why it stays in float, for the report.
    """

    name: str
    description: str
    min_opset: int
    activations: TensorFormat
    weights: TensorFormat
    int32_bias: bool
    concat_scales: ConcatScales
    weight_storage: WeightStorage
    integer_clips: bool
    ops: Mapping[str, OpRule]
    float_reasons: Mapping[str, str]


def load_target(target: str | os.PathLike[str]) -> Target:
    """Reads a target: the name of a built-in one, or the path of a TOML file.

    Raises:
        ConfigError: If there is no such target, or the file is wrong.
    """
    return parse_target(_read(target), where=os.fspath(target))


def target_files(target: str | os.PathLike[str]) -> tuple[pathlib.Path, ...]:
    """The files that a target is read from, those that it extends included; none for a built-in one.

    Raises:
        ConfigError: As for :func:`load_target`.
    """
    name, found = os.fspath(target), list[pathlib.Path]()
    while name not in builtin_targets():
        found.append(pathlib.Path(name))
        base = _base(name, _parsed(name))
        if base is None:
            break
        if base in map(os.fspath, found):
            raise _circle((*map(os.fspath, found), base))
        name = base
    return tuple(found)


def builtin_targets() -> tuple[str, ...]:
    """Names of the targets that ship with the package."""
    return tuple(sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml")))


def _folder() -> Any:
    return importlib.resources.files("postquant.pipeline").joinpath("targets")


def _read(target: str | os.PathLike[str], seen: tuple[str, ...] = ()) -> dict[str, Any]:
    name = os.fspath(target)
    if name in seen:
        raise _circle((*seen, name))
    data = _parsed(name)
    base = _base(name, data)
    data.pop("extends", None)
    return data if base is None else _merged(_read(base, (*seen, name)), data)


def _parsed(name: str) -> dict[str, Any]:
    """The tables of one target."""
    if name in builtin_targets():
        text = _folder().joinpath(f"{name}.toml").read_text(encoding="utf-8")
    else:
        path = pathlib.Path(name)
        if path.suffix != ".toml" or not path.is_file():
            raise ConfigError(
                "there is no such target",
                where="target",
                expected=f"{', '.join(builtin_targets())}, or the path of a .toml file",
                found=f'"{name}"',
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("the target file cannot be read", where=name, found=str(error)) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("the target file is not TOML", where=name, found=str(error)) from error


def _base(name: str, data: Mapping[str, Any]) -> str | None:
    """What a target extends: a name, or the path of a file."""
    base = data.get("extends")
    if base is None:
        return None
    if not isinstance(base, str):
        raise ConfigError("a key of the target file is wrong", where=f"{name}: extends", expected="a target's name")
    # A file is relative to the one that names it.
    return os.fspath(pathlib.Path(name).parent / base) if base.endswith(".toml") else base


def _circle(names: tuple[str, ...]) -> ConfigError:
    return ConfigError("target files extend each other in a circle", where=" -> ".join(names))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        both_tables = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both_tables else value
    return result


def parse_target(data: Mapping[str, Any], *, where: str = "target") -> Target:
    """Builds a target from parsed TOML.

    Args:
        data: The tables, ``extends`` already resolved.
        where: Name of the file for error messages.

    Raises:
        ConfigError: If a key is unknown or missing, or a value is wrong; the text names it.
    """
    top = TargetTable(data, where)
    ops: dict[str, OpRule] = {}
    for op_type, rule in top.table("ops").items():
        entry = TargetTable({"role": rule} if isinstance(rule, str) else rule, f"{where}: ops.{op_type}")
        role = entry.choice("role", Role)
        inputs = entry.integers("inputs", None, range(16))
        ops[op_type] = OpRule(
            role,
            inputs,
            entry.flag("output_quantized", role is not Role.PASS_THROUGH),
            entry.flag("accumulates", False),
        )
        if ops[op_type].accumulates and role is not Role.ELEMENTWISE:
            raise ConfigError("only an element-wise operator accumulates", where=f"{where}: ops.{op_type}")
        entry.finish()
    reasons = top.table("float", {})
    for op_type, reason in reasons.items():
        if not isinstance(reason, str):
            raise ConfigError("a key of the target file is wrong", where=f"{where}: float.{op_type}", expected="text")
        ops.pop(op_type, None)  # so that a file can take an operator out of the one that it extends
    target = Target(
        name=top.text("name"),
        description=top.text("description"),
        min_opset=top.integer("min_opset", range(10, 100)),
        activations=_format(top.table("activations"), f"{where}: activations"),
        weights=_format(top.table("weights"), f"{where}: weights"),
        int32_bias=top.choice("bias", _Bias) is _Bias.INT32,
        concat_scales=top.choice("concat_scales", ConcatScales),
        weight_storage=top.choice("weight_storage", WeightStorage),
        integer_clips=top.flag("integer_clips", True),
        ops=ops,
        float_reasons=dict(reasons),
    )
    top.finish()
    return target


class _Bias(enum.Enum):
    INT32 = "int32"
    FLOAT = "float"


def _format(data: Mapping[str, Any], where: str) -> TensorFormat:
    table = TargetTable(data, where)
    result = TensorFormat(
        bits=table.integers("bits", (2, 3, 4, 5, 6, 7, 8), _BITS) or (),
        signed=table.flag("signed"),
        symmetric=table.flag("symmetric"),
        narrow=table.flag("narrow", False),
        per_channel=table.flag("per_channel", False),
        power_of_two=table.flag("power_of_two", False),
        left_signed=table.flag("left_signed", True),
        max_bits=table.integer("max_bits", _BITS, 16),
        max_bits_reason=table.text("max_bits_reason", ""),
    )
    table.finish()
    if result.narrow and not (result.signed and result.symmetric):
        raise ConfigError("only signed symmetric codes have a narrow range", where=where)
    return result
