"""What a quantized tensor looks like, without any numbers: :class:`QuantSpec`.

A ``b``-bit code ``q`` is an integer in ``[qmin, qmax]``; the real value that it stands for is
``(q - zero_point) * scale``.

| signed | narrow | qmin           | qmax           | example                                   |
|--------|--------|----------------|----------------|-------------------------------------------|
| no     | no     | 0              | 2^b - 1        | activations                               |
| yes    | no     | -2^(b-1)       | 2^(b-1) - 1    | signed activations                        |
| yes    | yes    | -(2^(b-1) - 1) | 2^(b-1) - 1    | weights; EasyQuant's INT7 is -63 .. 63    |

Codes of fewer than 8 bits are stored in 8-bit containers (onnxruntime then runs integer kernels) or,
on request, in ONNX's INT4 / UINT4.

A weight with a code book (:mod:`postquant.runtime_ops.code_book`) has ``2^b`` values, which are int8 levels in units of
its scale. What is called its codes in Python are these levels: they are an int8 weight's codes, in ``[-128, 127]``.
An activation with a code book has ``2^b`` of the codes of 8 bits, in ``[0, 255]``.
"""

from __future__ import annotations

import dataclasses
import enum

from postquant.runtime_ops.code_book import CODE_BITS, MOST_LEVEL_BITS, CodeBook


class Rounding(enum.Enum):
    """How ``x / scale`` becomes an integer (ONNX QuantizeLinear: half to even)."""

    HALF_EVEN = "half_even"
    HALF_AWAY = "half_away"


@dataclasses.dataclass(frozen=True, slots=True)
class QuantSpec:
    """The format of one quantized tensor. An invalid combination cannot be built.

    Attributes:
        bits: Width of a code: 2 to 8, or 16.
        signed: Whether codes are signed.
        symmetric: Whether the zero point is fixed (0 when signed, the middle code when unsigned).
        axis: Channel axis that has its own scale, or None for one scale per tensor.
        narrow: Whether the most negative code is left out, so that the range is symmetric.
        power_of_two: Whether scales are restricted to powers of two.
        rounding: How ties are rounded.
        code_book: Which values exist; other books than the uniform one are for signed symmetric weights of 2 or 4 bits,
            the learned one also for unsigned activations of at most 4 bits.

    Raises:
        ValueError: If the combination does not exist.
    """

    bits: int
    signed: bool
    symmetric: bool
    axis: int | None = None
    narrow: bool = False
    power_of_two: bool = False
    rounding: Rounding = Rounding.HALF_EVEN
    code_book: CodeBook = CodeBook.UNIFORM

    def __post_init__(self) -> None:
        if self.bits not in (*range(2, 9), 16):
            raise ValueError(f"bits must be 2 to 8 or 16, not {self.bits}")
        if self.narrow and not (self.signed and self.symmetric):
            raise ValueError("a narrow range exists only for signed symmetric codes")
        if self.axis is not None and not self.symmetric:
            raise ValueError("scales per channel are symmetric: onnxruntime fuses nothing else")
        if self.has_table and self.signed and not (self.bits in CODE_BITS and self.symmetric):
            raise ValueError("a code book of signed codes exists only for symmetric ones of 2 or 4 bits")
        if self.has_table and not self.signed:
            plain = self.axis is None and not self.symmetric and not self.power_of_two
            if self.code_book is not CodeBook.LEARNED or self.bits > MOST_LEVEL_BITS or not plain:
                raise ValueError("a code book of unsigned codes is learned, has at most 4 bits and one free scale")

    @property
    def has_table(self) -> bool:
        """Whether codes are int8 levels of a table."""
        return self.code_book is not CodeBook.UNIFORM

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if not self.signed:
            return 0
        if self.has_table:
            return -128
        return -(1 << (self.bits - 1)) + (1 if self.narrow else 0)

    @property
    def qmax(self) -> int:
        """Largest code."""
        if self.has_table:
            return 127 if self.signed else 255
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def container(self) -> str:
        """NumPy dtype in which codes are kept: int8, uint8, int16 or uint16."""
        return f"{'' if self.signed else 'u'}int{16 if self.bits == 16 else 8}"

    @property
    def fills_container(self) -> bool:
        """Whether saturation to the container is saturation to ``[qmin, qmax]``."""
        return self.has_table or (self.bits in (8, 16) and not self.narrow)

    def to_json(self) -> dict[str, object]:
        """The spec as JSON values; :meth:`from_json` reads it back."""
        return {
            "bits": self.bits,
            "signed": self.signed,
            "symmetric": self.symmetric,
            "axis": self.axis,
            "narrow": self.narrow,
            "power_of_two": self.power_of_two,
            "rounding": self.rounding.value,
            "code_book": self.code_book.value,
        }

    @classmethod
    def from_json(cls, data: dict[str, object]) -> QuantSpec:
        """The inverse of :meth:`to_json`."""
        values = dict(data)
        values["rounding"] = Rounding(values["rounding"])
        values["code_book"] = CodeBook(
            values.get("code_book", CodeBook.UNIFORM.value)
        )  # plans of version 0.1 have none
        return cls(**values)  # type: ignore[arg-type]
