"""The server as an attacker in a session: each attack ends in the site's refusal, and its vectors stay hidden."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from common import wire
from common.errors import BadPeer
from common.messages import Confirmation, MaskedStep, OpenedSeeds, OpenedStep, Refusal, Vector
from common.secagg.encoding import decode_integers
from common.secagg.neighbours import threshold_of
from tests.client.attacker import TOO_UNEVEN, uniformity
from tests.client.session_attacker import STAGES, SessionAttacker, SessionMachines
from tests.client.test_active_server import SWAPS, bit_flipped
from tests.consortium import names_of
from tests.session_consortium import INTEGERS

NAMES = ("east", "north", "south", "west")
VICTIM, OTHER, THIRD, FOURTH = "north", "east", "south", "west"
REST = (OTHER, THIRD, FOURTH)
SEVEN = names_of(7)  # five of seven open; two may collude with an active server


@pytest.fixture
def attacker() -> SessionAttacker:
    return SessionAttacker(SessionMachines(NAMES))


# ---------------------------------------------------------------- the attacker's own tools


def test_left_alone_the_server_is_honest_and_learns_the_sums_only(attacker: SessionAttacker) -> None:
    attacker.walk((3, "open_step"))
    for step in (1, 2, 3):
        total = np.zeros_like(attacker.unknown(step, VICTIM)[0])
        for name in NAMES:
            words, left = attacker.unknown(step, name)
            assert set(left) == set(NAMES) - {name}  # its own mask is gone, all the others stay
            total += words
        plain = np.sum([attacker.sites.values(name, step) for name in NAMES], axis=0)
        assert (decode_integers(total, INTEGERS, len(plain)) == plain).all()
    for name in NAMES:
        attacker.assert_hidden(name)


def test_whoever_has_every_mask_finds_the_vector() -> None:
    # The control of all tests below: with three colluders among four sites the same code opens the fourth one's.
    attacker = SessionAttacker(SessionMachines(NAMES), colluders=REST)
    attacker.walk((2, "open_step"))
    for step in (1, 2):
        assert attacker.finds(step, VICTIM)
        assert uniformity(attacker.unknown(step, VICTIM)[0]) < TOO_UNEVEN
    with pytest.raises(AssertionError, match="lies open"):
        attacker.assert_hidden(VICTIM)


def test_the_masks_of_two_steps_have_nothing_in_common(attacker: SessionAttacker) -> None:
    attacker.sites.values = lambda name, step: np.zeros(4000, np.int64)  # type: ignore[method-assign]
    attacker.walk((2, "begin_step"))
    first, second = (attacker.masked[step, VICTIM][1].words for step in (1, 2))
    assert uniformity(first - second) > TOO_UNEVEN
    attacker.assert_hidden(VICTIM)  # the second one's self mask too: the keys of step 1 say nothing of it
    assert "" in attacker.unknown(2, VICTIM)[1]


# ---------------------------------------------------------------- swaps a key, mixes sums and sessions


@pytest.mark.parametrize("swap", SWAPS)
def test_a_swapped_key_or_a_padded_cohort_is_refused(swap: str, attacker: SessionAttacker) -> None:
    attacker.walk((0, "advertise_keys"))
    attacker.refused(VICTIM, attacker.share_seed(SWAPS[swap](attacker)), "bad_peer")  # type: ignore[arg-type]
    attacker.assert_nothing_is_left(VICTIM)


@pytest.mark.parametrize("field", ["steps", "round"])
def test_sites_that_were_shown_two_sessions_do_not_open_each_others_shares(
    field: str, attacker: SessionAttacker
) -> None:
    attacker.walk((0, "advertise_keys"))
    request = attacker.request(0, "share_seed", VICTIM)
    attacker.ask(VICTIM, dataclasses.replace(request, **{field: 2}))
    attacker.walk((0, "share_seed"), (0, "share_seed"), asked=REST)
    attacker.refused(OTHER, attacker.step(1, OTHER, NAMES), "bad_peer")
    request = attacker.step(1, VICTIM, NAMES)
    if field == "round":
        request = dataclasses.replace(request, work=dataclasses.replace(request.work, round=2))
    attacker.refused(VICTIM, request, "bad_peer")
    attacker.assert_nothing_is_left(VICTIM)


def test_a_session_without_steps_is_refused(attacker: SessionAttacker) -> None:
    attacker.walk((0, "advertise_keys"))
    request = dataclasses.replace(attacker.request(0, "share_seed", VICTIM), steps=0)
    attacker.refused(VICTIM, request, "bad_peer")


# ---------------------------------------------------------------- replays and leaves out steps


@pytest.mark.parametrize("reached", ["begin_step", "confirm_step", "open_step"])
@pytest.mark.parametrize("participants", [NAMES, (VICTIM, OTHER, THIRD)])
@pytest.mark.parametrize("again", [1, 2])
def test_a_step_is_served_once(
    again: int, participants: tuple[str, ...], reached: str, attacker: SessionAttacker
) -> None:
    """The same vector under two lists of sites would be the attacker's: whatever is asked, none leaves again."""
    attacker.walk((2, reached))
    attacker.refused(VICTIM, attacker.step(again, VICTIM, participants), "out_of_order")
    attacker.assert_nothing_is_left(VICTIM)


