"""What a quantized network may cost or must reach, as it is written: :class:`Budget`, ``size=0.14x``.

| written            | means                                                                            |
|--------------------|----------------------------------------------------------------------------------|
| ``size=0.14x``     | a file of at most 0.14 times the float model's bytes                             |
| ``size=2MB``       | a file of at most so many bytes                                                  |
| ``bitops=0.25x``   | at most that part of the bit operations with 8 bits everywhere                   |
| ``bitops=3e9``     | at most so many: the sum over layers of multiply-accumulates * wbits * abits     |
| ``sqnr=30``        | outputs of at least 30 dB, in a file as small as that allows                     |
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re

_UNITS = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30}
EXAMPLES = '"size=0.14x", "size=2MB", "bitops=0.25x", "bitops=3e9" or "sqnr=30"'


class BudgetKind(enum.Enum):
    """What is limited."""

    SIZE = "size"
    BITOPS = "bitops"
    SQNR = "sqnr"


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit.

    Attributes:
        kind: What is limited.
        value: Bytes, bit operations, dB, or a multiple where ``relative``.
        relative: Whether the value is a multiple of the float model's bytes, or of the bit operations at 8 bits.
    """

    kind: BudgetKind
    value: float
    relative: bool = False

    @classmethod
    def read(cls, text: str) -> Budget:
        """The budget that a text stands for.

        Raises:
            ValueError: If it stands for none.

        >>> Budget.read("size=0.14x")
        Budget(kind=<BudgetKind.SIZE: 'size'>, value=0.14, relative=True)
        """
        match = re.fullmatch(r"\s*([a-z]+)\s*=\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
        if match is None:
            raise ValueError(text)
        kind, value, unit = BudgetKind(match[1]), float(match[2]), match[3]
        relative = unit == "x" and kind is not BudgetKind.SQNR
        if relative or (kind is BudgetKind.SQNR and unit in ("", "dB")) or (kind is BudgetKind.BITOPS and not unit):
            factor = 1.0
        elif kind is BudgetKind.SIZE and unit.upper() in _UNITS:
            factor = _UNITS[unit.upper()]
        else:
            raise ValueError(text)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(text)
        return cls(kind, value * factor, relative)

    def limit(self, whole: float) -> float:
        """The value itself; a relative one of ``whole``."""
        return self.value * whole if self.relative else self.value
