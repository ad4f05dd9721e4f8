"""Epsilons by dp-accounting's PLD, bracketed: for the vectors in tests/vectors/epsilon.json and for tests that go live.

``python -m tests.common.privacy.epsilon_reference`` writes the vectors anew (a quarter of an hour).
"""

import json
import math
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.pld_pmf import PLDPmf
from scipy.optimize import brentq
from scipy.special import log_ndtr

Entries = tuple[tuple[float, float, int], ...]  # sampling_probability, noise_multiplier, steps

VECTORS = Path(__file__).parents[2] / "vectors" / "epsilon.json"
DELTAS = (1e-5, 1e-6, 1e-8)
PROBABILITIES = (1e-4, 1e-3, 1e-2, 0.1, 0.5)
NOISES = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STEPS = (1, 100, 10_000, 1_000_000)
MIXED: tuple[Entries, ...] = (
    ((0.1, 1.5, 60), (0.02, 0.9, 100), (1.0, 40.0, 5)),
    ((0.25, 3.0, 50), (0.25, 6.0, 80)),
    ((0.001, 2.0, 2000), (0.1, 8.0, 100)),
    ((0.001, 1.0, 10), (1.0, 3.0, 1)),
    ((0.0001, 1.0, 1_000_000), (1.0, 5.0, 1)),
    ((0.01, 1.0, 10_000), (0.001, 0.6, 10_000), (0.5, 30.0, 100)),
    ((0.0001, 30.0, 1_000_000), (0.001, 10.0, 10_000), (0.01, 5.0, 100)),
    ((0.1, 5.0, 1000), (0.5, 10.0, 1000), (0.001, 0.5, 100), (1.0, 30.0, 10)),
)
GRID: tuple[Entries, ...] = (
    *(((q, noise, steps),) for steps in STEPS for q in PROBABILITIES for noise in NOISES),
    *MIXED,
)
HOW = (
    "Epsilon at each delta of Poisson-subsampled Gaussian mechanisms [sampling_probability, noise_multiplier, steps], "
    "patient added or removed: pessimistic connect-the-dots PLDs, the mesh halved until no figure moves by more than "
    "1e-3 of itself (or 1e-8), or one moves up, which only rounding does: then the mesh before counts. upper: the last "
    "figure. lower: below it by twice the last move; a halving is expected to move the figure by a quarter of the move "
    "before, so that the truth lies between. Optimistic PLDs, which bound from below for certain, are compared where "
    "steps are few, and closed forms where they are many, in tests/common/privacy/test_accounting.py."
)


def pld_epsilons(entries: Entries, mesh: float, *, pessimistic: bool = True) -> tuple[float, ...]:
    """dp-accounting's epsilon at each of ``DELTAS``: an upper bound, or a lower one."""
    whole = None
    for q, noise, steps in entries:
        part = privacy_loss_distribution.from_gaussian_mechanism(
            noise,
            sampling_prob=q,
            value_discretization_interval=mesh,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        )
        part = part.self_compose(steps) if steps > 1 else part
        whole = part if whole is None else whole.compose(part)
    assert whole is not None
    sides = [pmf for pmf in (whole._pmf_remove, whole._pmf_add) if pmf is not None]
    return tuple(max(_epsilon_of(pmf, delta) for pmf in sides) for delta in DELTAS)


def bracket(entries: Entries, tight: float = 1e-3) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lower and upper epsilons at each of ``DELTAS``, as ``HOW`` says."""
    steps = sum(count for *_, count in entries)
    mesh = math.sqrt(sum(count * _deviation(q, noise) ** 2 for q, noise, count in entries) / steps) / 4
    before, found = pld_epsilons(entries, mesh), pld_epsilons(entries, mesh / 2)
    while any(old - new > max(tight * new, 1e-8) for old, new in zip(before, found, strict=True)):
        mesh /= 2
        finer = pld_epsilons(entries, mesh / 2)
        if any(new > old * (1 + 1e-6) for old, new in zip(found, finer, strict=True)):
            break
        before, found = found, finer
    return tuple(max(0.0, new - 2 * (old - new)) for old, new in zip(before, found, strict=True)), found


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Exact epsilon of Gaussian mechanisms (Balle & Wang 2018, theorem 8): mu^2 is the sum of steps / noise^2."""

    def excess(eps: float) -> float:
        above, below = log_ndtr(mu / 2 - eps / mu), eps + log_ndtr(-mu / 2 - eps / mu)
        return float(-math.exp(above) * math.expm1(below - above)) - delta

    return float(brentq(excess, 0, mu**2 / 2 + 8 * mu, xtol=1e-13)) if excess(0) > 0 else 0.0


def _epsilon_of(pmf: PLDPmf, delta: float) -> float:
    """As the PLD's own ``get_epsilon_for_delta``, which underflows above 700: weights relative to a grid point."""
    dense = pmf.to_dense_pmf()
    masses, lost = np.asarray(dense._probs, dtype=np.float64), dense._infinity_mass
    shares = -np.expm1(-dense._discretization * np.arange(len(masses)))
    below, above = -1, len(masses) - 1
    while above - below > 1:
        middle = (below + above) // 2
        too_low = lost + masses[middle:] @ shares[: len(masses) - middle] > delta
        below, above = (middle, above) if too_low else (below, middle)
    mass, discounted = lost + masses[above:].sum(), masses[above:] @ (1 - shares[: len(masses) - above])
    here = (dense._lower_loss + above) * dense._discretization
    return max(0.0, float(here + math.log((mass - delta) / discounted))) if mass > delta else 0.0


def _deviation(q: float, noise: float) -> float:
    """Standard deviation of one step's privacy loss, roughly: it sets the first mesh."""
    x = np.linspace(-12 * noise, 1 + 12 * noise, 400_001)
    loss = np.logaddexp(math.log1p(-q) if q < 1 else -math.inf, math.log(q) + (2 * x - 1) / (2 * noise**2))
    weights = (1 - q) * np.exp(-(x**2) / (2 * noise**2)) + q * np.exp(-((x - 1) ** 2) / (2 * noise**2))
    weights /= weights.sum()
    return math.sqrt(weights @ loss**2 - (weights @ loss) ** 2)


def _cell(entries: Entries) -> dict[str, Any]:
    lower, upper = bracket(entries)
    return {"mechanisms": entries, "lower": lower, "upper": upper}


def main() -> None:
    with ProcessPoolExecutor(2) as pool:
        cells = list(pool.map(_cell, GRID))
    source = {
        "written_by": f"{Path(__file__).name}, dp-accounting {version('dp-accounting')}",
        "confirmed_by": "closed forms and optimistic PLDs in tests/common/privacy/test_accounting.py",
        "written_how": HOW,
    }
    parts = {"source": json.dumps(source), "deltas": json.dumps(DELTAS)}
    parts["cells"] = "[\n    " + ",\n    ".join(json.dumps(cell) for cell in cells) + "\n  ]"
    VECTORS.write_text("{\n  " + ",\n  ".join(f'"{name}": {text}' for name, text in parts.items()) + "\n}\n")


if __name__ == "__main__":
    main()
