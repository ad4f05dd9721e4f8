"""Every signature and every key belongs to one study, attempt, stage and pair of sites, and serves for nothing else."""

import dataclasses
import itertools
import traceback
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadPeer
from common.secagg import keys
from common.secagg.keys import AdvertisedKeys, Attempt, Transcript
from common.secagg.shares import SHARE_BYTES

ATTEMPT = Attempt("5d" * 32, 7)
AGREED = Transcript(ATTEMPT, bytes(range(32)))
OTHER_ATTEMPTS = [Attempt("5d" * 32, 8), Attempt("5e" * 32, 7), Attempt("5d" * 32 + "7", 7), Attempt("", 7)]
OTHER_TRANSCRIPTS = [
    *(Transcript(other, AGREED.digest) for other in OTHER_ATTEMPTS),
    Transcript(ATTEMPT, bytes(32)),
    Transcript(ATTEMPT, AGREED.digest[::-1]),
]

parts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.binary(max_size=6), max_size=4)


def secret(number: int) -> bytes:
    return bytes([number]) * 32


def identity(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(secret(number))


def public(of: Ed25519PrivateKey) -> bytes:
    return of.public_key().public_bytes_raw()


def advertised(site: str, number: int, attempt: Attempt = ATTEMPT) -> AdvertisedKeys:
    share_key, mask_key = keys.public_half(secret(number + 1)), keys.public_half(secret(number + 2))
    return keys.advertise(identity(number), attempt, site, share_key, mask_key)


def with_field(entry: AdvertisedKeys, field: str, content: bytes) -> AdvertisedKeys:
    return AdvertisedKeys(**{**dataclasses.asdict(entry), field: content})


def flipped(content: bytes, bit: int) -> bytes:
    return (int.from_bytes(content, "big") ^ 1 << bit).to_bytes(len(content), "big")


# ------------------------------------------------------------ labels


def test_a_label_by_hand() -> None:
    label = Attempt("ab", 12).label("unmask", "x", b"\xff\0")
    assert label == (
        b"\0\0\0\x1esynthward secure aggregation 1" b"\0\0\0\2ab" b"\0\0\0\00212" b"\0\0\0\6unmask" b"\0\0\0\1x"
        b"\0\0\0\2\xff\0"
    )  # fmt: skip


def as_written(study: str, number: int, stage: str, rest: list[str | bytes]) -> list[bytes]:
    return [part.encode() if isinstance(part, str) else part for part in (study, str(number), stage, *rest)]


LABELS = st.tuples(st.text("ab", max_size=3), st.integers(0, 200), st.text("ab", max_size=3), parts)


@given(LABELS, LABELS)
def test_different_parts_give_different_labels(
    one: tuple[str, int, str, list[str | bytes]], other: tuple[str, int, str, list[str | bytes]]
) -> None:
    first, second = (Attempt(study, number).label(stage, *rest) for study, number, stage, rest in (one, other))
    assert (first == second) == (as_written(*one) == as_written(*other))


@given(st.lists(st.binary(max_size=3), min_size=1, max_size=4), st.data())
def test_moving_a_border_between_parts_changes_the_label(found: list[bytes], data: st.DataObject) -> None:
    """The hardest case: the same bytes in a row, cut elsewhere."""
    whole = b"".join(found)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=3)))
    recut = [whole[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(whole)])]
    assert (ATTEMPT.label("unmask", *found) == ATTEMPT.label("unmask", *recut)) == (found == recut)


@given(LABELS)
def test_a_label_can_be_read_back(case: tuple[str, int, str, list[str | bytes]]) -> None:
    study, number, stage, rest = case
    label, found = Attempt(study, number).label(stage, *rest), []
    while label:
        length = int.from_bytes(label[:4], "big")
        found.append(label[4 : 4 + length])
        label = label[4 + length :]
    assert found == [keys.PROTOCOL.encode(), *as_written(study, number, stage, rest)]


def test_a_transcripts_label_has_its_digest() -> None:
    assert AGREED.label("unmask", "a") == ATTEMPT.label("unmask", AGREED.digest, "a")


# ------------------------------------------------------------ advertised keys


def test_honest_keys_are_accepted() -> None:
    keys.check_advertised(advertised("north", 1), ATTEMPT, public(identity(1)))


@pytest.mark.parametrize("attempt", OTHER_ATTEMPTS, ids=["number", "study", "border", "no study"])
def test_keys_of_another_attempt_are_refused(attempt: Attempt) -> None:
    with pytest.raises(BadPeer):
        keys.check_advertised(advertised("north", 1, attempt), ATTEMPT, public(identity(1)))


