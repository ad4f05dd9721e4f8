"""A party's Ed25519 key in its folder: made there, readable by its owner only, never leaving it."""

import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from common.errors import ConfigError, SiteError
from common.files import write_atomically

KEY_FILE, PUBLIC_FILE = "identity.key", "identity.pub"


def make_identity(folder: Path) -> Path:
    """Make a site's key, readable by its owner only, and its public half beside it. Returns the public file.

    Raises:
        ConfigError: there is a key already; another one would lock the site out of its consortium.
    """
    if (folder / KEY_FILE).exists():
        raise ConfigError(
            f"{folder / KEY_FILE} exists already.", "Keep it: a site has one key. Move it away to make another."
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    identity = Ed25519PrivateKey.generate()
    public = identity.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_atomically(folder / PUBLIC_FILE, public)  # first: without a key beside it, it is written again
    write_atomically(
        folder / KEY_FILE, identity.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600
    )
    return folder / PUBLIC_FILE


def read_public(path: Path) -> bytes:
    """The 32 bytes of a site's public key file. Raises ConfigError for anything else."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.", f"Give the {PUBLIC_FILE} of a site.") from None
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} holds no Ed25519 public key.", f"Give the {PUBLIC_FILE} that the site made.")
    return key.public_bytes_raw()


def load_identity(folder: Path) -> Ed25519PrivateKey:
    """The site's private key. Raises SiteError: no key, no Ed25519 key, or one that others can read."""
    return load_private_key(folder / KEY_FILE)


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """A private key as ``make_identity`` writes it. Raises SiteError like ``load_identity``."""
    try:
        if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
            raise SiteError(f"{path} can be read by others than its owner.", f"chmod 600 {path}")
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise SiteError(
            f"Cannot read {path}: {error.strerror}.", "Make a key: `synthward site keygen FOLDER`."
        ) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise SiteError(f"{path} holds no Ed25519 private key.", "Restore the key that the roster knows.")
    return key
