"""Messages to Flower records and back: the only place that knows record keys and the protocol version."""

from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.errors import BadPeer
from common.messages import Enrolment, EnrolRequest, LocalUpdate, Refusal, Reply, Request, TrainRequest, Vector
from common.privacy.accounting import History, Mechanism

PROTOCOL_VERSION = 1
ENROL, TRAIN = "query.enrol", "train.local_round"

_FACTS, _VECTORS = "facts", "vectors"
T = TypeVar("T", str, bool, int, float)


def action(request: Request) -> str:
    """Flower's message type for a request: category and handler name."""
    return ENROL if isinstance(request, EnrolRequest) else TRAIN


def pack(message: Request | Reply) -> RecordDict:
    """Any message of this protocol as one Flower record."""
    match message:
        case EnrolRequest():
            return _record("enrol_request", {"study_digest": message.study_digest})
        case Enrolment():
            facts = {
                "site": message.site,
                "holdout_commitment": message.holdout_commitment,
                "record_is_patient": message.record_is_patient,
            }
            return _record("enrolment", facts)
        case TrainRequest():
            vectors = {"generator": message.generator, "discriminator": message.discriminator}
            return _record("train_request", {"study_digest": message.study_digest, "round": message.round}, vectors)
        case LocalUpdate():
            vectors = {"generator": message.generator, "discriminator": message.discriminator}
            facts = {
                "round": message.round,
                "sampling_probability": [m.sampling_probability for m in message.history],
                "noise_multiplier": [m.noise_multiplier for m in message.history],
                "steps": [m.steps for m in message.history],
            }
            return _record("local_update", facts, vectors)
        case Refusal():
            return _record("refusal", {"code": message.code})


def unpack(record: RecordDict) -> Request | Reply:
    """The message in a record. Raises BadPeer for anything that this version of the protocol does not say."""
    try:
        return _unpack(record)
    except BadPeer:
        raise
    except Exception as error:  # what a damaged array makes numpy raise has no bound: EOFError, BadZipFile, MemoryError
        raise BadPeer(f"Expected a message of protocol version {PROTOCOL_VERSION}, found a malformed one.") from error


def _unpack(record: RecordDict) -> Request | Reply:
    facts = cast(dict[str, Any], dict(record.config_records[_FACTS]))
    if facts["version"] != PROTOCOL_VERSION:
        raise BadPeer(
            f"Expected protocol version {PROTOCOL_VERSION}, found another.", "Run the same Synthward everywhere."
        )
    match facts["kind"]:
        case "enrol_request":
            return EnrolRequest(_text(facts["study_digest"]))
        case "enrolment":
            site, commitment = _text(facts["site"]), _text(facts["holdout_commitment"])
            return Enrolment(site, commitment, _typed(bool, facts["record_is_patient"]))
        case "train_request":
            generator, discriminator = _vector(record, "generator"), _vector(record, "discriminator")
            return TrainRequest(_text(facts["study_digest"]), _round(facts), generator, discriminator)
        case "local_update":
            generator, discriminator = _vector(record, "generator"), _vector(record, "discriminator")
            return LocalUpdate(_round(facts), generator, discriminator, _history(facts))
        case "refusal":
            return Refusal(_text(facts["code"]))
        case _:
            raise ValueError("unknown kind")


def _record(kind: str, facts: dict[str, Any], vectors: dict[str, Vector] | None = None) -> RecordDict:
    record = RecordDict({_FACTS: ConfigRecord({"version": PROTOCOL_VERSION, "kind": kind, **facts})})
    if vectors is not None:
        record[_VECTORS] = ArrayRecord({name: Array(vector) for name, vector in vectors.items()})
    return record


def _vector(record: RecordDict, name: str) -> Vector:
    vector = record.array_records[_VECTORS][name].numpy()
    if vector.ndim != 1 or vector.dtype != np.float32:
        raise ValueError("expected a flat float32 vector")
    return cast(Vector, vector)


def _history(facts: dict[str, Any]) -> History:
    columns = zip(facts["sampling_probability"], facts["noise_multiplier"], facts["steps"], strict=True)
    return tuple(Mechanism(_typed(float, q), _typed(float, noise), _typed(int, steps)) for q, noise, steps in columns)


def _round(facts: dict[str, Any]) -> int:
    number = _typed(int, facts["round"])
    if number < 0:
        raise ValueError("expected a round of 0 or more")
    return number


def _typed(kind: type[T], value: object) -> T:
    if type(value) is not kind:  # bool is an int, and int("5") is 5: neither is what an honest peer sends
        raise TypeError(f"expected {kind.__name__}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 256:
        raise ValueError("expected a short text")
    return value
