"""Keys of a secure sum: identities that sign, fresh keys of one attempt, and every key derived from them.

| key | made | lives |
|---|---|---|
| identity, Ed25519 | once a site | in the site's folder; its public half is in the roster |
| share key, X25519 | fresh an attempt | seals the shares |
| mask key, X25519 | fresh an attempt | pairwise masks; one sum shares its private half, a session never does |
| seed, 32 bytes | fresh an attempt | self masks; shared |
| pair secret | of two mask keys, in a session | pairwise masks of every step; never leaves either site |
| keys of a step | of seed, pair secrets and Step | one mask each; opened only after the sites confirmed the step |

**Guarantee.** Every signature and every derived key is bound to the protocol's name and version, the study, the
attempt, the stage and the ordered pair of sites; derived keys to the transcript too. Parts are length-prefixed, so that
no two different sets of parts read the same. From keys of any steps of a session neither the seed, nor a pair secret,
nor the key of another step can be computed (HKDF-SHA256 is a pseudo-random function of its secret).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import BadPeer

PROTOCOL = "synthward secure aggregation 1"
KEY_BYTES = 32
_NONCE = bytes(12)  # every sealing key seals one message only


@dataclass(frozen=True)
class Attempt:
    """What all keys and signatures of one secure sum are bound to.

    Args:
        study_digest: the study.
        number: counts the secure sums of a study, also those that failed; a site serves each number once at most.
    """

    study_digest: str
    number: int

    def label(self, stage: str, *parts: str | bytes) -> bytes:
        """The bytes that stand for this attempt, a stage of it and some parts; injective."""
        whole = (PROTOCOL, self.study_digest, str(self.number), stage, *parts)
        encoded = [part.encode() if isinstance(part, str) else part for part in whole]
        return b"".join(len(part).to_bytes(4, "big") + part for part in encoded)


@dataclass(frozen=True)
class AdvertisedKeys:
    """A site's public keys of one attempt, signed with its identity key over (attempt, site, keys)."""

    site: str
    share_key: bytes
    mask_key: bytes
    signature: bytes


def advertise(
    identity: Ed25519PrivateKey, attempt: Attempt, site: str, share_key: bytes, mask_key: bytes
) -> AdvertisedKeys:
    """Sign the public halves of a site's fresh keys."""
    signature = identity.sign(attempt.label("advertise_keys", site, share_key, mask_key))
    return AdvertisedKeys(site, share_key, mask_key, signature)


def check_advertised(keys: AdvertisedKeys, attempt: Attempt, identity: bytes) -> None:
    """Raise BadPeer unless the keys are signed by this identity for this attempt."""
    check_signature(identity, keys.signature, attempt.label("advertise_keys", keys.site, keys.share_key, keys.mask_key))


def check_signature(identity: bytes, signature: bytes, signed: bytes) -> None:
    """Raise BadPeer unless ``signature`` is that of the identity (32 bytes, public) over ``signed``."""
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, signed)
    except (InvalidSignature, ValueError):
        raise BadPeer("Expected a signature of a site on the roster, found another.") from None


@dataclass(frozen=True)
class Transcript:
    """What the sites of one attempt agreed on.

    Args:
        attempt: the attempt.
        digest: SHA-256 over everything public: attempt, roster, and each site's keys, by name.
    """

    attempt: Attempt
    digest: bytes

    def label(self, stage: str, *parts: str | bytes) -> bytes:
        """The bytes that stand for a stage of this attempt among these sites; injective."""
        return self.attempt.label(stage, self.digest, *parts)


def make_transcript(attempt: Attempt, roster_digest: str, cohort: Iterable[AdvertisedKeys]) -> Transcript:
    """The transcript of one sum among these sites, in whatever order they are given."""
    label = attempt.label("transcript", roster_digest, *_parts(cohort))
    return Transcript(attempt, hashlib.sha256(label).digest())


def session_transcript(
    attempt: Attempt, roster_digest: str, cohort: Iterable[AdvertisedKeys], round_number: int, steps: int
) -> Transcript:
    """The transcript of a session of so many steps among these sites: never that of one sum."""
    label = attempt.label("session_transcript", roster_digest, str(round_number), str(steps), *_parts(cohort))
    return Transcript(attempt, hashlib.sha256(label).digest())


def _parts(cohort: Iterable[AdvertisedKeys]) -> list[str | bytes]:
    parts: list[str | bytes] = []
    for entry in sorted(cohort, key=lambda entry: entry.site):
        parts += [entry.site, entry.share_key, entry.mask_key, entry.signature]
    return parts


