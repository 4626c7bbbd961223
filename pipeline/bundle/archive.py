"""A bundle as one ``.zip`` file: :func:`write_archive`, :func:`extract_archive`.

An archive holds the files of the manifest, sorted, not compressed, with one date and one mode. So it is the same to the
byte whatever wrote it, and a reader can hold every byte of an archive to that: what is not exactly the archive of its
files is damaged. Being stored as they are, files cannot grow when they are read.
"""

from __future__ import annotations

import filecmp
import os
import pathlib
import shutil
import stat
import tempfile
import zipfile

from postquant.pipeline.bundle.manifest import LARGEST_BYTES, Manifest, check_path
from postquant.pipeline.output import MANIFEST_FILE, SIGNATURE_FILE, is_disk_full
from postquant.runtime_ops.errors import ModelError, OutputError

_OLDEST = (1980, 1, 1, 0, 0, 0)
_MODE = (stat.S_IFREG | 0o644) << 16
_UNIX = 3
_MOST_FILES = 10_000
_BLOCK = 1 << 20


def write_archive(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Writes the bundle in ``folder`` to one file, whole or not at all.

    Args:
        folder: A bundle.
        path: The archive; an older one is replaced.

    Raises:
        ModelError: If ``folder`` is no bundle.
        OutputError: If a file is missing, or the archive cannot be written.
    """
    names = _names(folder, Manifest.load(folder))
    if path.exists() and any(os.path.samefile(path, folder / name) for name in names if (folder / name).exists()):
        raise OutputError("the archive would replace a file of the bundle", where=str(path), hint="give another name")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _not_written(path, error) from None
    try:
        with os.fdopen(handle, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name in names:
                    _add(archive, folder / name, name)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise _not_written(path, error) from None
    except BaseException:
        os.unlink(temporary)
        raise


def extract_archive(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Reads an archive into an empty folder; nothing is ever written outside of it.

    Args:
        path: The archive.
        folder: An empty folder. When this fails, what is in it means nothing.

    Raises:
        ModelError: If the archive is not, to the byte, what :func:`write_archive` writes: damaged or truncated, with
            paths that lead out of it, links, compressed entries, other files than its manifest names, or a manifest of
            a newer format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _extract(archive, path, folder)
    except FileNotFoundError:
        raise ModelError("there is no such bundle", where=str(path)) from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OverflowError) as error:
        raise _damaged(path, str(error) or "a cut file") from None
    except OSError as error:
        if is_disk_full(error):
            raise OutputError("there is no room to read the bundle", where=str(folder)) from None
        raise _damaged(path, error.strerror or str(error)) from None
    # Dates, comments, gaps and every other byte that files do not tell.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="postquant-") as temporary:
        again = pathlib.Path(temporary) / "bundle.zip"
        write_archive(folder, again)
        if not filecmp.cmp(path, again, shallow=False):
            raise _damaged(path, "bytes that do not belong to its files")


def _extract(archive: zipfile.ZipFile, path: pathlib.Path, folder: pathlib.Path) -> None:
    entries = archive.infolist()
    if len(entries) > _MOST_FILES:
        raise _damaged(path, f"{len(entries)} files")
    size = path.stat().st_size
    sizes: dict[str, int] = {}
    for entry in entries:
        check_path(entry.orig_filename)
        if entry.orig_filename != entry.filename or entry.filename in sizes:
            raise _damaged(path, f"an entry {entry.orig_filename[:100]!r} with two names, or there twice")
        if entry.external_attr != _MODE:
            raise _damaged(path, f"{entry.filename}, which is a link or no plain file")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise _damaged(path, f"{entry.filename}, which is compressed or encrypted")
        if entry.file_size != entry.compress_size or entry.file_size > size:
            raise _damaged(path, f"{entry.filename}, which is larger than the archive")
        sizes[entry.filename] = entry.file_size
    if sizes.get(MANIFEST_FILE, LARGEST_BYTES + 1) > LARGEST_BYTES:
        raise _damaged(path, f"no {MANIFEST_FILE}")
    manifest = Manifest.from_bytes(archive.read(MANIFEST_FILE), f"{path}:{MANIFEST_FILE}")
    wanted = {name: entry.bytes for name, entry in manifest.files.items()}
    own = {MANIFEST_FILE: sizes[MANIFEST_FILE]}
    if manifest.signer is not None:
        own[SIGNATURE_FILE] = sizes.get(SIGNATURE_FILE, 0)
    if sizes != wanted | own:
        odd = sorted(name for name in {*sizes, *wanted} if sizes.get(name) != (wanted | own).get(name))
        raise _damaged(path, f"files that are not those of its manifest: {', '.join(odd[:3]) or SIGNATURE_FILE}")
    for entry in entries:
        place = folder / entry.filename
        place.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entry) as source, open(place, "xb") as target:
            shutil.copyfileobj(source, target, _BLOCK)


def _names(folder: pathlib.Path, manifest: Manifest) -> list[str]:
    signature = [] if manifest.signer is None else [SIGNATURE_FILE]
    return sorted([*manifest.files, MANIFEST_FILE, *signature])


def _add(archive: zipfile.ZipFile, source: pathlib.Path, name: str) -> None:
    info = zipfile.ZipInfo(name, _OLDEST)
    info.external_attr = _MODE
    info.create_system = _UNIX
    info.file_size = source.stat().st_size
    with open(source, "rb") as file, archive.open(info, "w") as target:
        shutil.copyfileobj(file, target, _BLOCK)


def _not_written(path: pathlib.Path, error: OSError) -> OutputError:
    found = "a full disk" if is_disk_full(error) else error.strerror or str(error)
    where = str(error.filename or path)
    return OutputError("the bundle cannot be written as one file", where=where, found=found)


def _damaged(path: pathlib.Path, found: str) -> ModelError:
    return ModelError(
        "the bundle is damaged", where=str(path), found=found, hint="fetch it again from where it was made"
    )
