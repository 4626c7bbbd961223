"""One file: the same bytes every time, and nothing but those bytes is accepted."""

from __future__ import annotations

import os
import pathlib
import shutil
import stat
import zipfile
from collections.abc import Callable

import pytest

from postquant.pipeline.bundle.archive import extract_archive, write_archive
from postquant.pipeline.bundle.check import check_files
from postquant.pipeline.bundle.manifest import Manifest
from postquant.pipeline.verify_folder import verify_archive
from postquant.runtime_ops.errors import ModelError, OutputError, PostquantError


@pytest.fixture(scope="module")
def archive(made: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("archive") / "bundle.zip"
    write_archive(made, path)
    return path


def _refused(path: pathlib.Path, tmp_path: pathlib.Path, words: str) -> None:
    """The archive is refused, and nothing is written beside the folder it is read into."""
    folder = tmp_path / "inside" / "bundle"
    folder.mkdir(parents=True)
    before = {place for place in tmp_path.rglob("*") if folder not in place.parents}
    with pytest.raises(ModelError, match=words):
        extract_archive(path, folder)
    assert {place for place in tmp_path.rglob("*") if folder not in place.parents} == before
    assert not any(place.is_symlink() for place in tmp_path.rglob("*"))


def _changed(
    archive: pathlib.Path,
    path: pathlib.Path,
    change: Callable[[zipfile.ZipInfo, bytes], list[tuple[zipfile.ZipInfo, bytes]]],
) -> pathlib.Path:
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            for entry, content in change(info, source.read(info)):
                target.writestr(entry, content, entry.compress_type)
    return path


def test_the_same_bytes_every_time(made: pathlib.Path, archive: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = shutil.copytree(made, tmp_path / "copy")
    for path in copy.rglob("*"):
        os.utime(path, (10**9, 10**9))
    write_archive(copy, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_extracting_gives_the_files(made: pathlib.Path, archive: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    extract_archive(archive, folder)
    for name in Manifest.load(made).files:
        assert (folder / name).read_bytes() == (made / name).read_bytes()
    assert all(check.passed for check in check_files(folder))


def test_verifying_it(archive: pathlib.Path) -> None:
    assert all(check.passed for check in verify_archive(archive))


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "a/../../evil", "C:/evil", "a\\evil", "./evil", "a//b", "nul\x01"]
)
def test_paths_that_lead_outside(name: str, archive: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def add(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
        if info.filename != "README.md":
            return [(info, content)]
        evil = zipfile.ZipInfo("evil")
        evil.filename, evil.external_attr = name, info.external_attr
        return [(info, content), (evil, b"evil")]

    _refused(_changed(archive, tmp_path / "bad.zip", add), tmp_path, "damaged")


def test_links(archive: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def link(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
        if info.filename == "README.md":
            info.external_attr, content = (stat.S_IFLNK | 0o777) << 16, b"/etc/passwd"
        return [(info, content)]

    _refused(_changed(archive, tmp_path / "bad.zip", link), tmp_path, "a link or no plain file")


def test_bombs(archive: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def pack(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
        if info.filename == "README.md":
            info.compress_type, content = zipfile.ZIP_DEFLATED, b"\0" * (1 << 24)
        return [(info, content)]

    _refused(_changed(archive, tmp_path / "bad.zip", pack), tmp_path, "compressed or encrypted")


def test_other_files(archive: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def more(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
        other = zipfile.ZipInfo("zzz")
        other.external_attr = info.external_attr
        return [(info, content), (other, b"")] if info.filename == "README.md" else [(info, content)]

    def fewer(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
        return [] if info.filename == "report.json" else [(info, content)]

    def without_manifest(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
        return [] if info.filename == "manifest.json" else [(info, content)]

    for number, (change, words) in enumerate(
        (
            (more, "not those of its manifest: zzz"),
            (fewer, "not those of its.*report.json"),
            (without_manifest, "no man"),
        )
    ):
        place = tmp_path / str(number)
        place.mkdir()
        _refused(_changed(archive, place / "bad.zip", change), place, words)


def test_a_newer_format(archive: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def newer(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
        return [(info, content.replace(b'"schema_version": 1', b'"schema_version": 2'))]

    _refused(_changed(archive, tmp_path / "bad.zip", newer), tmp_path, "newer format.*install a newer postquant")


def test_what_is_no_archive(tmp_path: pathlib.Path, archive: pathlib.Path) -> None:
    content = archive.read_bytes()
    for number, bad in enumerate(
        (b"", b"PK", content[:-1], content[: len(content) // 2], content + b"\0", b"\0" + content)
    ):
        place = tmp_path / str(number)
        place.mkdir()
        (place / "bad.zip").write_bytes(bad)
        _refused(place / "bad.zip", place, "damaged")
    with pytest.raises(ModelError, match="there is no such bundle"):
        verify_archive(tmp_path / "absent.zip")


def test_where_it_cannot_be_written(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(OutputError, match="cannot be written as one file"):
        write_archive(made, tmp_path / "absent" / "bundle.zip")
    broken = shutil.copytree(made, tmp_path / "broken")
    (broken / "quant.toml").unlink()
    with pytest.raises(OutputError, match=r"quant\.toml"):
        write_archive(broken, tmp_path / "bundle.zip")
    assert not (tmp_path / "bundle.zip").exists()
    with pytest.raises(PostquantError, match="there is no bundle"):
        write_archive(tmp_path, tmp_path / "bundle.zip")
