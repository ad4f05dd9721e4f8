"""What follows from the noisy counts of an audit: PASS, FAIL or NO RELEASE, with the figures it rests on.

PASS asks for all of these; a clean release is refused by one or the other at most once in 100 times:

- p > 0.01: no tail of the score has more patients who were trained on than those held out explain
  (``common.audit.excess``);
- at most max(30, 1 % of those trained on) memorised patients, as a 95 % upper bound says;
- what one training run shows about epsilon, by canaries and by patients, is not above what is certified
  (``common.audit.one_run``);
- the control is clean: the two halves of the held-out patients do not differ.

FAIL: p <= 0.001, or epsilon is refuted, as long as the control is clean: else nothing can be concluded. NO RELEASE:
all that is in between.
The verdict is a function of counts that were paid for and of public numbers: it costs no privacy.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.audit import one_run
from common.audit.counts import HELD_OUT_A, HELD_OUT_B, TRAINING, AuditCounts, CountNoise
from common.audit.excess import SIMULATIONS, Comparison, Floats, Group, expected, p_value, stddevs, tails
from common.audit.power import LEVEL, P_FACTOR, Power, patients_against, power_of
from common.privacy.sampling import ByteSource

VERDICT_VERSION = 1
PASS, FAIL, NO_RELEASE = "PASS", "FAIL", "NO RELEASE"
FAIL_LEVEL = 0.001
CONTROL_LEVEL = 0.001
"""Of the control, which a clean release fails so often."""
ALLOWED, ALLOWED_SHARE = 30, 0.01
CONFIDENCE = 0.95
"""Of the upper bound on memorised patients."""
_NORMAL = 1.645  # standard deviations, on one side
_WIDEST = 0.4  # part of the allowed patients that chance may add to the bound


@dataclass(frozen=True)
class Tail:
    """All classes' patients from one border of the score upwards, noise included.

    Args:
        edge: the border.
        training: patients trained on who score higher.
        held_out: patients held out who score higher.
        expected: ``held_out`` times the patients trained on for each held out.
        stddev: of ``training`` - ``expected`` by chance: noise and coins.
        z: their difference in such standard deviations.
        class_z: the same within each class.
    """

    edge: float
    training: int
    held_out: int
    expected: float
    stddev: float
    z: float
    class_z: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """The outcome and its figures; all of them are plain, and None where there were no counts to conclude from.

    Args:
        outcome: ``PASS``, ``FAIL`` or ``NO_RELEASE``.
        reasons: sentences for a data protection officer.
        p: how often a clean release looks as bad, with ``P_FACTOR`` in it; at most 1.
        upper_bound: memorised patients are at most so many, with 95 % confidence, counted from ``upper_bound_edge`` up.
        upper_bound_edge: the border of the score.
        allowed_memorised: what it may be.
        minimum_detectable: memorised patients who would have been found with probability 0.85; None for more than 200.
        power_curve: (memorised patients, probability to find them).
        epsilon_lower_canaries: epsilon is above this, as canaries show, with 99.5 % confidence; None without any.
        epsilon_lower_patients: the same from patients.
        certified_epsilon: what training promises at ``delta``; None if it promises nothing.
        delta: of it.
        control_p: how often clean held-out halves differ as much.
        training_patients: by contract.
        held_out_patients: by contract.
        tails: one a border.
        training_cells, held_out_cells: (bins,) noisy counts of all classes.
        training_cell_stddev, held_out_cell_stddev: of the noise in each.
        canaries: (2, bins) included, left out.
    """

    outcome: str
    reasons: tuple[str, ...]
    p: float | None = None
    upper_bound: float | None = None
    upper_bound_edge: float | None = None
    allowed_memorised: int | None = None
    minimum_detectable: int | None = None
    power_curve: tuple[tuple[int, float], ...] = ()
    epsilon_lower_canaries: float | None = None
    epsilon_lower_patients: float | None = None
    certified_epsilon: float | None = None
    delta: float | None = None
    control_p: float | None = None
    training_patients: int | None = None
    held_out_patients: int | None = None
    tails: tuple[Tail, ...] = ()
    training_cells: tuple[int, ...] = ()
    held_out_cells: tuple[int, ...] = ()
    training_cell_stddev: float | None = None
    held_out_cell_stddev: float | None = None
    canaries: tuple[tuple[int, ...], ...] = ()


def no_release(reason: str) -> Verdict:
    """The verdict where there is nothing to conclude from: no bins, no held-out patients."""
    return Verdict(NO_RELEASE, (reason,))


def allowed_memorised(training_patients: int) -> int:
    """How many memorised patients a release may have, by its 95 % upper bound.

    >>> allowed_memorised(500), allowed_memorised(8000)
    (30, 80)
    """
    return max(ALLOWED, math.floor(ALLOWED_SHARE * training_patients))


def decide(
    counts: AuditCounts,
    *,
    edges: Sequence[float],
    noise: CountNoise,
    certified_epsilon: float,
    delta: float,
    training_patients: int,
    held_out_patients: int,
    smallest_share: float | None = None,
    source: ByteSource = os.urandom,
    simulations: int = SIMULATIONS,
    with_power: bool = True,
) -> Verdict:
    """The verdict.

    Args:
        counts: the opened sum over all sites.
        edges: (bins - 1,) borders of the score.
        noise: in ``counts``.
        certified_epsilon: what training promises; ``math.inf`` if nothing.
        delta: of it; in [0, 1).
        training_patients: of all sites, by contract; 0 or more.
        held_out_patients: the same of those held out.
        smallest_share: the smallest chance of any site's patients to be held out, if sites differ: a tail may be all
            of that site's. By default what the contract's numbers say.
        source: of the seed of the simulations; anything but the cryptographic one only in tests.
        simulations: clean releases that are compared with.
        with_power: whether to compute the power; a benchmark of many verdicts does without.

    Raises:
        ValueError: edges that do not fit the counts, or a delta that is none.
    """
    if len(edges) != counts.num_bins - 1 or counts.num_bins < 2:
        raise ValueError(f"{counts.num_bins} bins and {len(edges)} edges")
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be in [0, 1), found {delta}")
    if training_patients < 1 or held_out_patients < 1:
        return no_release("There are no held-out patients to compare with, or none who were trained on.")
    share = held_out_patients / (training_patients + held_out_patients)
    share = min(share, smallest_share) if smallest_share is not None else share
    if not 0 < share < 1:
        raise ValueError(f"smallest_share must be in (0, 1), found {smallest_share}")

    rng = np.random.default_rng(int.from_bytes(source(32), "big"))
    how = patients_against(noise, share)
    training, half_a, half_b = (counts.patients[k].astype(np.float64) for k in (TRAINING, HELD_OUT_A, HELD_OUT_B))
    held_out = half_a + half_b

    half = Group(noise.epsilon_held_out, noise.shape)
    p = min(1.0, P_FACTOR * p_value(training, held_out, how, rng, simulations=simulations))
    control = p_value(half_a, half_b, Comparison(half, half, 0.5), rng, both_ways=True, simulations=simulations)
    allowed = allowed_memorised(training_patients)
    bound, level = _upper_bound(training.sum(0), held_out.sum(0), how, counts.num_classes, allowed)
    certified = None if math.isinf(certified_epsilon) else certified_epsilon
    claimed_delta = delta if certified is not None else 0.0
    by_canaries = one_run.from_canaries(counts.canaries, claimed_delta) if counts.canaries.sum() else None
    total = training_patients + held_out_patients
    by_patients = one_run.from_patients(counts, noise, share, claimed_delta, total)
    power = power_of(expected(training, held_out, how), how, rng) if with_power else Power((), None)
    found = {"canaries": by_canaries, "patients": by_patients}
    refuted = [who for who, low in found.items() if certified is not None and low is not None and low > certified]

    return Verdict(
        outcome=_outcome(p, control, bound, allowed, refuted),
        reasons=_reasons(p, control, bound, allowed, refuted, certified, power.minimum_detectable),
        p=p,
        upper_bound=bound,
        upper_bound_edge=float(edges[level]),
        allowed_memorised=allowed,
        minimum_detectable=power.minimum_detectable,
        power_curve=power.curve,
        epsilon_lower_canaries=by_canaries,
        epsilon_lower_patients=by_patients,
        certified_epsilon=certified,
        delta=delta,
        control_p=control,
        training_patients=training_patients,
        held_out_patients=held_out_patients,
        tails=_tails(training, held_out, how, edges),
        training_cells=_plain(training.sum(0)),
        held_out_cells=_plain(held_out.sum(0)),
        training_cell_stddev=math.sqrt(counts.num_classes * how.first.variance),
        held_out_cell_stddev=math.sqrt(counts.num_classes * how.second.variance),
        canaries=tuple(_plain(row) for row in counts.canaries),
    )


def _outcome(p: float, control: float, bound: float, allowed: int, refuted: list[str]) -> str:
    if control <= CONTROL_LEVEL:
        return NO_RELEASE
    if p <= FAIL_LEVEL or refuted:
        return FAIL
    return PASS if p > LEVEL and bound <= allowed else NO_RELEASE


def _reasons(
    p: float,
    control: float,
    bound: float,
    allowed: int,
    refuted: list[str],
    certified: float | None,
    detectable: int | None,
) -> tuple[str, ...]:
    said = []
    if control <= CONTROL_LEVEL:
        said.append(
            f"The control failed (p = {control:.2g}): the two halves of the held-out patients differ from each other, "
            "although nobody treated them differently. So nothing can be concluded from this audit."
        )
    if p > LEVEL:
        said.append(
            f"Patients who were trained on are not nearer to the synthetic images than patients who were not "
            f"(p = {p:.2g}; more than {LEVEL} is needed)."
        )
    else:
        said.append(
            "Patients who were trained on are nearer to the synthetic images than patients who were not: "
            f"by chance that happens with a probability of at most {p:.2g}."
        )
    relation = "no more than" if bound <= allowed else "more than"
    said.append(
        f"With 95 % confidence at most {math.ceil(bound)} patients were memorised, {relation} the {allowed} that are "
        "allowed."
    )
    for who in refuted:
        said.append(f"The {who} show that training leaks more than the certified epsilon of {certified:g}.")
    if certified is None:
        said.append("Training was not private: there is no certified epsilon to compare with.")
    fewest = f"{detectable}" if detectable is not None else "more than 200"
    said.append(
        f"Had {fewest} patients been copied, this audit would have found it with a probability of 85 %; "
        "fewer can go unseen."
    )
    return tuple(said)


def _upper_bound(training: Floats, held_out: Floats, how: Comparison, classes: int, allowed: int) -> tuple[float, int]:
    """At most how many patients were memorised, and from which tail upwards.

    Two bounds hold, each with 95 % confidence: the excess over the held-out patients and its standard deviation; and
    all patients trained on in that tail, memorised or not, and the noise alone. Whichever is the narrower counts, in
    the tail farthest down where chance and clean patients add no more than ``_WIDEST`` of what is allowed; in the
    highest bin if there is none. Tail and way are chosen by how wide the bounds are if as many patients were held out
    there as is plausible, not by the excess.
    """
    bins = len(training)
    a, c = tails(training), np.maximum(tails(held_out), 0)
    cells = classes * np.arange(bins - 1, 0, -1)
    plausible = c + 2 * np.sqrt(c + cells * how.second.variance)
    by_excess = _NORMAL * stddevs(c, how, classes, bins)
    by_noise = np.array([how.first.quantile(int(number), CONFIDENCE) for number in cells])
    wide_excess, wide_noise = _NORMAL * stddevs(plausible, how, classes, bins), by_noise + how.ratio * plausible
    narrow = np.flatnonzero(np.minimum(wide_excess, wide_noise) <= _WIDEST * allowed)
    b = int(narrow[0]) if len(narrow) else bins - 2
    # Noise that makes an excess negative shows no less than nobody: otherwise the loudest noise would be the best.
    if wide_excess[b] <= wide_noise[b]:
        return float(max(a[b] - how.ratio * c[b], 0) + by_excess[b]), b
    return float(max(a[b], 0) + by_noise[b]), b


def _tails(training: Floats, held_out: Floats, how: Comparison, edges: Sequence[float]) -> tuple[Tail, ...]:
    classes, bins = training.shape
    a, c = tails(training), tails(held_out)
    deviations = stddevs(c.sum(0), how, classes, bins)
    class_z = (a - how.ratio * c) / stddevs(c, how, 1, bins)
    return tuple(
        Tail(
            edge=float(edge),
            training=int(a[:, b].sum()),
            held_out=int(c[:, b].sum()),
            expected=float(how.ratio * c[:, b].sum()),
            stddev=float(deviations[b]),
            z=float((a[:, b].sum() - how.ratio * c[:, b].sum()) / deviations[b]),
            class_z=tuple(float(z) for z in class_z[:, b]),
        )
        for b, edge in enumerate(edges)
    )


def _plain(row: NDArray[np.float64] | NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(int(each) for each in row)
