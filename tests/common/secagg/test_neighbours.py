"""The graph of large cohorts: its bounds against exact tails and against graphs that are drawn and looked at."""

import itertools
import math
import random
import secrets

import numpy as np
import pytest
from scipy.stats import hypergeom

from common.secagg.neighbours import (
    COLLUDING,
    CORRECTNESS_BITS,
    DROPPING,
    SECURITY_BITS,
    log2_of_correctness_failure,
    log2_of_security_failure,
    num_picks,
    pick,
    threshold_of,
)

SIZES = (33, 40, 64, 100, 200, 241, 300, 342, 400, 500, 1000, 2000)


def names(num_sites: int) -> list[str]:
    return [f"site-{number}" for number in range(num_sites)]


# ------------------------------------------------------------ numbers


@pytest.mark.parametrize("num_sites", range(2, 33))
def test_small_cohorts_are_complete(num_sites: int) -> None:
    assert num_picks(num_sites) == num_sites - 1
    cohort = names(num_sites)
    assert set(pick(cohort[0], cohort, random.Random(1))) == set(cohort[1:])


def test_thresholds_by_hand() -> None:
    assert [threshold_of(holders) for holders in (1, 2, 3, 4, 5, 6, 9, 10, 32)] == [1, 2, 3, 3, 4, 5, 7, 7, 22]


@pytest.mark.parametrize("holders", range(1, 201))
def test_a_threshold_is_the_smallest_above_two_thirds(holders: int) -> None:
    threshold = threshold_of(holders)
    assert 3 * threshold > 2 * holders >= 3 * (threshold - 1)
    assert threshold <= holders


@pytest.mark.parametrize("num_sites", SIZES)
def test_a_large_cohort_never_has_fewer_picks_than_the_largest_complete_one(num_sites: int) -> None:
    assert 31 <= num_picks(num_sites) < num_sites


# ------------------------------------------------------------ picks


@pytest.mark.parametrize("num_sites", [2, 3, 32, 33, 100, 400])
def test_picks_are_others_distinct_and_sorted(num_sites: int) -> None:
    cohort = names(num_sites)
    for site in (cohort[0], cohort[-1]):
        picks = pick(site, cohort, secrets.SystemRandom())
        assert len(picks) == num_picks(num_sites)
        assert site not in picks
        assert set(picks) <= set(cohort)
        assert list(picks) == sorted(set(picks))


def test_the_order_of_the_cohort_does_not_matter() -> None:
    cohort = names(100)
    assert pick("site-7", cohort, random.Random(3)) == pick("site-7", cohort[::-1], random.Random(3))
    assert pick("site-7", cohort, random.Random(3)) != pick("site-7", cohort, random.Random(4))


def test_picks_are_uniform() -> None:
    """31 of 99 others: each with probability 31/99, each pair with that of draws without return."""
    cohort, draws, coins = names(100), 6000, random.Random(8)
    others = [name for name in cohort if name != "site-50"]
    place = {name: at for at, name in enumerate(others)}
    picked = np.zeros((draws, len(others)), np.int64)
    for row in picked:
        row[[place[name] for name in pick("site-50", cohort, coins)]] = 1
    k, n = num_picks(100), len(others)
    for found, probability in (
        (picked.sum(axis=0), k / n),
        ((picked.T @ picked)[np.triu_indices(n, 1)], k * (k - 1) / (n * (n - 1))),
    ):
        deviations = (found - draws * probability) / math.sqrt(draws * probability * (1 - probability))
        assert np.abs(deviations).max() < 5
        assert 0.85 < deviations.std() < 1.15


# ------------------------------------------------------------ the bounds


def logs(probability: float) -> float:
    return math.log2(max(probability, 1e-300))


