"""``synthward site`` and ``synthward roster``: a site's settings and key, the roster, and the site's pin on it."""

import json
from collections.abc import Sequence
from pathlib import Path

from client.identity import load_member, pin_roster
from client.policy import Policy
from client.settings import FILE_NAME, SiteSettings
from common.errors import ConfigError
from common.identity import KEY_FILE, make_identity, read_public
from common.secagg.roster import load_roster, make_roster


def init(folder: Path, name: str, data: Path) -> None:
    """Write a site's settings. Raises ConfigError when there are some, or a name or path is wrong."""
    path = folder / FILE_NAME
    if path.exists():
        raise ConfigError(f"{path} exists already.", "Edit it, or give another folder.")
    if not data.is_dir():
        raise ConfigError(f"{data} is not a folder.", "Give the folder of the site's images.")
    SiteSettings.checked(name=name, data=data.resolve(), folder=folder).save()
    print(path)


def keygen(folder: Path) -> None:
    """Make a site's key and say what to do with the two files. Raises ConfigError when there is one."""
    public = make_identity(folder)
    print(f"{folder / KEY_FILE}   private: stays here, readable by its owner only")
    print(f"{public}   public: give it to the coordinator")
    print(f"public key {read_public(public).hex()}")


def pin(folder: Path, roster_file: Path, digest: str) -> None:
    """Put a roster into a site's folder and pin it, if its digest is the one that was heard from the coordinator.

    Raises:
        ConfigError: no roster, or another one.
        SiteError: no settings or key, or the roster has another key for this site. Nothing is changed.
        PolicyError: no policy, where the digest belongs. Nothing is changed.
    """
    settings, policy, roster = SiteSettings.load(folder), Policy.load(folder), load_roster(roster_file)
    if roster.digest != digest:
        raise ConfigError(
            f"{roster_file} has the digest {roster.digest}, not the one given.",
            "Compare it with the coordinator by telephone; ask for the file again if it differs.",
        )
    load_member(settings, policy.model_copy(update={"roster_digest": digest}), roster)
    pin_roster(settings, roster)
    print(f"{settings.name} has pinned the roster {digest} of {len(roster.sites)} sites")


def make(named_keys: Sequence[tuple[str, Path]], out: Path) -> None:
    """Write the roster of these public keys and print its digest. Raises ConfigError."""
    if len(dict(named_keys)) < len(named_keys):
        raise ConfigError("Two sites have the same name.", "Give every site its own name.")
    if out.exists():
        raise ConfigError(f"{out} exists already.", "Give another --out: sites have pinned the old one.")
    roster = make_roster({name: read_public(path) for name, path in named_keys})
    roster.save(out)
    print(roster.digest)


def show(roster_file: Path, *, as_json: bool) -> None:
    """Print every site's public key, and the digest. Raises ConfigError."""
    roster = load_roster(roster_file)
    keys = {name: key.hex() for name, key in sorted(roster.sites.items())}
    if as_json:
        print(json.dumps({"digest": roster.digest, "sites": keys}, indent=2))
        return
    width = max(map(len, keys))
    for name, key in keys.items():
        print(f"{name:<{width}}  {key}")
    print(f"{'digest':<{width}}  {roster.digest}")


def digest(roster_file: Path) -> None:
    """Print what sites compare and pin. Raises ConfigError."""
    print(load_roster(roster_file).digest)
