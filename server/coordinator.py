"""The coordinator's key in a run's folder: it signs the audit's plan, and what the run concludes."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.identity import KEY_FILE, load_identity, make_identity

FOLDER = "coordinator"


def coordinator_key(out: Path) -> Ed25519PrivateKey:
    """The key of a run, made when there is none; one that was put there before the run began is used.

    Raises:
        SiteError: it can be read by others, or is none.
    """
    folder = out / FOLDER
    if not (folder / KEY_FILE).exists():
        make_identity(folder)
    return load_identity(folder)
