"""The honest server's side of a secure sum: right sums, named errors, and nothing in between."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy import stats

from client.secagg import SiteRound
from common.errors import BadPeer, OutOfOrder, ProtocolError, TooFewSurvivors
from common.messages import Confirmation, MaskedInput, SealedShares, UnmaskShares
from common.secagg import keys, neighbours, shares
from common.secagg.encoding import MODULUS_BITS, Encoding
from server.secagg import SecureSum, check_keys
from tests.consortium import ENCODING, Consortium, encoded, names_of, vectors_of

STAGES = ("share_keys", "masked_input", "confirm_survivors", "unmask")
DROP_STAGES = ("advertise_keys", *STAGES)
FIVE, LENGTH = names_of(5), 7
FIRST, LAST = FIVE[0], FIVE[-1]
Floats = NDArray[np.float32]

# ---------------------------------------------------------------- one step at a time


def ask(sites: Consortium, server: SecureSum, stage: str, vectors: Mapping[str, Floats]) -> dict[str, Any]:
    """Enter a stage; the genuine answer of every site that is asked, none of them taken yet."""
    if stage == "share_keys":
        return {name: sites.sites[name].share_keys(request) for name, request in server.share_keys_requests().items()}
    if stage == "masked_input":
        replies = {}
        for name, request in server.masked_input_requests(sites.train).items():
            sites.sites[name].open_shares(request)
            replies[name], _ = sites.sites[name].masked_input(vectors[name], sites.plan.encoding, 1)
        return replies
    if stage == "confirm_survivors":
        requests = server.confirm_requests()
        return {name: sites.sites[name].confirm_survivors(request) for name, request in requests.items()}
    return {name: sites.sites[name].unmask(request) for name, request in server.unmask_requests().items()}


def take(server: SecureSum, stage: str, site: str, reply: Any) -> None:
    takers: dict[str, Callable[[str, Any], None]] = {
        "share_keys": server.take_sealed_shares,
        "masked_input": server.take_masked_input,
        "confirm_survivors": server.take_confirmation,
        "unmask": server.take_unmask_shares,
    }
    takers[stage](site, reply)


def go_through(
    sites: Consortium,
    server: SecureSum,
    vectors: Mapping[str, Floats],
    stages: tuple[str, ...] = STAGES,
    spoil: Mapping[str, Callable[[str, Any], Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Ask and take stage by stage. ``spoil`` changes a stage's answers; None instead of one loses it."""
    all_replies = {}
    for stage in stages:
        all_replies[stage] = ask(sites, server, stage, vectors)
        for name, reply in all_replies[stage].items():
            spoiled = spoil[stage](name, reply) if spoil and stage in spoil else reply
            if spoiled is not None:
                take(server, stage, name, spoiled)
    return all_replies


def five(number: int = 1) -> tuple[Consortium, SecureSum, dict[str, Floats]]:
    """Five sites, four of which open a secret, after ``advertise_keys``; and their vectors."""
    sites = Consortium(FIVE, LENGTH, number=number)
    return sites, sites.advertise(), vectors_of(FIVE, LENGTH)


def check_sum(found: Floats, vectors: Mapping[str, Floats], survivors: tuple[str, ...], encoding: Encoding) -> None:
    """The sum is that of the clipped vectors of exactly these sites, within the rounding."""
    limit = np.float64(np.float32(encoding.value_range))
    clipped = [np.clip(vectors[name].astype(np.float64), -limit, limit) for name in survivors]
    expected = np.sum(clipped, axis=0)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    rounding = len(survivors) * 2.0**-encoding.fraction_bits + np.abs(expected) * 2.0**-23
    assert (np.abs(found - expected) <= rounding).all()


def check_nothing_decoded(server: SecureSum) -> None:
    """Whatever is asked of the server from here on, it gives no sum."""
    for step in (server.confirm_requests, server.unmask_requests, server.result, server.result):
        with pytest.raises(ProtocolError):
            step()


# ---------------------------------------------------------------- a right sum or a named error


@st.composite
def encodings(draw: st.DrawFn, num_sites: int) -> Encoding:
    """Encodings that hold this many sites, often to the last integer."""
    bits, value_range = draw(st.sampled_from(MODULUS_BITS)), draw(st.floats(1e-3, 30.0) | st.just(1.0))
    fitting = [f for f in range(1, 31) if num_sites <= Encoding(value_range, f, bits).most_sites]
    if not fitting:  # a wide range in 16 bits among many
        return Encoding(value_range, 1, 32)
    return Encoding(value_range, draw(st.sampled_from(fitting) | st.just(fitting[-1])), bits)


