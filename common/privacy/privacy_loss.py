"""The privacy loss of Poisson-subsampled Gaussian mechanisms and of pure releases, discretised upwards and composed by
FFT.

Numerical composition of privacy loss random variables (PRV, Koskela et al. 2020 and Gopi et al. 2021) on a grid made as
in "Connect the Dots" (Doroshenko et al. 2022, https://arxiv.org/abs/2207.04380).

Notation: a step outputs x, in units of the noise: from Q = N(0, 1) without the patient and from P = (1 - q) Q + q N(1 /
sigma, 1) with. The loss of x is log(P(x) / Q(x)) when the patient is removed, log(Q(x) / P(x)) when one is added.

A pure release, of whatever kind, tells no more than randomised response does: its loss is epsilon with the probability
exp(epsilon) / (1 + exp(epsilon)), else minus epsilon, for a patient added as for one removed. Every pair of outputs of
an epsilon-differentially private mechanism can be made from that pair, and this stays true of a composition whose later
mechanisms are chosen by the earlier outputs (Kairouz, Oh and Viswanath 2015, theorems 3.3 and 3.4).

Design note. This grid needs no bound on its error: delta is the expectation of a convex function of exp(-loss), so
moving each loss onto its two neighbours in the grid, with the mean of exp(-loss) kept, can only raise delta, composed
or not. The excess falls with the square of the mesh, which is halved until the figure stands still. Opacus' PRV
accountant covers removal only, and pays for its error bound with a mesh that takes gigabytes where sampling is sparse
or steps are many.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft
from scipy.special import ndtr, ndtri

Array = npt.NDArray[np.float64]
Transform = npt.NDArray[np.complex128]
Kind = tuple[float, float, int]  # sampling_probability, noise_multiplier, steps
Pure = tuple[float, int]  # epsilon, steps

# What is left of delta's mass at the ends of the grid and what the last halving may change, as shares.
TAIL = 1e-4
TOLERANCE = 0.005
SMALLEST_EPSILON = 1e-7
# What the transform's rounding may take from delta at each step.
ROUNDING = 2.0**-52
MOST_CELLS = 2**19
# exp() of a larger loss overflows. One such step tells a patient's presence all but surely.
LARGEST_LOSS = 700.0


@dataclass(frozen=True)
class Losses:
    """Probabilities of the losses ``(first + i) * mesh``; ``lost`` is the mass beyond them, counted as infinite."""

    first: int
    masses: Array
    lost: float


def epsilon(kinds: Sequence[Kind], delta: float, pure: Sequence[Pure] = ()) -> float:
    """Epsilon at ``delta`` of all steps together; infinite where that is beyond what doubles can tell.

    So it is where one step alone has a loss above ``LARGEST_LOSS``, or where ``ROUNDING`` of all steps reaches delta.

    **Guarantee.** An upper bound at every mesh, for a patient added as for one removed. (Removal has been the larger
    one wherever we looked, but nobody has proven that it always is.)
    """
    num_steps = _num_steps(kinds, pure)
    variances = [steps * _variance(q, sigma) for q, sigma, steps in kinds]
    deviation = math.sqrt(sum(variances) + sum(steps * _pure_variance(loss) for loss, steps in pure))
    ends = np.concatenate(
        [_ends(q, sigma, TAIL * delta / num_steps) for q, sigma, _ in kinds]
        + [np.array([-loss, loss]) for loss, _ in pure]
    )
    if np.abs(ends).max() > LARGEST_LOSS:
        return math.inf
    smallest = max(np.ptp(ends), 30 * deviation, 1e-6) / MOST_CELLS
    # So fine from the start that epsilon cannot stand still by chance, as it does near the upper end of a wide cell.
    mesh = min(deviation / math.sqrt(num_steps) / 4, 1.0)
    if pure:  # the largest loss of few releases is moved up by as much as a cell each
        mesh = min(mesh, TOLERANCE / 2 * sum(loss * steps for loss, steps in pure) / sum(steps for _, steps in pure))
    mesh = max(mesh, smallest)
    before, found = math.inf, _epsilon_at(mesh, kinds, delta, pure)
    while before - found > TOLERANCE * found + SMALLEST_EPSILON and mesh / 2 >= smallest:
        mesh /= 2
        before, found = found, _epsilon_at(mesh, kinds, delta, pure)
    return found


def _num_steps(kinds: Sequence[Kind], pure: Sequence[Pure]) -> int:
    return sum(steps for *_, steps in kinds) + sum(steps for _, steps in pure)


def _epsilon_at(mesh: float, kinds: Sequence[Kind], delta: float, pure: Sequence[Pure] = ()) -> float:
    tail = TAIL * delta / _num_steps(kinds, pure)
    counts = [*(steps for *_, steps in kinds), *(steps for _, steps in pure)]
    pairs = [_discretised(q, sigma, mesh, tail) for q, sigma, _ in kinds]
    pairs += [(_pure_discretised(loss, mesh),) * 2 for loss, _ in pure]
    removed, added = zip(*pairs, strict=True)
    return max(_epsilon_of(_composed(losses, counts, TAIL * delta), mesh, delta) for losses in (removed, added))


def _loss(q: float, sigma: float, x: Array) -> Array:
    full = (x - 0.5 / sigma) / sigma
    return full if q == 1 else np.logaddexp(math.log1p(-q), math.log(q) + full)


def _place(q: float, sigma: float, loss: Array) -> Array:
    """The x of a loss when removed; minus infinity where every x has a larger one."""
    with np.errstate(divide="ignore"):
        full = loss if q == 1 else np.log1p(np.maximum(np.expm1(loss) / q, -1.0))
    return full * sigma + 0.5 / sigma


def _ends(q: float, sigma: float, tail: float) -> Array:
    """The losses when removed between which all but ``tail`` lies."""
    reach = -ndtri(tail)
    return _loss(q, sigma, np.array([-reach, 1 / sigma + reach]))


def _variance(q: float, sigma: float) -> float:
    """Of one step's loss when removed, roughly: it sets the first mesh and no more."""
    x = np.linspace(-10, 10, 2001)
    weights = np.exp(-(x**2) / 2) / np.exp(-(x**2) / 2).sum()
    without, present = _loss(q, sigma, x), _loss(q, sigma, x + 1 / sigma)
    mean = (1 - q) * (weights @ without) + q * (weights @ present)
    return float((1 - q) * (weights @ (without - mean) ** 2) + q * (weights @ (present - mean) ** 2))


