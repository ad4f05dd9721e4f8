"""One release after another: scores once, then coins, counts, noise and verdict anew; and what others would say.

The sums are what the sites' shares add up to; masks, messages and ledgers, which change no figure, are left out.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from common.audit import score
from common.audit.bins import bin_edges
from common.audit.counts import HELD_OUT_A, HELD_OUT_B, NUM_GROUPS, TRAINING, AuditCounts, CountNoise, count
from common.audit.verdict import FAIL, NO_RELEASE, PASS, Verdict, decide, no_release
from common.privacy import discrete_laplace
from common.privacy.sampling import ByteSource

Images = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]
Facts = dict[str, Any]

NUM_SITES, NUM_NOISY = 3, 2
EPSILON_TRAINING, EPSILON_HELD_OUT = 0.5, 2.0
SIMULATIONS = 2000
COMPARED = 20  # coins that the baselines are asked about
CORRELATION_TAIL, TOO_MANY = 0.05, 0.1
"""A candidate is called a copy where its correlation is above that of all but so many held-out images, and a generator
a copier where more than ``TOO_MANY`` of its candidates are."""
MEEHAN_Z, LEVEL = -3.0, 0.01
LEAST_AUTHENTIC = 0.5
BASELINES = ("pixels", "Meehan", "authenticity", "closest record")


@dataclass(frozen=True)
class Scored:
    """What follows from the images alone.

    Args:
        candidates: those that are left, (n, rows, columns).
        scores: (patients,); empty where there is ``problem``.
        edges: of the bins.
        problem: why there can be no release; empty for none.
    """

    candidates: Images
    scores: Floats
    edges: tuple[float, ...] = ()
    problem: str = ""


def score_patients(candidates: Images, people: list[Images], fewest: int) -> Scored:
    """Near-duplicates dropped, the bins fixed and every patient scored, as server and sites do it.

    Args:
        candidates: (n, rows, columns).
        people: images of each patient.
        fewest: candidates that must be left.
    """
    prepared = score.prepare_candidates(candidates)
    nearest = score.self_similarity(prepared)
    kept = ~score.near_duplicates(prepared, nearest)
    nothing = np.zeros(0, np.float32)
    if kept.sum() < fewest:
        return Scored(candidates[kept], nothing, problem=f"{kept.sum()} of {len(kept)} candidates differ")
    if not kept.all():
        prepared = prepared.those(kept)
        nearest = score.self_similarity(prepared)
    try:
        edges = bin_edges(nearest)
    except ValueError as error:
        return Scored(candidates[kept], nothing, problem=str(error))
    images = np.concatenate(people)
    starts = np.cumsum([0, *map(len, people)], dtype=np.int64)
    found = score.compare(prepared, nearest, images, starts)
    return Scored(candidates[kept], found.scores, tuple(edges.tolist()))


def judge(
    scored: Scored,
    training: Mask,
    fixed: Mask,
    share: float,
    releases: int,
    rng: np.random.Generator,
    *,
    certified_epsilon: float = 3.0,
    canary_scores: Floats | None = None,
    canary_included: Mask | None = None,
    source: ByteSource = os.urandom,
) -> list[Verdict]:
    """Verdicts on so many releases of the same candidates.

    Args:
        scored: the patients' scores.
        training: (patients,) who was trained on.
        fixed: (patients,) whose coin is not tossed again.
        share: chance to be held out.
        releases: how many.
        rng: of the coins and of the verdict's simulations.
        certified_epsilon: what training promises.
        canary_scores: (canaries,).
        canary_included: (canaries,).
        source: of the noise.
    """
    if scored.problem:
        return [no_release(scored.problem)] * releases
    noise = CountNoise(EPSILON_TRAINING, EPSILON_HELD_OUT, NUM_SITES, NUM_NOISY)
    bins, total = len(scored.edges) + 1, len(training)
    loud = _noise(releases, bins, source)
    verdicts = []
    for release in range(releases):
        member = draw_coins(training, fixed, share, rng)
        groups = np.where(member, TRAINING, rng.choice([HELD_OUT_A, HELD_OUT_B], total))
        exact = count(
            scored.scores,
            groups,
            np.zeros(total, np.int64),
            scored.edges,
            1,
            canary_scores=canary_scores,
            canary_included=canary_included,
        )
        # By contract if the coins are free; else so many were trained on.
        trained = int(training.sum()) if fixed.all() else round((1 - share) * total)
        verdicts.append(
            decide(
                AuditCounts(exact.patients + loud[release], exact.canaries),
                edges=scored.edges,
                noise=noise,
                certified_epsilon=certified_epsilon,
                delta=1e-5,
                training_patients=trained,
                held_out_patients=total - trained,
                smallest_share=share,
                source=rng.bytes,
                simulations=SIMULATIONS,
                with_power=False,
            )
        )
    return verdicts


def draw_coins(training: Mask, fixed: Mask, share: float, rng: np.random.Generator) -> Mask:
    """Who is trained on, where all but the fixed toss again."""
    return np.where(fixed, training, rng.random(len(training)) >= share)


def _noise(releases: int, bins: int, source: ByteSource) -> NDArray[np.int64]:
    """(releases, groups, 1, bins): the sum of all sites' shares."""
    shape = (releases, 1, bins)
    groups = []
    for group in range(NUM_GROUPS):
        epsilon = EPSILON_TRAINING if group == TRAINING else EPSILON_HELD_OUT
        shares = [discrete_laplace.share(epsilon, NUM_NOISY, releases * bins, source) for _ in range(NUM_SITES)]
        groups.append(np.sum(shares, axis=0).reshape(shape))
    return np.stack(groups, axis=1)


