"""The honest server's side of a session: right sums step after step, named errors, and nothing in between."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import BadPeer, OutOfOrder, ProtocolError, TooFewSurvivors
from common.secagg import neighbours
from common.secagg.encoding import MODULUS_BITS, Encoding, Integers
from common.secagg.neighbours import threshold_of
from server.secagg_session import SecureSteps
from tests.consortium import names_of
from tests.session_consortium import STEP_STAGES, SessionConsortium, integers_of

FIVE, LENGTH = names_of(5), 7
FIRST, LAST = FIVE[0], FIVE[-1]
Drops = dict[int, dict[str, list[str]]]  # by step (0 before the first) and stage


def plain_sum(values: Mapping[str, Integers], names: tuple[str, ...]) -> list[int]:
    return [sum(int(values[name][at]) for name in names) for at in range(len(next(iter(values.values()))))]


def begun(names: list[str] = FIVE, steps: int = 3, **options: Any) -> tuple[SessionConsortium, SecureSteps]:
    """A session whose sites have shared their seeds."""
    sites = SessionConsortium(names, steps=steps, **options)
    server = sites.advertise()
    sites.share(server)
    return sites, server


def check_nothing_decoded(server: SecureSteps) -> None:
    """Whatever is asked of the server from here on, it gives no sum."""
    steps: list[Callable[[], object]] = [
        server.result,
        server.confirm_requests,
        server.open_requests,
        server.open_seeds_requests,
        lambda: server.step_requests(np.zeros(3, np.float32)),
        server.result,
    ]
    for step in steps:
        with pytest.raises(ProtocolError):
            step()


# ---------------------------------------------------------------- the sum of every step


def test_two_sites_and_two_steps_by_hand() -> None:
    names = ["north", "south"]
    sites, server = begun(names, steps=2, length=3)
    first = {"north": np.array([1, -2, 2**30]), "south": np.array([-4, -5, 2**30 - 1])}
    second = {"north": np.array([0, 0, -(2**31)]), "south": np.array([7, -7, 0])}
    assert sites.one_step(server, first).tolist() == [-3, -7, 2**31 - 1]  # the largest sum that 32 bits hold
    assert sites.one_step(server, second).tolist() == [7, -7, -(2**31)]  # and the smallest
    assert server.survivors == ("north", "south")
    with pytest.raises(OutOfOrder, match="no step after 2"):
        server.step_requests(np.zeros(3, np.float32))


@st.composite
def sessions(draw: st.DrawFn, least: int, most: int, steps: int) -> tuple[SessionConsortium, Drops]:
    """Sites, and who falls out at which stage of which step."""
    count = draw(st.integers(least, most))
    names, num_steps = names_of(count), draw(st.integers(1, steps))
    where = [(0, "advertise_keys"), (0, "share_seed")]
    where += [(step, stage) for step in range(1, num_steps + 1) for stage in STEP_STAGES]
    staying = draw(st.sampled_from([1, 4, 12]))
    fates = draw(st.lists(st.sampled_from([*where, *[None] * (staying * len(where))]), min_size=count, max_size=count))
    drops: Drops = {}
    for name, fate in zip(names, fates, strict=True):
        if fate is not None:
            drops.setdefault(fate[0], {}).setdefault(fate[1], []).append(name)
    minimum = draw(st.just(2) | st.integers(2, count))
    length, bits = draw(st.sampled_from([1, 2, 3, 5, 33])), draw(st.sampled_from(MODULUS_BITS))
    return SessionConsortium(names, length, num_steps, minimum, encoding=Encoding(1.0, 4, bits)), drops


def enough(sites: SessionConsortium, owners: set[str], left: set[str]) -> bool:
    """Whether more than two thirds of each owner's holders are left."""
    for owner in owners:
        holders = {owner, *sites.sites[owner].picks}
        if 3 * len(holders & left) <= 2 * len(holders):
            return False
    return True


