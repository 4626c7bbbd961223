"""Wrong calibration data: one clear sentence, before any work."""

import pathlib
import re
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from postquant.calib.input_spec import InputSpec
from postquant.calib.open_source import open_source
from postquant.runtime_ops.errors import CalibrationError

F32 = np.dtype(np.float32)
ONE = (InputSpec("x", F32, (None, 3, 4)),)
TWO = (InputSpec("x", F32, (None, 3, 4)), InputSpec("y", F32, (None, 2)))
BATCH = (InputSpec("x", F32, (4, 3, 4)),)
GOOD = np.zeros((5, 3, 4), np.float32)


def with_bad(value: float, sample: int) -> npt.NDArray[np.float32]:
    array = GOOD.copy()
    array[sample, 1, 2] = value
    return array


def refused(data: object, specs: tuple[InputSpec, ...], *parts: str, **options: Any) -> None:
    with pytest.raises(CalibrationError) as caught:
        open_source(data, specs, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    for part in parts:
        assert part in text, text


ARRAYS: dict[str, tuple[Any, ...]] = {
    "no samples": (GOOD[:0], ONE, "no samples"),
    "uint8": (GOOD.astype(np.uint8), ONE, "wrong dtype", "expected float32, found uint8", "preprocessing"),
    "float64": (GOOD.astype(np.float64), ONE, "wrong dtype", "found float64", ".astype(numpy.float32)"),
    "byte order": (GOOD.astype(">f4"), ONE, "wrong dtype", "found >f4"),
    "rank": (GOOD[:, :, :, None, None], ONE, "wrong shape", "float32 [?, 3, 4]", "[5, 3, 4, 1, 1]"),
    "bare row": (GOOD[0], ONE, "wrong shape", "[3, 4]"),
    "no axis": (np.array(1.0), (InputSpec("x", np.dtype(np.float64), (None,)),), "wrong shape", "[]"),
    "shape": (GOOD[:, :2], ONE, "wrong shape", "[5, 2, 4]"),
    "NaN": (with_bad(np.nan, 3), ONE, "NaN or infinity", "input 'x', sample 3", "1 NaN and 0 infinite of 12"),
    "infinity": (with_bad(-np.inf, 0), ONE, "input 'x', sample 0", "0 NaN and 1 infinite"),
    "small for the batch": (GOOD[:3], BATCH, "do not fill a single batch", "at least 4 samples", "found 3"),
    "objects": (np.array([[None]], object), ONE, "found object"),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("how", ["array", "npz", "npy"])
def test_wrong_arrays(name: str, how: str, tmp_path: pathlib.Path) -> None:
    array, specs, *parts = ARRAYS[name]
    data: object = array
    if how == "npz":
        np.savez(tmp_path / "d.npz", x=array)
        data = tmp_path / "d.npz"
    elif how == "npy":
        np.save(tmp_path / "d.npy", array)
        data = tmp_path / "d.npy"
    if name == "objects" and how != "array":
        parts = ["Python objects"]
    refused(data, specs, *(str(part) for part in parts))


@pytest.mark.parametrize("how", ["list", "generator", "npz", "dict"])
@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (["x"], ["add 'y'"]),
        (["x", "y", "z"], ["leave out 'z'"]),
        (["x", "z"], ["add 'y' and leave out 'z'"]),
        ([], ["found none"]),
    ],
)
def test_missing_and_extra_keys(keys: list[str], parts: list[str], how: str, tmp_path: pathlib.Path) -> None:
    feed = {key: (GOOD if key == "x" else np.zeros((5, 2), np.float32)) for key in keys}
    data: object = feed
    if how == "list":
        data = [feed]
    elif how == "generator":
        data = iter([feed])
    elif how == "npz":
        np.savez(tmp_path / "d.npz", **feed)  # type: ignore[arg-type]
        data = tmp_path / "d.npz"
    refused(data, TWO, "expected 'x', 'y'", *parts)


def test_one_array_under_another_key_names_both(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "d.npz", images=GOOD)
    refused(tmp_path / "d.npz", ONE, "expected 'x', found 'images'", "save the array under the key 'x'", "d.npz")


def test_unequal_numbers_of_samples(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "d.npz", x=GOOD, y=np.zeros((4, 2), np.float32))
    refused(tmp_path / "d.npz", TWO, "different numbers of samples", "5 of 'x', 4 of 'y'")


@pytest.mark.parametrize(
    ("feed", "parts"),
    [
        ({"x": GOOD[0]}, ["sample 1", "expected [?, 3, 4], found [3, 4]", "x[None]"]),
        ({"x": GOOD[:, :1]}, ["found [5, 1, 4]"]),
        ({"x": GOOD[:0]}, ["is empty", "[0, 3, 4]"]),
        ({"x": GOOD.astype(np.float64)}, ["found float64"]),
        ({"x": [["a"]]}, ["wrong dtype"]),
        ({"x": [[1.0], [1.0, 2.0]]}, ["not an array of numbers"]),
        ({"x": None}, ["wrong dtype"]),
        ("x", ["expected a dict with the keys 'x'", "type str"]),
        (with_bad(np.inf, 2), ["input 'x', sample 1", "1 infinite"]),
    ],
)
@pytest.mark.parametrize("one_shot", [False, True])
def test_wrong_feeds(feed: object, parts: list[str], one_shot: bool) -> None:
    feeds = [{"x": GOOD}, feed]
    refused(iter(feeds) if one_shot else feeds, ONE, *parts)


