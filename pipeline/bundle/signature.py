"""Ed25519 signatures of manifests: :func:`read_private_key`, :func:`sign`, :func:`check_signature`.

The signature is that of the bytes of ``manifest.json``, which holds the digests of all other files. It is 64 bytes long
and stands alone in ``manifest.sig``, so that OpenSSL can check it too (docs/bundle.md).
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from postquant.runtime_ops.errors import ConfigError, VerificationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_LARGEST_KEY = 1 << 16


def read_private_key(path: pathlib.Path) -> Ed25519PrivateKey:
    """The key of a PEM file without password.

    Raises:
        ConfigError: If it is missing or no Ed25519 key, or the package ``cryptography`` is not installed.
    """
    _check_installed()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_content(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(path, "private", _reason(error)) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, "private", type(key).__name__)
    return key


def read_public_key(path: pathlib.Path) -> str:
    """The 32 bytes of a public key of a PEM file, in hex.

    Raises:
        ConfigError: As for :func:`read_private_key`.
    """
    _check_installed()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_content(path))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(path, "public", _reason(error)) from None
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(path, "public", type(key).__name__)
    return key.public_bytes_raw().hex()


def public_key_of(key: Ed25519PrivateKey) -> str:
    """The public key that belongs to a private one, in hex."""
    return key.public_key().public_bytes_raw().hex()


def sign(key: Ed25519PrivateKey, content: bytes) -> bytes:
    """The 64 bytes of the signature."""
    return key.sign(content)


def check_signature(signer: str, signature: bytes, content: bytes) -> None:
    """Checks that ``signature`` of ``content`` was made with the key whose public half is ``signer``.

    Raises:
        VerificationError: If it was not.
        ConfigError: If the package ``cryptography`` is not installed.
    """
    _check_installed()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer)).verify(signature, content)
    except (InvalidSignature, ValueError):
        raise VerificationError("the signature is not that of the manifest", where=f"key {signer[:64]}") from None


def _content(path: pathlib.Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_LARGEST_KEY)
    except OSError as error:
        raise ConfigError("the key cannot be read", where=str(path), found=error.strerror or str(error)) from None


def _reason(error: Exception) -> str:
    """The first sentence; what follows is about programs that call the package, with links."""
    return str(error).split(". ")[0]


def _no_key(path: pathlib.Path, half: str, found: str) -> ConfigError:
    hint = (
        "make one with: openssl genpkey -algorithm ed25519 -out key.pem"
        if half == "private"
        else "make one with: openssl pkey -in key.pem -pubout -out public.pem"
    )
    expected = f"an Ed25519 {half} key in PEM without password"
    return ConfigError(
        "the key is not usable", where=str(path), expected=expected, found=found.split("\n")[0], hint=hint
    )


def _check_installed() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError("signatures need the package cryptography", hint="pip install 'postquant[sign]'") from None