@pytest.mark.parametrize(
    ("reached", "asked"),
    [
        ((0, "share_seed"), 2),
        ((0, "share_seed"), 0),
        ((1, "begin_step"), 2),
        ((1, "confirm_step"), 2),
        ((1, "open_step"), 3),
        ((3, "open_step"), 4),
    ],
)
def test_no_step_is_left_out(reached: tuple[int, str], asked: int, attacker: SessionAttacker) -> None:
    attacker.walk(reached)
    attacker.refused(VICTIM, attacker.step(asked, VICTIM, NAMES), "out_of_order")
    attacker.assert_nothing_is_left(VICTIM)


@pytest.mark.parametrize("stage", ["confirm_step", "open_step", "open_seeds"])
@pytest.mark.parametrize("named", [1, 3])
def test_a_message_of_another_step_is_refused(named: int, stage: str, attacker: SessionAttacker) -> None:
    before = {"confirm_step": "begin_step", "open_step": "confirm_step", "open_seeds": "open_step"}[stage]
    attacker.walk((2, before))
    genuine = {
        "confirm_step": attacker.confirm(2, NAMES),
        "open_step": attacker.open(2 if stage == "open_step" else 1, NAMES),
        "open_seeds": attacker.seeds_of(2, [OTHER]),
    }[stage]
    attacker.refused(VICTIM, dataclasses.replace(genuine, step=named), "out_of_order")
    attacker.assert_nothing_is_left(VICTIM)


def test_confirmations_of_another_step_are_refused(attacker: SessionAttacker) -> None:
    attacker.walk((2, "confirm_step"))
    for name in REST:
        attacker.confirmed[2, name] = attacker.confirmed[1, name]
    attacker.refused(VICTIM, attacker.open(2, NAMES), "bad_peer")
    attacker.assert_nothing_is_left(VICTIM)


ORDER = [(0, "share_seed"), (1, "begin_step"), (1, "confirm_step"), (1, "open_step"), (1, "open_seeds")]


@pytest.fixture(scope="module")
def story() -> tuple[SessionAttacker, list[dict[str, Any]], list[Any]]:
    """A step told to its end: after every stage the sites, and the genuine request of every stage to the victim."""
    attacker, trees, requests = SessionAttacker(SessionMachines(NAMES, length=1000)), [], []
    attacker.walk((0, "advertise_keys"))
    for step, stage in ORDER:
        for name in NAMES if stage != "open_seeds" else [VICTIM]:
            seeds = attacker.seeds_of(1, [OTHER])
            request = seeds if stage == "open_seeds" else attacker.request(step, stage, name)
            assert not isinstance(attacker.ask(name, request), Refusal)
            if name == VICTIM:
                requests.append(request)
        trees.append(attacker.sites.trees())
    return attacker, trees, requests


@pytest.mark.parametrize("reached", range(len(ORDER)), ids=[stage for _, stage in ORDER])
@pytest.mark.parametrize("asked", range(len(ORDER)), ids=[stage for _, stage in ORDER])
def test_every_pair_of_stages(
    asked: int, reached: int, story: tuple[SessionAttacker, list[dict[str, Any]], list[Any]]
) -> None:
    attacker, trees, requests = story
    attacker.sites.back_to(trees[reached])
    reply = attacker.sites.ask(VICTIM, requests[asked])
    if asked == reached + 1:
        assert not isinstance(reply, Refusal)
    else:
        assert reply == Refusal("out_of_order")
        assert VICTIM not in attacker.sites.sites
    attacker.assert_hidden(VICTIM)


