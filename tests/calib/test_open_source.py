"""All kinds of calibration data give the same samples, twice, with flat memory."""

import gc
import pathlib
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnxruntime.quantization import CalibrationDataReader

from postquant.calib.input_spec import InputSpec
from postquant.calib.iterable_source import SpooledSource
from postquant.calib.open_source import open_source
from postquant.calib.source import CalibrationSource
from postquant.runtime_ops.errors import CalibrationError

ONE = (InputSpec("x", np.dtype(np.float32), (None, 3, 4)),)
TWO = (InputSpec("x", np.dtype(np.float32), (None, 3, 4)), InputSpec("ids", np.dtype(np.int64), (None, None)))
X = np.random.default_rng(0).normal(size=(7, 3, 4)).astype(np.float32)
IDS = np.arange(35, dtype=np.int64).reshape(7, 5)


def f32(values: object) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """A reader as onnxruntime's documentation shows it, without rewind."""

    def __init__(self) -> None:
        self.feeds = iter([{"x": x[None]} for x in X])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


class RewindingReader(Reader):
    def rewind(self) -> None:
        self.feeds = iter([{"x": x[None]} for x in X])


class Dataset:
    """Only ``__len__`` and ``__getitem__``, and no IndexError at the end."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> npt.NDArray[np.float32]:
        return X[[index]]


def stacked_npz(folder: pathlib.Path) -> object:
    np.savez(folder / "data.npz", x=X)
    return folder / "data.npz"


def compressed_npz(folder: pathlib.Path) -> object:
    np.savez_compressed(folder / "data.npz", x=X)
    return str(folder / "data.npz")


def fortran_npz(folder: pathlib.Path) -> object:
    np.savez(folder / "data.npz", x=np.asfortranarray(X))
    return folder / "data.npz"


def complete_npz(folder: pathlib.Path) -> object:
    np.savez(folder / "data.npz", x=X[:, None])
    return folder / "data.npz"


def stacked_npy(folder: pathlib.Path) -> object:
    np.save(folder / "data.npy", X)
    return folder / "data.npy"


def fortran_npy(folder: pathlib.Path) -> object:
    np.save(folder / "data.npy", np.asfortranarray(X))
    return folder / "data.npy"


def npy_folder(folder: pathlib.Path) -> object:
    for i, x in enumerate(X[:4]):
        np.save(folder / f"{i}.npy", x if i % 2 else x[None])  # with and without the batch axis
    np.save(folder / "4.npy", X[4:])
    (folder / "README.txt").write_text("not an array")
    return folder


def npz_folder(folder: pathlib.Path) -> object:
    np.savez(folder / "a.npz", x=X[:3])
    np.savez_compressed(folder / "b.npz", x=X[3:])
    return folder


def input_folders(folder: pathlib.Path) -> object:
    (folder / "x").mkdir()
    np.save(folder / "x" / "0.npy", X)
    return folder


def feed_of(x: npt.NDArray[np.float32]) -> dict[str, Any]:
    return {"x": x[None]}


def generator() -> Iterator[dict[str, Any]]:
    for x in X:
        yield {"x": x[None]}


KINDS: dict[str, Callable[[pathlib.Path], object]] = {
    "npz": stacked_npz,
    "compressed npz": compressed_npz,
    "Fortran npz": fortran_npz,
    "npz of complete inputs": complete_npz,
    "npy": stacked_npy,
    "Fortran npy": fortran_npy,
    "folder of npy": npy_folder,
    "folder of npz": npz_folder,
    "folder per input": input_folders,
    "dict": lambda _: {"x": X},
    "array": lambda _: X,
    "list of feeds": lambda _: [{"x": x[None]} for x in X],
    "list of arrays": lambda _: [x[None] for x in X],
    "list of lists": lambda _: [{"x": [x.tolist()]} for x in X],
    "dataset": lambda _: Dataset(),
    "generator function": lambda _: generator,
    "generator": lambda _: generator(),
    "map": lambda _: map(feed_of, X),
    "reader": lambda _: Reader(),
    "rewinding reader": lambda _: RewindingReader(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_samples_twice(kind: str, tmp_path: pathlib.Path) -> None:
    source = open_source(KINDS[kind](tmp_path), ONE)
    assert len(source) == 7
    for _ in range(2):
        samples = list(source)
        assert [list(sample) for sample in samples] == [["x"]] * 7
        for sample, x in zip(samples, X, strict=True):
            assert sample["x"].dtype == np.float32
            np.testing.assert_array_equal(sample["x"], x[None])
    # However the samples are stored, they are the same samples.
    assert source.digest == open_source({"x": X}, ONE).digest


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_every_kind(kind: str, tmp_path: pathlib.Path) -> None:
    source = open_source(KINDS[kind](tmp_path), ONE)
    drawn = source.subset(3, seed=5)
    assert len(drawn) == 3
    rows = np.concatenate([sample["x"] for sample in drawn])
    at = [int(np.flatnonzero((row == X).all(axis=(1, 2)))[0]) for row in rows]
    assert at == sorted(set(at))
    assert drawn.digest == open_source({"x": X}, ONE).subset(3, seed=5).digest
    np.testing.assert_array_equal(next(iter(source.take(1)))["x"], X[:1])
    assert len(drawn.take(2)) == 2
    assert source.take(7) is source
    assert source.subset(100, seed=0) is source
    with pytest.raises(ValueError, match="positive"):
        source.take(0)


@pytest.mark.parametrize("kind", ["npz", "reader"])
def test_samples_can_be_limited_when_opening(kind: str, tmp_path: pathlib.Path) -> None:
    whole = open_source(KINDS[kind](tmp_path), ONE)
    limited = open_source(KINDS[kind](tmp_path), ONE, samples=2, seed=9)
    assert limited.digest == whole.subset(2, seed=9).digest
    assert open_source(whole, ONE) is whole
    assert len(open_source(whole, ONE, samples=2)) == 2


def test_two_passes_at_once(tmp_path: pathlib.Path) -> None:
    for kind in ("npz", "generator", "folder of npz"):
        folder = tmp_path / kind
        folder.mkdir()
        source = open_source(KINDS[kind](folder), ONE)
        for left, right in zip(source, source, strict=True):
            np.testing.assert_array_equal(left["x"], right["x"])


def test_several_inputs(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "both.npz", x=X, ids=IDS)
    folders = tmp_path / "folders"
    for name, array in (("x", X), ("ids", IDS)):
        (folders / name).mkdir(parents=True)
        for i in range(7):
            np.save(folders / name / f"{i}.npy", array[i])
    feeds = [{"ids": IDS[[i]], "x": X[[i]]} for i in range(7)]
    digests = {open_source(data, TWO).digest for data in (tmp_path / "both.npz", folders, feeds, {"x": X, "ids": IDS})}
    assert len(digests) == 1
    assert list(next(iter(open_source(feeds, TWO)))) == ["x", "ids"]


def test_shapes_may_differ_where_axes_are_dynamic(tmp_path: pathlib.Path) -> None:
    spec = (InputSpec("ids", np.dtype(np.int64), (None, None)),)
    lengths = (3, 9, 5)
    feeds = [{"ids": np.ones((1, n), np.int64)} for n in lengths]
    for i, feed in enumerate(feeds):
        np.savez(tmp_path / f"{i}.npz", **feed)  # type: ignore[arg-type]
    for data in (feeds, iter(feeds), tmp_path):
        assert tuple(sample["ids"].shape[1] for sample in open_source(data, spec)) == lengths


def test_inputs_of_unknown_or_no_rank() -> None:
    anything = (InputSpec("x", np.dtype(np.float32), None),)
    assert next(iter(open_source(X, anything)))["x"].shape == (1, 3, 4)
    scalar = (InputSpec("t", np.dtype(np.float32), ()),)
    source = open_source({"t": f32([1, 2, 3])}, scalar)
    assert [sample["t"].shape for sample in source] == [(), (), ()]
    assert [float(s["t"]) for s in open_source([{"t": 1.5}, {"t": 2.5}], scalar)] == [1.5, 2.5]


def test_a_first_axis_that_is_no_batch() -> None:
    image = (InputSpec("x", np.dtype(np.float32), (3, 4)),)
    source = open_source({"x": X}, image)
    assert len(source) == 7
    np.testing.assert_array_equal(next(iter(source))["x"], X[0])


@pytest.mark.parametrize("kind", ["npz", "dict", "folder of npy", "folder of npz"])
def test_fixed_batch_is_filled_from_consecutive_samples(kind: str, tmp_path: pathlib.Path) -> None:
    batch = (InputSpec("x", np.dtype(np.float32), (2, 3, 4)),)
    source = open_source(KINDS[kind](tmp_path), batch)
    assert len(source) == 3
    np.testing.assert_array_equal(np.concatenate([sample["x"] for sample in source]), X[:6])
    np.testing.assert_array_equal(next(iter(source.subset(1, seed=0)))["x"].shape, (2, 3, 4))
    assert source.notes == ("1 of 7 calibration samples are not used: the model's batch is 2",)


def test_complete_batches_stay_as_they_are(tmp_path: pathlib.Path) -> None:
    batch = (InputSpec("x", np.dtype(np.float32), (2, 3, 4)),)
    source = open_source({"x": X[:6].reshape(3, 2, 3, 4)}, batch)
    assert len(source) == 3
    assert source.notes == ()
    np.testing.assert_array_equal(np.concatenate([sample["x"] for sample in source]), X[:6])


def test_arrays_belong_to_the_caller() -> None:
    source = open_source({"x": X}, ONE)
    for sample in source:
        sample["x"][:] = 0
    assert source.digest == open_source({"x": X}, ONE).digest


def test_data_that_change_between_passes() -> None:
    rng = np.random.default_rng(0)
    augmented = open_source(lambda: noisy(rng), ONE)
    with pytest.raises(CalibrationError, match=r"changed between two passes \(.*sample 0\)"):
        list(augmented)
    shrinking = [{"x": x[None]} for x in X]
    source = open_source(shrinking, ONE)
    shrinking.pop()
    with pytest.raises(CalibrationError, match=r"sample 6.*found nothing"):
        list(source)


def noisy(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for x in X:
        yield {"x": (x[None] + rng.normal()).astype(np.float32)}


def test_temporary_file_disappears(tmp_path: pathlib.Path) -> None:
    source: CalibrationSource | None = open_source(generator(), ONE, spool_folder=str(tmp_path))
    assert isinstance(source, SpooledSource)
    assert list(tmp_path.iterdir()) == []  # it has no name from the start
    del source
    gc.collect()


def test_no_space_to_store_samples(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be stored"):
        open_source(generator(), ONE, spool_folder=str(tmp_path / "missing"))


def test_errors_of_the_users_own_generator_are_not_explained_away() -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"x": X[:1]}
        raise FileNotFoundError("my file")

    with pytest.raises(FileNotFoundError, match="my file"):
        open_source(broken(), ONE)


BIG = (InputSpec("x", np.dtype(np.float32), (None, 64, 1024)),)


@pytest.mark.parametrize("kind", ["npz", "compressed npz", "npy", "folder", "generator"])
def test_memory_holds_one_sample(kind: str, tmp_path: pathlib.Path) -> None:
    def feeds(count: int) -> Iterator[dict[str, Any]]:
        for i in range(count):
            yield {"x": np.full((1, 64, 1024), i, np.float32)}

    count, size = 24, 64 * 1024 * 4
    data: object = tmp_path / f"data.{'npy' if kind == 'npy' else 'npz'}"
    x = np.concatenate([feed["x"] for feed in feeds(count)])
    if kind == "npz":
        np.savez(tmp_path / "data.npz", x=x)
    elif kind == "compressed npz":
        np.savez_compressed(tmp_path / "data.npz", x=x)
    elif kind == "npy":
        np.save(tmp_path / "data.npy", x)
    elif kind == "folder":
        data = tmp_path
        for i in range(count):
            np.savez(tmp_path / f"{i:03}.npz", x=x[[i]])
    else:
        data = feeds(count)
    del x
    tracemalloc.start()
    source = open_source(data, BIG)
    for sample in source:
        assert sample["x"].shape == (1, 64, 1024)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * size  # of 24
