"""Frozen groups of arrays that a plan saves by name: :class:`ArrayParts`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.errors import ModelError


class ArrayParts:
    """What dataclasses have in common whose fields all are arrays, in the order of an operator's inputs.

    Attributes:
        whole: What its fields are parts of, for people.
    """

    whole: ClassVar[str]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All arrays by name, in the order of the operator's inputs; :meth:`from_arrays` reads them back."""
        return {name: np.ascontiguousarray(getattr(self, name)) for name in self._names()}

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """The inverse of :meth:`arrays`.

        Raises:
            ModelError: If an array is missing.
        """
        missing = [name for name in cls._names() if name not in arrays]
        if missing:
            raise ModelError(f"a part of {cls.whole} is missing", where=missing[0])
        return cls(**{name: arrays[name] for name in cls._names()})

    @classmethod
    def _names(cls) -> list[str]:
        assert dataclasses.is_dataclass(cls)
        return [field.name for field in dataclasses.fields(cls)]