def sums_expected(sites: SessionConsortium, drops: Drops) -> list[set[str]]:
    """By counting alone: the survivors of each step, up to the first that cannot be had."""
    lost = lambda step, stage: set(drops.get(step, {}).get(stage, ()))  # noqa: E731
    cohort = set(sites.names) - lost(0, "advertise_keys")
    here, found = cohort - lost(0, "share_seed"), list[set[str]]()
    if len(cohort) < sites.minimum:
        return found
    for step in range(1, sites.steps + 1):
        if len(here) < sites.minimum or not enough(sites, here, here):
            return found
        survivors = here - lost(step, "begin_step")
        if len(survivors) < sites.minimum or not enough(sites, survivors, survivors):
            return found
        confirmed = survivors - lost(step, "confirm_step")
        if not enough(sites, confirmed, confirmed):
            return found
        opened = confirmed - lost(step, "open_step")
        missing, dropped = survivors - opened, here - survivors
        if missing:
            partners = [(one, other) for one in missing for other in dropped]
            if any(other in sites.sites[one].picks or one in sites.sites[other].picks for one, other in partners):
                return found
            if not enough(sites, missing, opened) or not enough(sites, missing, opened - lost(step, "open_seeds")):
                return found
        found.append(survivors)
        here = opened - lost(step, "open_seeds")
        if not missing and step < sites.steps:
            here = opened  # nobody was asked for seeds, so nobody fell out there
            late = lost(step, "open_seeds")
            drops.setdefault(step + 1, {}).setdefault("begin_step", []).extend(late)
    return found


def check_session(sites: SessionConsortium, drops: Drops) -> None:
    found: list[set[str]] = []
    limit = (2 ** (sites.plan.encoding.modulus_bits - 1) - 1) // len(sites.names)
    failed = False
    try:
        server = sites.advertise(drops.get(0, {}).get("advertise_keys", ()))
        sites.share(server, drops.get(0, {}).get("share_seed", ()))
        for step in range(1, sites.steps + 1):
            random = np.random.default_rng(step)
            values = {name: random.integers(-limit, limit, sites.plan.length, endpoint=True) for name in sites.names}
            total = sites.one_step(server, values, drops.get(step))
            assert total.tolist() == plain_sum(values, server.survivors)
            found.append(set(server.survivors))
            sites.gone.update(drops.get(step, {}).get("open_seeds", ()))
    except TooFewSurvivors:
        failed = True
        check_nothing_decoded(server)
    assert found == sums_expected(sites, drops)
    assert failed is (len(found) < sites.steps)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sessions(2, 10, 4))
def test_every_sum_is_exactly_that_of_its_survivors_or_the_session_ends(case: tuple[SessionConsortium, Drops]) -> None:
    check_session(*case)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(sessions(33, 42, 2))
def test_the_same_holds_where_sites_have_only_some_neighbours(case: tuple[SessionConsortium, Drops]) -> None:
    check_session(*case)


def test_forty_sites_of_which_some_fall_out_at_every_stage() -> None:
    names = names_of(40)
    sites, server = begun(names, steps=3)
    drops = [
        {"begin_step": names[:3]},
        {"confirm_step": names[3:4], "open_step": names[4:5]},
        {"begin_step": names[5:6], "open_seeds": names[6:7]},
    ]
    gone: set[str] = set()
    for step, lost in enumerate(drops, start=1):
        values = integers_of(names, LENGTH, step)
        total = sites.one_step(server, values, lost)
        gone |= set(lost.get("begin_step", ()))
        assert set(server.survivors) == set(names) - gone
        assert total.tolist() == plain_sum(values, server.survivors)
        gone = {name for each in drops[:step] for stage in each.values() for name in stage}


def test_a_sum_over_many_pieces_of_a_long_vector() -> None:
    names, length = names_of(3), 2 * (1 << 16) + 5
    sites, server = begun(names, steps=2, length=length)
    for step in (1, 2):
        values = integers_of(names, length, step)
        np.testing.assert_array_equal(sites.one_step(server, values), sum(values.values()))


# ---------------------------------------------------------------- who falls out