def numbers(value_range: float) -> st.SearchStrategy[float]:
    """Within the range, at its ends, and far beyond."""
    limit = float(np.float32(value_range))
    within = st.floats(-1.0, 1.0, width=32).map(lambda share: float(np.float32(share * limit)))
    return within | st.sampled_from([limit, -limit, 0.0, 3e38, -3e38, 1e-40, 2 * limit])


@st.composite
def cohorts(draw: st.DrawFn, least: int, most: int) -> tuple[Consortium, dict[str, Floats], dict[str, list[str]]]:
    """Sites, a vector each, and who falls out at which stage."""
    count = draw(st.integers(least, most))
    names, encoding = names_of(count), draw(encodings(count))
    length = draw(st.sampled_from([1, 2, 3, 5, 8, 33]))
    table = draw(arrays.arrays(np.float32, (count, length), elements=numbers(encoding.value_range)))
    # Few fall out in one half of the examples, so that both ends of a round come up.
    staying = draw(st.sampled_from([count // 2, 4 * count]))
    fates = draw(st.lists(st.sampled_from([*DROP_STAGES, *[""] * staying]), min_size=count, max_size=count))
    drops = {stage: [name for name, fate in zip(names, fates, strict=True) if fate == stage] for stage in DROP_STAGES}
    minimum = draw(st.just(2) | st.integers(2, count))
    return Consortium(names, length, encoding, minimum), dict(zip(names, table, strict=True)), drops


def stage_that_fails(sites: Consortium, drops: Mapping[str, list[str]]) -> str:
    """By counting holders alone: after which stage too few are left; "" for none."""
    left, here = {}, set(sites.sites)
    for stage in DROP_STAGES:
        here = left[stage] = here - set(drops[stage])
    minimum = sites.plan.minimum_sites
    if len(left["advertise_keys"]) < minimum:
        return "advertise_keys"
    for stage in STAGES:
        if stage in ("share_keys", "masked_input") and len(left[stage]) < minimum:
            return stage
        for owner in left["share_keys"]:
            holders = {owner, *sites.sites[owner].picks}
            if 3 * len(holders & left[stage]) <= 2 * len(holders):
                return stage
    return ""


def check_outcome(case: tuple[Consortium, dict[str, Floats], dict[str, list[str]]]) -> None:
    sites, vectors, drops = case
    try:
        total, survivors = sites.total(vectors, drops)
    except TooFewSurvivors as error:
        failed = stage_that_fails(sites, drops)
        assert failed
        assert f"ended after {failed}:" in error.message
        return
    assert stage_that_fails(sites, drops) == ""
    lost = {name for stage in DROP_STAGES[:3] for name in drops[stage]}
    assert survivors == tuple(sorted(set(sites.sites) - lost))
    check_sum(total, vectors, survivors, sites.plan.encoding)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cohorts(2, 12))
def test_the_sum_is_that_of_the_survivors_or_there_is_none(
    case: tuple[Consortium, dict[str, Floats], dict[str, list[str]]],
) -> None:
    check_outcome(case)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(cohorts(33, 45))
def test_the_same_holds_where_sites_have_only_some_neighbours(
    case: tuple[Consortium, dict[str, Floats], dict[str, list[str]]],
) -> None:
    check_outcome(case)


def test_a_sum_over_many_pieces_of_a_long_vector() -> None:
    names, length = names_of(3), 3 * (1 << 16) + 5
    vectors = vectors_of(names, length, seed=3)
    total, survivors = Consortium(names, length).total(vectors)
    assert survivors == tuple(names)
    check_sum(total, vectors, survivors, ENCODING)


def test_two_sites_by_hand() -> None:
    """0.5 - 0.25 and -1 + 0.125, exact in 15 binary places; 7 is clipped to 1, of which there are two."""
    names = ["north", "south"]
    vectors = {"north": np.array([0.5, -1, 7], np.float32), "south": np.array([-0.25, 0.125, 1], np.float32)}
    total, _ = Consortium(names, 3).total(vectors)
    assert total.tolist() == [0.25, -0.875, 2.0]


# ---------------------------------------------------------------- below the threshold


@pytest.mark.parametrize("stage", DROP_STAGES)
@pytest.mark.parametrize("dropped", [0, 1, 2, 3, 4])
def test_five_sites_of_which_some_fall_out(stage: str, dropped: int) -> None:
    """Once keys are shared four of five must stay. Before, the threshold goes by those that came: two are enough."""
    sites, vectors = Consortium(FIVE, LENGTH), vectors_of(FIVE, LENGTH)
    drops = {stage: FIVE[:dropped]}
    if dropped <= (3 if stage == "advertise_keys" else 1):
        total, survivors = sites.total(vectors, drops)
        in_sum = FIVE if stage in ("confirm_survivors", "unmask") else FIVE[dropped:]
        assert survivors == tuple(in_sum)
        check_sum(total, vectors, survivors, ENCODING)
        return
    needed = "2 sites, 1 left" if 5 - dropped < 2 and stage not in ("confirm_survivors", "unmask") else ""
    with pytest.raises(TooFewSurvivors, match=f"round 1 ended after {stage}: it needs {needed}"):
        sites.total(vectors, drops)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dropped", [2, 3, 4])
def test_a_server_that_goes_on_below_the_threshold_gets_nothing(stage: str, dropped: int) -> None:
    sites, server, vectors = five()
    lose = {stage: lambda name, reply: None if name in FIVE[:dropped] else reply}
    go_through(sites, server, vectors, STAGES[: STAGES.index(stage) + 1], lose)
    following = {
        "share_keys": lambda: server.masked_input_requests(sites.train),
        "masked_input": server.confirm_requests,
        "confirm_survivors": server.unmask_requests,
        "unmask": server.result,
    }
    with pytest.raises(TooFewSurvivors, match=f"ended after {stage}"):
        following[stage]()
    check_nothing_decoded(server)


def test_a_failed_sum_does_not_touch_the_next() -> None:
    sites, vectors = Consortium(FIVE, LENGTH), vectors_of(FIVE, LENGTH)
    with pytest.raises(TooFewSurvivors):
        sites.total(vectors, {"masked_input": FIVE[:2]})
    following = Consortium(FIVE, LENGTH, number=2, members=sites.members)
    total, survivors = following.total(vectors)
    check_sum(total, vectors, survivors, ENCODING)


# ---------------------------------------------------------------- answers that do not fit


def without(values: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    return {key: value for key, value in values.items() if key != name}


def flipped(data: bytes, bit: int = 0) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


Spoil = Callable[[Any], Any]
GARBAGE: list[tuple[str, str, Spoil, str]] = [
    # stage, what is wrong, how, what the error says
    ("share_keys", "attempt", lambda r: replace(r, attempt=2), "attempt 1 .* found 2"),
    ("share_keys", "one receiver left out", lambda r: replace(r, sealed=without(r.sealed, LAST)), "4 other sites"),
    ("share_keys", "no receiver", lambda r: replace(r, sealed={}), "4 other sites"),
    (
        "share_keys",
        "a receiver of no cohort",
        lambda r: replace(r, sealed=without(r.sealed, LAST) | {"elsewhere": b""}),
        "4 other",
    ),
    (
        "share_keys",
        "sealed for itself",
        lambda r: replace(r, sealed=without(r.sealed, LAST) | {FIRST: b""}),
        "4 other sites",
    ),
    ("share_keys", "one more receiver", lambda r: replace(r, sealed={**r.sealed, "elsewhere": b""}), "4 other sites"),
    (
        "share_keys",
        "a digest left out",
        lambda r: replace(r, self_mask_digests=without(r.self_mask_digests, LAST)),
        "digest of every share",
    ),
    (
        "share_keys",
        "its own digest left out",
        lambda r: replace(r, mask_key_digests=without(r.mask_key_digests, FIRST)),
        "digest of every share",
    ),
    (
        "share_keys",
        "one digest more",
        lambda r: replace(r, mask_key_digests={**r.mask_key_digests, "elsewhere": bytes(32)}),
        "digest of every share",
    ),
    ("masked_input", "attempt", lambda r: replace(r, attempt=0), "attempt 1 .* found 0"),
    ("masked_input", "study", lambda r: replace(r, study_digest="00" * 32), "Expected study 5d5d.* found 0000"),
    ("masked_input", "round", lambda r: replace(r, round=2), "Expected round 1 .* found 2"),
    ("masked_input", "length", lambda r: replace(r, length=LENGTH + 1), "Expected length 7 .* found 8"),
    ("masked_input", "bits", lambda r: replace(r, modulus_bits=16), "Expected modulus_bits 21 .* found 16"),
    ("masked_input", "too few words", lambda r: replace(r, words=r.words[:-1]), "number of words 3 .* found 2"),
    (
        "masked_input",
        "too many words",
        lambda r: replace(r, words=np.append(r.words, np.uint64(0))),
        "number of words 3 .* found 4",
    ),
    ("masked_input", "no words", lambda r: replace(r, words=r.words[:0]), "number of words 3 .* found 0"),
    ("confirm_survivors", "attempt", lambda r: replace(r, attempt=3), "attempt 1 .* found 3"),
    ("confirm_survivors", "signature", lambda r: replace(r, signature=flipped(r.signature, 100)), "signature"),
    ("confirm_survivors", "short signature", lambda r: replace(r, signature=r.signature[:-1]), "signature"),
    ("confirm_survivors", "no signature", lambda r: replace(r, signature=b""), "signature"),
    ("unmask", "attempt", lambda r: replace(r, attempt=2), "attempt 1 .* found 2"),
]


@pytest.mark.parametrize(
    ("stage", "spoil", "text"),
    [(stage, spoil, text) for stage, _, spoil, text in GARBAGE],
    ids=[f"{stage}, {what}" for stage, what, _, _ in GARBAGE],
)
def test_an_answer_that_does_not_fit_is_refused_and_the_rest_add_up(stage: str, spoil: Spoil, text: str) -> None:
    sites, server, vectors = five()
    at = STAGES.index(stage)
    go_through(sites, server, vectors, STAGES[:at])
    for name, reply in ask(sites, server, stage, vectors).items():
        if name == FIRST:
            with pytest.raises(BadPeer, match=text):
                take(server, stage, name, spoil(reply))
        else:
            take(server, stage, name, reply)
    go_through(sites, server, vectors, STAGES[at + 1 :])
    in_sum = FIVE if stage in ("confirm_survivors", "unmask") else FIVE[1:]
    total = server.result()
    assert server.survivors == tuple(in_sum)
    check_sum(total, vectors, server.survivors, ENCODING)


def test_a_confirmation_of_other_survivors_or_by_another_site_is_refused() -> None:
    sites, server, vectors = five()
    go_through(sites, server, vectors, STAGES[:2])
    genuine = ask(sites, server, "confirm_survivors", vectors)
    agreed = sites.sites[FIRST].agreed
    assert agreed is not None
    identity = sites.members[FIRST].identity
    others = Confirmation(1, identity.sign(keys.confirmed(agreed, FIVE[:4])))
    for wrong in (others, genuine[FIVE[1]]):
        with pytest.raises(BadPeer, match="signature"):
            server.take_confirmation(FIRST, wrong)
    server.take_confirmation(FIRST, genuine[FIRST])


def test_keys_of_another_site_attempt_or_length_are_refused() -> None:
    sites = Consortium(FIVE, LENGTH)
    own = sites.sites[FIRST].advertise_keys()
    check_keys(own, FIRST, sites.plan)
    with pytest.raises(BadPeer, match="found another name"):
        check_keys(own, LAST, sites.plan)
    with pytest.raises(BadPeer, match="another length"):
        check_keys(replace(own, share_key=own.share_key[:31]), FIRST, sites.plan)
    with pytest.raises(BadPeer, match="another length"):
        check_keys(replace(own, mask_key=own.mask_key + b"\0"), FIRST, sites.plan)
    for wrong in (replace(own, mask_key=flipped(own.mask_key)), replace(own, signature=flipped(own.signature))):
        with pytest.raises(BadPeer, match="signature"):
            check_keys(wrong, FIRST, sites.plan)
    replayed = SiteRound(sites.members[FIRST], replace(sites.attempt, number=2), 2).advertise_keys()
    with pytest.raises(BadPeer, match="signature"):
        check_keys(replayed, FIRST, sites.plan)


@pytest.mark.parametrize("stage", STAGES)
def test_of_two_answers_the_first_counts(stage: str) -> None:
    sites, server, vectors = five()
    at = STAGES.index(stage)
    replies = go_through(sites, server, vectors, STAGES[: at + 1])[stage]
    with pytest.raises(OutOfOrder, match=f"one answer of {FIRST} to {stage} at most"):
        take(server, stage, FIRST, replies[FIRST])
    go_through(sites, server, vectors, STAGES[at + 1 :])
    check_sum(server.result(), vectors, tuple(FIVE), ENCODING)


@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_that_was_not_asked_for_is_refused(stage: str) -> None:
    """Of a site that nobody knows, and of one that fell out a stage before."""
    sites, vectors = Consortium(FIVE, LENGTH), vectors_of(FIVE, LENGTH)
    at = STAGES.index(stage)
    server = sites.advertise(gone=[FIRST] if at == 0 else [])
    lose = {STAGES[at - 1]: lambda name, reply: None if name == FIRST else reply} if at else {}
    go_through(sites, server, vectors, STAGES[:at], lose)
    replies = ask(sites, server, stage, vectors)
    for stranger in (FIRST, "elsewhere"):
        with pytest.raises(OutOfOrder, match="only when it was asked"):
            take(server, stage, stranger, replies[LAST])
    for name, reply in replies.items():
        take(server, stage, name, reply)
    go_through(sites, server, vectors, STAGES[at + 1 :])
    check_sum(server.result(), vectors, server.survivors, ENCODING)


@pytest.mark.parametrize("reached", range(len(STAGES) + 2), ids=["start", *STAGES, "done"])
def test_only_the_next_stage_and_only_answers_to_this_one(reached: int) -> None:
    """All pairs of a stage and a step. A refused step changes nothing: the sum is right in the end."""
    sites, server, vectors = five()
    elsewhere, elsewhere_server, _ = five()
    some_replies = go_through(elsewhere, elsewhere_server, vectors)  # as good as any where none is expected
    late: Any = None

    def without_last(stage: str) -> None:
        """The stage, but the answer of one site is still to come."""
        nonlocal late
        replies = ask(sites, server, stage, vectors)
        late = replies.pop(LAST)
        for name, reply in replies.items():
            take(server, stage, name, reply)

    go_through(sites, server, vectors, STAGES[: max(0, min(reached, 4) - 1)])
    if 1 <= reached <= 4:
        without_last(STAGES[reached - 1])
    if reached == 5:
        go_through(sites, server, vectors, STAGES[3:])
        check_sum(server.result(), vectors, tuple(FIVE), ENCODING)

    enter: list[Callable[[], object]] = [
        server.share_keys_requests,
        lambda: server.masked_input_requests(sites.train),
        server.confirm_requests,
        server.unmask_requests,
        server.result,
    ]
    for position, step in enumerate(enter, start=1):
        if position != reached + 1:
            with pytest.raises(OutOfOrder):
                step()
    for position, stage in enumerate(STAGES, start=1):
        if position != reached:
            with pytest.raises(OutOfOrder):
                take(server, stage, LAST, some_replies[stage][LAST])

    if reached == 5:
        return
    if reached:
        take(server, STAGES[reached - 1], LAST, late)
    go_through(sites, server, vectors, STAGES[reached:])
    check_sum(server.result(), vectors, tuple(FIVE), ENCODING)


# ---------------------------------------------------------------- wrong shares

WRONG_SHARES: dict[str, Callable[[UnmaskShares], UnmaskShares]] = {
    "one bit each": lambda r: replace(r, self_masks={n: flipped(s, 77) for n, s in r.self_masks.items()}),
    "short": lambda r: replace(r, self_masks={n: s[:-1] for n, s in r.self_masks.items()}),
    "empty": lambda r: replace(r, self_masks=dict.fromkeys(r.self_masks, b"")),
    "no element of the field": lambda r: replace(r, self_masks=dict.fromkeys(r.self_masks, b"\xff" * 33)),
    "none": lambda r: replace(r, self_masks={}),
    "of unknown sites": lambda r: replace(r, self_masks={f"no-{n}": s for n, s in r.self_masks.items()}),
    "as if all had dropped": lambda r: replace(r, self_masks={}, mask_keys=r.self_masks),
    "in another order": lambda r: replace(
        r, self_masks=dict(zip(r.self_masks, reversed(r.self_masks.values()), strict=True))
    ),
}


@pytest.mark.parametrize("wrong", WRONG_SHARES)
@pytest.mark.parametrize("num_bad", [1, 2])
def test_wrong_shares_of_one_holder_are_passed_over_and_of_two_end_the_sum(wrong: str, num_bad: int) -> None:
    sites, server, vectors = five()
    spoil = {"unmask": lambda name, reply: WRONG_SHARES[wrong](reply) if name in FIVE[:num_bad] else reply}
    go_through(sites, server, vectors, spoil=spoil)
    if num_bad == 1:
        check_sum(server.result(), vectors, tuple(FIVE), ENCODING)
        return
    with pytest.raises(TooFewSurvivors, match="ended after unmask: it needs 4 right shares of .*, 3 left"):
        server.result()
    check_nothing_decoded(server)


def test_a_wrong_share_of_a_dropped_sites_key_counts_as_well() -> None:
    """Of six sites one drops out; five are left, of which five must open."""
    names = names_of(6)
    vectors = vectors_of(names, LENGTH)

    def spoiled(share: Callable[[bytes], bytes]) -> SecureSum:
        sites = Consortium(names, LENGTH)
        server = sites.advertise()
        lose = {
            "masked_input": lambda name, reply: None if name == names[5] else reply,
            "unmask": lambda name, reply: (
                replace(reply, mask_keys={n: share(s) for n, s in reply.mask_keys.items()})
                if name == names[0]
                else reply
            ),
        }
        replies = go_through(sites, server, vectors, spoil=lose)
        assert {tuple(reply.mask_keys) for reply in replies["unmask"].values()} == {(names[5],)}
        return server

    check_sum(spoiled(lambda share: share).result(), vectors, tuple(names[:5]), ENCODING)
    with pytest.raises(TooFewSurvivors, match=f"it needs 5 right shares of {names[5]}, 4 left"):
        spoiled(flipped).result()


# ---------------------------------------------------------------- a dealer that cheats


def dealt(site: SiteRound, cheat: str) -> SealedShares:
    """What a site deals that is free to deal anything, every digest right and every text well sealed."""
    holders = sorted((*site.picks, site.member.site))
    point = {name: position for position, name in enumerate(sorted(site.cohort), start=1)}
    points, threshold = [point[name] for name in holders], neighbours.threshold_of(len(holders))
    secret_of = {"self_mask": site.self_mask, "mask_key": site.mask_private}
    given: dict[str, dict[int, bytes]] = {}
    for kind, secret in secret_of.items():
        if cheat == f"{kind}: shares that do not belong together":
            given[kind] = {each: shares.split(secrets.token_bytes(32), points, 1)[each] for each in points}
        elif cheat == f"{kind}: a polynomial of a higher degree":
            given[kind] = shares.split(secret, points, len(points))
        elif cheat == f"{kind}: another secret":
            given[kind] = shares.split(secrets.token_bytes(32), points, threshold)
        elif cheat == f"{kind}: no element of the field":
            given[kind] = dict.fromkeys(points, b"\xff" * 33)
        else:
            given[kind] = shares.split(secret, points, threshold)
    name, agreed = site.member.site, site.agreed
    assert agreed is not None
    digests = {
        kind: {
            holder: keys.commitment(site.attempt, kind, name, holder, given[kind][point[holder]]) for holder in holders
        }
        for kind in given
    }
    texts = {holder: given["self_mask"][point[holder]] + given["mask_key"][point[holder]] for holder in holders}
    site.held = {name: texts.pop(name)}
    sealed = {
        holder: keys.seal(keys.load(site.share_private), site.cohort[holder].share_key, agreed, name, holder, text)
        for holder, text in texts.items()
    }
    seed = secrets.token_bytes(32) if cheat == "self_mask: another seed digest" else site.self_mask
    seed_digest = keys.commitment(site.attempt, "seed", name, "", seed)
    return SealedShares(site.attempt.number, sealed, digests["self_mask"], digests["mask_key"], seed_digest)


CHEATS = [
    "self_mask: shares that do not belong together",
    "self_mask: a polynomial of a higher degree",
    "self_mask: another secret",
    "self_mask: no element of the field",
    "self_mask: another seed digest",
    "mask_key: shares that do not belong together",
    "mask_key: a polynomial of a higher degree",
    "mask_key: another secret",
    "mask_key: no element of the field",
    "none",
]


@pytest.mark.parametrize("drops_out", [False, True], ids=["stays", "drops out"])
@pytest.mark.parametrize("cheat", CHEATS)
def test_a_dealer_that_cheats_is_named_and_nothing_is_decoded(cheat: str, drops_out: bool) -> None:
    """A survivor's self mask is rebuilt, a dropped site's mask key; what is not rebuilt cannot make the sum wrong."""
    sites, server, vectors = five()
    spoil: dict[str, Callable[[str, Any], Any]] = {
        "share_keys": lambda name, reply: dealt(sites.sites[FIRST], cheat) if name == FIRST else reply,
        "masked_input": lambda name, reply: None if drops_out and name == FIRST else reply,
    }
    go_through(sites, server, vectors, spoil=spoil)
    rebuilt = "mask_key" if drops_out else "self_mask"
    if not cheat.startswith(rebuilt):
        check_sum(server.result(), vectors, tuple(FIVE[1:] if drops_out else FIVE), ENCODING)
        return
    with pytest.raises(BadPeer, match=f"{FIRST} dealt shares of its {rebuilt} that do not belong together"):
        server.result()
    check_nothing_decoded(server)


# ---------------------------------------------------------------- what the server sees of one site

ADVERSARIAL: dict[str, Callable[[int], NDArray[np.float64]]] = {
    "zeros": np.zeros,
    "largest": np.ones,
    "smallest": lambda length: -np.ones(length),
    "alternating": lambda length: np.resize([1.0, -1.0], length),
    "clipped": lambda length: np.full(length, 1e30),
    "one spike": lambda length: np.eye(1, length, 17)[0],
}
FLAKE = 1e-7
"""Chance that a test of a truly uniform vector fails."""


def uniformity(words: NDArray[np.uint64]) -> float:
    """The smallest p-value of chi-square tests of each byte of the words and of their exclusive or, times how many."""
    columns = list(words.view(np.uint8).reshape(-1, 8).T)
    columns.append(np.bitwise_xor.reduce(columns))
    values = [stats.chisquare(np.bincount(column, minlength=256)).pvalue for column in columns]
    return float(min(values)) * len(values)


@pytest.mark.parametrize("bits", MODULUS_BITS)
@pytest.mark.parametrize("shape", ADVERSARIAL)
def test_a_masked_vector_is_uniform_whatever_is_in_it(shape: str, bits: int) -> None:
    length, encoding = 1 << 18, Encoding(1.0, 10, bits)
    sites = Consortium(names_of(2), length, encoding)
    vectors = {name: ADVERSARIAL[shape](length).astype(np.float32) for name in sites.sites}
    server = sites.advertise()
    replies: dict[str, MaskedInput] = go_through(sites, server, vectors, STAGES[:2])["masked_input"]
    seen = [reply.words for reply in replies.values()]
    for words in seen:
        assert uniformity(words) > FLAKE
    assert uniformity(seen[0] - seen[1]) > FLAKE  # nor do two masks of one round cancel
    assert uniformity(seen[0] + seen[1]) > FLAKE  # the self masks are still there
    assert uniformity(encoded(vectors[names_of(1)[0]], encoding)) < FLAKE  # the test can fail


def test_the_same_vector_looks_different_in_every_attempt() -> None:
    length = 1 << 18
    vectors = vectors_of(FIVE, length)
    seen = []
    members = None
    for number in (1, 2):
        sites = Consortium(FIVE, length, number=number, members=members)
        members = sites.members
        replies = go_through(sites, sites.advertise(), vectors, STAGES[:2])["masked_input"]
        seen.append(replies[FIRST].words)
    assert uniformity(seen[0] - seen[1]) > FLAKE


def test_keys_that_all_other_sites_would_refuse_are_refused_first() -> None:
    consortium = Consortium(names_of(2), 3)
    consortium.advertise()
    first, second = (consortium.keys[name] for name in names_of(2))
    identity = consortium.members[first.site].identity
    for share_key, mask_key in (
        (bytes(32), first.mask_key),
        (first.share_key, (1).to_bytes(32, "little")),
        (first.share_key[:31], first.mask_key),
        (second.share_key, first.mask_key),
        (first.share_key, second.mask_key),
        (second.mask_key, first.mask_key),
    ):
        signed = keys.advertise(identity, consortium.attempt, first.site, share_key, mask_key)
        with pytest.raises(BadPeer):
            check_keys(signed, first.site, consortium.plan, [second])
    check_keys(first, first.site, consortium.plan, [second])
