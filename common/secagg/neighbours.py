"""Who holds a site's shares and shares a mask with it: everybody in small cohorts, a few random others in large ones.

Above ``COMPLETE`` sites each site picks k others with secret coins, after the cohort is fixed (Bell et al. 2020,
"Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", section 4). It shares its secrets among its picks
and itself, and has a pairwise mask with everyone it picked and everyone that picked it.

Design note: the picks are each site's own coins and no function of what the server sends, so a server cannot try
cohorts or numbers until a graph suits it. Everything is bounded for the worst dropouts that an active server may claim
after it has seen all picks; only the colluding sites are fixed before.

| failure | bounded by |
|---|---|
| a site's secrets open: the server gets t shares of both kinds | some site picks 2t - h or more colluders |
| the sum over fewer than a third of the sites opens | s sites whose living holders are all among them or colluding |
| an honest round fails though few sites dropped | some site, living or dropped, loses more than h - t of its holders |

The first two add up to at most 2^-40 with one site in twenty colluding, the third is at most 2^-30 with one in twenty
dropping out. Each site needs h = k + 1 holders, t of them, t > 2h/3.
"""

import math
import random
from collections.abc import Sequence
from functools import lru_cache

COMPLETE = 32
COLLUDING = DROPPING = 1 / 20
SECURITY_BITS, CORRECTNESS_BITS = 40, 30


def threshold_of(num_holders: int) -> int:
    """The smallest threshold above two thirds of the holders, as the active adversary of Bonawitz et al. 2017 needs."""
    return 2 * num_holders // 3 + 1


@lru_cache(maxsize=64)
def num_picks(num_sites: int) -> int:
    """How many others each site of a cohort of ``num_sites`` picks."""
    picks = min(num_sites, COMPLETE) - 1
    while picks < num_sites - 1 and not _is_enough(num_sites, picks):
        picks += 1
    return picks


def pick(site: str, cohort: Sequence[str], coins: random.Random) -> tuple[str, ...]:
    """The others that will hold the shares of ``site``, sorted. ``coins`` are secret: the system's, but in tests."""
    others = sorted(name for name in cohort if name != site)
    return tuple(sorted(coins.sample(others, num_picks(len(cohort)))))


def _is_enough(num_sites: int, picks: int) -> bool:
    return (
        log2_of_security_failure(num_sites, picks) <= -SECURITY_BITS
        and log2_of_correctness_failure(num_sites, picks) <= -CORRECTNESS_BITS
    )


def log2_of_security_failure(num_sites: int, picks: int) -> float:
    """Upper bound of the first two rows of the module's table, as a logarithm to base 2."""
    threshold, colluding = threshold_of(picks + 1), math.ceil(COLLUDING * num_sites)
    both_kinds = num_sites * _at_least(2 * threshold - (picks + 1), num_sites - 1, colluding, picks)
    small_sums = 0.0
    for size in range(1, num_sites // 3 + 1):
        # Of a site's own picks at least t - 1 must live (it holds a share itself), all in the small set or colluding.
        alone = _at_least(threshold - 1, num_sites - 1, colluding + size - 1, picks)
        if alone > 0:
            small_sums += math.exp(min(0.0, _log_choose(num_sites - colluding, size) + size * math.log(alone)))
    return math.log2(max(both_kinds + small_sums, 1e-300))


def log2_of_correctness_failure(num_sites: int, picks: int) -> float:
    """Upper bound of the third row of the module's table, as a logarithm to base 2."""
    dropping = math.ceil(DROPPING * num_sites)
    lost = picks + 1 - threshold_of(picks + 1) + 1
    living = (num_sites - dropping) * _at_least(lost, num_sites - 1, dropping, picks)
    dropped = dropping * _at_least(lost - 1, num_sites - 1, dropping - 1, picks)  # it is one of its own lost holders
    return math.log2(max(living + dropped, 1e-300))


def _at_least(least: int, population: int, marked: int, draws: int) -> float:
    """Upper bound of P[X >= least], X hypergeometric: its ratios fall, so a geometric series bounds the tail."""
    marked = min(marked, population)
    if least <= draws * marked / population:
        return 1.0
    if least > min(draws, marked):
        return 0.0
    first = math.exp(
        _log_choose(marked, least) + _log_choose(population - marked, draws - least) - _log_choose(population, draws)
    )
    ratio = (marked - least) * (draws - least) / ((least + 1) * (population - marked - draws + least + 1))
    return min(1.0, first / (1 - ratio)) if ratio < 1 else 1.0


def _log_choose(total: int, chosen: int) -> float:
    if not 0 <= chosen <= total:
        return -math.inf
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)
