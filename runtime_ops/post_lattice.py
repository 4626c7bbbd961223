"""POST levels exactly: two tables of powers of two, one of which is multiplied by 1 / sqrt(2).

The levels of POST (arXiv 2504.17263) are 0 and plus or minus ``sqrt(2)^-k``. The code book
:func:`postquant.runtime_ops.code_book.post_table` replaces them by integers (96, 68, 48, ...) that an int8 kernel
multiplies directly; 68 / 96 is 0.17 % above 1 / sqrt(2). A kernel that wants the powers themselves splits them by the
parity of ``k``::

    level = (even[code] + odd[code] / sqrt(2)) / 48
    sum of x * level = (sum of x * even[code] + (sum of x * odd[code]) / sqrt(2)) / 48

Both sums are integers, so this form is exact up to the one multiplication by 1 / sqrt(2). It costs two integer products
for each one of the lattice.

The unit is half of the lattice's 96, so that the scale of the even plane is twice the lattice's, exactly; and a kernel
that adds two products of 8 bits in 16 bits cannot saturate: 2 * 255 * 48 < 2^15.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.code_book import post_table

# What 1.0 is in the planes' tables.
PLANE_UNIT = 48
_TOP = 96


def two_planes(bits: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """The even and the odd table, in the order of :func:`~postquant.runtime_ops.code_book.post_table`.

    Args:
        bits: 2 or 4.

    Returns:
        Two (2**bits,) int8 arrays; of each code at least one entry is 0.

    >>> [plane.tolist() for plane in two_planes(2)]
    [[-48, 0, 0, 48], [0, 0, 48, 0]]
    """
    table = post_table(bits).astype(np.float64)
    size = np.abs(table) / _TOP
    halvings = np.rint(-2 * np.log2(np.where(size > 0, size, 1.0))).astype(np.int64)
    magnitude = np.where(size > 0, np.sign(table) * PLANE_UNIT / 2.0 ** (halvings // 2), 0.0)
    even = np.where(halvings % 2 == 0, magnitude, 0.0)
    return even.astype(np.int8), (magnitude - even).astype(np.int8)


def exact_levels(bits: int) -> npt.NDArray[np.float64]:
    """The POST levels that the codes stand for, largest 1, in the order of the code book.

    >>> exact_levels(2).round(4).tolist()
    [-1.0, 0.0, 0.7071, 1.0]
    """
    even, odd = two_planes(bits)
    levels: npt.NDArray[np.float64] = (even + odd * np.sqrt(np.float64(0.5))) / PLANE_UNIT
    return levels


def plane_scales(scale: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scales of the even and the odd plane for a weight whose lattice codes have ``scale``.

    Args:
        scale: Any shape, > 0: what one step of the lattice (1 / 96 of the largest level) stands for.

    >>> [float(s) for s in plane_scales(np.float32(1))]
    [2.0, 1.4142135381698608]
    """
    unit = scale.astype(np.float64) * (_TOP / PLANE_UNIT)
    return np.asarray(unit, np.float32), np.asarray(unit * np.sqrt(0.5), np.float32)


def lattice_scale(even_scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The inverse of :func:`plane_scales`, exact: from the scale of the even plane."""
    return np.asarray(even_scale * np.float32(PLANE_UNIT / _TOP), np.float32)
