"""The mistakes that integer receivers make, as laws of their own: :func:`variants`.

Each variant says which codes a receiver would get from the same inputs if it broke one rule. What is right::

    d = requantized sum or value, in codes, from the zero point        code = saturate(round_half_even(d) + z)

| rule | what the receiver does instead |
|---|---|
| half away | ties go away from zero, or up |
| tie parity | ties go to the even distance from the zero point where they belong to the even code, or the reverse |
| truncation | ``floor(d)``, or toward zero |
| fixed point | int32 multiplier and shift: gemmlowp's double rounding, one rounding, a 16-bit multiplier |
| saturation | codes wrap around, or are not limited to the range of the format or of the activation function |
| per tensor | one weight scale for all output channels |
| padding | borders of a convolution are filled with the code 0 instead of the zero point |
| zero point | the zero point of the input or of the output is left out |
| bias | the bias is left out |
| float bias | a float bias is added as it is, where onnxruntime rounds it to int32 |
| fused sum | a result is added without being rounded first (:mod:`postquant.pipeline.conformance.fused`) |
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from postquant.pipeline.simulate import Group
from postquant.runtime_ops.integer import Affine, Prediction
from postquant.runtime_ops.kernel_laws import Operand
from postquant.runtime_ops.law import along_axis
from postquant.runtime_ops.law_conv import ConvAttributes, conv_sums
from postquant.runtime_ops.law_matmul import matmul_sums

Codes = npt.NDArray[np.int64]


class Rule(enum.Enum):
    """A rule that a receiver may break; the value is what reports call it."""

    HALF_AWAY = "half away from zero instead of half to even"
    TIE_PARITY = "ties to another even number"
    TRUNCATION = "truncation instead of rounding"
    FIXED_POINT = "fixed-point multiplier"
    SATURATION = "missing saturation"
    PER_TENSOR = "per-tensor instead of per-channel weights"
    PADDING = "padding with the wrong value"
    ZERO_POINT = "zero point left out"
    BIAS = "bias left out"
    FLOAT_BIAS = "float bias added as it is"
    FUSED_SUM = "rounding left out before a fused sum"


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One tensor on one sample, as the law computes it from the receiver's own codes.

    Attributes:
        group: Operator and operands, None where there is no single one.
        out: Numbers of the tensor.
        raw: The law in front of the clips of the float model and of the format.
        limited: The law behind them.
        low: Smallest code behind the clips.
        high: Largest code behind the clips.
        opset: Version of the standard operators.
    """

    group: Group | None
    out: Affine
    raw: Prediction
    limited: Prediction
    low: int
    high: int
    opset: int

    def saturated(self, codes: npt.NDArray[Any]) -> Codes:
        """Codes within the bounds of the tensor."""
        return np.asarray(np.clip(codes, self.low, self.high), np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """What a receiver would get that breaks ``rule`` in the way that ``detail`` says."""

    rule: Rule
    detail: str
    codes: Codes


def variants(site: Site) -> Iterator[Variant]:
    """All variants that exist for a tensor, one at a time."""
    yield from _roundings(site)
    yield from _saturations(site)
    if site.group is None:
        return
    sums = accumulator(site.group)
    if sums is not None:
        yield from _fixed_points(site, sums)
    yield from _other_operands(site, site.group)


def _roundings(site: Site) -> Iterator[Variant]:
    zero = float(site.out.zero_point)
    value = site.raw.value.astype(np.float64)
    distance = value - zero
    # The law's own codes stand where there is no tie: adding the zero point may have made a tie of a near one.
    tie = np.abs(distance - np.floor(distance) - 0.5) < 1e-9
    lawful = site.raw.codes.astype(np.int64)
    away = np.where(tie, np.copysign(np.floor(np.abs(distance) + 0.5), distance) + zero, lawful)
    up = np.where(tie, np.floor(distance + 0.5) + zero, lawful)
    yield Variant(Rule.HALF_AWAY, "ties away from zero", site.saturated(away))
    yield Variant(Rule.HALF_AWAY, "ties up", site.saturated(up))
    for name, codes in (("distance", np.rint(distance) + zero), ("code", np.rint(value))):
        yield Variant(Rule.TIE_PARITY, f"ties to the even {name}", site.saturated(np.where(tie, codes, lawful)))
    # A value a rounding error below a whole number is that number.
    slack = np.asarray(site.raw.slack, np.float64)
    whole = np.rint(distance)
    near = np.abs(distance - whole) <= slack
    yield Variant(Rule.TRUNCATION, "down", site.saturated(np.where(near, whole, np.floor(distance)) + zero))
    yield Variant(Rule.TRUNCATION, "toward zero", site.saturated(np.where(near, whole, np.trunc(distance)) + zero))


def _saturations(site: Site) -> Iterator[Variant]:
    distance = site.raw.value.astype(np.float64) - float(site.out.zero_point)
    free = np.rint(np.clip(distance, -(2.0**31), 2.0**31 - 1)).astype(np.int64) + int(site.out.zero_point)
    size = site.out.high - site.out.low + 1
    yield Variant(Rule.SATURATION, "codes wrap around", (free - site.out.low) % size + site.out.low)
    limits = np.clip(free, site.low, site.high)
    wide = np.where((free < site.out.low) | (free > site.out.high), (free - site.out.low) % size + site.out.low, limits)
    yield Variant(Rule.SATURATION, "codes beyond the container wrap around", wide)
    if (site.low, site.high) != (site.out.low, site.out.high):
        yield Variant(
            Rule.SATURATION,
            "codes are not limited to the range of the format or activation function",
            np.clip(free, site.out.low, site.out.high),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Accumulator:
    """Exact integer sums of an operator, and what turns them into codes.

    Attributes:
        sums: int64, the bias included.
        scale: () or (C,) real value of one, along ``axis``.
        axis: Axis of the output channels.
    """

    sums: Codes
    scale: npt.NDArray[np.float64]
    axis: int


def accumulator(group: Group) -> Accumulator | None:
    """The integer sums of a Conv, Gemm, MatMul or GlobalAveragePool; None for others and for float inputs."""
    x = group.operands[0] if group.operands else None
    if x is None or x.codes is None:
        return None
    codes, numbers = x.pair
    if group.op_type == "GlobalAveragePool":
        centered = numbers.centered(codes).astype(np.int64)
        points = math.prod(codes.shape[2:])
        sums = centered.sum(tuple(range(2, codes.ndim)), keepdims=True)
        return Accumulator(sums, np.asarray(numbers.scale, np.float64) / points, 1)
    w = group.operands[1] if len(group.operands) > 1 else None
    if group.op_type not in ("Conv", "Gemm", "MatMul") or w is None or w.codes is None:
        return None
    weight, own = w.pair
    left, right = numbers.centered(codes), own.centered(weight)
    scale = np.asarray(numbers.scale, np.float64) * np.asarray(own.scale, np.float64)
    if group.op_type == "Conv":
        products = conv_sums(left, right, ConvAttributes.of(group.attributes, weight.shape[2:], codes.shape[2:]))
        axis = 1
    else:
        left = left.T if group.attributes.get("transA") else left
        right = right.T if group.attributes.get("transB") else right
        products = matmul_sums(left, right)
        axis = products.ndim - 1
    sums = products.astype(np.int64)
    bias = group.operands[2] if len(group.operands) > 2 else None
    if bias is not None:
        integer = bias.codes
        if integer is None:
            integer = np.rint(np.asarray(bias.real, np.float64) / scale)
        sums = sums + along_axis(np.asarray(integer, np.int64), sums.ndim, axis if np.ndim(integer) == 1 else None)
    return Accumulator(sums, scale, axis)


def _fixed_points(site: Site, total: Accumulator) -> Iterator[Variant]:
    factor = np.asarray(total.scale / float(site.out.scale), np.float64)
    mantissa, exponent = np.frexp(factor)
    axis = total.axis if factor.ndim else None
    shape = total.sums.ndim
    for bits, name in ((31, "int32"), (15, "16-bit")):
        multiplier = np.rint(mantissa * 2.0**bits).astype(np.int64)
        # x * multiplier * 2^(exponent - bits); exponent <= 0 is a shift to the right.
        m, e = along_axis(multiplier, shape, axis), along_axis(exponent.astype(np.int64), shape, axis)
        shifted = total.sums << np.maximum(e, 0)
        product = shifted * m
        right = np.maximum(-e, 0)
        for detail, codes in (
            ("rounded twice", _shift_away(_shift_up(product, np.int64(bits)), right)),
            ("rounded once", _shift_up(product, bits + right)),
            ("rounded down", product >> (bits + right)),
        ):
            text = f"{name} multiplier and shift, {detail}"
            yield Variant(Rule.FIXED_POINT, text, site.saturated(codes + int(site.out.zero_point)))


def _shift_up(x: Codes, bits: Any) -> Codes:
    """``x / 2^bits``, ties up: gemmlowp's doubling high multiplication, which rounds in the same way."""
    half = np.where(np.asarray(bits) > 0, np.int64(1) << np.maximum(np.asarray(bits) - 1, 0), 0)
    return np.asarray((x + half) >> bits, np.int64)


def _shift_away(x: Codes, bits: Any) -> Codes:
    """``x / 2^bits``, ties away from zero: gemmlowp's rounding shift."""
    return np.asarray(np.sign(x) * _shift_up(np.abs(x), bits), np.int64)


def _other_operands(site: Site, group: Group) -> Iterator[Variant]:
    """The same law on operands that a receiver gets wrong."""
    if group.op_type not in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
        return
    operands = list(group.operands)
    x, w = operands[0], operands[1]
    if x is None or w is None or x.codes is None or w.codes is None:
        return
    (codes, numbers), (weight, own) = x.pair, w.pair
    bias = operands[2] if len(operands) > 2 else None
    for detail, other, scale in _one_scale(weight, own):
        wrong = [x, other, _same_bias(bias, numbers, own, scale)]
        yield from _law(site, group, Rule.PER_TENSOR, detail, wrong[: len(operands)])
    if numbers.zero_point.any():
        plain = Operand(codes, dataclasses.replace(numbers, zero_point=np.zeros_like(numbers.zero_point)))
        yield from _law(site, group, Rule.ZERO_POINT, "of the input", [plain, *operands[1:]])
        padded = _padded(group, codes)
        if padded is not None:
            attributes = {k: v for k, v in group.attributes.items() if k not in ("pads", "auto_pad")}
            wide = dataclasses.replace(group, attributes=attributes)
            yield from _law(site, wide, Rule.PADDING, "the code 0", [Operand(padded, numbers), *operands[1:]])
    if bias is not None:
        yield from _law(site, group, Rule.BIAS, "", [x, w, None])
        if bias.rounded_from is not None:
            yield from _law(site, group, Rule.FLOAT_BIAS, "", [x, w, Operand(plain=bias.rounded_from)])
    if int(site.out.zero_point):
        free = site.raw.codes.astype(np.int64) - int(site.out.zero_point)
        yield Variant(Rule.ZERO_POINT, "of the output", site.saturated(free))


def _law(site: Site, group: Group, rule: Rule, detail: str, operands: list[Operand | None]) -> Iterator[Variant]:
    prediction = dataclasses.replace(group, operands=tuple(operands)).law(site.out, site.opset)
    if prediction is not None and prediction.codes.shape == site.raw.codes.shape:
        yield Variant(rule, detail, site.saturated(prediction.codes))


def _one_scale(weight: npt.NDArray[np.integer], own: Affine) -> Iterator[tuple[str, Operand, npt.NDArray[np.float32]]]:
    """The weight with one scale for all channels: name, operand, scale."""
    if own.scale.ndim == 0 or own.scale.size < 2:
        return
    largest = np.asarray(own.scale.max(), np.float32)
    zero = np.zeros((), np.int32)
    one = Affine(largest, zero, own.dtype)
    requantized = np.clip(np.rint(own.real(weight) / largest), own.low, own.high).astype(own.dtype)
    yield "weights quantized again with the largest scale", Operand(requantized, one), largest
    for detail, scale in (("first", own.scale[0]), ("largest", own.scale.max())):
        number = np.asarray(scale, np.float32)
        yield f"the {detail} channel's scale for all channels", Operand(weight, Affine(number, zero, own.dtype)), number


def _same_bias(bias: Operand | None, x: Affine, w: Affine, scale: npt.NDArray[np.float32]) -> Operand | None:
    """A bias of the same real value for another weight scale."""
    if bias is None or bias.codes is None or bias.numbers is None:
        return bias
    step = np.asarray(x.scale * scale, np.float32)
    codes = np.rint(bias.real.astype(np.float64) / float(step)).astype(np.int32)
    return Operand(codes, Affine(step, np.zeros((), np.int32), np.dtype(np.int32)))


def _padded(group: Group, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.integer] | None:
    """The input of a convolution with its borders filled with the code 0; None without padding."""
    w = group.operands[1]
    if group.op_type != "Conv" or w is None or w.codes is None:
        return None
    pads = ConvAttributes.of(group.attributes, w.codes.shape[2:], codes.shape[2:]).pads
    if not any(n for pair in pads for n in pair):
        return None
    return np.pad(codes, [(0, 0), (0, 0), *pads])
