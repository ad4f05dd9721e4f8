"""The site's state machine of a secure sum, driven directly: what it checks, what leaves it, and what it forgets."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.secagg import STAGES, SiteRound
from common.errors import BadPeer, FederationError, OutOfOrder, SiteError, TooFewSurvivors
from common.messages import (
    ConfirmSurvivorsRequest,
    MaskedInput,
    MaskedInputRequest,
    ShareKeysRequest,
    UnmaskRequest,
)
from common.secagg import keys, masks, neighbours, shares
from common.secagg.encoding import MODULUS_BITS, Encoding
from common.secagg.keys import AdvertisedKeys, Attempt
from server.secagg import SecureSum
from tests.client.attacker import TOO_UNEVEN, forged, uniformity
from tests.consortium import ENCODING, STUDY, Consortium, encoded, members_of, names_of, vectors_of

LENGTH = 12_000


def masked_alone(
    vector: np.ndarray, encoding: Encoding = ENCODING, names: tuple[str, ...] = ("a", "b")
) -> tuple[Consortium, SecureSum, dict[str, MaskedInput]]:
    """Everybody masks the same vector; nothing is opened."""
    consortium = Consortium(names, len(vector), encoding)
    server = consortium.advertise()
    consortium.share(server)
    messages = {}
    for name, request in server.masked_input_requests(consortium.train).items():
        consortium.sites[name].open_shares(request)
        messages[name], _ = consortium.sites[name].masked_input(vector, encoding, 1)
    return consortium, server, messages


# ---------------------------------------------------------------- the sum


def test_two_sites_by_hand() -> None:
    # Quarters are exact with 15 binary places, so nothing is rounded.
    vectors = {"a": np.array([0.25, -0.5, 1.0], np.float32), "b": np.array([0.5, 0.25, -1.0], np.float32)}
    total, survivors = Consortium(["a", "b"], 3).total(vectors)
    assert total.tolist() == [0.75, -0.25, 0.0]
    assert survivors == ("a", "b")


@pytest.mark.parametrize("num_sites", [3, 4, 5])
def test_the_masks_cancel_for_every_set_of_survivors_at_the_threshold_and_below_it_sites_refuse(num_sites: int) -> None:
    names, threshold = names_of(num_sites), 2 * num_sites // 3 + 1
    vectors = vectors_of(names, 50)
    for count in range(2, num_sites + 1):
        for alive in itertools.combinations(names, count):
            consortium = Consortium(names, 50)
            server = consortium.advertise()
            consortium.share(server)
            consortium.mask(server, vectors, set(names) - set(alive))
            request = ConfirmSurvivorsRequest(STUDY, 1, alive)
            if count < threshold:
                with pytest.raises(TooFewSurvivors):
                    consortium.sites[alive[0]].confirm_survivors(request)
                continue
            consortium.confirm(server)
            consortium.unmask(server)
            plain = np.sum([vectors[name] for name in alive], axis=0)
            assert np.abs(server.result() - plain).max() < num_sites * 2.0**-ENCODING.fraction_bits


# ---------------------------------------------------------------- the masked vector


VECTORS = {
    "zeros": np.zeros(LENGTH, np.float32),
    "the largest": np.full(LENGTH, 1.0, np.float32),
    "the smallest": np.full(LENGTH, -1.0, np.float32),
    "far beyond the range": np.full(LENGTH, 1e30, np.float32),
    "alternating": np.resize(np.array([1, -1], np.float32), LENGTH),
    "a ramp": np.linspace(-1, 1, LENGTH, dtype=np.float32),
    "one spike": np.eye(1, LENGTH, 17, dtype=np.float32)[0],
}


@pytest.mark.parametrize("bits", MODULUS_BITS)
@pytest.mark.parametrize("vector", VECTORS)
def test_a_masked_vector_is_uniform_whatever_it_hides(vector: str, bits: int) -> None:
    encoding = Encoding(1.0, 8, bits)
    values = VECTORS[vector]
    assert uniformity(encoded(np.clip(values, -1, 1), encoding)) == 0  # which the test can tell
    _, _, messages = masked_alone(values, encoding)
    for message in messages.values():
        assert uniformity(message.words) > TOO_UNEVEN


def test_the_same_vector_masked_twice_and_by_two_sites_has_nothing_in_common() -> None:
    messages = [message for _ in range(2) for message in masked_alone(VECTORS["a ramp"])[2].values()]
    for one, other in itertools.combinations(messages, 2):
        assert uniformity(one.words - other.words) > TOO_UNEVEN


def test_a_masked_vector_is_the_encoded_one_plus_its_self_mask_plus_and_minus_pairwise_masks() -> None:
    # The middle one of three subtracts nothing of its own invention: a < b < c, so b subtracts with a, adds with c.
    names, vector = ("a", "b", "c"), np.resize(np.array([0.5, -0.25], np.float32), 100)  # exact in 15 places
    consortium = Consortium(names, 100)
    server = consortium.advertise()
    consortium.share(server)
    requests = server.masked_input_requests(consortium.train)
    site = consortium.sites["b"]
    seed, private, agreed = site.self_mask, keys.load(site.mask_private), site.agreed
    site.open_shares(requests["b"])
    assert agreed is not None
    message, clipped = site.masked_input(vector, ENCODING, 1)
    public = {name: consortium.keys[name].mask_key for name in names}
    total = message.words.copy()
    masks.apply(
        total,
        [
            (keys.self_mask_key(seed, agreed, "b"), False),
            (keys.pairwise_key(private, public["a"], agreed, consortium.train.digest, "b", "a"), True),
            (keys.pairwise_key(private, public["c"], agreed, consortium.train.digest, "b", "c"), False),
        ],
    )
    assert clipped == 0
    assert (total == encoded(vector, ENCODING)).all()


def test_clipped_coordinates_are_counted_and_a_vector_that_is_not_finite_does_not_leave() -> None:
    consortium = Consortium(("a", "b"), 4)
    server = consortium.advertise()
    consortium.share(server)
    for name, request in server.masked_input_requests(consortium.train).items():
        consortium.sites[name].open_shares(request)
    _, clipped = consortium.sites["a"].masked_input(np.array([2, -3, 1, 0], np.float32), ENCODING, 1)
    assert clipped == 2
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(SiteError, match="not finite"):
            consortium.sites["b"].masked_input(np.array([0, wrong, 0, 0], np.float32), ENCODING, 1)


# ---------------------------------------------------------------- shares


@settings(max_examples=20, deadline=None)
@given(num_sites=st.integers(2, 9), data=st.data())
def test_any_threshold_of_the_dealt_shares_rebuild_and_one_less_does_not(num_sites: int, data: st.DataObject) -> None:
    names = names_of(num_sites)
    consortium = Consortium(names, 1)
    server = consortium.advertise()
    consortium.share(server)
    secret = {name: (consortium.sites[name].self_mask, consortium.sites[name].mask_private) for name in names}
    for name, request in server.masked_input_requests(consortium.train).items():
        consortium.sites[name].open_shares(request)
    owner, threshold = data.draw(st.sampled_from(names)), 2 * num_sites // 3 + 1
    holders = data.draw(st.permutations(range(num_sites)))[:threshold]
    for part, right in ((slice(0, 33), secret[owner][0]), (slice(33, 66), secret[owner][1])):
        held = {holder + 1: consortium.sites[names[holder]].held[owner][part] for holder in holders}
        assert shares.rebuild(held) == right
        held.popitem()
        assert _rebuilt(held) != right


def _rebuilt(held: dict[int, bytes]) -> bytes:
    try:
        return shares.rebuild(held) if held else b""
    except ValueError:
        return b""


def test_all_secrets_are_fresh_in_every_attempt() -> None:
    members = members_of(["a", "b"])
    seen: list[bytes] = []
    for number in (1, 2, 3):
        consortium = Consortium(["a", "b"], 1, number=number, members=members)
        consortium.share(consortium.advertise())
        for site in consortium.sites.values():
            seen += [site.share_private, site.mask_private, site.self_mask]
    assert len(set(seen)) == len(seen) == 18 and all(len(secret) == 32 for secret in seen)


# ---------------------------------------------------------------- what it forgets, what it never says


def secrets_of(site: SiteRound) -> list[bytes]:
    own = (site.share_private, site.mask_private, site.self_mask)
    return [secret for secret in (*own, *site.pairwise.values(), *site.held.values()) if secret]


def test_a_site_forgets_each_secret_when_its_time_is_over() -> None:
    consortium, server, _ = masked_alone(np.zeros(8, np.float32), names=("a", "b", "c"))
    site = consortium.sites["a"]
    assert (site.share_private, site.mask_private, site.self_mask, site.pairwise) == (b"", b"", b"", {})
    assert set(site.held) == {"a", "b", "c"}
    consortium = Consortium(("a", "b", "c"), 8)
    consortium.total(vectors_of(["a", "b", "c"], 8))
    for site in consortium.sites.values():
        assert secrets_of(site) == []


def test_no_secret_is_in_a_repr_or_in_an_error() -> None:
    consortium = Consortium(("a", "b", "c"), 8)
    server = consortium.advertise()
    consortium.share(server)
    requests = server.masked_input_requests(consortium.train)
    site = consortium.sites["a"]
    texts = [repr(site), str(site), repr(site.member), str(site.member), repr(consortium.sites)]
    hidden = [*secrets_of(site), site.member.identity.private_bytes_raw()]
    for spoilt in (
        MaskedInputRequest(1, ("a", "b"), requests["a"].sealed, consortium.train),
        MaskedInputRequest(1, ("a", "b", "c"), {**requests["a"].sealed, "b": bytes(82)}, consortium.train),
        MaskedInputRequest(1, ("a",), {}, consortium.train),
    ):
        copy = SiteRound.from_tree(site.member, site.to_tree())
        with pytest.raises(FederationError) as caught:
            copy.open_shares(spoilt)
        texts += [str(caught.value), repr(caught.value), repr(caught.value.__cause__), repr(caught.value.__context__)]
    site.open_shares(requests["a"])
    hidden += secrets_of(site)
    texts.append(repr(site))
    assert len(hidden) >= 8
    for text in texts:
        for secret in hidden:
            assert secret.hex() not in text and repr(secret)[2:-1] not in text
    assert "SiteRound" in texts[0] and "roster" in texts[2]


# ---------------------------------------------------------------- order


def at_stage(stage: str) -> tuple[Consortium, dict[str, Any]]:
    """Three sites of which each has reached a stage, and the genuine requests to site a of every stage."""
    consortium = Consortium(("a", "b", "c"), 4)
    vectors, requests = vectors_of(["a", "b", "c"], 4), dict[str, Any]()
    trees = {"start": consortium.sites["a"].to_tree()}
    server = consortium.advertise()
    trees["advertise_keys"] = consortium.sites["a"].to_tree()
    requests["share_keys"] = ShareKeysRequest(STUDY, 1, tuple(consortium.keys[name] for name in ("a", "b", "c")))
    consortium.share(server)
    trees["share_keys"] = consortium.sites["a"].to_tree()
    for name, request in server.masked_input_requests(consortium.train).items():
        requests.setdefault("masked_input", request)  # that of a, the first
        consortium.sites[name].open_shares(request)
        server.take_masked_input(name, consortium.sites[name].masked_input(vectors[name], ENCODING, 1)[0])
    trees["masked_input"] = consortium.sites["a"].to_tree()
    requests["confirm_survivors"] = ConfirmSurvivorsRequest(STUDY, 1, ("a", "b", "c"))
    consortium.confirm(server)
    trees["confirm_survivors"] = consortium.sites["a"].to_tree()
    requests["unmask"] = server.unmask_requests()["a"]
    consortium.sites["a"].unmask(requests["unmask"])
    trees["unmask"] = consortium.sites["a"].to_tree()
    consortium.sites["a"] = SiteRound.from_tree(consortium.members["a"], trees[stage])
    return consortium, requests


def call(site: SiteRound, stage: str, requests: dict[str, Any]) -> object:
    match stage:
        case "advertise_keys":
            return site.advertise_keys()
        case "masked_input":
            site.open_shares(requests[stage])
            return site.masked_input(np.zeros(4, np.float32), ENCODING, 1)
        case _:
            return getattr(site, stage)(requests[stage])


@pytest.mark.parametrize("asked", STAGES[1:])
@pytest.mark.parametrize("reached", STAGES)
def test_every_pair_of_stages(reached: str, asked: str) -> None:
    consortium, requests = at_stage(reached)
    site = consortium.sites["a"]
    if STAGES.index(asked) == STAGES.index(reached) + 1:
        call(site, asked, requests)
        assert site.stage == asked
    else:
        with pytest.raises(OutOfOrder):
            call(site, asked, requests)
        assert site.stage == reached  # nothing moved


@pytest.mark.parametrize("reached", [stage for stage in STAGES if stage != "masked_input"])
def test_no_vector_is_masked_outside_its_stage(reached: str) -> None:
    consortium, _ = at_stage(reached)
    with pytest.raises(OutOfOrder):
        consortium.sites["a"].masked_input(np.zeros(4, np.float32), ENCODING, 1)


def test_a_vector_is_masked_once_and_survivors_are_not_confirmed_before() -> None:
    consortium, requests = at_stage("share_keys")
    site = consortium.sites["a"]
    site.open_shares(requests["masked_input"])
    early = SiteRound.from_tree(site.member, site.to_tree())
    with pytest.raises(OutOfOrder):
        early.confirm_survivors(requests["confirm_survivors"])
    site.masked_input(np.zeros(4, np.float32), ENCODING, 1)
    with pytest.raises(OutOfOrder):
        site.masked_input(np.zeros(4, np.float32), ENCODING, 1)


@pytest.mark.parametrize("wrong", ["shares", "list", "too few"])
def test_no_vector_is_masked_after_shares_that_were_refused(wrong: str) -> None:
    """It would lack the pairwise masks: the machine itself must refuse, whoever drives it."""
    consortium, requests = at_stage("share_keys")
    site, request = consortium.sites["a"], requests["masked_input"]
    spoilt = {
        "shares": MaskedInputRequest(1, request.sharers, {**request.sealed, "b": bytes(82)}, consortium.train),
        "list": MaskedInputRequest(1, ("b", "c"), request.sealed, consortium.train),
        "too few": MaskedInputRequest(1, ("a",), {}, consortium.train),
    }[wrong]
    with pytest.raises((BadPeer, TooFewSurvivors)):
        site.open_shares(spoilt)
    with pytest.raises(OutOfOrder):
        site.masked_input(np.zeros(4, np.float32), ENCODING, 1)


# ---------------------------------------------------------------- large cohorts


@pytest.fixture(scope="module")
def forty() -> tuple[dict[str, Any], dict[str, AdvertisedKeys], Attempt]:
    """Forty members and their keys for an attempt: each picks 31 others."""
    names = names_of(40)
    members, attempt = members_of(names), Attempt(STUDY, 1)
    advertised = {name: SiteRound(members[name], attempt, 2).advertise_keys() for name in names}
    return members, advertised, attempt


def begun(
    forty: tuple[dict[str, Any], dict[str, AdvertisedKeys], Attempt], minimum: int = 2, **swapped: AdvertisedKeys
) -> tuple[SiteRound, ShareKeysRequest]:
    members, advertised, attempt = forty
    site = SiteRound(members["site-000"], attempt, minimum)
    cohort = {**advertised, "site-000": site.advertise_keys(), **swapped}
    return site, ShareKeysRequest(STUDY, 1, tuple(cohort.values()))


def test_a_site_picks_its_own_holders_at_random(
    forty: tuple[dict[str, Any], dict[str, AdvertisedKeys], Attempt],
) -> None:
    picks = []
    for _ in range(3):
        site, request = begun(forty)
        dealt = site.share_keys(request)
        assert set(dealt.sealed) == set(site.picks)
        assert len(site.picks) == neighbours.num_picks(40) == 31 and "site-000" not in site.picks
        picks.append(site.picks)
    assert len(set(picks)) > 1  # equal ones have a chance of 1 in 61 million


def test_only_a_sites_own_holders_confirm_to_it(
    forty: tuple[dict[str, Any], dict[str, AdvertisedKeys], Attempt],
) -> None:
    members, _, _ = forty
    site, request = begun(forty)
    site.share_keys(request)
    names = tuple(names_of(40))
    site.open_shares(MaskedInputRequest(1, names, {}, Consortium(("a", "b"), 1).train))
    site.masked_input(np.zeros(3, np.float32), ENCODING, 1)
    site.confirm_survivors(ConfirmSurvivorsRequest(STUDY, 1, names))
    assert site.agreed is not None
    signed = keys.confirmed(site.agreed, names)
    others = [name for name in names if name not in site.picks and name != "site-000"]
    threshold = neighbours.threshold_of(len(site.picks) + 1)

    def confirmations(own: int) -> UnmaskRequest:
        chosen = [*site.picks[:own], *others]
        return UnmaskRequest(STUDY, 1, {name: members[name].identity.sign(signed) for name in chosen})

    assert threshold - 2 + len(others) >= threshold  # enough signatures, too few of them of its holders
    copy = SiteRound.from_tree(site.member, site.to_tree())
    with pytest.raises(TooFewSurvivors):
        copy.unmask(confirmations(threshold - 2))
    assert set(site.unmask(confirmations(threshold - 1)).self_masks) == {"site-000"}


def test_forged_keys_of_a_site_that_was_not_picked_give_it_no_shares_of_anybody(
    forty: tuple[dict[str, Any], dict[str, AdvertisedKeys], Attempt],
) -> None:
    # Signatures are checked of those a site has to do with: all it picked, and all that send it shares.
    _, _, attempt = forty
    stranger, private, names = members_of(["x"])["x"].identity, bytes([7]) * 32, tuple(names_of(40))
    fake = keys.advertise(stranger, attempt, "site-007", keys.public_half(private), keys.public_half(bytes([8]) * 32))
    seen = {"at once": 0, "later": 0}
    while min(seen.values()) == 0:
        site, request = begun(forty, **{"site-007": fake})
        try:
            dealt = site.share_keys(request)
        except BadPeer:
            seen["at once"] += 1
            continue
        assert "site-007" not in dealt.sealed and site.agreed is not None
        # The stranger has the private halves, so what it sends would open.
        own = site.cohort["site-000"].share_key
        sealed = keys.seal(keys.load(private), own, site.agreed, "site-007", "site-000", bytes(2 * shares.SHARE_BYTES))
        with pytest.raises(BadPeer, match="signature"):
            site.open_shares(MaskedInputRequest(1, names, {"site-007": sealed}, Consortium(("a", "b"), 1).train))
        seen["later"] += 1


def test_a_minimum_above_the_picks_is_met_by_sites_whose_keys_are_genuine(
    forty: tuple[dict[str, Any], dict[str, AdvertisedKeys], Attempt],
) -> None:
    # All forty must be genuine, so one forged entry is always found.
    _, _, attempt = forty
    stranger = members_of(["x"])["x"].identity
    for _ in range(3):
        site, request = begun(forty, 40, **{"site-007": forged(attempt, "site-007", stranger)})
        with pytest.raises(BadPeer):
            site.share_keys(request)
    site, request = begun(forty, 36)
    site.share_keys(request)
    assert len(set(site.checked)) == 35


def test_what_is_kept_between_messages_is_json_and_the_whole_state() -> None:
    for stage in STAGES:
        consortium, _ = at_stage(stage)
        site = consortium.sites["a"]
        again = SiteRound.from_tree(site.member, json.loads(json.dumps(site.to_tree())))
        assert again == site
