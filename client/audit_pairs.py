"""What a site keeps of an audit: its verdict on each candidate for the filter, and its closest pairs for its officer.

**Guarantee.** It lies in the site's folder, readable by its owner only. No message has a field for any of it but the
filter's random numbers.
"""

import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import BadPeer
from common.files import write_atomically

FOLDER, FILE_NAME = "audit", "pairs.npz"
MOST_PAIRS = 48


@dataclass(frozen=True)
class Pairs:
    """One audit at one site.

    Args:
        audit_digest: (), of the request, text.
        matched: (n,) bool, the candidates that show a patient.
        dropped: (n,) bool, those and the decoys.
        threshold: (), the excess from which on one does.
        training_scores, held_out_scores: one a patient.
        patients: (pairs,) index of the training patient, closest first.
        images: (pairs,) which of the prepared training images.
        candidates: (pairs,) which of the candidates.
        candidate_images: (pairs, size, size) uint8.
        scores, sims: (pairs,).
        transforms: (pairs, ...) as ``common.audit.score.aligned`` takes them.
    """

    audit_digest: NDArray[np.str_]
    matched: NDArray[np.bool_]
    dropped: NDArray[np.bool_]
    threshold: NDArray[np.float64]
    training_scores: NDArray[np.float32]
    held_out_scores: NDArray[np.float32]
    patients: NDArray[np.int64]
    images: NDArray[np.int64]
    candidates: NDArray[np.int64]
    candidate_images: NDArray[np.uint8]
    scores: NDArray[np.float32]
    sims: NDArray[np.float32]
    transforms: NDArray[np.int64]


def save_pairs(folder: Path, pairs: Pairs) -> None:
    """Keep them in a study's folder at the site, in place of those of an earlier audit."""
    (folder / FOLDER).mkdir(mode=0o700, exist_ok=True)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {field.name: getattr(pairs, field.name) for field in fields(Pairs)}
    np.savez_compressed(buffer, **arrays)
    write_atomically(folder / FOLDER / FILE_NAME, buffer.getvalue(), mode=0o600)


def load_pairs(folder: Path) -> Pairs:
    """Those of the last audit. Raises BadPeer when there was none."""
    path = folder / FOLDER / FILE_NAME
    if not path.exists():
        raise BadPeer("This site has compared no candidates of this study.")
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as saved:
        return Pairs(**{field.name: saved[field.name] for field in fields(Pairs)})