CHANGES: dict[str, Callable[[AdvertisedKeys], AdvertisedKeys]] = {
    "another site": lambda own: dataclasses.replace(own, site="south"),
    "no site": lambda own: dataclasses.replace(own, site=""),
    "keys swapped": lambda own: dataclasses.replace(own, share_key=own.mask_key, mask_key=own.share_key),
    "one key twice": lambda own: dataclasses.replace(own, mask_key=own.share_key),
    "a byte moved from key to key": lambda own: dataclasses.replace(
        own, share_key=own.share_key + own.mask_key[:1], mask_key=own.mask_key[1:]
    ),
    "a byte moved from name to key": lambda own: dataclasses.replace(
        own, site=own.site[:-1], share_key=own.site[-1:].encode() + own.share_key
    ),
    "no signature": lambda own: dataclasses.replace(own, signature=b""),
    "signature of zeros": lambda own: dataclasses.replace(own, signature=bytes(64)),
    "signature cut": lambda own: dataclasses.replace(own, signature=own.signature[:-1]),
    "signature too long": lambda own: dataclasses.replace(own, signature=own.signature + b"\0"),
    "another's signature": lambda own: dataclasses.replace(own, signature=advertised("north", 4).signature),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_keys_are_refused(change: Callable[[AdvertisedKeys], AdvertisedKeys]) -> None:
    with pytest.raises(BadPeer):
        keys.check_advertised(change(advertised("north", 1)), ATTEMPT, public(identity(1)))


@pytest.mark.parametrize("field", ["share_key", "mask_key", "signature"])
def test_any_flipped_bit_is_refused(field: str) -> None:
    own = advertised("north", 1)
    for bit in range(8 * len(getattr(own, field))):
        changed = with_field(own, field, flipped(getattr(own, field), bit))
        with pytest.raises(BadPeer):
            keys.check_advertised(changed, ATTEMPT, public(identity(1)))


@pytest.mark.parametrize("found", [public(identity(2)), b"", bytes(31), bytes(33), b"\xff" * 32], ids=bytes.hex)
def test_another_identity_is_refused(found: bytes) -> None:
    with pytest.raises(BadPeer):
        keys.check_advertised(advertised("north", 1), ATTEMPT, found)


def test_a_confirmation_is_no_advertisement() -> None:
    """A site signs two kinds of thing with one key; neither passes for the other."""
    own = advertised("north", 1)
    signature = identity(1).sign(keys.confirmed(AGREED, ["north", "south"]))
    with pytest.raises(BadPeer):
        keys.check_advertised(dataclasses.replace(own, signature=signature), ATTEMPT, public(identity(1)))
    with pytest.raises(BadPeer):
        keys.check_signature(public(identity(1)), own.signature, keys.confirmed(AGREED, ["north", "south"]))


def test_what_is_confirmed_are_the_survivors_of_this_transcript() -> None:
    signed = keys.confirmed(AGREED, ["a", "b", "c"])
    assert signed == keys.confirmed(AGREED, ["c", "a", "b"])
    others = [keys.confirmed(AGREED, names) for names in (["a", "b"], ["ab", "c"], ["a", "b", "c", "c"], ["abc"], [])]
    others += [keys.confirmed(other, ["a", "b", "c"]) for other in OTHER_TRANSCRIPTS]
    assert len({signed, *others}) == 1 + len(others)


# ------------------------------------------------------------ the transcript

COHORT = [advertised(name, 10 * number) for number, name in enumerate(("north", "south", "west"), start=1)]


def test_the_transcript_does_not_depend_on_the_order() -> None:
    found = {keys.make_transcript(ATTEMPT, "ro", order) for order in itertools.permutations(COHORT)}
    assert len(found) == 1


def test_the_transcript_changes_with_every_byte_of_every_entry() -> None:
    digests = [keys.make_transcript(ATTEMPT, "ro", COHORT).digest]
    for place, entry in enumerate(COHORT):
        changes: list[AdvertisedKeys] = []
        for field in ("share_key", "mask_key", "signature"):
            content = getattr(entry, field)
            for byte in range(len(content)):
                changes.append(with_field(entry, field, flipped(content, 8 * byte + byte % 8)))
        for letter in range(len(entry.site)):
            changes.append(dataclasses.replace(entry, site=entry.site[:letter] + "X" + entry.site[letter + 1 :]))
        digests += [
            keys.make_transcript(ATTEMPT, "ro", [*COHORT[:place], change, *COHORT[place + 1 :]]).digest
            for change in changes
        ]
    assert len(digests) == 1 + sum(32 + 32 + 64 + len(entry.site) for entry in COHORT)
    assert len(set(digests)) == len(digests)


def test_the_transcript_changes_with_the_roster_the_attempt_and_the_cohort() -> None:
    found = [keys.make_transcript(ATTEMPT, "ro", COHORT), keys.make_transcript(ATTEMPT, "rp", COHORT)]
    found += [keys.make_transcript(other, "ro", COHORT) for other in OTHER_ATTEMPTS]
    found += [keys.make_transcript(ATTEMPT, "ro", fewer) for fewer in (COHORT[:2], COHORT[1:], COHORT[:1], [])]
    assert len({each.digest for each in found}) == len(found)


# ------------------------------------------------------------ keys of pairs

STATE = "57" * 32
SECRET = {"a": secret(21), "b": secret(22), "c": secret(23)}
PRIVATE = {name: keys.load(private) for name, private in SECRET.items()}
PUBLIC = {name: keys.public_half(private) for name, private in SECRET.items()}


def pairwise(one: str, other: str, agreed: Transcript = AGREED) -> bytes:
    return keys.pairwise_key(PRIVATE[one], PUBLIC[other], agreed, STATE, one, other)


def test_both_ends_make_the_same_key_and_every_pair_another() -> None:
    found = []
    for one, other in itertools.combinations(PRIVATE, 2):
        assert pairwise(one, other) == pairwise(other, one)
        assert len(pairwise(one, other)) == 32
        found.append(pairwise(one, other))
    assert len(set(found)) == 3


def test_a_key_of_another_attempt_transcript_or_pair_of_names_is_another() -> None:
    found = [pairwise("a", "b"), *(pairwise("a", "b", other) for other in OTHER_TRANSCRIPTS)]
    # The same two key pairs under other names: no site's mask passes for another's.
    for names in (("a", "c"), ("ab", ""), ("a", "b2")):
        found.append(keys.pairwise_key(PRIVATE["a"], PUBLIC["b"], AGREED, STATE, *names))
    found.append(keys.pairwise_key(PRIVATE["a"], PUBLIC["b"], AGREED, "58" * 32, "a", "b"))  # another shared state
    assert len(set(found)) == len(found)


def test_a_self_mask_key_is_bound_to_site_and_transcript() -> None:
    found = [keys.self_mask_key(secret(1), AGREED, name) for name in ("a", "b", "")]
    found += [keys.self_mask_key(secret(1), other, "a") for other in OTHER_TRANSCRIPTS]
    found += [keys.self_mask_key(secret(2), AGREED, "a")]
    assert len(set(found)) == len(found)


def test_a_commitment_is_bound_to_everything_it_names() -> None:
    def commit(**changes: object) -> bytes:
        facts = {"attempt": ATTEMPT, "kind": "self_mask", "owner": "a", "holder": "b", "secret": secret(1)}
        return keys.commitment(**(facts | changes))  # type: ignore[arg-type]

    found = [
        commit(),
        *(commit(attempt=other) for other in OTHER_ATTEMPTS),
        commit(kind="mask_key"),
        commit(owner="b", holder="a"),
        commit(owner="ab", holder=""),
        commit(holder="c"),
        commit(secret=secret(2)),
        commit(secret=secret(1) + b"\0"),
    ]
    assert len(set(found)) == len(found)
    assert commit() == commit()


LOW_ORDER = {
    "0": bytes(32),
    "1": b"\1" + bytes(31),
    "order 8": bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    "the other of order 8": bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    "p - 1": b"\xec" + b"\xff" * 30 + b"\x7f",
    "p": b"\xed" + b"\xff" * 30 + b"\x7f",
    "p + 1": b"\xee" + b"\xff" * 30 + b"\x7f",
    "0 with the unused bit": bytes(31) + b"\x80",
    "too short": bytes(31),
    "too long": bytes(33),
    "empty": b"",
}


@pytest.mark.parametrize("found", LOW_ORDER.values(), ids=LOW_ORDER.keys())
def test_degenerate_public_keys_are_refused(found: bytes) -> None:
    """They would make the shared secret a constant that everybody knows."""
    with pytest.raises(BadPeer, match="X25519"):
        keys.agree(PRIVATE["a"], found)
    with pytest.raises(BadPeer):
        keys.pairwise_key(PRIVATE["a"], found, AGREED, STATE, "a", "b")
    with pytest.raises(BadPeer):
        keys.seal(PRIVATE["a"], found, AGREED, "a", "b", b"text")
    with pytest.raises(BadPeer):
        keys.unseal(PRIVATE["a"], found, AGREED, "b", "a", bytes(32))


# ------------------------------------------------------------ sealed shares

TEXT = bytes(range(2 * SHARE_BYTES))


def sealed_by_a_for_b() -> bytes:
    return keys.seal(PRIVATE["a"], PUBLIC["b"], AGREED, "a", "b", TEXT)


def test_the_receiver_opens_what_the_sender_sealed() -> None:
    sealed = sealed_by_a_for_b()
    assert len(sealed) == len(TEXT) + 16
    assert TEXT[:8] not in sealed
    assert keys.unseal(PRIVATE["b"], PUBLIC["a"], AGREED, "a", "b", sealed) == TEXT


def test_any_flipped_bit_of_a_sealed_text_is_refused() -> None:
    sealed = sealed_by_a_for_b()
    for bit in range(8 * len(sealed)):
        with pytest.raises(BadPeer):
            keys.unseal(PRIVATE["b"], PUBLIC["a"], AGREED, "a", "b", flipped(sealed, bit))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 81, 83, 164])