# ---------------------------------------------------------------- shows two lists, two states


def test_two_lists_of_participants_open_nothing(attacker: SessionAttacker) -> None:
    attacker.walk((1, "open_step"))
    lists = {VICTIM: NAMES, OTHER: NAMES, THIRD: (VICTIM, THIRD, FOURTH), FOURTH: (VICTIM, THIRD, FOURTH)}
    for name in NAMES:
        assert isinstance(attacker.ask(name, attacker.step(2, name, lists[name])), MaskedStep)
    for name in NAMES:
        assert isinstance(attacker.ask(name, attacker.confirm(2, (VICTIM, THIRD, FOURTH))), Confirmation) or (
            name == OTHER
        )
    attacker.refused(VICTIM, attacker.open(2, (THIRD, FOURTH)), "bad_peer")  # they signed for another step
    attacker.refused(THIRD, attacker.open(2, (FOURTH,)), "too_few_survivors")
    attacker.assert_nothing_is_left(VICTIM)
    attacker.assert_hidden(THIRD)


def test_two_lists_of_survivors_open_nothing(attacker: SessionAttacker) -> None:
    attacker.walk((2, "begin_step"))
    lists = {VICTIM: NAMES, OTHER: NAMES, THIRD: REST, FOURTH: REST}
    for name in NAMES:
        assert isinstance(attacker.ask(name, attacker.confirm(2, lists[name])), Confirmation)
    for name in NAMES:
        same = [each for each in NAMES if lists[each] == lists[name]]
        attacker.refused(name, attacker.open(2, same), "too_few_survivors")
    attacker.assert_nothing_is_left(VICTIM)


def test_signatures_over_two_lists_do_not_add_up(attacker: SessionAttacker) -> None:
    attacker.walk((2, "begin_step"))
    for name in NAMES:
        attacker.ask(name, attacker.confirm(2, (VICTIM, OTHER, THIRD) if name == THIRD else NAMES))
    attacker.refused(VICTIM, attacker.open(2, NAMES), "bad_peer")
    attacker.assert_nothing_is_left(VICTIM)


def test_a_colluders_second_signature_is_not_enough(attacker: SessionAttacker) -> None:
    attacker.walk((1, "begin_step"))
    for name in REST:  # they take the victim for dropped, and open what they have in common with it
        attacker.ask(name, attacker.confirm(1, REST))
    for name in REST:
        reply = attacker.ask(name, attacker.open(1, REST))
        assert isinstance(reply, OpenedStep) and set(reply.pair_keys) == {VICTIM}
    attacker.ask(VICTIM, attacker.confirm(1, NAMES))
    step = attacker.masked[1, VICTIM][0]
    attacker.confirmed[1, FOURTH] = NAMES, attacker.sign(FOURTH, step, NAMES)
    attacker.refused(VICTIM, attacker.open(1, [FOURTH]), "too_few_survivors")  # two of the three it needs
    assert attacker.unknown(1, VICTIM)[1] == [""]  # its own mask alone hides it now
    attacker.assert_nothing_is_left(VICTIM)


def test_two_states_do_not_cancel(attacker: SessionAttacker) -> None:
    """Pasquini et al. 2022: on another discriminator the others' parts would vanish from the sum."""
    attacker.walk((1, "open_step"))
    for name in NAMES:
        attacker.ask(name, attacker.step(2, name, NAMES, state=5 if name == VICTIM else 6))
    for name in NAMES:
        attacker.ask(name, attacker.confirm(2, NAMES))
    for name in REST:
        assert isinstance(attacker.ask(name, attacker.open(2, REST)), OpenedStep)
    attacker.refused(VICTIM, attacker.open(2, REST), "bad_peer")  # they signed another step
    total = sum(attacker.unknown(2, name)[0] for name in NAMES)
    assert uniformity(total) > TOO_UNEVEN  # type: ignore[arg-type]
    attacker.assert_nothing_is_left(VICTIM)


