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
from common.privacy.accounting import Budget, Entry, History, Mechanism, PureRelease
from common.secagg.keys import AdvertisedKeys

PROTOCOL_VERSION = 5
_ACTIONS: dict[type, str] = {
    EnrolRequest: "query.enrol",
    RegisterPlanRequest: "query.register_plan",
    TrainRequest: "train.local_round",
    MomentsRequest: "train.moments",
    AuditRequest: "train.audit",
    FilterRequest: "train.filter",
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

_FACTS, _VECTORS = "facts", "vectors"
MOST_BYTES = 4096  # of a key, a signature or a sealed share
T = TypeVar("T", str, bool, int, float)
Vectors = Mapping[str, NDArray[Any]]


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
        case RegisterPlanRequest():
            return _record("register_plan", {"study_digest": message.study_digest, "plan": message.plan})
        case PlanRegistered():
            return _record("plan_registered", {"plan_digest": message.plan_digest})
        case TrainRequest() | MomentsRequest() | AuditRequest() | FilterRequest():
            return _record(_kind_of_work(message), *_work_facts(message))
        case JointRequest():
            return _record("joint_request", *_joint_facts(message))
        case LocalUpdate():
            return _record("local_update", {"round": message.round}, {"update": message.vector})
        case AdvertiseKeysRequest():
            facts = {"study_digest": message.study_digest, "attempt": message.attempt, "round": message.round}
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
            facts, vectors = _work_facts(message.work)
            facts |= {
                "work": _kind_of_work(message.work),
                "attempt": message.attempt,
                "sharers": list(message.sharers),
                **_named("sealed", message.sealed),
            }
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
                "next_round": message.next_round,
            }
            return _record("unmask_request", facts | _named("confirmations", message.confirmations))
        case UnmaskShares():
            facts = {"attempt": message.attempt}
            shares = _named("self_masks", message.self_masks) | _named("mask_keys", message.mask_keys)
            next_keys = _keys_facts([message.next_keys] if message.next_keys else [])
            return _record("unmask_shares", facts | shares | next_keys)
        case ShareSeedRequest():
            facts = {
                "study_digest": message.study_digest,
                "attempt": message.attempt,
                "round": message.round,
                "steps": message.steps,
            }
            return _record("share_seed_request", facts | _keys_facts(message.cohort))
        case SealedSeeds():
            facts = {
                "attempt": message.attempt,
                **_named("sealed", message.sealed),
                **_named("digests", message.digests),
                "seed_digest": message.seed_digest,
            }
            return _record("sealed_seeds", facts)
        case StepRequest():
            facts, vectors = _joint_facts(message.work)
            facts |= {
                "attempt": message.attempt,
                "participants": list(message.participants),
                **_named("sealed", message.sealed),
            }
            return _record("step_request", facts, vectors)
        case MaskedStep():
            facts = {
                "study_digest": message.study_digest,
                "round": message.round,
                "length": message.length,
                "modulus_bits": message.modulus_bits,
            }
            named = _named("key_digests", message.key_digests)
            return _record("masked_step", facts | _step_facts(message) | named, {"words": message.words})
        case ConfirmStepRequest():
            facts = {"study_digest": message.study_digest, "survivors": list(message.survivors)}
            return _record("confirm_step_request", facts | _step_facts(message))
        case OpenStepRequest():
            facts = {"study_digest": message.study_digest, **_named("confirmations", message.confirmations)}
            return _record("open_step_request", facts | _step_facts(message))
        case OpenedStep():
            facts = {"self_key": message.self_key, **_named("pair_keys", message.pair_keys)}
            return _record("opened_step", facts | _step_facts(message))
        case OpenSeedsRequest():
            facts = {
                "study_digest": message.study_digest,
                "owners": list(message.owners),
                "next_round": message.next_round,
            }
            return _record("open_seeds_request", facts | _step_facts(message))
        case OpenedSeeds():
            facts = _step_facts(message) | _named("shares", message.shares)
            return _record("opened_seeds", facts | _keys_facts([message.next_keys] if message.next_keys else []))
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

    def next_keys(self) -> AdvertisedKeys | None:
        following = self.keys()
        if len(following) > 1:
            raise ValueError("expected the keys of one site")
        return following[0] if following else None

    def history(self, prefix: str = "") -> History:
        columns = (
            self.many(f"{prefix}sampling_probability", lambda value: _typed(float, value)),
            self.many(f"{prefix}noise_multiplier", lambda value: _typed(float, value)),
            self.many(f"{prefix}epsilon", lambda value: _typed(float, value)),
            self.many(f"{prefix}steps", lambda value: _typed(int, value)),
        )
        return tuple(_entry(*row) for row in zip(*columns, strict=True))

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
        case "register_plan":
            return RegisterPlanRequest(facts.text("study_digest"), facts.data("plan"))
        case "plan_registered":
            return PlanRegistered(facts.text("plan_digest"))
        case "train_request" | "moments_request" | "audit_request" | "filter_request":
            return _work(kind, facts)
        case "joint_request":
            return _joint_request(facts)
        case "local_update":
            return LocalUpdate(facts.number("round"), facts.vector("update"))
        case "advertise_keys_request":
            return AdvertiseKeysRequest(facts.text("study_digest"), facts.number("attempt"), facts.number("round"))
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
            return MaskedInputRequest(attempt, sharers, facts.named("sealed"), _work(facts.text("work"), facts))
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
            return UnmaskRequest(study_digest, attempt, facts.named("confirmations"), facts.number("next_round"))
        case "unmask_shares":
            self_masks, mask_keys = facts.named("self_masks"), facts.named("mask_keys")
            return UnmaskShares(facts.number("attempt"), self_masks, mask_keys, facts.next_keys())
        case "share_seed_request":
            study_digest, attempt = facts.text("study_digest"), facts.number("attempt")
            return ShareSeedRequest(study_digest, attempt, facts.number("round"), facts.number("steps"), facts.keys())
        case "sealed_seeds":
            attempt, seed_digest = facts.number("attempt"), facts.data("seed_digest")
            return SealedSeeds(attempt, facts.named("sealed"), facts.named("digests"), seed_digest)
        case "step_request":
            attempt, participants = facts.number("attempt"), tuple(facts.many("participants", _text))
            return StepRequest(attempt, participants, facts.named("sealed"), _joint_request(facts))
        case "masked_step":
            return MaskedStep(
                facts.text("study_digest"),
                facts.number("attempt"),
                facts.number("round"),
                facts.number("step"),
                facts.number("length"),
                facts.number("modulus_bits"),
                facts.named("key_digests"),
                facts.vector("words", np.uint64),
            )
        case "confirm_step_request":
            study_digest, survivors = facts.text("study_digest"), tuple(facts.many("survivors", _text))
            return ConfirmStepRequest(study_digest, facts.number("attempt"), facts.number("step"), survivors)
        case "open_step_request":
            study_digest, confirmations = facts.text("study_digest"), facts.named("confirmations")
            return OpenStepRequest(study_digest, facts.number("attempt"), facts.number("step"), confirmations)
        case "opened_step":
            attempt, step = facts.number("attempt"), facts.number("step")
            return OpenedStep(attempt, step, facts.data("self_key"), facts.named("pair_keys"))
        case "open_seeds_request":
            study_digest, attempt, step = facts.text("study_digest"), facts.number("attempt"), facts.number("step")
            owners = tuple(facts.many("owners", _text))
            return OpenSeedsRequest(study_digest, attempt, step, owners, facts.number("next_round"))
        case "opened_seeds":
            attempt, step = facts.number("attempt"), facts.number("step")
            return OpenedSeeds(attempt, step, facts.named("shares"), facts.next_keys())
        case "refusal":
            return Refusal(facts.text("code"))
        case _:
            raise ValueError("unknown kind")


