"""What a list of mechanisms costs, as (epsilon, delta). Epsilon is computed from the data, never gathered on the way.

There are two kinds: steps of training (``Mechanism``) and an audit's answers (``PureRelease``).

Two accountants: RDP (Opacus), 5 to 10 % loose and many times too high where sampling is sparse, for a run's progress;
PRV (``common.privacy.privacy_loss``), tight, for plans, for what a budget allows and for every figure that is reported.
"""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from common.privacy import privacy_loss
from common.quiet import quiet

# Noise multipliers that calibration chooses from: powers of this, between two limits. A list that all parties share, so
# that the last bits of their processors' arithmetic do not show in the plan.
NOISE_RATIO = 1.001
SMALLEST_NOISE, LARGEST_NOISE = 0.05, 1e5

# Opacus' default orders end at 63, which floors epsilon at log(1 / delta) / 62: small budgets need larger ones. Orders
# between two whole numbers cost a hundred times more each, so there are few, where a large epsilon has its optimum.
ALPHAS = [1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, *range(4, 64), 80, 96, 128, 192, 256, 384, 512, 1024, 4096]


@dataclass(frozen=True)
class Mechanism:
    """``steps`` Poisson-subsampled Gaussian mechanisms on sums of vectors of norm at most the sensitivity.

    Args:
        sampling_probability: chance of each patient at each step, in (0, 1].
        noise_multiplier: noise standard deviation over sensitivity, > 0 and finite.
        steps: how many, >= 1; an empty batch is a step too.
    """

    sampling_probability: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not (0 < self.sampling_probability <= 1 and 0 < self.noise_multiplier < math.inf and self.steps >= 1):
            raise ValueError(f"not a mechanism: {self}")


@dataclass(frozen=True)
class PureRelease:
    """``steps`` answers that are each (epsilon, 0)-differentially private: counts with discrete Laplace noise.

    Args:
        epsilon: of each, > 0 and finite.
        steps: how many, >= 1.
    """

    epsilon: float
    steps: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf and self.steps >= 1):
            raise ValueError(f"not a pure release: {self}")


