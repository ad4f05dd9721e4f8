"""What a list of mechanisms costs, as (epsilon, delta). Epsilon is computed from the data, never gathered on the way.

Two accountants of Opacus: RDP, fast and 5 to 10 % loose, for decisions on the fly; PRV (Gopi et al. 2021) for plans and
for every figure that is reported.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from common.quiet import quiet

# Error asked of PRV: a share of epsilon between two bounds. The lower one, and its share of RDP's figure, bound memory.
RELATIVE_ERROR = 0.003
ABSOLUTE_ERROR = 0.01
SMALLEST_ERROR = 5e-5

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


History = tuple[Mechanism, ...]
Accountant = Callable[[History, float], float]


def append(history: History, mechanism: Mechanism) -> History:
    """History with one more mechanism; equal neighbours merge into one with the sum of their steps."""
    if history and _kind(history[-1]) == _kind(mechanism):
        merged = Mechanism(*_kind(mechanism), steps=history[-1].steps + mechanism.steps)
        return (*history[:-1], merged)
    return (*history, mechanism)


def num_steps(history: Iterable[Mechanism]) -> int:
    """All steps of a history."""
    return sum(mechanism.steps for mechanism in history)


def epsilon(history: History, delta: float) -> float:
    """Epsilon at ``delta`` of the composition of ``history``, by PRV: the figure to report. 0 for an empty history.

    **Guarantee.** An upper bound, at most 1 % above the true epsilon (1e-4 at a tiny one, and 1e-4 of RDP's figure
    where that lies far above): PRV's own upper end, or RDP's figure where PRV has none (an epsilon of many hundreds).
    """
    history = _merged(history)
    rough = found = rdp_epsilon(history, delta)
    smallest, error = SMALLEST_ERROR * max(1.0, rough), math.inf
    # RDP can lie many times above PRV; the error is then too coarse for the figure, and a second look is due.
    while (wanted := max(smallest, min(ABSOLUTE_ERROR, RELATIVE_ERROR * found))) < 0.8 * error:
        error = wanted
        found = _prv_epsilon(history, delta, error)
    return found


def rdp_epsilon(history: History, delta: float) -> float:
    """Epsilon at ``delta`` by Renyi DP: an upper bound as well, looser and quicker. 0 for an empty history."""
    return _rdp_epsilon(_merged(history), delta) if history else 0.0


@lru_cache(maxsize=64)
def calibrate(*, epsilon_target: float, delta: float, sampling_probability: float, steps: int) -> float:
    """The smallest noise multiplier (to 0.2 %, rounded up) whose ``steps`` together cost at most ``epsilon_target``.

    Raises:
        ValueError: no noise multiplier between 0.05 and 100000 is enough.
    """
    from scipy.optimize import brentq

    error = min(ABSOLUTE_ERROR, RELATIVE_ERROR * epsilon_target)

    def near(history: History, delta: float) -> float:
        return _prv_epsilon(history, delta, error)

    def excess(log_noise: float, accountant: Accountant = near) -> float:
        mechanism = Mechanism(sampling_probability, math.exp(log_noise), steps)
        return math.log(max(accountant((mechanism,), delta), 1e-12) / epsilon_target)

    def rdp_excess(log_noise: float) -> float:
        return excess(log_noise, rdp_epsilon)

    lowest, highest = math.log(0.05), math.log(1e5)
    if rdp_excess(highest) > 0:
        raise ValueError(f"no noise_multiplier gives epsilon {epsilon_target:g} at delta {delta:g} in {steps} steps")
    # RDP never lies below, so the noise that it asks for is enough; PRV needs less, much less at a small probability.
    high = lowest if rdp_excess(lowest) <= 0 else float(brentq(rdp_excess, lowest, highest, xtol=1e-3)) + 1e-3
    low = max(lowest, high - math.log(1.3))
    while low > lowest and excess(low) <= 0:
        low, high = max(lowest, low - math.log(1.3)), low
    root = float(brentq(excess, low, high, xtol=5e-4)) if excess(low) > 0 else low
    while excess(root, epsilon) > 0:
        root += 5e-4
    return math.exp(root)


def _kind(mechanism: Mechanism) -> tuple[float, float]:
    return mechanism.sampling_probability, mechanism.noise_multiplier


def _merged(history: History) -> History:
    """Order does not change a composition: one entry a kind, sorted, so that equal histories share the cache."""
    steps: dict[tuple[float, float], int] = {}
    for mechanism in history:
        steps[_kind(mechanism)] = steps.get(_kind(mechanism), 0) + mechanism.steps
    return tuple(Mechanism(*kind, steps=count) for kind, count in sorted(steps.items()))


@lru_cache(maxsize=4096)
def _prv_epsilon(history: History, delta: float, error: float) -> float:
    """PRV's upper end, or RDP's where it is lower: PRV has none at an epsilon of 0 or of many hundreds."""
    from opacus.accountants import PRVAccountant

    rough = rdp_epsilon(history, delta)
    if rough <= 0:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = [(m.noise_multiplier, m.sampling_probability, m.steps) for m in history]
    with quiet():  # numpy remarks on log(1 - q) at q = 1, Opacus on orders at the end of its list
        return min(rough, float(accountant.get_epsilon(delta, eps_error=error)))


@lru_cache(maxsize=4096)
def _rdp_epsilon(history: History, delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(m.noise_multiplier, m.sampling_probability, m.steps) for m in history]
    with quiet():
        return float(accountant.get_epsilon(delta, alphas=ALPHAS))
