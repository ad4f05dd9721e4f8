"""Opened counts of releases whose patients toss the hold-out's coin, for tests of what is concluded from counts."""

from collections.abc import Sequence

import numpy as np

from common.audit.counts import NUM_GROUPS, AuditCounts, CountNoise
from common.audit.excess import Group

NOISE = CountNoise(0.5, 2.0, num_sites=3, num_noisy=2)
USUAL = (0.0, 0.005, 0.045, 0.45, 0.25, 0.2, 0.05, 0.0)
EDGES = (-0.4, -0.2, -0.1, 0.0, 0.02, 0.04, 0.08)


def counts_of(
    patients: int,
    rng: np.random.Generator,
    *,
    copies: int = 0,
    profile: Sequence[float] = USUAL,
    classes: Sequence[float] = (1.0,),
    share: float = 0.2,
    noise: CountNoise = NOISE,
    canaries: int = 128,
) -> AuditCounts:
    """Counts with noise; the copied patients are in the highest bin."""
    everybody = rng.multinomial(patients, np.outer(classes, profile).ravel()).reshape(len(classes), len(profile))
    training = rng.binomial(everybody, 1 - share)
    half_a = rng.binomial(everybody - training, 0.5)
    cells = np.stack([training, half_a, everybody - training - half_a]).astype(np.int64)
    cells[0, :, -1] += rng.multinomial(copies, classes)
    for group in range(NUM_GROUPS):
        cells[group] += Group(noise.epsilon(group), noise.shape).draw(everybody.shape, rng).astype(np.int64)
    bins = rng.multinomial(canaries, profile)
    included = rng.binomial(bins, 0.5)
    return AuditCounts(cells, np.stack([included, bins - included]).astype(np.int64))
