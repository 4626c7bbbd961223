"""Whatever a user passes as calibration data becomes a checked :class:`CalibrationSource`: :func:`open_source`."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from postquant.calib.batched_source import BatchedSource
from postquant.calib.folder_source import open_folder, open_npy, open_npz
from postquant.calib.image_preprocess import ImagePreprocess
from postquant.calib.image_source import ImageFolderSource
from postquant.calib.input_spec import InputSpec, check_keys
from postquant.calib.iterable_source import RepeatedSource, SpooledSource, reader_feeds
from postquant.calib.source import CalibrationSource
from postquant.calib.stacked_source import MemoryArray, StackedSource
from postquant.runtime_ops.errors import CalibrationError


def open_source(
    data: object,
    inputs: Sequence[InputSpec],
    *,
    samples: int | None = None,
    seed: int = 0,
    images: ImagePreprocess | Mapping[str, Any] | None = None,
    spool_folder: str | None = None,
) -> CalibrationSource:
    """Opens calibration data and checks every sample, before any work.

    Args:
        data: One of

            * a path to an .npz or .npy file, or to a folder of them (:mod:`postquant.calib.folder_source`);
            * a path to a folder of images, together with ``images``;
            * a mapping from input name to an array whose first axis is samples, or such an array alone if the model
              has one input;
            * a list or other re-iterable of feeds, or a callable that returns an iterable of them;
            * a generator or other iterator of feeds: stored on disk, because it comes only once;
            * an onnxruntime ``CalibrationDataReader``: with ``rewind`` it is read again, otherwise stored on disk;
            * a :class:`CalibrationSource` made for the same inputs.
        inputs: What the model expects (:func:`postquant.calib.input_spec.input_specs`).
        samples: Use at most so many samples, drawn with ``seed``; None uses all. Those not drawn from files or arrays
            are not checked either.
        seed: Of the draw.
        images: Preprocessing of a folder of images.
        spool_folder: Where samples that come only once are stored; None for the system's temporary folder.

    Returns:
        A source of at least one sample, with its digest computed.

    Raises:
        CalibrationError: If there are no samples, keys are missing or left over, a dtype or shape is wrong, numbers
            of samples differ, a value is NaN or infinite, or something cannot be read.
    """
    specs = tuple(inputs)
    if not specs:
        raise CalibrationError("the model has no inputs, so that there is nothing to calibrate with")
    if isinstance(data, CalibrationSource):
        if data.inputs != specs:
            raise CalibrationError(
                "the calibration source was made for other inputs", expected=_list(specs), found=_list(data.inputs)
            )
        return data if samples is None else data.subset(samples, seed)
    if images is not None and not isinstance(data, str | os.PathLike):
        raise CalibrationError(
            "image preprocessing is for a folder of images", found=f"calibration data of type {type(data).__name__}"
        )
    if isinstance(data, str | os.PathLike):
        path = pathlib.Path(data)
        source, batch = _open_path(path, specs, images)
        where = str(path)
    elif isinstance(data, np.ndarray | Mapping):
        stacked = _open_arrays(data, specs)
        source, batch, where = stacked, stacked.batch, "the calibration arrays"
    else:
        source = _open_iterable(data, specs, spool_folder)
        return source if samples is None else source.subset(samples, seed)
    if batch > 1:
        source = BatchedSource(source, batch, specs, where=where)
    if samples is not None:
        source = source.subset(samples, seed)
    source.check()
    return source


def _open_path(
    path: pathlib.Path, specs: Sequence[InputSpec], images: ImagePreprocess | Mapping[str, Any] | None
) -> tuple[CalibrationSource, int]:
    if not path.exists():
        raise CalibrationError("the calibration data do not exist", where=str(path))
    try:
        if images is not None:
            if not path.is_dir():
                raise CalibrationError("image preprocessing is for a folder of images", where=str(path))
            preprocess = images if isinstance(images, ImagePreprocess) else ImagePreprocess.from_mapping(images)
            source = ImageFolderSource(path, preprocess, specs)
            return source, source.batch
        if path.is_dir():
            return open_folder(path, specs)
    except OSError as error:
        raise CalibrationError("the calibration folder cannot be read", where=str(path), found=str(error)) from error
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return open_npz(path, specs)
    if suffix == ".npy":
        return open_npy(path, specs)
    raise CalibrationError(
        "the calibration data are of an unknown kind",
        where=str(path),
        expected="an .npz or .npy file, or a folder",
        found=f"a file that ends in {suffix!r}" if suffix else "a file without a suffix",
    )


def _open_arrays(data: np.ndarray[Any, Any] | Mapping[Any, Any], specs: Sequence[InputSpec]) -> StackedSource:
    if isinstance(data, np.ndarray):
        if len(specs) != 1:
            raise CalibrationError(
                "one calibration array cannot feed several inputs",
                expected=f"a dict with the keys {_list(specs)}",
                found=f"an array of shape {list(data.shape)}",
            )
        data = {specs[0].name: data}
    check_keys([str(key) for key in data], specs, where="the calibration dict")
    arrays = {}
    for name, array in data.items():
        if not isinstance(array, np.ndarray):
            raise CalibrationError(
                "a value of the calibration dict is not an array",
                where=f"input {name!r}",
                expected="an array whose first axis is samples",
                found=f"an object of type {type(array).__name__}",
                hint="pass a list of dicts for one feed per sample",
            )
        arrays[name] = MemoryArray(array, "the array passed as calibration data")
    return StackedSource(arrays, specs)


def _open_iterable(data: object, specs: Sequence[InputSpec], spool_folder: str | None) -> CalibrationSource:
    where = f"the {type(data).__name__} passed as calibration data"
    if hasattr(data, "get_next"):
        if hasattr(data, "rewind"):
            return RepeatedSource(lambda: _rewound(data), specs, where=where)
        return SpooledSource(reader_feeds(data), specs, where=where, folder=spool_folder)
    if isinstance(data, Iterator):
        return SpooledSource(data, specs, where=where, folder=spool_folder)
    if isinstance(data, Iterable):
        return RepeatedSource(lambda: cast("Iterable[object]", data), specs, where=where)
    if callable(data):
        return RepeatedSource(_iterable_from(cast("Callable[[], object]", data)), specs, where=where)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        items = cast("Sequence[object]", data)
        return RepeatedSource(lambda: (items[i] for i in range(len(items))), specs, where=where)
    raise CalibrationError(
        "the calibration data are of an unknown kind",
        expected="a path, arrays, an iterable of feeds or a CalibrationDataReader",
        found=f"an object of type {type(data).__name__}",
    )


def _rewound(reader: Any) -> Iterator[object]:
    reader.rewind()
    return reader_feeds(reader)


def _iterable_from(make: Callable[[], object]) -> Callable[[], Iterable[object]]:
    def called() -> Iterable[object]:
        feeds = make()
        if not isinstance(feeds, Iterable):
            raise CalibrationError(
                "the callable passed as calibration data returns no iterable",
                found=f"an object of type {type(feeds).__name__}",
            )
        return feeds

    return called


def _list(specs: Sequence[InputSpec]) -> str:
    return ", ".join(f"{spec.name!r} {spec}" for spec in specs)