@dataclass(frozen=True)
class Budget:
    """The most that may be spent on any patient: at most ``epsilon`` at ``delta``, all releases together."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf and 0 < self.delta < 1):
            raise ValueError(f"not a budget: {self}")


Entry = Mechanism | PureRelease
History = tuple[Entry, ...]


def append(history: History, entry: Entry) -> History:
    """History with one more entry; equal neighbours merge into one with the sum of their steps."""
    if history and _kind(history[-1]) == _kind(entry):
        return (*history[:-1], replace(entry, steps=history[-1].steps + entry.steps))
    return (*history, entry)


def num_steps(history: Iterable[Entry]) -> int:
    """All steps of a history; a pure release is one."""
    return sum(entry.steps for entry in history)


def of_training(history: Iterable[Entry]) -> tuple[Mechanism, ...]:
    """The Gaussian part of a history: what training has cost."""
    return tuple(entry for entry in history if isinstance(entry, Mechanism))


def of_audits(history: Iterable[Entry]) -> tuple[PureRelease, ...]:
    """The pure part of a history: what audits have cost."""
    return tuple(entry for entry in history if isinstance(entry, PureRelease))


def epsilon(history: History, delta: float) -> float:
    """Epsilon at ``delta`` of the composition of ``history``, by PRV: the figure to report. 0 for an empty history.

    **Guarantee.** An upper bound; for up to ten million steps, and up to 1e14 * delta of them, at most 1 % (and 1e-6)
    above the true epsilon, be that 0 or a million. Exceptions, with RDP's looser figure: a single step that may have a
    privacy loss above 700, as with a noise multiplier below 0.05, and more than 4e15 * delta steps. Pure releases never
    cost more than the sum of their epsilons on top of the rest.
    """
    return _prv_epsilon(_merged(history), delta) if history else 0.0


def rdp_epsilon(history: History, delta: float) -> float:
    """Epsilon at ``delta`` by Renyi DP: an upper bound as well, a looser one. 0 for an empty history."""
    return _rdp_epsilon(_merged(history), delta) if history else 0.0


def fits(history: History, budget: Budget) -> bool:
    """Whether all of ``history`` together stays within the budget."""
    return epsilon(history, budget.delta) <= budget.epsilon


@lru_cache(maxsize=64)
def calibrate(*, epsilon_target: float, delta: float, sampling_probability: float, steps: int) -> float:
    """The smallest noise multiplier (to 0.2 %, rounded up) whose ``steps`` together cost at most ``epsilon_target``.

    Raises:
        ValueError: no noise multiplier between 0.05 and 100000 is enough.
    """

    def is_enough(power: int) -> bool:
        mechanism = Mechanism(sampling_probability, NOISE_RATIO**power, steps)
        return epsilon((mechanism,), delta) <= epsilon_target

    low, high = (round(math.log(noise, NOISE_RATIO)) for noise in (SMALLEST_NOISE, LARGEST_NOISE))
    if not is_enough(high):
        raise ValueError(f"no noise_multiplier gives epsilon {epsilon_target:g} at delta {delta:g} in {steps} steps")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return NOISE_RATIO**high


Shape = tuple[float, int, float]
"""Sampling probability, steps and share of epsilon of a stretch of training whose noise is still to be found."""


@lru_cache(maxsize=64)
def calibrate_together(*, epsilon_target: float, delta: float, shapes: tuple[Shape, ...]) -> tuple[float, ...]:
    """Noise multipliers for several stretches of training that together cost at most ``epsilon_target``.

    Each is calibrated for its share of epsilon alone, then all are multiplied by the smallest power of ``NOISE_RATIO``
    with which the whole fits. One stretch with the share 1 gets what ``calibrate`` says.

    Raises:
        ValueError: no noise multiplier between 0.05 and 100000 is enough.
    """
    alone = [
        calibrate(epsilon_target=share * epsilon_target, delta=delta, sampling_probability=sampling, steps=steps)
        for sampling, steps, share in shapes
    ]
    if len(shapes) == 1 and shapes[0][2] == 1:
        return (alone[0],)

    def multiplied(power: int) -> tuple[float, ...]:
        return tuple(NOISE_RATIO ** (round(math.log(noise, NOISE_RATIO)) + power) for noise in alone)

    def is_enough(power: int) -> bool:
        noises = zip(shapes, multiplied(power), strict=True)
        history = tuple(Mechanism(sampling, noise, steps) for (sampling, steps, _), noise in noises)
        return epsilon(history, delta) <= epsilon_target

    reach = math.ceil(math.log(10, NOISE_RATIO))  # ten times less noise to ten times more
    low, high = -reach, reach
    if not is_enough(high):
        raise ValueError(f"no noise_multipliers give epsilon {epsilon_target:g} at delta {delta:g} with these shares")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return multiplied(high)


def _kind(entry: Entry) -> Entry:
    """What all steps of an entry have in common, as one of them."""
    return replace(entry, steps=1)


def _merged(history: History) -> History:
    """Order does not change a composition: one entry a kind, sorted, so that equal histories share the cache."""
    steps: dict[Entry, int] = {}
    for entry in history:
        steps[_kind(entry)] = steps.get(_kind(entry), 0) + entry.steps
    merged = (replace(kind, steps=count) for kind, count in steps.items())
    return tuple(sorted(merged, key=lambda entry: (isinstance(entry, PureRelease), astuple(entry))))


@lru_cache(maxsize=4096)
def _prv_epsilon(history: History, delta: float) -> float:
    gaussian, pure = of_training(history), of_audits(history)
    kinds = [(m.sampling_probability, m.noise_multiplier, m.steps) for m in gaussian]
    found = privacy_loss.epsilon(kinds, delta, [(release.epsilon, release.steps) for release in pure])
    if found == math.inf:
        found = rdp_epsilon(history, delta)
    if pure:  # epsilons of pure releases may always be added up; one alone costs what it says, to the last digit
        alone = _prv_epsilon(gaussian, delta) if gaussian else 0.0
        found = min(found, alone + sum(release.steps * release.epsilon for release in pure))
    return found


@lru_cache(maxsize=4096)
def _rdp_epsilon(history: History, delta: float) -> float:
    from opacus.accountants.analysis import rdp

    with quiet():
        total = np.zeros(len(ALPHAS))
        for m in of_training(history):
            total += rdp.compute_rdp(
                q=m.sampling_probability, noise_multiplier=m.noise_multiplier, steps=m.steps, orders=ALPHAS
            )
        for release in of_audits(history):
            total += release.steps * _pure_rdp(release.epsilon)
        found, _ = rdp.get_privacy_spent(orders=ALPHAS, rdp=total, delta=delta)
    return max(0.0, float(found))


def _pure_rdp(epsilon: float) -> npt.NDArray[np.float64]:
    """The Renyi divergence of randomised response, at each of ``ALPHAS``: the most of any pure release (Mironov 2017,
    propositions 5 and 6)."""
    alphas = np.array(ALPHAS, dtype=np.float64)
    both = np.logaddexp(alphas * epsilon, (1 - alphas) * epsilon) - np.logaddexp(epsilon, 0.0)
    return np.asarray(both / (alphas - 1), dtype=np.float64)
