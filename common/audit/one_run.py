"""Lower bounds on epsilon from one training run (Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1)
training run"), for coins that are not fair and for counts with noise.

Patient i = 1 ... m is in training by a coin S_i of chance q, independent of all else. y is what training and all that
follows from it made; from y alone somebody names patients "in" (those in a tail of the score). Of M who were named, T
were in and H = M - T not.

**Lemma.** Let training be (epsilon, delta)-private when one patient is added or removed, D = q e^eps + 1 - q and
p = q e^eps / D. Then T <= V + F, where, given y, V is dominated by a binomial (M, p), and E F <= m q (1 - q) delta / D.

*Proof.* Fix i and the coins before it; let P1 and P0 be the law of y if S_i is 1 or 0, the later coins at random. They
are mixtures of neighbouring runs, so the integral of (P1 - e^eps P0)+ is at most delta (that divergence is jointly
convex). The chance of S_i = 1 given y and the coins before is w(y) = q P1 / (q P1 + (1 - q) P0). On average over y,
(w - p)+ is the integral of (q (1 - p) P1 - p (1 - q) P0)+ = q (1 - q) / D (P1 - e^eps P0)+, as 1 - p = (1 - q) / D: at
most q (1 - q) delta / D. So S_i = V_i + F_i with V_i of chance min(w, p) and F_i of chance (w - p)+: one uniform
number, cut at min(w, p) and at w. Given y, draw the coins in turn: sum V_i over the named is dominated by the binomial
(induction over i, each step conditional on those before). F is the sum of the F_i. For "out" the same holds with q and
1 - q exchanged. With q = 1/2 and delta = 0 this is theorem 5.1 there.

*Exceptions.* F is anything of that mean, so by Markov F > k with a chance of at most E F / (k + 1): k patients are
conceded, and this chance is added to the error.

**Canaries** (q = 1/2, exact counts). Those in a tail are named in, and those below it out or not at all. The right
ones of r are at most k more than a binomial (r, p): its upper tail is the error. All cuts are tried, each with its
part of the error.

**Patients** (q = 1 - h, counts A = T + X, C = H + Y with noise). M is unknown. For 0 < t < -ln p let
s = -ln((1 - p e^t) / (1 - p)) > 0, so that p e^t + (1 - p) e^-s = 1. Then exp(t V - s (M - V)) has a mean of at most
(p e^t + (1 - p) e^-s)^M = 1 given y, as it grows with V, whatever M is, even if it depends on y. The noise is
independent of all that, so

    E(t) = exp(t (A - k) - s (C + k)) / (E exp(t X) E exp(-s Y))

has a mean of at most 1 where F <= k. So has the average of E over tails and over t, fixed beforehand, and it is
1 / beta or more with a chance of at most beta (Markov).

**Confidence.** Claims of larger epsilon are weaker, so they are tested from 0 upwards, and the bound is the last one
refuted before the first that stands: if it is above the true one, the true one was refuted. That has a chance of at
most ``ERROR``.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from common.audit.counts import HELD_OUT_A, TRAINING, AuditCounts, CountNoise
from common.audit.excess import tails

ERROR = 0.005
"""How often each of the two bounds may be above the truth."""
STEP, LARGEST = 0.05, 12.0
_STEEPNESS = (0.03, 0.06, 0.12, 0.25, 0.5, 0.8)  # t as a part of the largest that is allowed


def from_canaries(canaries: NDArray[np.int64], delta: float) -> float:
    """A lower bound on epsilon, 0 or more.

    Args:
        canaries: (2, bins) included and left out, by a fair coin each.
        delta: of the claim.
    """
    included, left_out = (tails(np.concatenate([row[:1] * 0, row]).astype(np.float64)) for row in canaries)
    # The first tail is all of them. Named in: a tail from bin b upwards; named out: those below, or nobody.
    right, named = [], []
    for b in range(1, canaries.shape[1]):
        right += [included[b], included[b] + left_out[0] - left_out[b]]
        named += [included[b] + left_out[b], included[0] + left_out[0]]
    total = float(canaries.sum())
    correct, guesses = np.array(right), np.array(named)
    if total == 0 or len(correct) == 0:
        return 0.0

    def stands(epsilon: float) -> bool:
        p = 1 / (1 + math.exp(-epsilon))
        exceptions = total * delta / 4 / ((math.exp(epsilon) + 1) / 2)
        conceded = _conceded(exceptions, ERROR / 2)
        spent = exceptions / (conceded + 1)
        errors = stats.binom.sf(correct - conceded - 1, guesses, p)
        return float(errors.min()) * len(errors) > ERROR - spent

    return _last_refuted(stands)


def from_patients(counts: AuditCounts, noise: CountNoise, share: float, delta: float, patients: int) -> float:
    """A lower bound on epsilon, 0 or more.

    Args:
        counts: of all sites.
        noise: in them.
        share: chance to be held out, in (0, 1); the smallest of any site's.
        delta: of the claim.
        patients: at most so many tossed the coin.
    """
    q = 1 - share
    training = counts.patients[TRAINING].sum(0).astype(np.float64)
    held_out = counts.patients[HELD_OUT_A:].sum((0, 1)).astype(np.float64)
    a, c = tails(training), tails(held_out)
    cells = counts.num_classes * np.arange(counts.num_bins - 1, 0, -1)

    def stands(epsilon: float) -> bool:
        odds = q * math.exp(epsilon) / share
        p = odds / (1 + odds)
        exceptions = patients * q * share * delta / (q * math.exp(epsilon) + share)
        k = _conceded(exceptions, ERROR / 2)
        exponents = []
        for part in _STEEPNESS:
            t = part * min(-math.log(p), 0.9 * noise.epsilon_training)
            s = math.log(1 - p) - math.log1p(-p * math.exp(t))
            if s >= 0.95 * noise.epsilon_held_out:
                continue
            moments = (
                noise.shape
                * cells
                * (log_moment(t, noise.epsilon_training) + 2 * log_moment(s, noise.epsilon_held_out))
            )
            exponents.append(t * (a - k) - s * (c + k) - moments)
        if not exponents:
            return True
        average = np.logaddexp.reduce(np.concatenate(exponents)) - math.log(len(_STEEPNESS) * len(a))
        return bool(average < -math.log(ERROR - exceptions / (k + 1)))

    return _last_refuted(stands)


def log_moment(t: float, epsilon: float) -> float:
    """ln E exp(t X) of one discrete Laplace X of scale 1 / epsilon, for |t| < epsilon.

    >>> log_moment(0.0, 0.5)
    0.0
    """
    base = math.exp(-epsilon)
    return 2 * math.log1p(-base) - math.log1p(-base * math.exp(t)) - math.log1p(-base * math.exp(-t))


def _conceded(exceptions: float, error: float) -> int:
    return max(0, math.ceil(exceptions / error) - 1)


def _last_refuted(stands: Callable[[float], bool]) -> float:
    last = 0.0
    for number in range(round(LARGEST / STEP) + 1):
        epsilon = number * STEP
        if stands(epsilon):
            break
        last = epsilon
    return round(last, 6)
