"""How many memorised patients an audit would find, computed from what is public before training.

Memorised patients are taken to be in the highest bin, spread over the classes as all patients are: there copies are
(``common.audit.bins``). Those that are less near are found less often.
"""

from dataclasses import dataclass

import numpy as np

from common.audit.bins import REFERENCE
from common.audit.counts import CountNoise
from common.audit.excess import Comparison, Floats, Group, expected, null_statistics, simulate, statistic

NUMBERS = (5, 10, 15, 20, 25, 30, 40, 50, 70, 100, 150, 200)
FOUND = 0.85
P_FACTOR = 1.6
"""The p that is reported is so many times the simulated one: a clean release is asked other questions besides, and may
be refused for all of them together once in 100 times."""
LEVEL = 0.01
_USUAL, _PLANTED = 4000, 1500


@dataclass(frozen=True)
class Power:
    """What is found.

    Args:
        curve: (memorised patients, probability that they prevent PASS by p) pairs, both increasing.
        minimum_detectable: patients who are found with probability ``FOUND``; None if more than the last of the curve.
    """

    curve: tuple[tuple[int, float], ...]
    minimum_detectable: int | None


def patients_against(noise: CountNoise, share: float) -> Comparison:
    """Training patients compared with all held-out ones, of whom a patient is with the chance ``share``."""
    first = Group(noise.epsilon_training, noise.shape)
    return Comparison(first, Group(noise.epsilon_held_out, 2 * noise.shape), share)


def power_before(
    noise: CountNoise, training_patients: int, held_out_patients: int, num_classes: int, rng: np.random.Generator
) -> Power:
    """For the plan: patients score as in ``REFERENCE``, the same in all classes of the same size."""
    total = training_patients + held_out_patients
    patients = np.outer(np.full(num_classes, total / num_classes), REFERENCE)
    return power_of(patients, patients_against(noise, held_out_patients / total), rng)


def power_of(patients: Floats, how: Comparison, rng: np.random.Generator) -> Power:
    """Power if (classes, bins) patients toss the coin, and some of those trained on are memorised besides."""
    weights = patients.sum(1) / max(patients.sum(), 1e-9)
    first, second = simulate(patients, how, _PLANTED, rng)
    classes = np.searchsorted(np.cumsum(weights)[:-1], rng.random((_PLANTED, max(NUMBERS))))  # of each copy
    shares = []
    for number in NUMBERS:
        found = first.copy()
        for each in range(len(weights)):
            found[:, each, -1] += (classes[:, :number] == each).sum(1)
        typical = (1 - how.share) * patients
        typical[:, -1] += number * weights
        usual = null_statistics(expected(typical, how.share * patients, how), how, rng, simulations=_USUAL)
        needed = np.quantile(usual, 1 - LEVEL / P_FACTOR)
        shares.append(float((statistic(found, second, how) >= needed).mean()))
    curve = tuple(zip(NUMBERS, np.maximum.accumulate(shares).round(3).tolist(), strict=True))
    return Power(curve, _smallest(curve))


def _smallest(curve: tuple[tuple[int, float], ...]) -> int | None:
    before = (0, 0.0)
    for number, probability in curve:
        if probability >= FOUND:
            part = (FOUND - before[1]) / (probability - before[1])
            return int(np.ceil(before[0] + part * (number - before[0])))
        before = (number, probability)
    return None
