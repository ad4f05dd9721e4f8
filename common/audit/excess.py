"""Whether more patients who were trained on are near the candidates than patients who were held out explain.

Notation: h is the chance of a patient to be held out, r = (1 - h) / h. In the tail of the score from bin b upwards,
A_b patients were trained on and C_b held out, noise included, of variances a_b and c_b. If no patient was memorised,
then who was trained on is a coin that knows nothing of the scores, so A_b - r C_b is 0 on average in every tail, of
every class and of all together, whatever the scores of patients look like. Its variance is that of the noise,
a_b + r^2 c_b, and that of the coins, r (1 + r) times the held-out patients that are expected there.

The statistic is the largest z_b = (A_b - r C_b+) / sqrt(a_b + r^2 c_b + r (1 + r) (C_b+ + 1/2)) over tails, of all
classes together and of each class; C+ is C, or 0 if the noise has made it negative. There are many of them, and copies
are expected in the highest bin: so those of a class count ``CLASS_HANDICAP`` less, and each bin further down
``STEP_HANDICAP`` less. What is usual for it is found by simulation: patients of every class and bin are drawn, about as
many as were counted, each tosses the coin, and the noise is added.

How many of them a simulation draws matters where few patients are: the more, the larger the chance that all of them
were trained on. The counts of both groups say how many there are, of which those trained on may be inflated by what is
looked for; so no more are drawn than ``PLAUSIBLE`` standard deviations above what the held-out counts alone say.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import signal, stats

Floats = NDArray[np.float64]

SIMULATIONS = 10_000
CLASS_HANDICAP = 0.5
STEP_HANDICAP = 0.2
PLAUSIBLE = 1.0
_BATCH = 2000


@dataclass(frozen=True)
class Group:
    """The noise in the cells of one side of a comparison.

    Args:
        epsilon: of one discrete Laplace.
        shape: discrete Laplaces a cell; any number above 0.
    """

    epsilon: float
    shape: float

    @property
    def variance(self) -> float:
        """Of the noise in one cell."""
        return float(self.shape / (2 * np.sinh(self.epsilon / 2) ** 2))

    def draw(self, size: tuple[int, ...], rng: np.random.Generator) -> Floats:
        """Noise of cells: integers as floats."""
        stop = -np.expm1(-self.epsilon)
        first, second = (rng.negative_binomial(self.shape, stop, size) for _ in range(2))
        return (first - second).astype(np.float64)

    def quantile(self, cells: int, probability: float) -> int:
        """The smallest number that the noise of so many cells together is at most with this probability.

        >>> Group(0.5, 1.0).quantile(1, 0.4)
        0
        """
        size, stop = self.shape * cells, -np.expm1(-self.epsilon)
        most = int(stats.nbinom.isf(1e-12, size, stop)) + 1
        one = stats.nbinom.pmf(np.arange(most + 1), size, stop)
        below = np.cumsum(signal.fftconvolve(one, one[::-1]))  # from -most to most
        return int(np.searchsorted(below, probability)) - most


@dataclass(frozen=True)
class Comparison:
    """How two groups of patients are compared.

    Args:
        first: noise of those looked at.
        second: noise of those they are compared with.
        share: of the second among both, in (0, 1).
    """

    first: Group
    second: Group
    share: float

    @property
    def ratio(self) -> float:
        """Expected patients of the first group for each of the second."""
        return (1 - self.share) / self.share

    def swapped(self) -> "Comparison":
        """The second looked at, compared with the first."""
        return Comparison(self.second, self.first, 1 - self.share)


def tails(cells: Floats) -> Floats:
    """(..., bins) to (..., bins - 1): the sum of bins 1 upwards, of 2 upwards, ... of the last.

    >>> tails(np.array([5.0, 3.0, 1.0])).tolist()
    [4.0, 1.0]
    """
    return np.asarray(np.cumsum(cells[..., ::-1], axis=-1)[..., ::-1][..., 1:])


def z_scores(first: Floats, second: Floats, how: Comparison) -> Floats:
    """z_b of all classes together, then of each class.

    Args:
        first: (..., classes, bins) noisy counts of those looked at.
        second: (..., classes, bins) noisy counts of those they are compared with.
        how: the comparison.

    Returns:
        (..., 1 + classes, bins - 1), or (..., 1, bins - 1) for one class.
    """
    classes, bins = first.shape[-2:]
    ours, theirs = tails(first), tails(second)
    excess = _z(ours.sum(-2), theirs.sum(-2), how, classes, bins)[..., None, :]
    if classes == 1:
        return excess
    return np.concatenate([excess, _z(ours, theirs, how, 1, bins)], axis=-2)


def stddevs(theirs: Floats, how: Comparison, classes: int, bins: int) -> Floats:
    """The denominator of z_b for tails (..., bins - 1) of so many classes together, in patients of the first group."""
    cells = classes * np.arange(bins - 1, 0, -1)
    noise = how.first.variance + how.ratio**2 * how.second.variance
    return np.asarray(np.sqrt(cells * noise + how.ratio * (1 + how.ratio) * (np.maximum(theirs, 0) + 0.5)))


def largest(z: Floats) -> Floats:
    """(..., 1 + classes, bins - 1) to (...): the statistic."""
    handicaps = STEP_HANDICAP * np.arange(z.shape[-1])[::-1] + CLASS_HANDICAP * (np.arange(z.shape[-2]) > 0)[:, None]
    return np.asarray((z - handicaps).max((-2, -1)))


def expected(first: Floats, second: Floats, how: Comparison, *, plausible: float = PLAUSIBLE) -> Floats:
    """(classes, bins) patients of both groups that are expected in a cell if nobody was memorised; 0 or more."""
    both = np.maximum(first + second, 0.0)
    theirs = np.maximum(second, 0.0)
    most = (theirs + plausible * np.sqrt(theirs + how.second.variance)) / how.share
    return np.asarray(np.minimum(both, most))


def simulate(patients: Floats, how: Comparison, count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Noisy counts (count, classes, bins) of both groups if so many patients (classes, bins) toss the coin."""
    size = (count, *patients.shape)
    first = rng.poisson((1 - how.share) * patients, size) + how.first.draw(size, rng)
    second = rng.poisson(how.share * patients, size) + how.second.draw(size, rng)
    return first, second


