"""The roster: which identity key speaks for which site. Every site holds it and pins its digest."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.files import write_atomically

VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Roster:
    """Public Ed25519 keys, 32 bytes, by site."""

    sites: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the roster in canonical JSON: what sites compare by telephone and pin."""
        return hashlib.sha256(json.dumps(self._tree(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the roster as JSON."""
        write_atomically(path, (json.dumps(self._tree(), indent=2, sort_keys=True) + "\n").encode())

    def _tree(self) -> dict[str, object]:
        return {"version": VERSION, "sites": {name: key.hex() for name, key in self.sites.items()}}


def make_roster(sites: Mapping[str, bytes]) -> Roster:
    """A roster of these keys. Raises ConfigError for a wrong name or key, two sites with one key, or no site."""
    for name, key in sites.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"Expected a site's name of letters, digits and ._-, found {name!r}.", "Rename the site.")
        if len(key) != 32:
            raise ConfigError(
                f"Expected a public key of 32 bytes for {name}, found {len(key)}.", "Ask the site for its key."
            )
    if not sites:
        raise ConfigError("A roster needs at least one site.", "Give NAME=FILE of each site's public key.")
    if len(set(sites.values())) < len(sites):
        raise ConfigError("Two sites of the roster have the same key.", "Every site makes a key of its own.")
    return Roster(dict(sites))


def load_roster(path: Path) -> Roster:
    """Read a roster file. Raises ConfigError when it is missing or no roster of this version."""
    try:
        tree = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
        if set(tree) != {"version", "sites"} or tree["version"] != VERSION:
            raise ValueError("other keys or another version")
        sites = {str(name): bytes.fromhex(key) for name, key in tree["sites"].items()}
    except OSError as error:
        raise ConfigError(
            f"Cannot read the roster {path}: {error.strerror}.", "Give the file that `synthward roster make` wrote."
        ) from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ConfigError(
            f"{path} is not a roster of version {VERSION}.", "Ask the coordinator for the file again."
        ) from None
    return make_roster(sites)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a name twice")
    return tree
