"""How the first axis of an array becomes samples: :class:`Cut`.

For a model input of rank r, an array of

* rank r is a stack of rows along the model's batch axis; each row keeps that axis with size 1, and a model
  with a fixed batch N is fed N consecutive rows (:class:`postquant.calib.batched_source.BatchedSource`);
* rank r + 1 is a stack of complete inputs;
* rank r - 1 is one row without its batch axis; only files of a folder may be that.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from postquant.calib.input_spec import InputSpec, check_dtype
from postquant.runtime_ops.errors import CalibrationError


class EntryArray(Protocol):
    """An array that is read entry by entry, from a file or from memory."""

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of its elements."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""

    @property
    def label(self) -> str:
        """For messages."""

    def entries(self, indices: Sequence[int]) -> Iterator[npt.NDArray[np.generic]]:
        """``array[i]`` for increasing indices."""

    def whole(self) -> npt.NDArray[np.generic]:
        """The complete array."""


class Cut(enum.Enum):
    """What an entry of an array is."""

    ROWS = "rows of the batch axis"
    COMPLETE = "complete inputs"
    BARE = "one row without batch axis"


@dataclasses.dataclass(frozen=True, slots=True)
class Cutting:
    """How the arrays of all inputs are cut together.

    Attributes:
        cuts: Input name -> what an entry of its array is.
        entries: Number of entries, equal for all inputs.
        batch: Entries that make one feed.
    """

    cuts: Mapping[str, Cut]
    entries: int
    batch: int


def fixed_batch(specs: Sequence[InputSpec]) -> int:
    """The size of the first axis if it is the same fixed number for all inputs, otherwise 1."""
    sizes = {spec.shape[0] if spec.shape else None for spec in specs}
    return sizes.pop() or 1 if len(sizes) == 1 else 1


def cutting(arrays: Mapping[str, EntryArray], specs: Sequence[InputSpec], *, bare: bool = False) -> Cutting:
    """How ``arrays`` become feeds.

    Args:
        arrays: Input name -> array, one for every input.
        specs: What the model expects.
        bare: Whether an array may be one row without its batch axis.

    Raises:
        CalibrationError: If a dtype or shape does not fit, numbers of samples differ, or there is none.
    """
    batch = fixed_batch(specs)
    cuts, counts = {}, {}
    for spec in specs:
        array = arrays[spec.name]
        where = f"input {spec.name!r}, {array.label}"
        check_dtype(array.dtype, spec, where=where)
        cuts[spec.name] = _cut(array.shape, spec, batch, bare=bare, where=where)
        counts[spec.name] = 1 if cuts[spec.name] is Cut.BARE else array.shape[0]
    labels = ", ".join(dict.fromkeys(array.label for array in arrays.values()))
    if len(set(counts.values())) > 1:
        raise CalibrationError(
            "the inputs have different numbers of samples",
            where=labels,
            found=", ".join(f"{count} of {name!r}" for name, count in counts.items()),
        )
    complete = [cut is Cut.COMPLETE for cut in cuts.values()]
    if batch > 1 and any(complete) and not all(complete):
        raise CalibrationError(
            "some arrays hold rows and others complete batches",
            where=labels,
            expected=f"rows of all inputs, or batches of {batch} of all inputs",
        )
    return Cutting(cuts, next(iter(counts.values())), 1 if all(complete) else batch)


def _cut(shape: tuple[int, ...], spec: InputSpec, batch: int, *, bare: bool, where: str) -> Cut:
    # The array on its own is checked; whether rows fill a batch is a question for the whole source.
    row = spec
    if spec.shape and batch > 1:
        row = dataclasses.replace(spec, shape=(1, *spec.shape[1:]))
    kind = None
    if spec.shape is None or len(shape) == len(spec.shape) > 0:
        kind = Cut.ROWS if shape and row.fits((1, *shape[1:])) else None
    elif len(shape) == len(spec.shape) + 1:
        kind = Cut.COMPLETE if spec.fits(shape[1:]) else None
    elif bare and row.fits((1, *shape)):
        kind = Cut.BARE
    if kind is None:
        raise CalibrationError(
            "a calibration array has the wrong shape",
            where=where,
            expected=f"samples of {spec} along the first axis",
            found=f"[{', '.join(map(str, shape))}]",
        )
    if kind is not Cut.BARE and shape[0] == 0:
        raise CalibrationError("the calibration data hold no samples", where=where)
    return kind