def test_a_cut_or_longer_text_is_refused(length: int) -> None:
    with pytest.raises(BadPeer):
        keys.unseal(PRIVATE["b"], PUBLIC["a"], AGREED, "a", "b", (2 * sealed_by_a_for_b() + b"\0")[:length])


@pytest.mark.parametrize(
    ("private", "public_key", "sender", "receiver"),
    [
        ("b", "a", "b", "a"),  # sent back to where it came from
        ("b", "a", "c", "b"),  # said to come from another
        ("b", "a", "a", "c"),
        ("b", "c", "a", "b"),  # another's key
        ("c", "a", "a", "b"),  # opened by another
        ("c", "a", "a", "c"),
        ("b", "a", "ab", ""),
    ],
)
def test_another_sender_or_receiver_is_refused(private: str, public_key: str, sender: str, receiver: str) -> None:
    with pytest.raises(BadPeer):
        keys.unseal(PRIVATE[private], PUBLIC[public_key], AGREED, sender, receiver, sealed_by_a_for_b())


@pytest.mark.parametrize("agreed", OTHER_TRANSCRIPTS, ids=range(len(OTHER_TRANSCRIPTS)))
def test_another_attempt_or_transcript_is_refused(agreed: Transcript) -> None:
    with pytest.raises(BadPeer):
        keys.unseal(PRIVATE["b"], PUBLIC["a"], agreed, "a", "b", sealed_by_a_for_b())