@pytest.mark.parametrize("stage", STEP_STAGES)
@pytest.mark.parametrize("num_dropped", [0, 1, 2])
def test_five_sites_of_which_some_fall_out_in_the_second_step(stage: str, num_dropped: int) -> None:
    """Four of five must stay: a seed opens with four of the other four holders."""
    sites, server = begun()
    sites.one_step(server, integers_of(FIVE, LENGTH))
    values, dropped = integers_of(FIVE, LENGTH, 2), FIVE[:num_dropped]
    if num_dropped < 2 or stage == "open_seeds":  # nobody is asked for seeds when all opened the step
        assert sites.one_step(server, values, {stage: dropped}).tolist() == plain_sum(values, server.survivors)
        assert server.survivors == tuple(FIVE[num_dropped:] if stage == "begin_step" else FIVE)
        return
    with pytest.raises(TooFewSurvivors, match=f"ended after {stage} 2: it needs 4 "):
        sites.one_step(server, values, {stage: dropped})
    check_nothing_decoded(server)


def test_a_site_that_did_not_open_a_step_is_in_its_sum_and_in_no_later_one() -> None:
    sites, server = begun()
    values = integers_of(FIVE, LENGTH)
    sites.one_step(server, values, {"open_step": [FIRST]})
    assert server.survivors == tuple(FIVE)
    sites.one_step(server, integers_of(FIVE, LENGTH, 2))
    assert server.survivors == tuple(FIVE[1:])
    for name in FIVE[1:]:
        assert FIRST not in sites.sites[name].pair_secrets and FIRST not in sites.sites[name].held


def test_what_a_dropped_and_a_silent_site_had_in_common_ends_the_session() -> None:
    names = names_of(8)
    sites, server = begun(names)
    with pytest.raises(TooFewSurvivors, match=f"the key that {names[1]} and a site that dropped out have in common"):
        sites.one_step(server, integers_of(names, LENGTH), {"begin_step": names[:1], "open_step": names[1:2]})
    check_nothing_decoded(server)


def test_a_sum_over_fewer_sites_than_the_minimum_is_never_opened() -> None:
    names = names_of(8)
    sites, server = begun(names, minimum=7)
    sites.one_step(server, integers_of(names, LENGTH), {"begin_step": names[:1]})
    sites.values = integers_of(names, LENGTH, 2)
    sites.ask(server, "begin_step", gone=names[1:2])  # six are left, which is still the threshold
    with pytest.raises(TooFewSurvivors, match="ended after begin_step 2: it needs 7 sites, 6 left"):
        sites.ask(server, "confirm_step")
    check_nothing_decoded(server)


def test_the_good_case_opens_no_seed_and_every_key_once() -> None:
    sites, server = begun(steps=2)
    sites.values, opened = integers_of(FIVE, LENGTH), dict[str, Any]()
    for stage in STEP_STAGES[:3]:
        sites.ask(server, stage, lambda name, reply: opened.setdefault((stage, name), reply))  # noqa: B023
    assert server.open_seeds_requests() == {}
    for name in FIVE:
        assert opened["open_step", name].pair_keys == {}
        assert len(opened["begin_step", name].words) == (LENGTH + 1) // 2


# ---------------------------------------------------------------- answers that do not fit


def flipped(data: bytes, bit: int = 3) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


Change = Callable[[Any], Any]
GARBAGE: list[tuple[str, str, Change, str]] = [
    ("begin_step", "attempt", lambda r: replace(r, attempt=2), "attempt 1 .* found 2"),
    ("begin_step", "the step before", lambda r: replace(r, step=r.step - 1), "Expected step 2 .* found 1"),
    ("begin_step", "study", lambda r: replace(r, study_digest="00" * 32), "Expected study"),
    ("begin_step", "round", lambda r: replace(r, round=2), "Expected round 1 .* found 2"),
    ("begin_step", "length", lambda r: replace(r, length=LENGTH - 1), "Expected length 7 .* found 6"),
    ("begin_step", "bits", lambda r: replace(r, modulus_bits=21), "Expected modulus_bits 32 .* found 21"),
    ("begin_step", "words", lambda r: replace(r, words=r.words[:-1]), "number of words 4 .* found 3"),
    ("begin_step", "no digest", lambda r: replace(r, key_digests={}), "digest of the key of every mask"),
    ("confirm_step", "attempt", lambda r: replace(r, attempt=3), "attempt 1 .* found 3"),
    ("confirm_step", "signature", lambda r: replace(r, signature=flipped(r.signature)), "signature"),
    ("open_step", "attempt", lambda r: replace(r, attempt=3), "attempt 1 .* found 3"),
    ("open_step", "the step before", lambda r: replace(r, step=1), "Expected step 2 .* found 1"),
    ("open_step", "a bit of the key", lambda r: replace(r, self_key=flipped(r.self_key)), "keys of the masks"),
    ("open_step", "no key", lambda r: replace(r, self_key=b""), "keys of the masks"),
    ("open_step", "a key more", lambda r: replace(r, pair_keys={LAST: bytes(32)}), "no others"),
]


