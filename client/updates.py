"""Which update a site has at hand, and which has left it masked: that one is never masked again.

Under two cohorts that differ by one site, the difference of the two sums would be that site's update. So a round that
is asked for again, because its secure sum failed after this site had answered, is trained anew under its own charge.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import SiteError
from common.files import write_atomically
from common.messages import Vector
from common.secagg.encoding import Encoding, Integers

FILE_NAME = "updates.json"


@dataclass(frozen=True)
class MadeUpdate:
    """What training made: not masked, so it stays at the site.

    Args:
        round: the round.
        vector: the weighted update, generator then discriminator, (dim,) float32.
        id: random; the same whenever the same update is read again.
    """

    round: int
    vector: Vector
    id: str

    @property
    def floats(self) -> Vector:
        """The vector as it leaves where nothing masks it."""
        return self.vector


@dataclass(frozen=True)
class MadeSum:
    """A noisy sum over patients.

    Args:
        round: the round.
        vector: (dim,) int64.
        encoding: of the integers.
        id: random.
    """

    round: int
    vector: Integers
    encoding: Encoding
    id: str

    @property
    def floats(self) -> Vector:
        """The vector as it leaves where nothing masks it."""
        return np.asarray(self.vector * 2.0**-self.encoding.fraction_bits, np.float32)


@dataclass(frozen=True)
class Updates:
    """Random ids of updates; "" for none.

    Args:
        made: the update that is saved, finished or not.
        left: the newest update that has left.
    """

    made: str = ""
    left: str = ""

    @property
    def pending(self) -> bool:
        """Whether the saved update can still be sent."""
        return self.made != "" and self.made != self.left


def read(folder: Path) -> Updates:
    """What stands in a study's folder. Raises SiteError for a damaged file."""
    path = folder / FILE_NAME
    if not path.exists():
        return Updates()
    try:
        content = json.loads(path.read_bytes())
        found: Updates | None = Updates(content["made"], content["left"])
    except (ValueError, KeyError, TypeError):
        found = None
    if found is None or not (isinstance(found.made, str) and isinstance(found.left, str)):
        raise SiteError(f"{path} is damaged.", "Restore it: without it an update could leave twice.")
    return found


def note_made(folder: Path, update: str) -> None:
    """An update is about to be saved, finished or not."""
    _write(folder, replace(read(folder), made=update))


def note_left(folder: Path, update: str) -> None:
    """An update is about to leave; call this before it does."""
    _write(folder, replace(read(folder), left=update))


def give_up(folder: Path) -> None:
    """Nothing waits to be sent any more. What has left stays known, also when the newest update was never saved."""
    _write(folder, replace(read(folder), made=read(folder).left))


def _write(folder: Path, updates: Updates) -> None:
    content = {"made": updates.made, "left": updates.left}
    write_atomically(folder / FILE_NAME, json.dumps(content).encode(), mode=0o600)