def _discretised(q: float, sigma: float, mesh: float, tail: float) -> tuple[Losses, Losses]:
    """One step's losses when a patient is removed and when one is added."""
    low, high = _ends(q, sigma, tail)
    first, last = math.floor(low / mesh), math.ceil(high / mesh)
    grid = np.arange(first, last + 1) * mesh
    edges = _place(q, sigma, grid)
    shifted = edges - 1 / sigma
    without = _between(edges)  # probabilities under Q of each cell
    present = (1 - q) * without + q * _between(shifted)  # under P

    removed = _onto_ends(present, without * np.exp(grid[:-1]), mesh)
    removed[0] += (1 - q) * ndtr(edges[0]) + q * ndtr(shifted[0])
    lost_removed = (1 - q) * ndtr(-edges[-1]) + q * ndtr(-shifted[-1])

    # The loss of the added is minus the other's: the grid runs backwards and P and Q change places.
    added = _onto_ends(without[::-1], (present * np.exp(-grid[1:]))[::-1], mesh)
    added[0] += ndtr(-edges[-1])
    lost_added = ndtr(edges[0])
    return Losses(first, removed, float(lost_removed)), Losses(-last, added, float(lost_added))


def _pure_variance(loss: float) -> float:
    """Of the loss of a pure release."""
    return 4 * loss**2 * math.exp(-loss) / (1 + math.exp(-loss)) ** 2


def _pure_discretised(loss: float, mesh: float) -> Losses:
    """A pure release's loss, which is ``loss`` or minus that."""
    first, last = math.floor(-loss / mesh), math.floor(loss / mesh) + 1
    masses, scaled = np.zeros(last - first), np.zeros(last - first)
    for value in (loss, -loss):
        cell = math.floor(value / mesh)
        mass = 1 / (1 + math.exp(-value))
        masses[cell - first] += mass
        scaled[cell - first] += mass * math.exp(cell * mesh - value)
    return Losses(first, _onto_ends(masses, scaled, mesh), 0.0)


def _between(edges: Array) -> Array:
    """Standard normal probabilities between neighbouring edges, from the nearer tail, where differences are exact."""
    low = np.where(edges[:-1] > 0, -edges[1:], edges[:-1])
    high = np.where(edges[:-1] > 0, -edges[:-1], edges[1:])
    return np.asarray(ndtr(high) - ndtr(low), dtype=np.float64)


