"""Messages to Flower records and back: the only place that knows record keys and the protocol version.

A record with a key that its kind of message does not have is refused, as is one that lacks a key: nothing that a peer
adds to a message is ever silently read past.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.constant import SType
from numpy.typing import NDArray

from common.errors import BadPeer
from common.messages import (
    AdvertiseKeysRequest,
    Confirmation,
    ConfirmSurvivorsRequest,
    Enrolment,
    EnrolRequest,
    LocalUpdate,
    MaskedInput,
    MaskedInputRequest,
    Refusal,
    Reply,
    Request,
    SealedShares,
    ShareKeysRequest,
    TrainRequest,
    UnmaskRequest,
    UnmaskShares,
    Vector,
)
from common.privacy.accounting import Budget, History, Mechanism
from common.secagg.keys import AdvertisedKeys

PROTOCOL_VERSION = 3
_ACTIONS: dict[type, str] = {
    EnrolRequest: "query.enrol",
    TrainRequest: "train.local_round",
    AdvertiseKeysRequest: "query.advertise_keys",
    ShareKeysRequest: "query.share_keys",
    MaskedInputRequest: "train.masked_input",
    ConfirmSurvivorsRequest: "query.confirm_survivors",
    UnmaskRequest: "query.unmask",
}

_FACTS, _VECTORS = "facts", "vectors"
MOST_BYTES = 4096  # of a key, a signature or a sealed share
T = TypeVar("T", str, bool, int, float)


def action(request: Request) -> str:
    """Flower's message type for a request: category and handler name."""
    return _ACTIONS[type(request)]


def pack(message: Request | Reply) -> RecordDict:
    """Any message of this protocol as one Flower record."""
    match message:
        case EnrolRequest():
            return _record(
                "enrol_request",
                {"study_digest": message.study_digest, "run": message.run, "signature": message.signature},
            )
        case Enrolment():
            facts = {
                "site": message.site,
                "holdout_commitment": message.holdout_commitment,
                "record_is_patient": message.record_is_patient,
                "last_attempt": message.last_attempt,
                "identity": message.identity,
                "roster_digest": message.roster_digest,
            }
            budget = [message.budget.epsilon, message.budget.delta] if message.budget else []
            histories = _history_facts("", message.history) | _history_facts("earlier_", message.earlier)
            return _record("enrolment", facts | histories | {"budget": budget})
        case TrainRequest():
            vectors = {"generator": message.generator, "discriminator": message.discriminator}
            return _record("train_request", {"study_digest": message.study_digest, "round": message.round}, vectors)
        case LocalUpdate():
            return _record("local_update", {"round": message.round}, {"update": message.vector})
        case AdvertiseKeysRequest():
            facts = {"study_digest": message.study_digest, "attempt": message.attempt}
            return _record("advertise_keys_request", facts)
        case AdvertisedKeys():
            return _record("advertised_keys", _keys_facts([message]))
        case ShareKeysRequest():
            facts = {"study_digest": message.study_digest, "attempt": message.attempt}
            return _record("share_keys_request", facts | _keys_facts(message.cohort))
        case SealedShares():
            facts = {
                "attempt": message.attempt,
                **_named("sealed", message.sealed),
                **_named("self_mask_digests", message.self_mask_digests),
                **_named("mask_key_digests", message.mask_key_digests),
                "seed_digest": message.seed_digest,
            }
            return _record("sealed_shares", facts)
        case MaskedInputRequest():
            facts = {
                "study_digest": message.train.study_digest,
                "round": message.train.round,
                "attempt": message.attempt,
                "sharers": list(message.sharers),
                **_named("sealed", message.sealed),
            }
            vectors = {"generator": message.train.generator, "discriminator": message.train.discriminator}
            return _record("masked_input_request", facts, vectors)
        case MaskedInput():
            facts = {
                "study_digest": message.study_digest,
                "attempt": message.attempt,
                "round": message.round,
                "length": message.length,
                "modulus_bits": message.modulus_bits,
            }
            return _record("masked_input", facts, {"words": message.words})
        case ConfirmSurvivorsRequest():
            facts = {
                "study_digest": message.study_digest,
                "attempt": message.attempt,
                "survivors": list(message.survivors),
            }
            return _record("confirm_survivors_request", facts)
        case Confirmation():
            return _record("confirmation", {"attempt": message.attempt, "signature": message.signature})
        case UnmaskRequest():
            facts = {
                "study_digest": message.study_digest,
                "attempt": message.attempt,
                "another": message.another,
            }
            return _record("unmask_request", facts | _named("confirmations", message.confirmations))
        case UnmaskShares():
            facts = {"attempt": message.attempt}
            shares = _named("self_masks", message.self_masks) | _named("mask_keys", message.mask_keys)
            next_keys = _keys_facts([message.next_keys] if message.next_keys else [])
            return _record("unmask_shares", facts | shares | next_keys)
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