def summary(verdicts: Sequence[Verdict]) -> Facts:
    """How often which outcome, and medians of the figures."""
    outcomes = [verdict.outcome for verdict in verdicts]
    facts: Facts = {name: outcomes.count(name) for name in (PASS, FAIL, NO_RELEASE)}
    for name in ("p", "upper_bound", "control_p", "epsilon_lower_canaries", "epsilon_lower_patients"):
        values = [value for verdict in verdicts if (value := getattr(verdict, name)) is not None]
        facts[name] = median(values) if values else None
    if verdicts[0].p is None:
        facts["problem"] = verdicts[0].reasons[0]
    else:
        facts["by_p"] = sum(verdict.p is not None and verdict.p <= 0.01 for verdict in verdicts)
    return facts


# ---------------------------------------------------------------- what others would say, without any noise


@dataclass(frozen=True)
class Distances:
    """Between images of candidates and patients, all at one place.

    Args:
        nearest: (candidates, patients) least Euclidean distance to a patient's images.
        correlation: (candidates, patients) largest correlation.
        between: (patients, patients) least distance; infinite to oneself.
        correlated: (patients, patients) largest correlation; -1 to oneself.
    """

    nearest: Floats
    correlation: Floats
    between: Floats
    correlated: Floats


def distances(candidates: Images, people: list[Images]) -> Distances:
    """All of them."""
    images = np.concatenate(people)
    starts = np.cumsum([0, *map(len, people)])[:-1]
    ours, theirs = (np.asarray(x.reshape(len(x), -1), np.float32) / np.float32(255) for x in (images, candidates))
    own, other = _standard(ours), _standard(theirs)
    between, correlated = _euclidean(ours, ours), own @ own.T
    between = np.minimum.reduceat(np.minimum.reduceat(between, starts, 0), starts, 1)
    correlated = np.maximum.reduceat(np.maximum.reduceat(correlated, starts, 0), starts, 1)
    np.fill_diagonal(between, np.inf)
    np.fill_diagonal(correlated, -1)
    return Distances(
        np.minimum.reduceat(_euclidean(theirs, ours), starts, 1),
        np.maximum.reduceat(other @ own.T, starts, 1),
        between,
        correlated,
    )


def baselines(of: Distances, member: Mask) -> dict[str, tuple[float, bool]]:
    """What each says, and whether it calls the generator a copier.

    - *pixels*: the share of candidates whose correlation with a training patient is above the 95th percentile of that
      of the held-out ones.
    - *Meehan* et al. 2020, the three-sample test in one cell: Mann-Whitney z of the candidates' distances to their
      nearest training patient against those of the held-out ones; far below 0 is copying.
    - *authenticity* (Alaa et al. 2022): the share of candidates that are farther from their nearest training patient
      than that one is from the nearest other.
    - *closest record*: the share of candidates that are nearer to a training patient than to any held-out one, against
      the share that was trained on, by a binomial test.
    """
    to_training, to_held_out = of.nearest[:, member].min(1), of.nearest[:, ~member].min(1)
    usual = of.between[~member][:, member].min(1)
    border = np.quantile(of.correlated[~member][:, member].max(1), 1 - CORRELATION_TAIL)
    copied = float((of.correlation[:, member].max(1) > border).mean())
    z = _mann_whitney(to_training, usual)
    others = of.between[member][:, member].min(1)
    authentic = float((to_training > others[of.nearest[:, member].argmin(1)]).mean())
    nearer = int((to_training < to_held_out).sum())
    p = stats.binomtest(nearer, len(to_training), float(member.mean()), alternative="greater").pvalue
    return {
        "pixels": (copied, copied > TOO_MANY),
        "Meehan": (z, z < MEEHAN_Z),
        "authenticity": (authentic, authentic < LEAST_AUTHENTIC),
        "closest record": (nearer / len(to_training), p <= LEVEL),
    }


def compare_with_others(
    candidates: Images, people: list[Images], training: Mask, fixed: Mask, share: float, rng: np.random.Generator
) -> Facts:
    """By baseline: the median of its figure and how often it calls the generator a copier."""
    between = distances(candidates, people)
    # Coins that cannot be tossed again give one answer.
    compared = [
        baselines(between, draw_coins(training, fixed, share, rng)) for _ in range(1 if fixed.all() else COMPARED)
    ]
    return {
        name: [median([each[name][0] for each in compared]), float(np.mean([each[name][1] for each in compared]))]
        for name in BASELINES
    }


def _mann_whitney(first: Floats, second: Floats) -> float:
    """Standard normal if both are of one distribution; below 0 if the first are smaller."""
    ranks = stats.rankdata(np.concatenate([first, second]))[: len(first)]
    n, m = len(first), len(second)
    u = ranks.sum() - n * (n + 1) / 2
    return float((u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def _euclidean(first: Floats, second: Floats) -> Floats:
    squared = (first**2).sum(1)[:, None] - 2 * first @ second.T + (second**2).sum(1)
    return np.asarray(np.sqrt(np.maximum(squared, 0)))


def _standard(flat: Floats) -> Floats:
    centred = flat - flat.mean(1, keepdims=True)
    return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6))
