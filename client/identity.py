"""Who a site is: its Ed25519 key, made at the site and never leaving it, and the roster that it has pinned."""

import os
import stat
from dataclasses import dataclass, field
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

from client.policy import Policy, set_roster_digest
from client.settings import SiteSettings
from common.errors import ConfigError, SiteError
from common.files import write_atomically
from common.secagg.roster import Roster, load_roster

KEY_FILE, PUBLIC_FILE, ROSTER_FILE = "identity.key", "identity.pub", "roster.json"


@dataclass(frozen=True)
class Member:
    """A site as a member of its consortium.

    Args:
        site: its name.
        identity: its private key.
        roster: the pinned roster, which has this site's public key.
        minimum_cohort: the site joins no sum over fewer sites.
    """

    site: str
    identity: Ed25519PrivateKey = field(repr=False)
    roster: Roster
    minimum_cohort: int


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


def load_member(settings: SiteSettings, policy: Policy, roster: Roster | None = None) -> Member:
    """The site's key and roster, checked against each other and against the digest that the policy pins.

    Args:
        settings: the site's.
        policy: the site's.
        roster: to check in place of the one in the site's folder.

    Raises:
        SiteError: no key, a key that others can read, no roster, another roster than the pinned one, or one that has
            another key for this site.
    """
    identity = load_identity(settings.folder)
    if not policy.roster_digest:
        raise SiteError("This site has pinned no roster.", "Pin it: `synthward site pin FOLDER ROSTER --digest HEX`.")
    roster = roster or _load_roster(settings.folder / ROSTER_FILE)
    if roster.digest != policy.roster_digest:
        raise SiteError(
            f"{settings.folder / ROSTER_FILE} is not the roster that this site has pinned.",
            "Compare `synthward roster digest` with the coordinator by telephone before you pin another.",
        )
    if roster.sites.get(settings.name) != identity.public_key().public_bytes_raw():
        raise SiteError(
            f"The roster has another key, or none, for {settings.name}.",
            f"Give the coordinator this site's {PUBLIC_FILE} and pin the new roster.",
        )
    return Member(settings.name, identity, roster, policy.minimum_cohort)


def pin_roster(settings: SiteSettings, roster: Roster) -> None:
    """Put the roster into the site's folder and its digest into the site's policy. Raises PolicyError without one."""
    set_roster_digest(settings.folder, roster.digest)
    roster.save(settings.folder / ROSTER_FILE)


def _load_roster(path: Path) -> Roster:
    try:
        return load_roster(path)
    except ConfigError as error:  # a fault of the site's folder, not of a command
        raise SiteError(error.message, error.remedy) from None


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
