"""Candidates for release: images that follow from a generator alone, so that every site can make them again.

**Guarantee.** What a site compares its patients with are images of the generator that it was shown, at indices of a
seed that nobody chose: a site makes all of them itself and refuses others. So a server cannot slip an image in and
learn from the audit whether its patient is here.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.config import StudyConfig
from common.messages import Vector

FEWEST = 1000
"""Fewer candidates than these are not audited: an answer about few images says much about each."""
MOST_SPARE = 4.0
"""At most so many candidates for each image that the study wants to release."""
FILTER_DROP = 0.01
"""Share of candidates that a site's filter may drop although their patient was never trained on."""
TOLERANCE = 2
"""Grey levels by which the same image may differ between two kinds of device."""


@dataclass(frozen=True)
class CandidateSet:
    """The candidates of one audit, in the order of their index.

    Args:
        images: (n, size, size) uint8.
        labels: (n,) int64 class indices.
        indices: (n,) int64, which of the generated images these are; increasing.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]

    @property
    def root(self) -> str:
        """The Merkle root (hex) over index, label and pixels of each."""
        return merkle_root([leaf(*each) for each in zip(self.indices, self.labels, self.images, strict=True)]).hex()


def num_generated(study: StudyConfig) -> int:
    """How many images are made, so that about as many are left as the study wants: decoys of every site are dropped,
    and up to ``FILTER_DROP`` more at each.
    """
    num_sites = len(study.federation.contracted_patients)
    left = math.pow(1 - study.audit.decoys, num_sites / study.num_noisy_in_audit)
    left *= math.pow(1 - FILTER_DROP, num_sites)
    return math.ceil(study.audit.candidates * min(MOST_SPARE, 1 / left))


def generator_digest(generator: Vector) -> str:
    """SHA-256 (hex) of a generator's parameters: which checkpoint was audited."""
    return hashlib.sha256(np.ascontiguousarray(generator, np.float32).tobytes()).hexdigest()


def generate(study: StudyConfig, generator: Vector) -> CandidateSet:
    """All candidates before any is dropped. Labels in turn; the seed follows from study and generator."""
    from common.gan.synthesis import synthesize, to_gray  # imports torch

    count = num_generated(study)
    labels = np.arange(count, dtype=np.int64) % study.image.num_classes
    text = f"synthward candidates/{study.digest}/{generator_digest(generator)}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    images = to_gray(synthesize(study, generator, labels, seed).images[:, 0])
    return CandidateSet(images, labels, np.arange(count, dtype=np.int64))


def keep(candidates: CandidateSet, kept: NDArray[np.bool_]) -> CandidateSet:
    """Those of them that a mask (n,) names."""
    return CandidateSet(candidates.images[kept], candidates.labels[kept], candidates.indices[kept])


def largest_difference(found: CandidateSet, expected: CandidateSet) -> int:
    """Grey levels by which a site's own images differ from those it was shown."""
    pairs = zip(found.images, expected.images, strict=True)  # one by one: together they would be signed and large
    return max(int(np.abs(one.astype(np.int16) - other).max()) for one, other in pairs)


def leaf(index: int, label: int, image: NDArray[np.uint8]) -> bytes:
    """What stands for one image in the tree."""
    header = f"synthward image/{index}/{label}/{image.shape[0]}x{image.shape[1]}/".encode()
    return hashlib.sha256(b"\x00" + header + np.ascontiguousarray(image).tobytes()).digest()


def merkle_root(leaves: list[bytes]) -> bytes:
    """The root of the binary hash tree over leaves, as in RFC 6962 section 2.1: leaf and node hashes cannot be taken
    for each other, and no two lists have one root.

    >>> merkle_root([b"a" * 32]) == b"a" * 32
    True
    """
    if len(leaves) == 1:
        return leaves[0]
    if not leaves:
        return hashlib.sha256(b"").digest()
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + merkle_root(leaves[:split]) + merkle_root(leaves[split:])).digest()