def _onto_ends(masses: Array, scaled: Array, mesh: float) -> Array:
    """Each cell's mass on its two ends, such that the mean of exp(-loss) stays.

    Args:
        masses: of the cells, in the distribution that the loss is drawn from.
        scaled: of the cells in the other distribution, times exp(loss at the cell's lower end); at most ``masses``.
    """
    upper = np.clip((masses - scaled) / -math.expm1(-mesh), 0, masses)
    ends = np.zeros(len(masses) + 1)
    ends[1:] += upper
    ends[:-1] += masses - upper
    return ends


def _composed(parts: Sequence[Losses], counts: Sequence[int], tail: float) -> Losses:
    """The sum of ``counts`` independent draws of each part, on a window without at most ``tail`` at each end."""
    low, high = _window(parts, counts, tail)
    size = fft.next_fast_len(high - low + 1, real=True)
    product = np.ones(size // 2 + 1, dtype=np.complex128)
    for part, count in zip(parts, counts, strict=True):
        # Beyond the window the sum wraps around: what comes back in is counted twice, never lost.
        padded = np.pad(part.masses, (0, -len(part.masses) % size))
        product *= _power(fft.rfft(padded.reshape(-1, size).sum(axis=0)), count)
    masses = np.roll(np.maximum(fft.irfft(product, size), 0.0), -(low % size))
    first = low + sum(part.first * count for part, count in zip(parts, counts, strict=True))
    lost = tail + sum((part.lost + ROUNDING) * count for part, count in zip(parts, counts, strict=True))
    return Losses(first, masses, lost)


def _power(base: Transform, exponent: int) -> Transform:
    """By squaring: numpy's own, by logarithms, takes most of the time of all that happens here."""
    result = np.ones_like(base)
    while exponent:
        if exponent % 2:
            result *= base
        base, exponent = base * base, exponent // 2
    return result


def _window(parts: Sequence[Losses], counts: Sequence[int], tail: float) -> tuple[int, int]:
    """Lowest and highest index of the sum, counted from the lowest of all, but for ``tail`` at each end (Chernoff)."""
    indices = [np.arange(len(part.masses)) for part in parts]
    deviation = 0.0
    for part, count, index in zip(parts, counts, indices, strict=True):
        deviation += count * float(part.masses @ (index - part.masses @ index) ** 2)
    deviation = max(1.0, math.sqrt(deviation))
    with np.errstate(divide="ignore"):
        logs = [np.log(part.masses) for part in parts]

    def bound(rate: float) -> float:
        moment = 0.0
        for log, count, index in zip(logs, counts, indices, strict=True):
            exponents = log + rate * index
            largest = exponents.max()
            moment += count * float(largest + np.log(np.exp(exponents - largest).sum()))
        return (moment - math.log(tail)) / rate

    # A light tail is bounded best at 4 to 16 deviations' inverse, a heavy one at some inverses of its length.
    lowest = min(1 / deviation, 8 / max(len(index) for index in indices))
    rates = [16 / deviation / 2**halvings for halvings in range(math.ceil(math.log2(16 / deviation / lowest)) + 1)]
    longest = sum(count * (len(part.masses) - 1) for part, count in zip(parts, counts, strict=True))
    low, high = max(bound(-rate) for rate in rates), min(bound(rate) for rate in rates)
    return max(0, math.floor(low)), min(longest, math.ceil(high))


def _epsilon_of(losses: Losses, mesh: float, delta: float) -> float:
    """The smallest epsilon >= 0 at which the hockey-stick divergence, E[1 - exp(epsilon - loss)]+, is at most delta."""
    masses, delta = losses.masses, delta - losses.lost
    if delta <= 0:
        return math.inf
    shares = -np.expm1(-mesh * np.arange(len(masses)))  # 1 - exp(epsilon - loss) from epsilon at a grid point on

    def excess(index: int) -> float:
        return float(masses[index:] @ shares[: len(masses) - index]) - delta

    below, above = max(-1, -losses.first - 1), len(masses) - 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if excess(middle) > 0 else (below, middle)
    upper = masses[above:].sum()
    discounted = masses[above:] @ (1 - shares[: len(masses) - above])
    if upper <= delta:
        return 0.0
    return max(0.0, float((losses.first + above) * mesh + np.log((upper - delta) / discounted)))
