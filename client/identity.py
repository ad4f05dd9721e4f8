"""Who a site is: its Ed25519 key, made at the site and never leaving it, and the roster that it has pinned."""

from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.policy import Policy, set_roster_digest
from client.settings import SiteSettings
from common.errors import ConfigError, SiteError
from common.identity import PUBLIC_FILE, load_identity
from common.secagg.roster import Roster, load_roster

ROSTER_FILE = "roster.json"


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
