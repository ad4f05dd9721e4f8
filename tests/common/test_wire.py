"""Every message survives the wire; nothing else gets through it."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings

from common import wire
from common.errors import BadPeer
from common.messages import (
    AdvertiseKeysRequest,
    AuditRequest,
    Confirmation,
    ConfirmStepRequest,
    ConfirmSurvivorsRequest,
    Enrolment,
    EnrolRequest,
    FilterRequest,
    JointRequest,
    LocalUpdate,
    MaskedInput,
    MaskedInputRequest,
    MaskedStep,
    MomentsRequest,
    OpenedSeeds,
    OpenedStep,
    OpenSeedsRequest,
    OpenStepRequest,
    PlanRegistered,
    Refusal,
    RegisterPlanRequest,
    Reply,
    Request,
    SealedSeeds,
    SealedShares,
    ShareKeysRequest,
    ShareSeedRequest,
    StepRequest,
    TrainRequest,
    UnmaskRequest,
    UnmaskShares,
    Work,
)
from common.privacy.accounting import Budget, Mechanism, PureRelease
from common.secagg.keys import AdvertisedKeys
from tests.strategies import replies, requests


def sent(record: RecordDict) -> RecordDict:
    """What arrives at the other end of a real connection."""
    return recorddict_from_proto(recorddict_to_proto(record))


def assert_same(one: Request | Reply, other: Request | Reply) -> None:
    assert type(one) is type(other)
    for name, value in vars(one).items():
        if isinstance(value, np.ndarray):
            assert getattr(other, name).dtype == value.dtype
            np.testing.assert_array_equal(getattr(other, name), value)
        elif isinstance(value, Work | JointRequest):
            assert_same(value, getattr(other, name))
        else:
            assert getattr(other, name) == value


@settings(max_examples=300)
@given(requests | replies)
def test_every_message_survives_the_wire(message: Request | Reply) -> None:
    assert_same(wire.unpack(sent(wire.pack(message))), message)


VECTOR = np.arange(3, dtype=np.float32)
TRAIN, MOMENTS = TrainRequest("d", 1, VECTOR, VECTOR), MomentsRequest("d", 1, VECTOR)
JOINT = JointRequest("d", 2, 3, VECTOR)
INDICES, PIXELS = np.arange(2, dtype=np.int64), np.arange(8, dtype=np.uint8)
AUDIT = AuditRequest("d", 5, "plan", VECTOR, INDICES, PIXELS, VECTOR)
FILTER = FilterRequest("d", 6, "audit", 2)
KEYS = AdvertisedKeys("north", b"share", b"mask", b"signature")
OTHER_KEYS = AdvertisedKeys("south", b"share 2", b"mask 2", b"signature 2")
NAMED = {"north": b"1", "south": b"2"}
HISTORY = (Mechanism(0.5, 2.0, 4), PureRelease(0.5, 2), Mechanism(1.0, 3.0, 1))
EACH: dict[str, Request | Reply] = {
    "enrol_request": EnrolRequest("d", "run", b"signature"),
    "enrolment": Enrolment("north", "c", True, HISTORY, HISTORY[:1], Budget(8.0, 1e-5), 3, "1d", "aa"),
    "train_request": TRAIN,
    "register_plan": RegisterPlanRequest("d", b"{}"),
    "plan_registered": PlanRegistered("plan"),
    "moments_request": MOMENTS,
    "audit_request": AUDIT,
    "filter_request": FILTER,
    "joint_request": JOINT,
    "local_update": LocalUpdate(1, VECTOR),
    "advertise_keys_request": AdvertiseKeysRequest("d", 1, 1),
    "advertised_keys": KEYS,
    "share_keys_request": ShareKeysRequest("d", 1, (KEYS, OTHER_KEYS)),
    "sealed_shares": SealedShares(1, NAMED, NAMED, NAMED, b"3"),
    "masked_input_request": MaskedInputRequest(1, ("north", "south"), NAMED, TRAIN),
    "masked_input": MaskedInput("d", 1, 1, 7, 21, np.arange(3, dtype=np.uint64)),
    "confirm_survivors_request": ConfirmSurvivorsRequest("d", 1, ("north", "south")),
    "confirmation": Confirmation(1, b"s"),
    "unmask_request": UnmaskRequest("d", 1, NAMED, 2),
    "unmask_shares": UnmaskShares(1, NAMED, {"west": b"4"}, KEYS),
    "share_seed_request": ShareSeedRequest("d", 1, 2, 9, (KEYS, OTHER_KEYS)),
    "sealed_seeds": SealedSeeds(1, NAMED, NAMED, b"3"),
    "step_request": StepRequest(1, ("north", "south"), NAMED, JOINT),
    "masked_step": MaskedStep("d", 1, 2, 3, 5, 32, NAMED, np.arange(3, dtype=np.uint64)),
    "confirm_step_request": ConfirmStepRequest("d", 1, 3, ("north", "south")),
    "open_step_request": OpenStepRequest("d", 1, 3, NAMED),
    "opened_step": OpenedStep(1, 3, b"key", NAMED),
    "open_seeds_request": OpenSeedsRequest("d", 1, 3, ("north", "south"), 2),
    "opened_seeds": OpenedSeeds(1, 3, NAMED, KEYS),
    "refusal": Refusal("site"),
}


def test_the_examples_here_are_of_every_kind() -> None:
    assert {type(message) for message in EACH.values()} == {*get_args(Request), *get_args(Reply)}
    for kind, message in EACH.items():
        assert wire.pack(message).config_records["facts"]["kind"] == kind
        assert_same(wire.unpack(sent(wire.pack(message))), message)


def test_actions_name_the_handlers() -> None:
    assert {type(message): wire.action(message) for message in EACH.values() if isinstance(message, Request)} == {
        EnrolRequest: "query.enrol",
        RegisterPlanRequest: "query.register_plan",
        AuditRequest: "train.audit",
        FilterRequest: "train.filter",
        TrainRequest: "train.local_round",
        MomentsRequest: "train.moments",
        JointRequest: "train.joint_step",
        AdvertiseKeysRequest: "query.advertise_keys",
        ShareKeysRequest: "query.share_keys",
        MaskedInputRequest: "train.masked_input",
        ConfirmSurvivorsRequest: "query.confirm_survivors",
        UnmaskRequest: "query.unmask",
        ShareSeedRequest: "query.share_seed",
        StepRequest: "train.begin_step",
        ConfirmStepRequest: "query.confirm_step",
        OpenStepRequest: "query.open_step",
        OpenSeedsRequest: "query.open_seeds",
    }


def test_a_refusal_carries_its_code_and_nothing_else() -> None:
    record = wire.pack(Refusal("site"))
    assert dict(record.config_records["facts"]) == {"version": 5, "kind": "refusal", "code": "site"}
    assert list(record.keys()) == ["facts"]


def test_an_update_carries_exactly_its_fields() -> None:
    record = wire.pack(LocalUpdate(3, np.zeros(2, np.float32)))
    assert dict(record.config_records["facts"]) == {"version": 5, "kind": "local_update", "round": 3}
    assert list(record.array_records["vectors"]) == ["update"]


def test_a_masked_update_carries_nothing_that_is_not_masked() -> None:
    """No history, no counts, no losses: the vector, and what the server asked for."""
    record = wire.pack(EACH["masked_input"])
    assert dict(record.config_records["facts"]) == {
        "version": 5,
        "kind": "masked_input",
        "study_digest": "d",
        "attempt": 1,
        "round": 1,
        "length": 7,
        "modulus_bits": 21,
    }
    assert list(record.array_records["vectors"]) == ["words"]
    assert record.array_records["vectors"]["words"].numpy().nbytes == 24


def facts(**changes: Any) -> Callable[[RecordDict], None]:
    def change(record: RecordDict) -> None:
        for key, value in changes.items():
            record.config_records["facts"][key] = value

    return change


def without(key: str) -> Callable[[RecordDict], None]:
    return lambda record: record.config_records["facts"].pop(key)


def generator(array: Any) -> Callable[[RecordDict], None]:
    def change(record: RecordDict) -> None:
        record["vectors"] = ArrayRecord({"generator": array, "discriminator": Array(np.zeros(3, np.float32))})

    return change


def raw(data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype="float32", shape=(3,), stype=stype, data=data)


def saved(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3, np.float32))
    return buffer.getvalue()


def huge() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (2**58,)})
    return buffer.getvalue()


MUTATIONS: dict[str, Callable[[RecordDict], Any]] = {
    "no version": without("version"),
    "the version before": facts(version=4),
    "the version after": facts(version=6),
    "a version of text": facts(version="5"),
    "a fractional version": facts(version=5.0),
    "no kind": without("kind"),
    "an unknown kind": facts(kind="gradients"),
    "a kind that is no text": facts(kind=[1, 2]),
    "no round": without("round"),
    "a negative round": facts(round=-1),
    "a round of text": facts(round="1"),
    "a fractional round": facts(round=1.5),
    "an infinite round": facts(round=float("inf")),
    "a boolean round": facts(round=True),
    "no facts": lambda record: record.pop("facts"),
    "no vectors": lambda record: record.pop("vectors"),
    "no generator": lambda record: record.array_records["vectors"].pop("generator"),
    "another dtype": generator(Array(np.zeros(3, np.float64))),
    "integers": generator(Array(np.zeros(3, np.int32))),
    "two dimensions": generator(Array(np.zeros((3, 1), np.float32))),
    "a scalar": generator(Array(np.array(1, np.float32))),
    "big-endian": generator(Array(np.zeros(3, ">f4"))),
    "no data": generator(raw(b"")),
    "noise instead of data": generator(raw(b"\x93NUMPY\x01\x00\x05")),
    "more than an array": generator(raw(saved(np.zeros(3, np.float32)) + bytes(4))),
    "another version of the format": generator(raw(b"\x93NUMPY\x02" + saved(np.zeros(3, np.float32))[7:])),
    "half an array": generator(raw(saved(np.zeros(3, np.float32))[:-5])),
    "a pickle": generator(raw(saved(np.array([{}], dtype=object), allow_pickle=True))),
    "a zip": generator(raw(zipped())),
    "a broken zip": generator(raw(b"PK\x03\x04" + bytes(20))),
    "an array larger than memory": generator(raw(huge())),
    "another serialisation": generator(raw(saved(np.zeros(3, np.float32)), stype="pickle")),
    "vectors that are facts": lambda record: record.__setitem__("vectors", ConfigRecord({"generator": 1})),
    "facts that are vectors": lambda record: record.__setitem__("facts", ArrayRecord()),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_no_honest_peer_sends_is_refused(mutation: str) -> None:
    record = copy.deepcopy(wire.pack(TRAIN))
    wire.unpack(record)
    MUTATIONS[mutation](record)
    with pytest.raises(BadPeer) as caught:
        wire.unpack(record)
    assert caught.value.code == "bad_peer"


@pytest.mark.parametrize("work", [TRAIN, MOMENTS])
def test_a_masked_input_is_asked_for_with_the_work_in_it(work: Work) -> None:
    """One message: what is to be summed, and with whom it is masked."""
    message = MaskedInputRequest(1, ("north", "south"), NAMED, work)
    assert_same(wire.unpack(sent(wire.pack(message))), message)
    assert message.study_digest == work.study_digest


@pytest.mark.parametrize(
    ("work", "change"),
    [
        (TRAIN, facts(work="moments_request")),  # with the vectors of the other
        (MOMENTS, facts(work="train_request")),
        (MOMENTS, facts(work="local_update")),
        (MOMENTS, facts(work="")),
        (MOMENTS, without("work")),
    ],
)
def test_work_that_is_none_is_refused(work: Work, change: Callable[[RecordDict], None]) -> None:
    refused(MaskedInputRequest(1, ("north", "south"), NAMED, work), change)


def test_a_masked_step_carries_nothing_that_is_not_masked() -> None:
    record = wire.pack(EACH["masked_step"])
    facts_of, vectors = set(record.config_records["facts"]), list(record.array_records["vectors"])
    asked = {"version", "kind", "study_digest", "attempt", "round", "step", "length", "modulus_bits"}
    assert facts_of == asked | {"key_digests_names", "key_digests"} and vectors == ["words"]


def test_requests_for_other_work_have_other_digests() -> None:
    """What a sum answers is the round and the exact request: masks are bound to its digest."""
    other = np.array([0, 1, 3], np.float32)
    found = [
        TRAIN, MOMENTS, replace(MOMENTS, round=2), replace(MOMENTS, study_digest="e"), replace(MOMENTS, features=other),
        replace(TRAIN, round=2), replace(TRAIN, generator=other),
        AUDIT, replace(AUDIT, plan_digest="e"), replace(AUDIT, generator=other), replace(AUDIT, indices=INDICES + 1),
        replace(AUDIT, images=PIXELS + 1), replace(AUDIT, nearest=other), FILTER, replace(FILTER, audit_digest="e"),
        replace(FILTER, count=3),
    ]  # fmt: skip
    assert len({work.digest for work in found}) == len(found)
    assert MomentsRequest("d", 1, VECTOR.copy()).digest == MOMENTS.digest


def refused(message: Request | Reply, *changes: Callable[[RecordDict], Any]) -> None:
    record = copy.deepcopy(wire.pack(message))
    wire.unpack(record)
    for change in changes:
        change(record)
    with pytest.raises(BadPeer):
        wire.unpack(sent(record))


HISTORIES = {  # in place of steps of training, a verdict and steps of training again
    "no probabilities": without("sampling_probability"),
    "no epsilons": without("epsilon"),
    "probabilities of text": facts(sampling_probability=["a", "b", "c"]),
    "a NaN probability": facts(sampling_probability=[float("nan"), 1.0, 1.0]),
    "a probability of 0": facts(sampling_probability=[0.0, 1.0, 1.0]),
    "a probability above 1": facts(sampling_probability=[1.1, 1.0, 1.0]),
    "one probability too few": facts(sampling_probability=[0.5, 1.0]),
    "a NaN noise": facts(noise_multiplier=[float("nan"), 0.0, 1.0]),
    "no noise": facts(noise_multiplier=[0.0, 0.0, 1.0]),
    "infinite noise": facts(noise_multiplier=[float("inf"), 0.0, 1.0]),
    "no epsilon": facts(epsilon=[0.0, 0.0, 0.0]),
    "a negative epsilon": facts(epsilon=[0.0, -0.5, 0.0]),
    "a NaN epsilon": facts(epsilon=[0.0, float("nan"), 0.0]),
    "an infinite epsilon": facts(epsilon=[0.0, float("inf"), 0.0]),
    "an epsilon beside noise": facts(epsilon=[0.5, 0.5, 0.0]),
    "noise beside an epsilon": facts(noise_multiplier=[2.0, 1.0, 1.0]),
    "sampling beside an epsilon": facts(sampling_probability=[0.5, 0.5, 1.0]),
    "one epsilon too few": facts(epsilon=[0.0, 0.5]),
    "whole epsilons": facts(epsilon=[0, 1, 0]),
    "negative steps": facts(steps=[-4, 1, 1]),
    "no steps": facts(steps=[0, 1, 1]),
    "a verdict of no steps": facts(steps=[4, 0, 1]),
    "fractional steps": facts(steps=[1.5, 1.0, 1.0]),
    "infinite steps": facts(steps=[float("inf"), 1.0, 1.0]),
    "steps of text": facts(steps=["4", "1", "1"]),
    "steps that are no list": facts(steps=5),
}


@pytest.mark.parametrize("case", HISTORIES)
def test_a_history_that_is_none_is_refused(case: str) -> None:
    refused(EACH["enrolment"], HISTORIES[case])


ALL_FACTS = [(kind, key) for kind, message in EACH.items() for key in dict(wire.pack(message).config_records["facts"])]
ALL_VECTORS = [
    (kind, key)
    for kind, message in EACH.items()
    if "vectors" in wire.pack(message)
    for key in wire.pack(message).array_records["vectors"]
]


@pytest.mark.parametrize(("kind", "key"), ALL_FACTS)
def test_no_fact_of_a_message_may_be_missing(kind: str, key: str) -> None:
    refused(EACH[kind], without(key))


@pytest.mark.parametrize(("kind", "key"), ALL_VECTORS)
def test_no_vector_of_a_message_may_be_missing(kind: str, key: str) -> None:
    refused(EACH[kind], lambda record: record.array_records["vectors"].pop(key))


@pytest.mark.parametrize("kind", EACH)
def test_nothing_may_be_added_to_a_message(kind: str) -> None:
    """A server cannot make a site read past a fact, nor a site tell more than the protocol says."""
    extra = {"extra": Array(np.zeros(1, np.float32))}

    def add_vector(record: RecordDict) -> None:
        record["vectors"] = ArrayRecord({**record.array_records.get("vectors", {}), **extra})

    refused(EACH[kind], facts(num_patients=17))
    refused(EACH[kind], add_vector)
    refused(EACH[kind], lambda record: record.__setitem__("more", ConfigRecord({"loss": 0.5})))
    refused(EACH[kind], lambda record: record.__setitem__("more", ArrayRecord(extra)))
    refused(EACH[kind], lambda record: record.__setitem__("more", MetricRecord({"loss": 0.5})))


def wrong(value: object) -> list[Any]:
    """Values of other types than this one, and too large ones of its own."""
    match value:
        case bool():
            return [0, "yes", b"1", 1.0]
        case int():
            return ["1", 1.5, True, -1, [1], b"1"]
        case str():
            return [b"a", 1, True, ["a"], "x" * 257]
        case bytes():
            return ["a", 1, b"x" * (wire.MOST_BYTES + 1), [b"a"]]
        case [first, *_]:
            other: list[Any] = [1.0, 2.0] if not isinstance(first, float) else ["a", "b"]
            too_large = {str: ["x" * 257] * len(value), bytes: [b"x" * (wire.MOST_BYTES + 1)] * len(value)}
            longer = [[*value, first]] if len(value) > 1 else []
            return [first, other[: len(value)], *longer, *filter(None, [too_large.get(type(first))])]
    raise AssertionError(value)


@pytest.mark.parametrize(("kind", "key"), ALL_FACTS)
def test_facts_of_another_type_or_too_large_are_refused(kind: str, key: str) -> None:
    value = wire.pack(EACH[kind]).config_records["facts"][key]
    lone = key in ("sharers", "survivors", "participants", "owners")  # a list of its own may be longer
    for each in wrong(value)[: 2 if lone else None]:
        refused(EACH[kind], facts(**{key: each}))


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, key in ALL_FACTS if key.endswith("_names")])
def test_a_name_twice_is_refused(kind: str, key: str) -> None:
    """Of two shares for one site, the reader would take one and the sender mean the other."""
    column, name = key.removesuffix("_names"), "north"
    refused(EACH[kind], facts(**{key: [name, name], column: [b"1", b"2"]}))
    refused(EACH[kind], facts(**{key: [name, name], column: [b"1", b"1"]}))


@pytest.mark.parametrize(("kind", "key"), ALL_VECTORS)
def test_vectors_of_another_type_or_shape_are_refused(kind: str, key: str) -> None:
    dtype = wire.pack(EACH[kind]).array_records["vectors"][key].numpy().dtype
    for array in (np.zeros((3, 1), dtype), np.array(1, dtype), np.zeros(3, np.int32), np.zeros(3, np.float64)):
        refused(EACH[kind], lambda record, a=array: record.array_records["vectors"].__setitem__(key, Array(a)))
    swapped = np.zeros(3, np.uint64 if dtype == np.float32 else np.float32)
    refused(EACH[kind], lambda record: record.array_records["vectors"].__setitem__(key, Array(swapped)))


@pytest.mark.parametrize(
    "vector", [np.zeros(0, np.float32), np.arange(5, dtype=np.float32), np.arange(7, dtype=np.uint64), VECTOR[::2]]
)
def test_a_vector_is_packed_as_flower_would_and_read_where_it_lies(vector: np.ndarray) -> None:
    packed, flowers = wire._array(vector), Array(vector)
    assert vars(packed) | {"_is_dirty": 0} == vars(flowers) | {"_is_dirty": 0}
    message = MaskedInput("d", 1, 1, 7, 21, vector.astype(np.uint64))
    record = wire.pack(message)
    read = wire.unpack(record)
    assert isinstance(read, MaskedInput)
    lies = np.frombuffer(record.array_records["vectors"]["words"].data, np.uint8)
    assert not read.words.flags.writeable
    assert len(vector) == 0 or np.shares_memory(read.words, lies)


@pytest.mark.parametrize("number", [0, 2])
def test_keys_are_advertised_by_one_site_at_a_time(number: int) -> None:
    columns = ("key_sites", "share_keys", "mask_keys_public", "key_signatures")
    found = wire.pack(EACH["share_keys_request"]).config_records["facts"]
    refused(EACH["advertised_keys"], facts(**{column: found[column][:number] for column in columns}))
    if number:
        for kind in ("unmask_shares", "opened_seeds"):
            refused(EACH[kind], facts(**{column: found[column] for column in columns}))


def test_as_many_bytes_as_a_key_may_have_pass() -> None:
    message = Confirmation(1, b"x" * wire.MOST_BYTES)
    assert wire.unpack(sent(wire.pack(message))) == message


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (EnrolRequest("d", "run", b"signature"), {"study_digest": 5}),
        (EnrolRequest("d", "run", b"signature"), {"study_digest": "x" * 257}),
        (Enrolment("a", "c", True), {"site": b"a"}),
        (Enrolment("a", "c", True), {"record_is_patient": "no"}),
        (Enrolment("a", "c", True), {"record_is_patient": 0}),
        (Refusal("site"), {"code": ["a"]}),
        (Refusal("site"), {"code": "x" * 257}),
    ],
)
def test_fields_of_another_type_are_refused(message: Request | Reply, changes: dict[str, Any]) -> None:
    record = wire.pack(message)
    facts(**changes)(record)
    with pytest.raises(BadPeer):
        wire.unpack(record)


@pytest.mark.parametrize("record", [RecordDict(), RecordDict({"facts": ConfigRecord()})])
def test_an_empty_record_is_refused(record: RecordDict) -> None:
    with pytest.raises(BadPeer):
        wire.unpack(record)