class _Facts:
    """The facts of a record, each taken once; what is left in the end is refused."""

    def __init__(self, record: RecordDict) -> None:
        self._left = cast(dict[str, Any], dict(record.config_records[_FACTS]))
        self._vectors = dict(record.array_records[_VECTORS]) if _VECTORS in record else {}
        if len(record) > 1 + (_VECTORS in record):
            raise ValueError("expected no other record")

    def take(self, kind: type[T], key: str) -> T:
        return _typed(kind, self._left.pop(key))

    def text(self, key: str) -> str:
        return _text(self._left.pop(key))

    def number(self, key: str) -> int:
        number = self.take(int, key)
        if number < 0:
            raise ValueError("expected a number of 0 or more")
        return number

    def data(self, key: str) -> bytes:
        return _bytes(self._left.pop(key))

    def many(self, key: str, read: Callable[[object], Any]) -> list[Any]:
        values = self._left.pop(key)
        if not isinstance(values, list):
            raise TypeError("expected a list")
        return [read(value) for value in values]

    def named(self, key: str) -> dict[str, bytes]:
        return _unique(self.many(f"{key}_names", _text), self.many(key, _bytes))

    def keys(self) -> tuple[AdvertisedKeys, ...]:
        sites = self.many("key_sites", _text)
        columns = [self.many(key, _bytes) for key in ("share_keys", "mask_keys_public", "key_signatures")]
        return tuple(AdvertisedKeys(*row) for row in zip(sites, *columns, strict=True))

    def history(self, prefix: str = "") -> History:
        columns = (
            self.many(f"{prefix}sampling_probability", lambda value: _typed(float, value)),
            self.many(f"{prefix}noise_multiplier", lambda value: _typed(float, value)),
            self.many(f"{prefix}steps", lambda value: _typed(int, value)),
        )
        return tuple(Mechanism(*row) for row in zip(*columns, strict=True))

    def budget(self) -> Budget | None:
        numbers = self.many("budget", lambda value: _typed(float, value))
        return Budget(*numbers) if numbers else None

    def vector(self, name: str, dtype: type[np.generic] = np.float32) -> NDArray[Any]:
        """A vector, read-only: it lies in the message, where ``Array.numpy`` would copy it twice."""
        array = self._vectors.pop(name)
        if array.stype != SType.NUMPY:
            raise ValueError("expected an array of numpy's")
        file = io.BytesIO(array.data)  # shares the bytes
        version = np.lib.format.read_magic(file)
        shape, _, found = np.lib.format.read_array_header_1_0(file)
        vector = np.frombuffer(array.data, dtype, offset=file.tell())
        if version != (1, 0) or found != dtype or shape != vector.shape:
            raise ValueError(f"expected a flat {dtype.__name__} vector")
        return vector

    def check_empty(self) -> None:
        if self._left or self._vectors:
            raise ValueError("expected no other fact")


def _unpack(record: RecordDict) -> Request | Reply:
    facts = _Facts(record)
    if facts.take(int, "version") != PROTOCOL_VERSION:
        raise BadPeer(
            f"Expected protocol version {PROTOCOL_VERSION}, found another.", "Run the same Synthward everywhere."
        )
    message = _message(facts.text("kind"), facts)
    facts.check_empty()
    return message