def null_statistics(
    patients: Floats, how: Comparison, rng: np.random.Generator, *, both_ways: bool = False, simulations: int
) -> Floats:
    """(simulations,) the statistic of as many clean releases."""
    found = []
    for start in range(0, simulations, _BATCH):
        found.append(statistic(*simulate(patients, how, min(_BATCH, simulations - start), rng), how, both_ways))
    return np.concatenate(found)


def statistic(first: Floats, second: Floats, how: Comparison, both_ways: bool = False) -> Floats:
    """(..., classes, bins) of each group to (...): the largest z; ``both_ways``: of either group over the other."""
    one = largest(z_scores(first, second, how))
    return np.maximum(one, largest(z_scores(second, first, how.swapped()))) if both_ways else one


def p_value(
    first: Floats,
    second: Floats,
    how: Comparison,
    rng: np.random.Generator,
    *,
    both_ways: bool = False,
    simulations: int = SIMULATIONS,
) -> float:
    """How often a clean release has a statistic as large; at least 1 / (simulations + 1).

    Args:
        first: (classes, bins) noisy counts of those looked at.
        second: (classes, bins) noisy counts of those they are compared with.
        how: the comparison.
        rng: private, or the simulation could be foreseen.
        both_ways: whether either group may have the excess, and neither is above suspicion.
        simulations: how many.
    """
    patients = expected(first, second, how, plausible=np.inf if both_ways else PLAUSIBLE)
    usual = null_statistics(patients, how, rng, both_ways=both_ways, simulations=simulations)
    return float((1 + (usual >= statistic(first, second, how, both_ways)).sum()) / (simulations + 1))


def _z(ours: Floats, theirs: Floats, how: Comparison, classes: int, bins: int) -> Floats:
    return np.asarray((ours - how.ratio * np.maximum(theirs, 0)) / stddevs(theirs, how, classes, bins))
