"""What a receiver's runtime wrote down: ``.npy``, ``.npz`` and raw files, by tensor name (:class:`Dumps`).

    FOLDER/0/..., FOLDER/1/...      one folder per sample; without such folders, FOLDER itself is sample 0
    conv1_quantized.npy             an array, named by the codes, the value, or the key of index.json
    anything.npz                    arrays by such names
    000017.raw, 000017.bin          row-major numbers, named like an .npy file or by names.json
    names.json                      {"000017.raw": "conv1_quantized", ...}

In file names, characters other than letters, digits, ``_``, ``.`` and ``-`` may be replaced by ``_``. Integer
arrays hold codes, floating-point arrays the real values that codes stand for. Four-dimensional arrays may have their
channels last.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from postquant.pipeline.conformance.arrays import Arrays, read_array, read_arrays
from postquant.pipeline.conformance.expected import ExpectedTensor
from postquant.runtime_ops.errors import ModelError

_NAMES_FILE = "names.json"
_RAW = (".raw", ".bin")
# A real value this far from the nearest code, in codes, is not on the tensor's grid.
_OFF_GRID = 0.02


class OffGridError(ValueError):
    """Real values that are not multiples of the tensor's scale."""


class Dumps:
    """The dumped arrays of one sample.

    Args:
        folder: The receiver's folder.
        sample: Index of the sample.

    Raises:
        ModelError: If the folder does not exist or a file is damaged.
    """

    def __init__(self, folder: pathlib.Path, sample: int) -> None:
        self._arrays: Arrays = {}
        self._raw: dict[str, pathlib.Path] = {}
        self._used: set[str] = set()
        if not folder.is_dir():
            raise ModelError("there is no such folder of outputs", where=str(folder), hint="give --outputs FOLDER")
        divided = (folder / "0").is_dir()
        place = folder / str(sample) if divided else folder
        if place.is_dir() and (divided or sample == 0):
            self._read(place)

    @classmethod
    def of(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Dumps:
        """Arrays that are in memory already, by their names."""
        result = cls.__new__(cls)
        result._arrays, result._raw, result._used = dict(arrays), {}, set()
        return result

    def __len__(self) -> int:
        return len(self._arrays) + len(self._raw)

    def _read(self, place: pathlib.Path) -> None:
        names = _names(place / _NAMES_FILE)
        for path in sorted(place.iterdir()):
            if not path.is_file():
                continue
            name = names.get(path.name, names.get(path.stem, path.stem))
            if path.suffix == ".npy":
                self._arrays[name] = read_array(path)
            elif path.suffix == ".npz":
                self._arrays.update({names.get(key, key): array for key, array in read_arrays(path).items()})
            elif path.suffix in _RAW:
                self._raw[name] = path

    def unused(self) -> list[str]:
        """Names that no tensor and no output has asked for."""
        return sorted(({*self._arrays, *self._raw}) - self._used)

    def output(self, name: str, like: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """A dumped output of the model in the shape of ``like``; None where it was not dumped.

        Raises:
            ValueError: If it has another size.
        """
        found = self._find((name,), like.size, like.dtype)
        return None if found is None else found.reshape(like.shape)

    def codes(
        self, tensor: ExpectedTensor, shape: tuple[int, ...], expected: npt.NDArray[Any] | None
    ) -> tuple[npt.NDArray[np.int32], str] | None:
        """The codes of a tensor, and in words how they were read; None where it was not dumped.

        Args:
            tensor: Which one.
            shape: Its shape on this sample.
            expected: The expected codes, which tell whether channels are last where the shape does not.

        Raises:
            ValueError: If the array has another size.
            OffGridError: If it holds real values that no codes stand for.
        """
        names = (tensor.key, tensor.codes, tensor.name)
        found = self._find(names, math.prod(shape), np.dtype(tensor.dtype))
        if found is None:
            return None
        codes = _as_codes(found, tensor)
        if len(shape) != 4:
            return codes.reshape(shape), ""
        last = (shape[0], *shape[2:], shape[1])
        first, moved = codes.reshape(shape), codes.reshape(last).transpose(0, 3, 1, 2)
        if last != shape and found.shape in (shape, last):
            return (first, "") if found.shape == shape else (moved, "channels last")
        if expected is not None and np.count_nonzero(moved != expected) < np.count_nonzero(first != expected):
            return moved, "channels last"
        return first, ""

    def _find(self, names: Iterable[str], size: int, dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
        """The array of the first name that is there; raw files have the type of the codes, or float32."""
        for name in (spelled for own in names for spelled in (own, _safe(own))):
            if name in self._raw:
                self._used.add(name)
                data = self._raw[name].read_bytes()
                kinds = [kind for kind in (dtype, np.dtype("<f4")) if len(data) == size * kind.itemsize]
                if not kinds:
                    raise ValueError(f"{len(data)} bytes, expected {size} of {dtype} or float32")
                return np.frombuffer(data, kinds[0])
            if name in self._arrays:
                self._used.add(name)
                array = self._arrays[name]
                if array.size != size:
                    raise ValueError(f"shape {list(array.shape)}, expected {size} numbers")
                return array
        return None


def _as_codes(found: npt.NDArray[Any], tensor: ExpectedTensor) -> npt.NDArray[np.int32]:
    if found.dtype.kind in "iub":
        return found.astype(np.int32)
    if found.dtype.kind != "f":
        raise ValueError(f"numbers of type {found.dtype}")
    real = found.astype(np.float64)
    if not np.isfinite(real).all():
        raise OffGridError("values that are not finite")
    distance = real / tensor.scale
    codes = np.rint(distance)
    worst = float(np.abs(distance - codes).max(initial=0.0))
    if worst > _OFF_GRID:
        raise OffGridError(f"real values up to {worst:.2f} codes away from the grid of scale {tensor.scale:.6g}")
    return np.asarray(np.clip(codes + tensor.zero_point, -(2.0**31), 2.0**31 - 1), np.int32)


def _names(path: pathlib.Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError("the file of names is damaged", where=str(path), found=str(error)) from None
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise ModelError("the file of names is damaged", where=str(path), expected='{"file.raw": "tensor name", ...}')
    return data


def _safe(name: str) -> str:
    """A name as it may stand in a file name.

    >>> _safe("/layer1/conv_quantized")
    '_layer1_conv_quantized'
    """
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)