def test_numbers_without_dtype_must_be_exact() -> None:
    ids = (InputSpec("ids", np.dtype(np.int8), (None, 2)),)
    assert len(open_source([{"ids": [[1, 2]]}], ids)) == 1
    refused([{"ids": [[1, 200]]}], ids, "do not fit the input's dtype", "int8 [?, 2]")
    refused([{"ids": [[1, 0.5]]}], ids, "do not fit the input's dtype")


@pytest.mark.parametrize("data", [[], iter([]), (), list, {"x": GOOD[:0]}])
def test_no_samples(data: object) -> None:
    refused(data, ONE, "no samples")


@pytest.mark.parametrize("data", [5, None, object(), lambda: 5])
def test_no_data_at_all(data: object) -> None:
    refused(data, ONE, "type")


def test_array_for_several_inputs(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "d.npy", GOOD)
    refused(GOOD, TWO, "several inputs")
    refused(tmp_path / "d.npy", TWO, "several inputs", "'x', 'y'")
    refused(tmp_path, TWO, "folder of .npy files", "one subfolder")
    refused({"x": GOOD, "y": [1]}, TWO, "input 'y'", "type list")


def test_model_without_inputs() -> None:
    refused(GOOD, (), "no inputs")


def test_source_for_another_model() -> None:
    refused(open_source(GOOD, ONE), TWO, "other inputs")


def test_paths(tmp_path: pathlib.Path) -> None:
    refused(tmp_path / "missing.npz", ONE, "do not exist", "missing.npz")
    refused(tmp_path, ONE, "no calibration files", "say how they are preprocessed")
    (tmp_path / "d.csv").write_text("1,2")
    refused(tmp_path / "d.csv", ONE, "unknown kind", "'.csv'")
    (tmp_path / "x").mkdir()
    refused(tmp_path, ONE, "no .npy files")


def test_folders_that_do_not_fit_together(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "a.npz", x=GOOD)
    np.save(tmp_path / "b.npy", GOOD)
    refused(tmp_path, ONE, "mixes")
    parts = tmp_path / "parts"
    for name in ("x", "y"):
        (parts / name).mkdir(parents=True)
        np.save(parts / name / "0.npy", np.zeros((1, 3, 4) if name == "x" else (1, 2), np.float32))
    np.save(parts / "y" / "1.npy", np.zeros((1, 2), np.float32))
    refused(parts, TWO, "equally named", "'1.npy'")
    (parts / "z").mkdir()
    refused(parts, TWO, "leave out 'z'")
    refused(parts, (*TWO, InputSpec("w", F32, (None,))), "add 'w'")
    rows = tmp_path / "rows"
    rows.mkdir()
    np.save(rows / "0.npy", np.zeros((4, 3, 4), np.float32))
    np.save(rows / "1.npy", np.zeros((1, 4, 3, 4), np.float32))
    refused(rows, BATCH, "some files hold rows", "1.npy")


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize("how", ["truncated", "text", "empty", "flipped"])
def test_broken_files(suffix: str, how: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / f"d{suffix}"
    if suffix == ".npz":
        np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(50, 3, 4)).astype(np.float32))
    else:
        np.save(path, GOOD)
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) * 2 // 3]
    elif how == "text":
        data = bytearray(b"this is not an array\n" * 20)
    elif how == "empty":
        data = bytearray()
    else:
        data[len(data) // 2] ^= 0xFF
        if suffix == ".npy":
            data[:2] = b"??"
    path.write_bytes(data)
    refused(path, ONE, "cannot be read", path.name)
    refused(tmp_path, ONE, "cannot be read", path.name)


def test_npz_without_arrays(tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("notes.txt", "nothing")
    refused(tmp_path / "d.npz", ONE, "expected 'x', found none")


def test_rows_and_complete_batches_do_not_mix() -> None:
    specs = (InputSpec("x", F32, (2, 3)), InputSpec("y", F32, (2, 1)))
    data = {"x": np.zeros((4, 3), np.float32), "y": np.zeros((4, 2, 1), np.float32)}
    refused(data, specs, "some arrays hold rows")


def test_samples_of_one_batch_have_one_shape(tmp_path: pathlib.Path) -> None:
    for i, length in enumerate((3, 4)):
        np.save(tmp_path / f"{i}.npy", np.zeros((1, length), np.float32))
    refused(tmp_path, (InputSpec("x", F32, (2, None)),), "cannot share a batch", "[1, 3], [1, 4]")


def test_messages_have_no_python_traceback_text(tmp_path: pathlib.Path) -> None:
    (tmp_path / "d.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(CalibrationError) as caught:
        open_source(tmp_path / "d.npy", ONE)
    assert not re.search(r"Traceback|File \"", str(caught.value))
