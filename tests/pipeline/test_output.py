"""The output folder: checked by writing, and changed only when a whole result is there."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil

import pytest

from postquant.pipeline.output import (
    check_inputs_stay,
    check_space,
    output_error,
    output_folder,
    publish,
    put_aside,
)
from postquant.runtime_ops.errors import OutputError


def _stage(folder: pathlib.Path, **files: str) -> pathlib.Path:
    staging = folder / "out" / "staging"
    staging.mkdir(parents=True)
    for name, text in files.items():
        (staging / name.replace("__", ".")).write_text(text)
    return staging


def test_makes_the_folder_and_leaves_no_empty_one(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "a" / "b"
    with output_folder(out):
        assert list(out.iterdir()) == []
    assert not out.exists()
    with output_folder(out):
        (out / "file").touch()
    assert (out / "file").exists()
    (out / "file").unlink()
    with output_folder(out):
        pass
    assert out.exists()  # it was there before


def test_a_file_in_the_way(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="the output folder is a file"), output_folder(tmp_path / "file"):
        pass
    with (
        pytest.raises(OutputError, match="a file where a folder is needed"),
        output_folder(tmp_path / "file" / "below"),
    ):
        pass


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="no permission"), output_folder(tmp_path):
        pass


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="needs /proc")
def test_a_place_where_nothing_can_be_made() -> None:
    with (
        pytest.raises(OutputError, match="the output folder cannot be written"),
        output_folder(pathlib.Path("/proc/postquant")),
    ):
        pass


def test_a_full_disk_is_found_before_any_work(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"too full.*at least 2.0 MB free"):
        check_space(tmp_path, 2_000_000)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OutputError, match=r"disk of the output folder is full.*run the same command again"),
        output_folder(tmp_path),
    ):
        pass


def test_the_source_model_is_never_replaced(tmp_path: pathlib.Path) -> None:
    model = tmp_path / "model.onnx"
    model.touch()
    with pytest.raises(OutputError, match="would replace a file that the run reads"):
        check_inputs_stay(tmp_path, (model,))


@pytest.mark.parametrize("name", ["encodings/vendor.json", "quant.toml", "conformance/0/x.npz", "manifest.sig"])
def test_what_a_bundle_replaces(name: str, tmp_path: pathlib.Path) -> None:
    """Folders of an older bundle go with everything in them, also with a link to a file elsewhere."""
    (tmp_path / "elsewhere").write_text("x")
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="would replace a file that the run reads"):
        check_inputs_stay(tmp_path / "out", (path,))


def test_other_files_may_lie_in_the_folder(tmp_path: pathlib.Path) -> None:
    for name in ("mine.toml", "encodings.json", "more/encodings/vendor.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        check_inputs_stay(tmp_path, (path, tmp_path / "missing"))


def test_publishing_replaces_an_old_result_and_an_old_failure(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    staging = _stage(tmp_path, model__onnx="new", plan__safetensors="p", report__json="r")
    (out / "model.onnx").write_text("old")
    (out / "model.onnx.data").write_text("old data")
    (out / "notes.txt").write_text("the user's own")
    put_aside(_stage(tmp_path / "x", model__onnx="bad"), out, "why")
    publish(staging, out)
    assert (out / "model.onnx").read_text() == "new"
    assert not (out / "model.onnx.data").exists()
    assert not (out / "failed-verification").exists()
    assert (out / "notes.txt").exists()
    assert list(staging.iterdir()) == []


def test_the_report_goes_first_and_comes_last(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    staging = _stage(tmp_path, model__onnx="new", plan__safetensors="p", report__json="r")
    (out / "report.json").write_text("old")
    real, moved = os.replace, []

    def replace(source: pathlib.Path, to: pathlib.Path) -> None:
        assert not (out / "report.json").exists()
        moved.append(pathlib.Path(to).name)
        real(source, to)

    monkeypatch.setattr(os, "replace", replace)
    publish(staging, out)
    assert moved == ["plan.safetensors", "model.onnx", "report.json"]


def test_a_failed_result_is_kept_aside(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    failed = out / "failed-verification"
    for text in ("first", "second"):
        staging = _stage(tmp_path, model__onnx=text)
        (out / "model.onnx").write_text("good")
        assert put_aside(staging, out, "the simulation differs.") == failed
        assert (failed / "model.onnx").read_text() == text
    assert (out / "model.onnx").read_text() == "good"
    assert "Do not use these files" in (failed / "README.txt").read_text()
    assert "the simulation differs." in (failed / "README.txt").read_text()


def test_errors_say_why() -> None:
    assert "read-only" in str(output_error(OSError(errno.EROFS, ""), pathlib.Path("o")))
    assert "no permission" in str(output_error(OSError(errno.EACCES, ""), pathlib.Path("o")))
    assert "Input/output error" in str(output_error(OSError(errno.EIO, os.strerror(errno.EIO)), pathlib.Path("o")))