@pytest.mark.parametrize(
    ("stage", "change", "text"),
    [(stage, change, text) for stage, _, change, text in GARBAGE],
    ids=[f"{stage}, {what}" for stage, what, _, _ in GARBAGE],
)
def test_an_answer_that_does_not_fit_is_refused_and_the_rest_add_up(stage: str, change: Change, text: str) -> None:
    sites, server = begun()
    sites.one_step(server, integers_of(FIVE, LENGTH))
    refused: list[str] = []
    take = {
        "begin_step": server.take_masked_step,
        "confirm_step": server.take_confirmation,
        "open_step": server.take_opened_step,
    }[stage]

    def spoil(name: str, reply: Any) -> Any:
        if name != FIRST:
            return reply
        with pytest.raises(BadPeer, match=text):
            take(name, change(reply))
        refused.append(name)
        return None

    values = integers_of(FIVE, LENGTH, 2)
    total = sites.one_step(server, values, spoil={stage: spoil})
    assert refused == [FIRST]
    assert total.tolist() == plain_sum(values, tuple(FIVE[1:] if stage == "begin_step" else FIVE))


def test_a_wrong_key_in_common_with_a_dropped_site_never_gives_a_wrong_sum() -> None:
    sites, server = begun(names_of(8))

    def spoil(name: str, reply: Any) -> Any:
        if name != names_of(8)[2]:
            return reply
        with pytest.raises(BadPeer, match="keys of the masks"):
            server.take_opened_step(name, replace(reply, pair_keys={n: flipped(k) for n, k in reply.pair_keys.items()}))
        return None

    with pytest.raises(TooFewSurvivors, match="in common"):
        sites.one_step(server, integers_of(names_of(8), LENGTH), {"begin_step": [FIRST]}, {"open_step": spoil})
    check_nothing_decoded(server)


@pytest.mark.parametrize("change", ["flip", "cut", "none", "another's"])
def test_wrong_shares_of_a_seed_are_passed_over_while_enough_are_right(change: str) -> None:
    names = names_of(9)  # seven of nine holders open a seed, one of eight others may be wrong

    def spoiled(share: bytes) -> bytes:
        return {"flip": flipped(share), "cut": share[:-1], "none": b"", "another's": bytes(33)}[change]

    for num_wrong in (1, 2):
        sites, server = begun(names)
        wrong = names[1 : 1 + num_wrong]
        spoil = {
            "open_seeds": lambda name, reply, wrong=tuple(wrong): (
                replace(reply, shares={n: spoiled(s) for n, s in reply.shares.items()}) if name in wrong else reply
            )
        }
        values = integers_of(names, LENGTH)
        if num_wrong == 1:
            assert sites.one_step(server, values, {"open_step": [names[0]]}, spoil).tolist() == plain_sum(
                values, tuple(names)
            )
            continue
        with pytest.raises(TooFewSurvivors, match=f"needs 7 right shares of {names[0]}, 6 left"):
            sites.one_step(server, values, {"open_step": [names[0]]}, spoil)
        check_nothing_decoded(server)


