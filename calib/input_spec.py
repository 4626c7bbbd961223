"""What a model expects to be fed, and whether a sample is that: :class:`InputSpec`, :func:`check_sample`.

Nothing is converted silently: a uint8 image fed to a float32 input has usually missed its preprocessing, and a
float64 array its rounding. Python numbers and lists, which have no dtype, take the input's when that is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from postquant.runtime_ops.errors import CalibrationError, ModelError

# One feed of the model: input name -> array, batch axis included.
Sample = dict[str, npt.NDArray[np.generic]]


@dataclasses.dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: Its name.
        dtype: NumPy dtype of its elements.
        shape: A size per axis, None for a dynamic one; None as a whole if even the rank is unknown.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        """For messages: ``float32 [?, 3, 32, 32]``."""
        return f"{self.dtype.name} {_describe(self.shape)}"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of ``shape`` can be fed."""
        if self.shape is None:
            return True
        return len(shape) == len(self.shape) and all(
            expected in (None, size) for size, expected in zip(shape, self.shape, strict=True)
        )


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """What ``model`` must be fed: its graph inputs except those with an initializer as default.

    Raises:
        ModelError: If an input is not a tensor of numbers.
    """
    specs = []
    for value in model.graph.inputs:
        name = value.name or ""
        if name in model.graph.initializers:
            continue
        if value.dtype is None or (value.type is not None and not isinstance(value.type, ir.TensorType)):
            raise ModelError(
                "an input of the model cannot be fed with an array",
                where=f"input {name!r}",
                expected="a dense tensor with an element type",
                found=str(value.type),
            )
        if value.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
            raise ModelError(
                "an input of the model is not numeric", where=f"input {name!r}", found=value.dtype.name.lower()
            )
        shape = None
        if value.shape is not None:
            shape = tuple(size if isinstance(size, int) else None for size in value.shape)
        specs.append(InputSpec(name, np.dtype(value.dtype.numpy()), shape))
    return tuple(specs)


def check_keys(found: Sequence[str], specs: Sequence[InputSpec], *, where: str) -> None:
    """Checks that the data have exactly the model's inputs.

    Raises:
        CalibrationError: If a key is missing or left over.
    """
    expected = [spec.name for spec in specs]
    if set(found) == set(expected):
        return
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    hints = []
    if len(found) == len(expected) == 1:
        hints.append(f"save the array under the key {expected[0]!r}")
    else:
        if missing:
            hints.append(f"add {_names(missing)}")
        if extra:
            hints.append(f"leave out {_names(extra)}")
    raise CalibrationError(
        "the calibration data do not have the keys that the model has inputs",
        where=where,
        expected=_names(expected),
        found=_names(found),
        hint=" and ".join(hints),
    )


def check_array(array: npt.NDArray[np.generic], spec: InputSpec, *, where: str) -> None:
    """Checks dtype, shape and values of one input of one sample.

    Raises:
        CalibrationError: If the dtype or the shape is not the model's, or a value is NaN or infinite.
    """
    check_dtype(array.dtype, spec, where=where)
    if not spec.fits(array.shape):
        hint = "the array of a sample has all axes of the model's input"
        if spec.shape is not None and len(array.shape) == len(spec.shape) - 1:
            hint += ", the batch axis included: use x[None] for a single sample"
        raise CalibrationError(
            "a calibration array has the wrong shape",
            where=where,
            expected=_describe(spec.shape),
            found=_describe(array.shape),
            hint=hint,
        )
    if not array.size:
        raise CalibrationError("a calibration array is empty", where=where, found=_describe(array.shape))
    if not _is_finite(array):
        numbers = array.astype(np.float64)
        nan, inf = int(np.isnan(numbers).sum()), int(np.isinf(numbers).sum())
        raise CalibrationError(
            "the calibration data hold NaN or infinity",
            where=where,
            found=f"{nan} NaN and {inf} infinite of {array.size} values",
            hint="remove the sample or repair its preprocessing",
        )


def check_dtype(dtype: np.dtype[np.generic], spec: InputSpec, *, where: str) -> None:
    """Checks the dtype of the data for one input.

    Raises:
        CalibrationError: If it is not the model's.
    """
    if dtype == spec.dtype:
        return
    hint = f"convert it with .astype(numpy.{spec.dtype.name}) before saving"
    if dtype.kind in "ui" and spec.dtype.kind == "f":
        hint += ", after the model's own preprocessing (scale, mean, std)"
    # Names hide the byte order, which may be all that differs.
    found = dtype.name if dtype.name != spec.dtype.name else dtype.str
    raise CalibrationError(
        "a calibration array has the wrong dtype", where=where, expected=spec.dtype.name, found=found, hint=hint
    )


def check_sample(feed: object, specs: Sequence[InputSpec], *, index: int) -> Sample:
    """One sample, checked against the model.

    Args:
        feed: Mapping from input name to array (or nested lists of numbers); for a model with one input the array
            alone will do.
        specs: What the model expects.
        index: Number of the sample, for messages.

    Returns:
        Input name -> array in the order of ``specs``.

    Raises:
        CalibrationError: If keys, dtypes, shapes or values do not fit.
    """
    where = f"sample {index}"
    if not isinstance(feed, Mapping):
        if len(specs) != 1 or not isinstance(feed, np.ndarray | list | tuple | int | float):
            raise CalibrationError(
                "a calibration sample is not a feed of the model",
                where=where,
                expected=f"a dict with the keys {_names([spec.name for spec in specs])}",
                found=f"an object of type {type(feed).__name__}",
            )
        feed = {specs[0].name: feed}
    check_keys([str(key) for key in feed], specs, where=where)
    sample = {}
    for spec in specs:
        place = f"input {spec.name!r}, sample {index}"
        array = _as_array(feed[spec.name], spec, where=place)
        check_array(array, spec, where=place)
        sample[spec.name] = array
    return sample


def _as_array(value: object, spec: InputSpec, *, where: str) -> npt.NDArray[np.generic]:
    """``value`` itself if it has a dtype, otherwise Python numbers in the input's dtype."""
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    try:
        # torch tensors and the like say what they are; lists and numbers do not.
        array = np.asarray(value)
        if hasattr(value, "__array__") or array.dtype.kind not in "biuf":
            return array
        converted = array.astype(spec.dtype)
        same = spec.dtype.kind == "f" or np.array_equal(converted, array)
    except (TypeError, ValueError, OverflowError) as error:
        raise CalibrationError(
            "a calibration value is not an array of numbers", where=where, expected=str(spec), found=str(error)
        ) from error
    if not same:
        raise CalibrationError("calibration numbers do not fit the input's dtype", where=where, expected=str(spec))
    return converted


def _is_finite(array: npt.NDArray[np.generic]) -> bool:
    if array.dtype.kind in "biu":
        return True
    # The sum of two extremes needs no temporary of the array's size; NaN propagates through both.
    numbers = array.reshape(-1)
    return bool(np.isfinite(numbers.min()) and np.isfinite(numbers.max()))


def _describe(shape: Sequence[int | None] | None) -> str:
    if shape is None:
        return "any shape"
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _names(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) if names else "none"
