"""A signature on a study: someone whom sites trust vouches for exactly this study."""

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_LABEL = b"synthward study v1\x00"  # a key signs other things too: no signature of one kind passes for another


def sign(private: Ed25519PrivateKey, study_digest: str) -> bytes:
    """Sign a study, given by its digest. Returns 64 bytes."""
    return private.sign(_LABEL + study_digest.encode())


def is_signed(public: bytes, study_digest: str, signature: bytes) -> bool:
    """Whether ``signature`` is one on this study by the holder of this key.

    Args:
        public: raw Ed25519 public key. What is no key has signed nothing.
        study_digest: as ``StudyConfig.digest`` gives it.
        signature: any bytes; none or wrong ones are no signature.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _LABEL + study_digest.encode())
    except (InvalidSignature, ValueError):
        return False
    return True