def _message(kind: str, facts: _Facts) -> Request | Reply:
    match kind:
        case "enrol_request":
            return EnrolRequest(facts.text("study_digest"), facts.text("run"), facts.data("signature"))
        case "enrolment":
            return Enrolment(
                facts.text("site"),
                facts.text("holdout_commitment"),
                facts.take(bool, "record_is_patient"),
                facts.history(),
                facts.history("earlier_"),
                facts.budget(),
                facts.number("last_attempt"),
                facts.text("identity"),
                facts.text("roster_digest"),
            )
        case "train_request":
            return _train_request(facts)
        case "local_update":
            return LocalUpdate(facts.number("round"), facts.vector("update"))
        case "advertise_keys_request":
            return AdvertiseKeysRequest(facts.text("study_digest"), facts.number("attempt"))
        case "advertised_keys":
            (only,) = facts.keys()
            return only
        case "share_keys_request":
            return ShareKeysRequest(facts.text("study_digest"), facts.number("attempt"), facts.keys())
        case "sealed_shares":
            attempt = facts.number("attempt")
            return SealedShares(
                attempt,
                facts.named("sealed"),
                facts.named("self_mask_digests"),
                facts.named("mask_key_digests"),
                facts.data("seed_digest"),
            )
        case "masked_input_request":
            attempt, sharers = facts.number("attempt"), tuple(facts.many("sharers", _text))
            return MaskedInputRequest(attempt, sharers, facts.named("sealed"), _train_request(facts))
        case "masked_input":
            return MaskedInput(
                facts.text("study_digest"),
                facts.number("attempt"),
                facts.number("round"),
                facts.number("length"),
                facts.number("modulus_bits"),
                facts.vector("words", np.uint64),
            )
        case "confirm_survivors_request":
            survivors = tuple(facts.many("survivors", _text))
            return ConfirmSurvivorsRequest(facts.text("study_digest"), facts.number("attempt"), survivors)
        case "confirmation":
            return Confirmation(facts.number("attempt"), facts.data("signature"))
        case "unmask_request":
            study_digest, attempt = facts.text("study_digest"), facts.number("attempt")
            return UnmaskRequest(study_digest, attempt, facts.named("confirmations"), facts.take(bool, "another"))
        case "unmask_shares":
            self_masks, mask_keys, following = facts.named("self_masks"), facts.named("mask_keys"), facts.keys()
            if len(following) > 1:
                raise ValueError("expected the keys of one site")
            return UnmaskShares(facts.number("attempt"), self_masks, mask_keys, following[0] if following else None)
        case "refusal":
            return Refusal(facts.text("code"))
        case _:
            raise ValueError("unknown kind")


def _record(
    kind: str, facts: dict[str, Any], vectors: Mapping[str, Vector | NDArray[np.uint64]] | None = None
) -> RecordDict:
    record = RecordDict({_FACTS: ConfigRecord({"version": PROTOCOL_VERSION, "kind": kind, **facts})})
    if vectors is not None:
        record[_VECTORS] = ArrayRecord({name: _array(vector) for name, vector in vectors.items()})
    return record


def _array(vector: NDArray[Any]) -> Array:
    """The same as ``Array(vector)``, which would copy the vector three times."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(vector))
    content = b"".join((header.getvalue(), np.ascontiguousarray(vector).data))
    return Array(str(vector.dtype), vector.shape, SType.NUMPY, content)


def _train_request(facts: _Facts) -> TrainRequest:
    generator, discriminator = facts.vector("generator"), facts.vector("discriminator")
    return TrainRequest(facts.text("study_digest"), facts.number("round"), generator, discriminator)


def _history_facts(prefix: str, history: History) -> dict[str, Any]:
    return {
        f"{prefix}sampling_probability": [m.sampling_probability for m in history],
        f"{prefix}noise_multiplier": [m.noise_multiplier for m in history],
        f"{prefix}steps": [m.steps for m in history],
    }


def _keys_facts(cohort: Sequence[AdvertisedKeys]) -> dict[str, Any]:
    return {
        "key_sites": [keys.site for keys in cohort],
        "share_keys": [keys.share_key for keys in cohort],
        "mask_keys_public": [keys.mask_key for keys in cohort],
        "key_signatures": [keys.signature for keys in cohort],
    }


def _named(key: str, values: Mapping[str, bytes]) -> dict[str, Any]:
    return {f"{key}_names": list(values), key: list(values.values())}


def _unique(names: Sequence[str], values: Sequence[bytes]) -> dict[str, bytes]:
    if len(set(names)) < len(names):
        raise ValueError("a name twice")
    return dict(zip(names, values, strict=True))


def _typed(kind: type[T], value: object) -> T:
    if type(value) is not kind:  # bool is an int, and int("5") is 5: neither is what an honest peer sends
        raise TypeError(f"expected {kind.__name__}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 256:
        raise ValueError("expected a short text")
    return value


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) > MOST_BYTES:
        raise ValueError("expected a few bytes")
    return value