@dataclass(frozen=True)
class Step:
    """One sum of a session: what its masks and signatures are bound to.

    Args:
        agreed: the session's transcript.
        number: 1, 2, ... of the session.
        state: digest of the request that the masked vectors answer; see ``pairwise_key``.
        participants: the sites asked for a vector, sorted.
    """

    agreed: Transcript
    number: int
    state: str
    participants: tuple[str, ...]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over all of it."""
        return hashlib.sha256(self.agreed.label("step", str(self.number), self.state, *self.participants)).digest()

    def confirmed(self, survivors: Iterable[str]) -> bytes:
        """What a site signs to confirm the survivors of this step."""
        return self.agreed.label("confirm_step", self.digest, *sorted(survivors))

    def self_key(self, seed: bytes, site: str) -> bytes:
        """The key of a site's own mask of this step, from its seed of the session."""
        return derive(seed, self.digest, self.agreed.label("self_key", self.digest, site))

    def pair_key(self, secret: bytes, one: str, other: str) -> bytes:
        """The key of the mask that two sites share in this step, from their secret of the session."""
        return derive(secret, self.digest, self.agreed.label("pair_key", self.digest, *sorted((one, other))))

    def commitment(self, owner: str, other: str, key: bytes) -> bytes:
        """SHA-256 that binds ``owner`` to its key of this step with ``other``, or (``other`` "") to its self mask's."""
        return hashlib.sha256(self.agreed.label("step_commitment", self.digest, owner, other, key)).digest()


def pair_secret(private: X25519PrivateKey, public: bytes, agreed: Transcript, one: str, other: str) -> bytes:
    """What two sites share for a session, from one's private and the other's public mask key; the same at both ends."""
    return derive(agree(private, public), agreed.digest, agreed.label("pair_secret", *sorted((one, other))))


def commitment(attempt: Attempt, kind: str, owner: str, holder: str, secret: bytes) -> bytes:
    """SHA-256 that binds a site to a share it dealt, or (``holder`` "") to its seed; it hides 32 random bytes."""
    return hashlib.sha256(attempt.label("commitment", kind, owner, holder, secret)).digest()


def confirmed(agreed: Transcript, survivors: Iterable[str]) -> bytes:
    """What a site signs to confirm the survivors."""
    return agreed.label("confirm_survivors", *sorted(survivors))


def load(private: bytes) -> X25519PrivateKey:
    """A private key of 32 bytes, made ready: that costs as much as an agreement, so do it once for many."""
    return X25519PrivateKey.from_private_bytes(private)


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """The shared secret of two X25519 keys. Raises BadPeer for a public key of small order or another length."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise BadPeer("Expected an X25519 public key, found one of another length or of small order.") from None


def public_half(private: bytes) -> bytes:
    """The public key of an X25519 private key, 32 bytes each."""
    return load(private).public_key().public_bytes_raw()


def derive(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes by HKDF-SHA256 (RFC 5869)."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt, info).derive(secret)


def pairwise_key(
    private: X25519PrivateKey, public: bytes, agreed: Transcript, state: str, one: str, other: str
) -> bytes:
    """The key of the mask that two sites share; the same from both ends, if both were shown the same shared state.

    A server could else show the others a state on which their updates vanish, and read one site's from the sum
    (Pasquini et al. 2022, "Eluding Secure Aggregation in Federated Learning via Model Inconsistency").

    Args:
        private: one end's private mask key.
        public: the other end's public mask key.
        agreed: the transcript.
        state: digest of the request that the masked updates answer.
        one: name of either end.
        other: name of the other.
    """
    return derive(agree(private, public), agreed.digest, agreed.label("masked_input", state, *sorted((one, other))))


def self_mask_key(self_mask: bytes, agreed: Transcript, site: str) -> bytes:
    """The key of a site's own mask, from its 32-byte seed."""
    return derive(self_mask, agreed.digest, agreed.label("masked_input", site))


def seal(
    private: X25519PrivateKey, public: bytes, agreed: Transcript, sender: str, receiver: str, text: bytes
) -> bytes:
    """Encrypt the one text that ``sender`` sends to ``receiver`` in an attempt (ChaCha20-Poly1305)."""
    label = agreed.label("share_keys", sender, receiver)
    return ChaCha20Poly1305(derive(agree(private, public), agreed.digest, label)).encrypt(_NONCE, text, label)


def unseal(
    private: X25519PrivateKey, public: bytes, agreed: Transcript, sender: str, receiver: str, sealed: bytes
) -> bytes:
    """The inverse of ``seal`` at the receiver. Raises BadPeer for a text that was changed, moved or replayed."""
    label = agreed.label("share_keys", sender, receiver)
    try:
        return ChaCha20Poly1305(derive(agree(private, public), agreed.digest, label)).decrypt(_NONCE, sealed, label)
    except (InvalidTag, ValueError):
        raise BadPeer(f"Expected a share that {sender} sealed for this site and attempt, found another text.") from None
