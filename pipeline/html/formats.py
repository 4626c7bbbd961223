"""Formats of numbers as labels and as shares of a network: :func:`format_label`, :func:`weight_shares`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from postquant.pipeline.tensor_statistics import OutlineNode

_BOOKS = {
    "post": "POST",
    "lut": "table",
    "feedback": "table, errors fed back",
    "border": "border",
    "adaptive": "adaptive",
}


@dataclasses.dataclass(frozen=True)
class FormatShare:
    """A part of the network's constants.

    Attributes:
        label: Such as "4 bit POST" or "float".
        bits: Bits; None for float.
        elements: Number of constants.
        share: Their share of all, 0 to 1.
        layers: Layers with this format.
    """

    label: str
    bits: int | None
    elements: int
    share: float
    layers: int


def format_label(bits: int | None, values: str | None = None) -> str:
    """A format in words.

    >>> format_label(4, "post"), format_label(8, "int"), format_label(None)
    ('4 bit POST', '8 bit', 'float')
    """
    return "float" if bits is None else f"{bits} bit {book_label(values)}".rstrip()


def book_label(values: str | None) -> str:
    """Which values codes stand for, in a word; nothing for plain integers.

    >>> book_label("lut"), book_label("int")
    ('table', '')
    """
    return _BOOKS.get(values or "", "")


def weight_shares(nodes: Iterable[OutlineNode]) -> tuple[FormatShare, ...]:
    """How the constants of a network are stored, the most frequent format first."""
    found: dict[tuple[int | None, str], list[int]] = {}
    for node in nodes:
        if node.parameters:
            key = (node.wbits, format_label(node.wbits, node.weights))
            found.setdefault(key, []).append(node.parameters)
    total = sum(sum(counts) for counts in found.values())
    shares = [
        FormatShare(label, bits, sum(counts), sum(counts) / total, len(counts))
        for (bits, label), counts in found.items()
    ]
    return tuple(sorted(shares, key=lambda share: (-share.elements, share.label)))