def _record(kind: str, facts: dict[str, Any], vectors: Vectors | None = None) -> RecordDict:
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


_KINDS_OF_WORK: dict[type, str] = {
    TrainRequest: "train_request",
    MomentsRequest: "moments_request",
    AuditRequest: "audit_request",
    FilterRequest: "filter_request",
}


def _kind_of_work(work: Work) -> str:
    return _KINDS_OF_WORK[type(work)]


def _work_facts(work: Work) -> tuple[dict[str, Any], Vectors | None]:
    facts: dict[str, Any] = {"study_digest": work.study_digest, "round": work.round}
    match work:
        case TrainRequest():
            return facts, {"generator": work.generator, "discriminator": work.discriminator}
        case MomentsRequest():
            return facts, {"features": work.features}
        case AuditRequest():
            names = ("generator", "indices", "images", "nearest")
            return facts | {"plan_digest": work.plan_digest}, {name: getattr(work, name) for name in names}
        case FilterRequest():
            return facts | {"audit_digest": work.audit_digest, "count": work.count}, None


def _joint_facts(work: JointRequest) -> tuple[dict[str, Any], Vectors]:
    facts: dict[str, Any] = {"study_digest": work.study_digest, "round": work.round, "step": work.step}
    return facts, {"discriminator": work.discriminator}


def _joint_request(facts: _Facts) -> JointRequest:
    number, step = facts.number("round"), facts.number("step")
    return JointRequest(facts.text("study_digest"), number, step, facts.vector("discriminator"))


def _work(kind: str, facts: _Facts) -> Work:
    study_digest, number = facts.text("study_digest"), facts.number("round")
    match kind:
        case "train_request":
            return TrainRequest(study_digest, number, facts.vector("generator"), facts.vector("discriminator"))
        case "moments_request":
            return MomentsRequest(study_digest, number, facts.vector("features"))
        case "audit_request":
            return AuditRequest(
                study_digest,
                number,
                facts.text("plan_digest"),
                facts.vector("generator"),
                facts.vector("indices", np.int64),
                facts.vector("images", np.uint8),
                facts.vector("nearest"),
            )
        case "filter_request":
            return FilterRequest(study_digest, number, facts.text("audit_digest"), facts.number("count"))
        case _:
            raise ValueError("unknown work")


def _history_facts(prefix: str, history: History) -> dict[str, Any]:
    return {
        f"{prefix}sampling_probability": [_numbers(entry)[0] for entry in history],
        f"{prefix}noise_multiplier": [_numbers(entry)[1] for entry in history],
        f"{prefix}epsilon": [_numbers(entry)[2] for entry in history],
        f"{prefix}steps": [entry.steps for entry in history],
    }


def _numbers(entry: Entry) -> tuple[float, float, float]:
    """Sampling, noise and epsilon: a mechanism of training has no epsilon of its own, a pure release no noise."""
    if isinstance(entry, PureRelease):
        return 1.0, 0.0, float(entry.epsilon)
    return float(entry.sampling_probability), float(entry.noise_multiplier), 0.0


def _entry(sampling_probability: float, noise_multiplier: float, epsilon: float, steps: int) -> Entry:
    if epsilon == 0:
        return Mechanism(sampling_probability, noise_multiplier, steps)
    if (sampling_probability, noise_multiplier) != (1, 0):
        raise ValueError("expected noise or an epsilon")
    return PureRelease(epsilon, steps)


def _step_facts(
    message: MaskedStep | ConfirmStepRequest | OpenStepRequest | OpenedStep | OpenSeedsRequest | OpenedSeeds,
) -> dict[str, Any]:
    return {"attempt": message.attempt, "step": message.step}


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
