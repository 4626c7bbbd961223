"""A folder of .npz or .npy files as one source: :func:`open_folder`.

* ``*.npz``: every file has one array per input, under the input's name;
* ``*.npy``: for a model with one input;
* one subfolder per input, named as the input, with equally named .npy files in each.

A file holds one sample (with or without its batch axis) or several along its first axis. Files are taken in the order
of their names; shapes may differ from file to file where the model's axes are dynamic.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from postquant.calib.array_file import StoredArray, stored_arrays
from postquant.calib.input_spec import InputSpec, check_keys
from postquant.calib.source import CalibrationSource
from postquant.calib.stacked_source import ChainedSource, StackedSource
from postquant.runtime_ops.errors import CalibrationError

_ARRAY_SUFFIXES = (".npz", ".npy")


def open_folder(folder: pathlib.Path, inputs: Sequence[InputSpec]) -> tuple[CalibrationSource, int]:
    """The samples of all files in ``folder``.

    Args:
        folder: An existing folder.
        inputs: What the model expects.

    Returns:
        The source, and how many of its samples make one feed.

    Raises:
        CalibrationError: If the folder has no usable files or a file does not fit the model.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in _ARRAY_SUFFIXES)
    kinds = {path.suffix.lower() for path in files}
    if len(kinds) > 1:
        raise CalibrationError(
            "the calibration folder mixes .npz and .npy files", where=str(folder), hint="keep one kind per folder"
        )
    if kinds == {".npz"}:
        feeds = [(str(path), _npz_arrays(path, inputs)) for path in files]
    elif kinds == {".npy"}:
        if len(inputs) != 1:
            raise CalibrationError(
                "a folder of .npy files cannot say which input they are for",
                where=str(folder),
                expected=f"the model's {len(inputs)} inputs {', '.join(repr(spec.name) for spec in inputs)}",
                hint="use .npz files, or one subfolder of .npy files per input",
            )
        feeds = [(str(path), {inputs[0].name: stored_arrays(path)[None]}) for path in files]
    else:
        feeds = _subfolder_feeds(folder, inputs)
    return _chained(feeds, inputs)


def open_npz(path: pathlib.Path, inputs: Sequence[InputSpec]) -> tuple[CalibrationSource, int]:
    """The samples of one .npz file, stacked along the first axis of its arrays; see :func:`open_folder`."""
    source = StackedSource(_npz_arrays(path, inputs), inputs)
    return source, source.batch


def open_npy(path: pathlib.Path, inputs: Sequence[InputSpec]) -> tuple[CalibrationSource, int]:
    """The samples of one .npy file, stacked along its first axis; see :func:`open_folder`."""
    if len(inputs) != 1:
        raise CalibrationError(
            "an .npy file holds one array but the model has several inputs",
            where=str(path),
            expected=", ".join(repr(spec.name) for spec in inputs),
            hint="save an .npz with one array per input",
        )
    source = StackedSource({inputs[0].name: stored_arrays(path)[None]}, inputs)
    return source, source.batch


def _npz_arrays(path: pathlib.Path, inputs: Sequence[InputSpec]) -> dict[str, StoredArray]:
    arrays = {name: array for name, array in stored_arrays(path).items() if name is not None}
    check_keys(list(arrays), inputs, where=str(path))
    return arrays


def _subfolder_feeds(folder: pathlib.Path, inputs: Sequence[InputSpec]) -> list[tuple[str, dict[str, StoredArray]]]:
    parts = {spec.name: folder / spec.name for spec in inputs}
    missing = [name for name, part in parts.items() if not part.is_dir()]
    if len(missing) == len(parts):
        raise CalibrationError(
            "the calibration folder holds no calibration files",
            where=str(folder),
            expected=".npz or .npy files, or one subfolder of .npy files per input",
            hint="for a folder of images, say how they are preprocessed: [image] in the configuration",
        )
    # An input "a/b" lies in the subfolder "a": only first parts can be compared.
    known = {pathlib.PurePath(name).parts[0] for name in parts}
    extra = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in known)
    check_keys([name for name in parts if name not in missing] + extra, inputs, where=str(folder))
    files = {name: sorted(path.name for path in part.glob("*.npy")) for name, part in parts.items()}
    first = files[inputs[0].name]
    for name, names in files.items():
        if not names:
            raise CalibrationError("the calibration folder holds no .npy files", where=str(parts[name]))
        if names != first:
            odd = sorted(set(names) ^ set(first))[0]
            raise CalibrationError(
                "the inputs' subfolders do not hold equally named files",
                where=str(folder),
                found=f"{odd!r} for only one of {inputs[0].name!r} and {name!r}",
            )
    return [
        (f"{folder}, files {file!r}", {name: stored_arrays(part / file)[None] for name, part in parts.items()})
        for file in first
    ]


def _chained(
    feeds: Sequence[tuple[str, dict[str, StoredArray]]], inputs: Sequence[InputSpec]
) -> tuple[CalibrationSource, int]:
    sources = [StackedSource(arrays, inputs, bare=True) for _, arrays in feeds]
    batches = [source.batch for source in sources]
    for (where, _), batch in zip(feeds, batches, strict=True):
        if batch != batches[0]:
            raise CalibrationError(
                "some files hold rows and others complete batches", where=where, expected=f"files as {feeds[0][0]}"
            )
    return ChainedSource(sources), batches[0]