@pytest.mark.parametrize("cheat", ["another seed", "another digest"])
def test_a_dealer_that_cheats_is_named_and_nothing_is_decoded(cheat: str) -> None:
    sites = SessionConsortium(FIVE)
    server = sites.advertise()
    for name, request in server.share_seed_requests().items():
        reply = sites.sites[name].share_seed(request)
        if name == FIRST and cheat == "another digest":
            reply = replace(reply, seed_digest=bytes(32))
        if name == FIRST and cheat == "another seed":
            sites.sites[name].seed = bytes(32)  # masks with it what it did not deal
        server.take_sealed_seeds(name, reply)
    with pytest.raises(BadPeer, match=f"{FIRST} dealt shares that do not belong to its mask"):
        sites.one_step(server, integers_of(FIVE, LENGTH), {"open_step": [FIRST]})
    check_nothing_decoded(server)


@pytest.mark.parametrize("stage", STEP_STAGES)
def test_of_two_answers_the_first_counts_and_strangers_have_none(stage: str) -> None:
    sites, server = begun(steps=1)
    sites.values = integers_of(FIVE, LENGTH)
    take: Any = {
        "begin_step": server.take_masked_step,
        "confirm_step": server.take_confirmation,
        "open_step": server.take_opened_step,
        "open_seeds": server.take_opened_seeds,
    }[stage]
    for each in STEP_STAGES[: STEP_STAGES.index(stage)]:
        sites.ask(server, each)
    replies: dict[str, Any] = {}
    sites.ask(server, stage, lambda name, reply: replies.setdefault(name, reply))
    for name in (FIRST, "elsewhere"):
        with pytest.raises(OutOfOrder, match=f"one answer of {name} to {stage} at most"):
            take(name, replies[FIRST])
    for each in STEP_STAGES[STEP_STAGES.index(stage) + 1 :]:
        sites.ask(server, each)
    assert server.result().tolist() == plain_sum(sites.values, tuple(FIVE))


@pytest.mark.parametrize("reached", range(5), ids=["shared", *STEP_STAGES])
def test_only_the_next_stage(reached: int) -> None:
    sites, server = begun(steps=2)
    sites.values = integers_of(FIVE, LENGTH)
    for stage in STEP_STAGES[:reached]:
        if stage == "open_seeds":
            with pytest.raises(OutOfOrder):
                server.step_requests(np.zeros(3, np.float32))
        sites.ask(server, stage)
    enter: list[Callable[[], object]] = [
        lambda: server.step_requests(np.zeros(3, np.float32)),
        server.confirm_requests,
        server.open_requests,
        server.open_seeds_requests,
        server.result,
    ]
    legal = {0: {0}, 1: {1}, 2: {2}, 3: {3, 4}, 4: {4}}[reached]
    for at, step in enumerate(enter):
        if at not in legal:
            with pytest.raises(OutOfOrder):
                step()


# ---------------------------------------------------------------- neighbours, for the guarantee of the sites' side


@pytest.mark.parametrize("num_sites", [34, 40, 64, 100, 200, 400])
def test_no_small_set_of_sites_can_make_a_sum_of_its_own_even_when_seeds_were_opened(num_sites: int) -> None:
    """Up to a third of the sites, or half where none's seed was opened: as ``client/secagg_session.py`` says.

    In a set whose sum opens, a site that opened its own key has all but t - 1 of its picks among the set and the
    colluders; one whose seed was opened has 2t - h of them among the former and the colluders.
    """
    picks = neighbours.num_picks(num_sites)
    threshold, colluding = threshold_of(picks + 1), math.ceil(neighbours.COLLUDING * num_sites)
    chances: list[float] = []
    for size in range(1, num_sites // 2 + 1):
        own = neighbours._at_least(threshold - 1, num_sites - 1, colluding + size - 1, picks)
        for first in range(1, size + 1) if size <= num_sites // 3 else [size]:
            seed = neighbours._at_least(2 * threshold - picks - 1, num_sites - 1, colluding + first, picks)
            if own > 0 and (seed > 0 or first == size):
                sets = neighbours._log_choose(num_sites - colluding, size) + neighbours._log_choose(size, first)
                opened = (size - first) * math.log(seed) if first < size else 0.0
                chances.append(math.exp(min(0.0, sets + first * math.log(own) + opened)))
    assert sum(chances) <= 2.0**-neighbours.SECURITY_BITS