# ---------------------------------------------------------------- listed alive and dead; grown and shrunk lists


def test_no_seed_of_a_site_that_dropped_out_is_opened(attacker: SessionAttacker) -> None:
    """The victim's vector came, held back: its partners open the keys in common, and its own mask must stay."""
    attacker.walk((1, "open_step"))
    attacker.walk((2, "begin_step"), (2, "begin_step"))
    for name in REST:
        attacker.ask(name, attacker.confirm(2, REST))
    for name in REST:
        attacker.ask(name, attacker.open(2, REST))
    assert attacker.unknown(2, VICTIM)[1] == [""]
    later = attacker.sites.trees()
    for name in REST:
        attacker.refused(name, attacker.seeds_of(2, [VICTIM]), "bad_peer")
    attacker.sites.back_to(later)
    for name in REST:  # nor of a step in which it had survived
        attacker.refused(name, attacker.seeds_of(1, [VICTIM]), "out_of_order")
    attacker.sites.back_to(later)
    for name in REST:  # nor in any later one
        attacker.ask(name, attacker.step(3, name, REST))
        attacker.ask(name, attacker.confirm(3, REST))
    for name in REST:
        attacker.ask(name, attacker.open(3, REST))
        attacker.refused(name, attacker.seeds_of(3, [VICTIM]), "bad_peer")
    attacker.refused(VICTIM, attacker.confirm(2, REST), "bad_peer")  # a list without itself
    attacker.assert_nothing_is_left(VICTIM)


@pytest.mark.parametrize("stage", ["begin_step", "confirm_step"])
def test_lists_do_not_grow_again(stage: str, attacker: SessionAttacker) -> None:
    attacker.walk((1, "begin_step"))
    attacker.walk((1, "open_step"), (1, "confirm_step"), names=[VICTIM, OTHER, THIRD])
    if stage == "begin_step":
        attacker.refused(VICTIM, attacker.step(2, VICTIM, NAMES), "bad_peer")
    else:
        attacker.walk((2, "begin_step"), (2, "begin_step"), names=[VICTIM, OTHER, THIRD])
        attacker.refused(VICTIM, attacker.confirm(2, NAMES), "bad_peer")
    attacker.assert_nothing_is_left(VICTIM)


LISTS = {
    "without itself": (REST, "bad_peer"),
    "a site twice": ((*NAMES, OTHER), "bad_peer"),
    "a stranger": ((*NAMES, "visitor"), "bad_peer"),
    "below the threshold": ((VICTIM, OTHER), "too_few_survivors"),
    "alone": ((VICTIM,), "too_few_survivors"),
    "nobody": ((), "bad_peer"),
}


@pytest.mark.parametrize("case", LISTS)
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("stage", ["begin_step", "confirm_step"])
def test_a_list_that_no_honest_server_makes_is_refused(
    stage: str, step: int, case: str, attacker: SessionAttacker
) -> None:
    names, code = LISTS[case]
    attacker.walk((step - 1, "open_step") if step > 1 else (0, "share_seed"))
    if stage == "confirm_step":
        attacker.walk((step, "begin_step"), (step, "begin_step"))
        attacker.refused(VICTIM, attacker.confirm(step, names), code)
    else:
        attacker.refused(VICTIM, attacker.step(step, VICTIM, names), code)
    attacker.assert_nothing_is_left(VICTIM)


def test_a_site_joins_no_sum_below_its_own_minimum() -> None:
    attacker = SessionAttacker(SessionMachines(SEVEN, minimum=6))
    attacker.walk((1, "open_step"))
    attacker.refused(SEVEN[0], attacker.step(2, SEVEN[0], SEVEN[:5]), "too_few_survivors")  # the threshold is five
    attacker.assert_nothing_is_left(SEVEN[0])


@pytest.mark.parametrize("step", [2, 3])
def test_shares_come_with_the_first_step_only(step: int, attacker: SessionAttacker) -> None:
    attacker.walk((step - 1, "open_step"))
    request = dataclasses.replace(attacker.step(step, VICTIM, NAMES), sealed=attacker.step(1, VICTIM, NAMES).sealed)
    attacker.refused(VICTIM, request, "bad_peer")
    attacker.assert_nothing_is_left(VICTIM)


