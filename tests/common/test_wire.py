"""Every message survives the wire; nothing else gets through it."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st

from common import wire
from common.errors import BadPeer
from common.messages import Enrolment, EnrolRequest, LocalUpdate, Refusal, Reply, Request, TrainRequest
from common.privacy.accounting import Mechanism
from tests.strategies import histories, site_names, vectors

texts = st.text(max_size=100)
rounds = st.integers(0, 2**40)
messages: st.SearchStrategy[Request | Reply] = st.one_of(
    st.builds(EnrolRequest, texts),
    st.builds(Enrolment, site_names, texts, st.booleans()),
    st.builds(TrainRequest, texts, rounds, vectors, vectors),
    st.builds(LocalUpdate, rounds, vectors, vectors, histories),
    st.builds(Refusal, texts),
)


def sent(record: RecordDict) -> RecordDict:
    """What arrives at the other end of a real connection."""
    return recorddict_from_proto(recorddict_to_proto(record))


def assert_same(one: Request | Reply, other: Request | Reply) -> None:
    assert type(one) is type(other)
    for name, value in vars(one).items():
        if isinstance(value, np.ndarray):
            assert getattr(other, name).dtype == np.float32
            np.testing.assert_array_equal(getattr(other, name), value)
        else:
            assert getattr(other, name) == value


@given(messages)
def test_every_message_survives_the_wire(message: Request | Reply) -> None:
    assert_same(wire.unpack(sent(wire.pack(message))), message)


def test_actions_name_the_two_handlers() -> None:
    vector = np.zeros(1, np.float32)
    assert wire.action(EnrolRequest("d")) == "query.enrol"
    assert wire.action(TrainRequest("d", 0, vector, vector)) == "train.local_round"


def test_a_refusal_carries_its_code_and_nothing_else() -> None:
    record = wire.pack(Refusal("site"))
    assert dict(record.config_records["facts"]) == {"version": 1, "kind": "refusal", "code": "site"}
    assert list(record.keys()) == ["facts"]


def test_an_update_carries_exactly_its_fields() -> None:
    vector = np.zeros(2, np.float32)
    record = wire.pack(LocalUpdate(3, vector, vector, (Mechanism(0.5, 2.0, 4),)))
    assert dict(record.config_records["facts"]) == {
        "version": 1,
        "kind": "local_update",
        "round": 3,
        "sampling_probability": [0.5],
        "noise_multiplier": [2.0],
        "steps": [4],
    }
    assert sorted(record.array_records["vectors"]) == ["discriminator", "generator"]


def update() -> RecordDict:
    vector = np.arange(3, dtype=np.float32)
    return wire.pack(LocalUpdate(1, vector, vector, (Mechanism(0.5, 2.0, 4), Mechanism(1.0, 3.0, 1))))


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
    "another version": facts(version=2),
    "a version of text": facts(version="1"),
    "no kind": without("kind"),
    "an unknown kind": facts(kind="gradients"),
    "a kind that is no text": facts(kind=[1, 2]),
    "no round": without("round"),
    "a negative round": facts(round=-1),
    "a round of text": facts(round="1"),
    "a fractional round": facts(round=1.5),
    "an infinite round": facts(round=float("inf")),
    "a boolean round": facts(round=True),
    "no probabilities": without("sampling_probability"),
    "probabilities of text": facts(sampling_probability=["a", "b"]),
    "a NaN probability": facts(sampling_probability=[float("nan"), 1.0]),
    "a probability of 0": facts(sampling_probability=[0.0, 1.0]),
    "a probability above 1": facts(sampling_probability=[1.1, 1.0]),
    "one probability too few": facts(sampling_probability=[0.5]),
    "a NaN noise": facts(noise_multiplier=[float("nan"), 1.0]),
    "no noise": facts(noise_multiplier=[0.0, 1.0]),
    "infinite noise": facts(noise_multiplier=[float("inf"), 1.0]),
    "negative steps": facts(steps=[-4, 1]),
    "no steps": facts(steps=[0, 1]),
    "fractional steps": facts(steps=[1.5, 1.0]),
    "infinite steps": facts(steps=[float("inf"), 1.0]),
    "steps of text": facts(steps=["4", "1"]),
    "steps that are no list": facts(steps=5),
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
    "half an array": generator(raw(saved(np.zeros(3, np.float32))[:-5])),
    "a pickle": generator(raw(saved(np.array([{}], dtype=object), allow_pickle=True))),
    "a zip": generator(raw(zipped())),
    "a broken zip": generator(raw(b"PK\x03\x04" + bytes(20))),
    "an array larger than memory": generator(raw(huge())),
    "another serialisation": generator(raw(saved(np.zeros(3, np.float32)), stype="pickle")),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_no_honest_peer_sends_is_refused(mutation: str) -> None:
    record = copy.deepcopy(update())
    wire.unpack(record)
    MUTATIONS[mutation](record)
    with pytest.raises(BadPeer) as caught:
        wire.unpack(record)
    assert caught.value.code == "bad_peer"


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (EnrolRequest("d"), {"study_digest": 5}),
        (EnrolRequest("d"), {"study_digest": "x" * 257}),
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