def exact_security(num_sites: int, picks: int) -> float:
    """The union bounds of the module's first two rows, with exact tails."""
    threshold, colluding = threshold_of(picks + 1), math.ceil(COLLUDING * num_sites)
    total = num_sites * hypergeom.sf(2 * threshold - (picks + 1) - 1, num_sites - 1, colluding, picks)
    for size in range(1, num_sites // 3 + 1):
        alone = hypergeom.sf(threshold - 2, num_sites - 1, min(colluding + size - 1, num_sites - 1), picks)
        if alone > 0:
            exponent = math.log2(math.comb(num_sites - colluding, size)) + size * math.log2(alone)
            total += 2.0 ** min(0.0, exponent)
    return logs(total)


def exact_correctness(num_sites: int, picks: int) -> float:
    """Some site loses more holders than it can: a survivor only others, a dropped site also itself."""
    dropping, spare = math.ceil(DROPPING * num_sites), picks + 1 - threshold_of(picks + 1)
    survivors = (num_sites - dropping) * hypergeom.sf(spare, num_sites - 1, dropping, picks)
    dropped = dropping * hypergeom.sf(spare - 1, num_sites - 1, dropping - 1, picks)
    return logs(survivors + dropped)


WEAK = [(60, 3), (60, 9), (100, 12), (400, 20), (1000, 31), (2000, 40)]
"""Sites and picks far too few, where nothing vanishes."""


@pytest.mark.parametrize(("num_sites", "picks"), [*((n, num_picks(n)) for n in SIZES), *WEAK])
def test_the_security_bound_is_above_the_exact_tails_and_near(num_sites: int, picks: int) -> None:
    bound, exact = log2_of_security_failure(num_sites, picks), exact_security(num_sites, picks)
    assert exact - 1e-6 <= bound
    assert bound <= max(exact, 0) + 1.5 or bound <= 0.8 * exact  # the geometric series costs little where it matters


@pytest.mark.parametrize(("num_sites", "picks"), [*((n, num_picks(n)) for n in SIZES), *WEAK])
def test_the_correctness_bound_is_above_the_exact_tails(num_sites: int, picks: int) -> None:
    bound, exact = log2_of_correctness_failure(num_sites, picks), exact_correctness(num_sites, picks)
    assert exact - 1e-6 <= bound <= exact + 1


@pytest.mark.parametrize("num_sites", SIZES)
def test_cohorts_fail_as_seldom_as_promised(num_sites: int) -> None:
    picks = num_picks(num_sites)
    assert (SECURITY_BITS, CORRECTNESS_BITS) == (40, 30)
    if picks == num_sites - 1:
        return  # complete: the graph adds no failure
    assert exact_security(num_sites, picks) <= log2_of_security_failure(num_sites, picks) + 1e-6 <= -40
    assert exact_correctness(num_sites, picks) <= -30


@pytest.mark.parametrize("num_sites", [300, 400, 1000, 2000])
def test_fewer_picks_would_not_do(num_sites: int) -> None:
    picks = num_picks(num_sites) - 1
    security, correctness = log2_of_security_failure(num_sites, picks), log2_of_correctness_failure(num_sites, picks)
    assert security > -40 or correctness > -30


# ------------------------------------------------------------ graphs drawn and looked at


def drawn(num_sites: int, picks: int, graphs: int, seed: int) -> np.ndarray:
    """(graph, site, other): whether a site picked another, each site's picks uniform."""
    random_ = np.random.default_rng(seed)
    marks = random_.random((graphs, num_sites, num_sites))
    marks[:, np.arange(num_sites), np.arange(num_sites)] = 2  # never oneself
    order = np.argpartition(marks, picks, axis=2)[:, :, :picks]
    found = np.zeros(marks.shape, bool)
    np.put_along_axis(found, order, True, axis=2)
    return found


def test_weak_graphs_give_both_kinds_of_share_as_often_as_bounded() -> None:
    """60 sites, 3 colluding, 3 picks: h = 4, t = 3. Two colluding holders are enough to reach 3 of both kinds."""
    graph = drawn(60, 3, 4000, seed=1)
    colluders = graph[:, 3:, :3].sum(axis=2)  # by honest site
    # Of the honest holders (the site too) each opens one kind; the colluding open both.
    honest = 4 - colluders
    opens = honest + 2 * colluders >= 2 * threshold_of(4)
    measured = opens.any(axis=1).mean()
    first_row = 60 * hypergeom.sf(1, 59, 3, 3)
    assert 0.6 * first_row < measured < first_row
    assert math.log2(measured) < log2_of_security_failure(60, 3)


def test_weak_graphs_open_small_sums_as_often_as_bounded() -> None:
    """12 sites, 1 colluding, 4 picks: h = 5, t = 4. Every set of at most four honest sites is tried."""
    num_sites, picks, graphs = 12, 4, 60_000
    threshold = threshold_of(picks + 1)
    masks = drawn(num_sites, picks, graphs, seed=2) @ (1 << np.arange(num_sites))  # (graph, site)
    opened = np.zeros(graphs, bool)
    for size in range(1, num_sites // 3 + 1):
        for small in itertools.combinations(range(1, num_sites), size):  # site 0 colludes
            living = sum(1 << site for site in (0, *small))
            holders = np.bitwise_count(masks[:, small] & living) + 1  # itself
            opened |= (holders >= threshold).all(axis=1)
    bound = 2 ** log2_of_security_failure(num_sites, picks)
    assert opened.sum() > 100
    assert bound / 5 < opened.mean() < bound


def test_weak_graphs_fail_honest_rounds_as_often_as_bounded() -> None:
    """60 sites, 3 picks, 3 dropped: some site, dropped or not, has fewer than t = 3 of its 4 holders left."""
    graph = drawn(60, 3, 4000, seed=3)
    lost = graph[:, :, :3].sum(axis=2)
    lost[:, :3] += 1  # a dropped site was a holder of its own
    measured = (lost > 4 - threshold_of(4)).any(axis=1).mean()
    assert 0.5 * 2 ** exact_correctness(60, 3) < measured < 2 ** exact_correctness(60, 3)
    assert math.log2(measured) < log2_of_correctness_failure(60, 3)


# ------------------------------------------------------------ growth


def test_picks_grow_with_the_logarithm() -> None:
    """From 1000 sites to 10 000 a third as many again; a hundredfold stays below twice."""
    found = {num_sites: num_picks(num_sites) for num_sites in (100, 500, 1000, 2000, 10_000)}
    assert found[10_000] < 1.34 * found[1000]
    assert found[10_000] < 2.5 * found[100]
    for num_sites in (1000, 2000, 10_000):
        assert found[num_sites] < 7 * math.log2(num_sites)


def test_picks_hardly_ever_fall_as_the_cohort_grows() -> None:
    """They may, a little: a threshold counts whole thirds of the holders, so that two or three fewer can do better."""
    found = [num_picks(num_sites) for num_sites in [*range(2, 400), *range(400, 2001, 100), 5000, 10_000]]
    assert (np.maximum.accumulate(found) - found).max() <= 3
    assert found[-1] == max(found)