# ---------------------------------------------------------------- seeds

WRONG_SEEDS: dict[str, Callable[[SessionAttacker], Any]] = {
    "its own": lambda a: a.seeds_of(1, [VICTIM]),
    "nobody's": lambda a: a.seeds_of(1, []),
    "a stranger's": lambda a: a.seeds_of(1, ["visitor"]),
    "one twice": lambda a: a.seeds_of(1, [OTHER, OTHER]),
    "the next keys before the end": lambda a: a.seeds_of(1, [OTHER], next_round=2),
}


@pytest.mark.parametrize("case", WRONG_SEEDS)
def test_seeds_that_no_honest_server_asks_for_are_refused(case: str, attacker: SessionAttacker) -> None:
    attacker.walk((1, "open_step"))
    attacker.refused(VICTIM, WRONG_SEEDS[case](attacker), "bad_peer")
    attacker.assert_nothing_is_left(VICTIM)


@pytest.mark.parametrize("reached", ["begin_step", "confirm_step"])
def test_no_seed_is_opened_before_the_step_is(reached: str, attacker: SessionAttacker) -> None:
    attacker.walk((2, reached))
    attacker.refused(VICTIM, attacker.seeds_of(2, [OTHER]), "out_of_order")
    attacker.refused(OTHER, attacker.seeds_of(1, [VICTIM]), "out_of_order")
    attacker.assert_nothing_is_left(VICTIM)


def test_seeds_are_opened_once_a_step(attacker: SessionAttacker) -> None:
    attacker.walk((1, "open_step"))
    assert isinstance(attacker.ask(VICTIM, attacker.seeds_of(1, [OTHER])), OpenedSeeds)
    attacker.refused(VICTIM, attacker.seeds_of(1, [THIRD]), "out_of_order")
    attacker.assert_nothing_is_left(VICTIM)


def test_a_site_whose_seed_is_known_stays_hidden_and_is_out() -> None:
    attacker = SessionAttacker(SessionMachines(SEVEN), colluders=SEVEN[5:])
    victim, others = SEVEN[0], SEVEN[1:]
    attacker.walk((1, "open_step"))
    for name in others:
        assert isinstance(attacker.ask(name, attacker.seeds_of(1, [victim])), OpenedSeeds)
    assert attacker.seed_of(victim) is not None
    trees = attacker.sites.trees()
    for name in others[:4]:
        attacker.refused(name, attacker.step(2, name, SEVEN), "bad_peer")  # with it they mask no more
    attacker.sites.back_to(trees)
    # It was told nothing, and masks for everybody: four pairwise masks stay that nobody else will ever use.
    assert isinstance(attacker.ask(victim, attacker.step(2, victim, SEVEN)), MaskedStep)
    attacker.ask(victim, attacker.confirm(2, SEVEN))
    step = attacker.masked[2, victim][0]
    for colluder in SEVEN[5:]:
        attacker.confirmed[2, colluder] = tuple(SEVEN), attacker.sign(colluder, step, SEVEN)
    attacker.refused(victim, attacker.open(2, SEVEN[5:]), "too_few_survivors")
    assert set(attacker.unknown(2, victim)[1]) == set(SEVEN[1:5])
    attacker.assert_nothing_is_left(victim)


def test_shares_collected_over_several_steps_cost_the_masks_with_their_holders() -> None:
    """Two holders give a share in the first step, the others in the second, where they take part with the victim."""
    attacker = SessionAttacker(SessionMachines(SEVEN), colluders=SEVEN[5:])
    victim, early, late = SEVEN[0], SEVEN[1:3], SEVEN[3:5]
    attacker.walk((1, "open_step"))
    for name in early:
        attacker.ask(name, attacker.seeds_of(1, [victim]))
    assert attacker.seed_of(victim) is None  # with the colluders' four of five
    left = [name for name in SEVEN if name not in early]
    for name in left:
        assert isinstance(attacker.ask(name, attacker.step(2, name, left)), MaskedStep)
    for name in left:
        attacker.ask(name, attacker.confirm(2, left))
    for name in left:
        attacker.ask(name, attacker.open(2, left))
    attacker.ask(late[0], attacker.seeds_of(2, [victim]))
    assert attacker.seed_of(victim) is not None
    assert set(attacker.unknown(2, victim)[1]) == set(late)
    attacker.assert_hidden(victim)


