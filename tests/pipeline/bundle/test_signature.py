"""Signatures: made with a key of OpenSSL's format, checked with and without the public half."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from postquant.pipeline.bundle.archive import write_archive
from postquant.pipeline.bundle.check import check_files
from postquant.pipeline.bundle.complete import complete_bundle
from postquant.pipeline.bundle.manifest import Manifest
from postquant.pipeline.bundle.signature import read_private_key, read_public_key
from postquant.pipeline.cli import app
from postquant.runtime_ops.errors import ConfigError, ModelError

pytest.importorskip("cryptography", reason="signatures need the extra sign")
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)


def _write_keys(folder: pathlib.Path, name: str, seed: int) -> tuple[pathlib.Path, pathlib.Path]:
    key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def signed(made: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    folder = shutil.copytree(made, tmp_path / "out")
    private, _ = _write_keys(tmp_path, "own", 1)
    _write_keys(tmp_path, "other", 2)
    complete_bundle(folder, sign_with=private)
    return folder


def _signature(folder: pathlib.Path, public: pathlib.Path | None) -> tuple[bool, str]:
    check = check_files(folder, None if public is None else read_public_key(public))[1]
    return check.passed, check.detail


def test_signed_and_checked(signed: pathlib.Path, made: pathlib.Path) -> None:
    assert _signature(signed, signed.parent / "own.pub")[0]
    passed, detail = _signature(signed, None)
    assert passed
    assert "nobody vouches for" in detail
    assert _signature(signed, signed.parent / "other.pub") == (False, f"signed with another key, {_hex(signed)}")
    assert _signature(made, signed.parent / "own.pub") == (False, "the bundle is not signed")
    assert _signature(made, None) == (True, "not signed")


def _hex(folder: pathlib.Path) -> str:
    signer = Manifest.load(folder).signer
    assert signer is not None
    return signer


def test_changes_make_it_void(signed: pathlib.Path) -> None:
    manifest = (signed / "manifest.json").read_bytes()
    signature = (signed / "manifest.sig").read_bytes()
    for bad in (signature[:-1], signature + b"\0", bytes(64), b""):
        (signed / "manifest.sig").write_bytes(bad)
        assert not _signature(signed, None)[0]
    (signed / "manifest.sig").unlink()
    assert "No such file" in _signature(signed, None)[1]
    (signed / "manifest.sig").write_bytes(signature)
    assert _signature(signed, None)[0]
    complete_bundle(signed, origin="elsewhere")
    assert not (signed / "manifest.sig").exists()
    assert _signature(signed, None) == (True, "not signed")
    (signed / "manifest.sig").write_bytes(signature)
    assert "nobody signed" in _signature(signed, None)[1]
    (signed / "manifest.json").write_bytes(manifest)
    assert _signature(signed, signed.parent / "own.pub")[0]


def test_signing_is_reproducible(signed: pathlib.Path, made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = shutil.copytree(made, tmp_path / "again")
    complete_bundle(other, sign_with=signed.parent / "own.pem")
    write_archive(signed, tmp_path / "one.zip")
    write_archive(other, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on this machine")
def test_openssl_checks_it_too(signed: pathlib.Path) -> None:
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "../own.pub", "-rawin"]
    done = subprocess.run(
        [*command, "-in", "manifest.json", "-sigfile", "manifest.sig"],
        cwd=signed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout


def test_keys_that_are_none(tmp_path: pathlib.Path) -> None:
    private, public = _write_keys(tmp_path, "own", 1)
    other = tmp_path / "ec.pem"
    elliptic = generate_private_key(SECP256R1())
    other.write_bytes(elliptic.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "text").write_text("no key")
    for path in (public, other, tmp_path / "text"):
        with pytest.raises(ConfigError, match=r"the key is not usable.*openssl genpkey"):
            read_private_key(path)
    for path in (private, other, tmp_path / "text"):
        with pytest.raises(ConfigError, match=r"the key is not usable.*openssl pkey"):
            read_public_key(path)
    with pytest.raises(ConfigError, match="the key cannot be read"):
        read_private_key(tmp_path / "absent")


def test_without_the_package(made: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, _ = _write_keys(tmp_path, "own", 1)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"signatures need the package cryptography; pip install 'postquant\[sign\]'"):
        complete_bundle(made, sign_with=private)


def test_the_commands(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = shutil.copytree(made, tmp_path / "out")
    private, public = _write_keys(tmp_path, "own", 1)
    _, other = _write_keys(tmp_path, "other", 2)
    runner, packed = CliRunner(), tmp_path / "out.zip"
    done = runner.invoke(
        app, ["bundle", str(folder), "--zip", str(packed), "--sign", str(private), "--licence", "Apache-2.0"]
    )
    assert done.exit_code == 0, done.output
    assert "signed, " in done.stdout
    for place in (folder, packed):
        good = runner.invoke(app, ["verify", str(place), "--public-key", str(public)])
        assert good.exit_code == 0, good.output
        assert "ok     signature: made with the given key" in good.stdout
        bad = runner.invoke(app, ["verify", str(place), "--public-key", str(other)])
        assert bad.exit_code == 3
        assert "signed with another key" in bad.stderr
    missing = runner.invoke(app, ["bundle", str(tmp_path)])
    assert missing.exit_code == 2
    assert "there is no result to make a bundle of" in missing.stderr
    with pytest.raises(ModelError, match="there is no bundle"):
        Manifest.load(tmp_path)
