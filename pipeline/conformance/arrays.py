"""``.npz`` files whose bytes depend on the arrays only, and which are read without trust."""

from __future__ import annotations

import io
import math
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from postquant.runtime_ops.errors import ModelError

Arrays = dict[str, npt.NDArray[Any]]

# More elements are never read from one array: what a bundle holds is far smaller.
_MOST_ELEMENTS = 1 << 28
_OLDEST = (1980, 1, 1, 0, 0, 0)  # the first time that a zip archive can say


def write_arrays(path: pathlib.Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes an ``.npz`` file; equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in sorted(arrays.items()):
            data = io.BytesIO()
            np.lib.format.write_array(data, np.asarray(array, order="C"), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", _OLDEST)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data.getvalue())


def read_arrays(path: pathlib.Path) -> Arrays:
    """The arrays of an ``.npz`` file, none of which may hold objects or more than 2^28 elements.

    Raises:
        ModelError: If it is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): _member(archive, info) for info in archive.infolist()}
    except OSError as error:
        raise ModelError("an array file cannot be read", where=str(path), found=error.strerror or str(error)) from None
    except _DAMAGE as error:
        raise ModelError("an array file is damaged", where=str(path), found=_said(error)) from None


def read_array(path: pathlib.Path) -> npt.NDArray[Any]:
    """The array of an ``.npy`` file, under the same conditions.

    Raises:
        ModelError: If it is missing or damaged.
    """
    try:
        with open(path, "rb") as file:
            _check_header(file)
            file.seek(0)
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except OSError as error:
        raise ModelError("an array file cannot be read", where=str(path), found=error.strerror or str(error)) from None
    except _DAMAGE as error:
        raise ModelError("an array file is damaged", where=str(path), found=_said(error)) from None


# What zipfile and NumPy raise on damaged files.
_DAMAGE = (
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    TypeError,
    OverflowError,
    MemoryError,
)


def _said(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else "a cut file"


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> npt.NDArray[Any]:
    with archive.open(info) as member:
        _check_header(member)
    with archive.open(info) as member:
        return np.asarray(np.lib.format.read_array(member, allow_pickle=False))


def _check_header(file: IO[bytes]) -> None:
    """Looks at type and size before anything is allocated."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of format {version}")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject or dtype.kind not in "biufc":
        raise ValueError(f"expected numbers, found {dtype}")
    if math.prod(shape) > _MOST_ELEMENTS:
        raise ValueError(f"expected at most {_MOST_ELEMENTS} elements, found shape {shape}")