def test_after_the_last_step_a_site_keeps_no_secret(attacker: SessionAttacker) -> None:
    attacker.walk((3, "open_step"))
    site = attacker.sites.sites[VICTIM]
    tree = site.to_tree()
    assert (tree["seed"], tree["pair_secrets"], tree["private"]) == ("", {}, ["", ""])
    assert set(tree["held"]) == set(REST)
    attacker.ask(VICTIM, attacker.seeds_of(3, []))
    assert attacker.sites.sites[VICTIM].to_tree()["held"] == {}


# ---------------------------------------------------------------- whatever it tries


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_a_server_with_two_colluders_among_seven_asks_every_honest_vector_stays_hidden(
    data: st.DataObject,
) -> None:
    attacker = SessionAttacker(SessionMachines(SEVEN, length=8), colluders=SEVEN[5:])
    attacker.walk((0, "share_seed"))
    honest = SEVEN[:5]
    sometimes, pick = st.sampled_from([*[False] * 12, True]), st.integers(0, 1)
    without = st.lists(st.sampled_from(honest), max_size=2).map(lambda out: [n for n in SEVEN if n not in out])
    for step in (1, 2, 3):
        everyone = [SEVEN, data.draw(without)]
        lists = [[n for n in SEVEN if all(n in _left(attacker, o) for o in each)] for each in everyone]
        for name in SEVEN:
            shown = lists[data.draw(pick)] if data.draw(sometimes) else lists[0]
            state = step + 10 if data.draw(sometimes) and data.draw(sometimes) else step
            attacker.ask(name, attacker.step(step, name, sorted({*shown, name}), state))
        survivors = [data.draw(without), data.draw(without)]
        for name in SEVEN:
            if (step, name) in attacker.masked:
                suiting = [each for each in survivors if name in each] or [SEVEN]
                chosen = suiting[data.draw(pick) % len(suiting)] if data.draw(sometimes) else suiting[0]
                participants = attacker.masked[step, name][0].participants
                attacker.ask(name, attacker.confirm(step, [each for each in chosen if each in participants]))
        for name in honest:
            if (step, name) in attacker.confirmed:
                shown, bound = attacker.confirmed[step, name][0], attacker.masked[step, name][0]
                for colluder in SEVEN[5:]:  # the colluders sign whatever helps
                    attacker.confirmed[step, colluder] = shown, attacker.sign(colluder, bound, shown)
                suits = [
                    each
                    for each in shown
                    if attacker.confirmed.get((step, each), ((),))[0] == shown
                    and (each in SEVEN[5:] or attacker.masked[step, each][0].digest == bound.digest)
                ]
                attacker.ask(name, attacker.open(step, suits))
        for name in honest:
            if (step, name) in attacker.opened and data.draw(st.booleans()):
                shown = attacker.confirmed[step, name][0]
                owners = [each for each in shown if each != name and data.draw(st.booleans())]
                if owners:
                    attacker.ask(name, attacker.seeds_of(step, owners))
    for name in honest:
        attacker.assert_hidden(name)


def _left(attacker: SessionAttacker, name: str) -> set[str]:
    """Whom a site still takes for one that may take part."""
    site = attacker.sites.sites.get(name)
    return set(site.to_tree().get("remaining", ())) if site else set()


def test_forty_sites_and_their_neighbours() -> None:
    """The victim's holders are told that it survives, everybody else that it dropped out."""
    names = names_of(40)
    attacker = SessionAttacker(SessionMachines(names, steps=2, length=1000), colluders=names[38:])
    victim = names[0]
    attacker.walk((1, "begin_step"))
    picks = attacker.sites.sites[victim].picks
    without = [name for name in names if name != victim]
    needed = threshold_of(len(picks) + 1)
    told = {name: names if name in (victim, *picks[:needed]) else without for name in names}
    for name in names:
        assert isinstance(attacker.ask(name, attacker.confirm(1, told[name])), Confirmation)
    for name in names:
        same = [each for each in names if told[each] == told[name]]
        attacker.ask(name, attacker.open(1, same))
    assert (1, victim) in attacker.opened  # enough of its holders signed
    given = {name for name in names if (1, name) in attacker.opened and victim in attacker.opened[1, name].pair_keys}
    left = set(attacker.unknown(1, victim)[1])
    assert left >= set(picks[:needed]) - set(names[38:]) and not left & given
    attacker.assert_hidden(victim)