def test_there_and_back_use_two_keys() -> None:
    """The nonce is fixed, so the two directions of one pair must not share a key."""
    there = keys.seal(PRIVATE["a"], PUBLIC["b"], AGREED, "a", "b", TEXT)
    back = keys.seal(PRIVATE["b"], PUBLIC["a"], AGREED, "b", "a", TEXT)
    assert there[: len(TEXT)] != back[: len(TEXT)]


# ------------------------------------------------------------ nothing secret is shown


def test_no_private_half_is_shown() -> None:
    shown = [repr(COHORT), str(COHORT[0]), repr(AGREED), repr(ATTEMPT), repr(identity(1))]
    for refused in (
        lambda: keys.agree(PRIVATE["a"], bytes(32)),
        lambda: keys.unseal(PRIVATE["b"], PUBLIC["a"], AGREED, "b", "a", sealed_by_a_for_b()),
        lambda: keys.check_advertised(COHORT[0], ATTEMPT, public(identity(99))),
    ):
        with pytest.raises(BadPeer) as caught:
            refused()
        shown += [repr(caught.value), "".join(traceback.format_exception(caught.value))]
        assert caught.value.__suppress_context__
    privates = [*SECRET.values(), *(secret(number) for number in (1, 10, 11, 12, 99)), TEXT]
    for text, private in itertools.product(shown, privates):
        assert private.hex() not in text
        assert repr(private) not in text
        assert repr(list(private)) not in text


def test_what_is_kept_has_no_room_for_a_private_half() -> None:
    assert [field.name for field in dataclasses.fields(AdvertisedKeys)] == [
        "site",
        "share_key",
        "mask_key",
        "signature",
    ]
    assert [field.name for field in dataclasses.fields(Transcript)] == ["attempt", "digest"]
