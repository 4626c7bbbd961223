"""No mutated bundle verifies, and none makes the reader crash or write elsewhere.

``POSTQUANT_MUTATIONS=1000`` tries as many of each kind instead of a few.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postquant.pipeline.bundle.archive import write_archive
from postquant.pipeline.bundle.check import check_files
from postquant.pipeline.bundle.manifest import Manifest
from postquant.pipeline.verify_folder import verify_archive, verify_folder
from postquant.runtime_ops.errors import PostquantError

_SETTINGS = settings(
    max_examples=int(os.environ.get("POSTQUANT_MUTATIONS", "30")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)


@pytest.fixture(scope="module")
def archive(made: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("archive") / "bundle.zip"
    write_archive(made, path)
    return path.read_bytes()


@st.composite
def _edits(draw: st.DrawFn, size: int) -> tuple[str, int, bytes]:
    """What is done, where, and with which bytes."""
    kind = draw(st.sampled_from(("replace", "insert", "delete", "cut", "swap")))
    # The directory at the end of an archive is small, and what is in it matters most.
    at = draw(st.one_of(st.integers(0, size - 1), st.integers(max(0, size - 3000), size - 1)))
    return kind, at, draw(st.binary(min_size=1, max_size=8))


def _edited(content: bytes, edit: tuple[str, int, bytes]) -> bytes:
    kind, at, new = edit
    if kind == "replace":
        return content[:at] + new + content[at + len(new) :]
    if kind == "insert":
        return content[:at] + new + content[at:]
    if kind == "delete":
        return content[:at] + content[at + len(new) :]
    if kind == "cut":
        return content[:at]
    far = (at * 7919 + len(new)) % len(content)
    swapped = bytearray(content)
    swapped[at], swapped[far] = swapped[far], swapped[at]
    return bytes(swapped)


def _archive_is_refused(content: bytes, edit: tuple[str, int, bytes]) -> None:
    changed = _edited(content, edit)
    if changed == content:
        return
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        (place / "bundle.zip").write_bytes(changed)
        try:
            checks = verify_archive(place / "bundle.zip")
        except PostquantError:
            checks = ()
        assert not checks or not all(check.passed for check in checks)
        assert [path.name for path in place.iterdir()] == ["bundle.zip"]


def _folder_is_refused(made: pathlib.Path, name: str, edit: tuple[str, int, bytes]) -> None:
    content = (made / name).read_bytes()
    kind, at, new = edit
    changed = _edited(content, (kind, at % len(content), new))
    if changed == content:
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(made, pathlib.Path(folder) / "out")
        (copy / name).write_bytes(changed)
        try:
            checks = verify_folder(copy)
        except PostquantError:
            return
        assert not all(check.passed for check in checks)


def _names(made: pathlib.Path) -> list[str]:
    return [*Manifest.load(made).files, "manifest.json"]


@_SETTINGS
@given(data=st.data())
def test_mutated_archives(archive: bytes, data: st.DataObject) -> None:
    _archive_is_refused(archive, data.draw(_edits(len(archive))))


@_SETTINGS
@given(data=st.data())
def test_mutated_folders(made: pathlib.Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(_names(made)))
    _folder_is_refused(made, name, data.draw(_edits(1 << 16)))


def test_missing_and_additional_files(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for number, name in enumerate(_names(made)[:-1]):
        copy = shutil.copytree(made, tmp_path / str(number))
        (copy / name).unlink()
        assert not check_files(copy)[0].passed
        shutil.rmtree(copy)
    copy = shutil.copytree(made, tmp_path / "more")
    (copy / "encodings" / "other.json").write_text("{}")
    assert "encodings/other.json is not in the manifest" in check_files(copy)[0].detail
    (copy / "encodings" / "other.json").unlink()
    (copy / "notes.txt").write_text("a receiver may keep notes beside the files")
    assert check_files(copy)[0].passed
    content = (copy / "README.md").read_bytes()
    (copy / "README.md").unlink()
    (tmp_path / "elsewhere").write_bytes(content)
    (copy / "README.md").symlink_to(tmp_path / "elsewhere")
    assert "README.md is or lies behind a link" in check_files(copy)[0].detail
