"""What a site has spent in one study: a file that is written before the gradients it pays for."""

import json
from pathlib import Path

from common.errors import PrivacyError
from common.files import locked, write_atomically
from common.privacy import accounting
from common.privacy.accounting import History, Mechanism

FILE_NAME = "accountant.json"


class SiteAccountant:
    """The mechanisms a site has charged for one study, kept in the study's folder at the site.

    **Guarantee.** ``charge`` returns only after the longer history is on disk, so a crash at any moment can over-count
    and never under-count. The history never shrinks and never starts again.

    Args:
        folder: the study's folder at the site.
        study_digest: written into the file; a file of another study is refused.
    """

    def __init__(self, folder: Path, study_digest: str) -> None:
        self._path = folder / FILE_NAME
        self._study_digest = study_digest
        self.history = self._read()

    def charge(self, mechanism: Mechanism) -> None:
        """Add a mechanism and wait until it is on disk.

        Raises:
            OSError: it cannot be written. Nothing is charged.
            PrivacyError: another process has charged since this one read the file. Nothing is charged.
        """
        history = accounting.append(self.history, mechanism)
        steps = [[m.sampling_probability, m.noise_multiplier, m.steps] for m in history]
        content = {"version": 1, "study_digest": self._study_digest, "mechanisms": steps}
        with locked(self._path.with_suffix(".lock")):
            if self._read() != self.history:
                raise PrivacyError(f"{self._path} was changed by another process.", "Run one training at a time.")
            write_atomically(self._path, json.dumps(content).encode(), mode=0o600)
        self.history = history

    @property
    def exists(self) -> bool:
        """Whether anything was ever charged."""
        return self._path.exists()

    def _read(self) -> History:
        if not self._path.exists():
            return ()
        try:
            content = json.loads(self._path.read_bytes())
            same = content["version"] == 1 and content["study_digest"] == self._study_digest
            history = tuple(Mechanism(float(q), float(noise), int(steps)) for q, noise, steps in content["mechanisms"])
            same = same and all(m.steps == entry[2] for m, entry in zip(history, content["mechanisms"], strict=True))
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            same, history = False, ()
        if not same:
            raise PrivacyError(
                f"{self._path} is unreadable or of another study, so what was spent is unknown.",
                "Restore the file. Without it this site cannot train in this study again.",
            )
        return history