# ---------------------------------------------------------------- messages, bit by bit

MESSAGES = [(0, "share_seed"), (1, "begin_step"), (2, "begin_step"), (2, "confirm_step"), (2, "open_step")]
# What is the server's to say: how many steps of which round there will be. A shorter list of survivors is, as well.
FREE = {("share_seed", "steps"), ("share_seed", "round")}


def before(step: int, stage: str) -> SessionAttacker:
    attacker = SessionAttacker(SessionMachines(NAMES, length=1000))
    where = [(0, "advertise_keys"), (0, "share_seed")]
    where += [(each, name) for each in (1, 2, 3) for name in STAGES[2:]]
    attacker.walk((1, "open_step") if stage == "open_seeds" else where[where.index((step, stage)) - 1])
    return attacker


@pytest.fixture(scope="module")
def ready() -> dict[tuple[int, str], tuple[SessionAttacker, Any]]:
    found: dict[tuple[int, str], tuple[SessionAttacker, Any]] = {}
    for step, stage in [*MESSAGES, (1, "open_seeds")]:
        attacker = before(step, stage)
        genuine = attacker.seeds_of(1, [OTHER]) if stage == "open_seeds" else attacker.request(step, stage, VICTIM)
        found[step, stage] = attacker, genuine
    return found


@pytest.mark.parametrize("message", [*MESSAGES, (1, "open_seeds")], ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_record_with_any_fact_changed_is_refused(
    message: tuple[int, str], data: st.DataObject, ready: dict[tuple[int, str], tuple[SessionAttacker, Any]]
) -> None:
    attacker, request = ready[message]
    step, stage = message
    record = wire.pack(request)
    facts: dict[str, Any] = dict(record.config_records["facts"])
    key = data.draw(st.sampled_from(sorted(key for key in facts if (stage, key) not in FREE)))
    changed = bit_flipped(facts[key], data.draw)
    if key in ("survivors", "participants") and len(changed) < len(facts[key]):
        changed = ["x", *changed]
    if stage == "open_seeds" and key == "owners" and len(changed) == len(facts[key]) == 1:
        changed = [*changed, "x"] if changed[0] in NAMES else changed
    try:
        record["facts"] = ConfigRecord({**facts, key: changed})
    except TypeError:
        return  # Flower itself does not carry a list of two kinds
    try:
        arrived = wire.unpack(record)
    except BadPeer:
        return
    assert type(arrived) is type(request)
    site, begun = attacker.sites.sites[VICTIM], dict(attacker.sites.sites)
    tree = site.to_tree()
    kind = type(site)
    attacker.sites.sites[VICTIM] = kind.from_tree(attacker.sites.members[VICTIM], tree)
    try:
        reply = attacker.sites.ask(VICTIM, arrived)
        if key == "study_digest" and stage != "begin_step":
            return  # which study it is the app checks, for every message alike
        assert isinstance(reply, Refusal), (key, changed)
        assert reply.code in {"bad_peer", "out_of_order", "too_few_survivors"}
    finally:
        attacker.sites.sites = begun


def test_the_discriminator_is_what_the_masks_are_for(attacker: SessionAttacker) -> None:
    """A bit of the state changed on the way to one site: its masks cancel with nobody's, and nobody confirms it."""
    attacker.walk((0, "share_seed"))
    request = attacker.step(1, VICTIM, NAMES)
    state: Vector = request.work.discriminator.copy()
    state.view(np.uint32)[0] ^= 1
    attacker.ask(VICTIM, dataclasses.replace(request, work=dataclasses.replace(request.work, discriminator=state)))
    attacker.walk((1, "confirm_step"), (1, "begin_step"), asked=REST)
    attacker.ask(VICTIM, attacker.confirm(1, NAMES))
    attacker.refused(VICTIM, attacker.open(1, REST), "bad_peer")
    attacker.assert_nothing_is_left(VICTIM)
