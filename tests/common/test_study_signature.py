import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import StudyConfig
from common.study_signature import is_signed, sign

KEY, OTHER = Ed25519PrivateKey.from_private_bytes(b"k" * 32), Ed25519PrivateKey.from_private_bytes(b"o" * 32)
PUBLIC = KEY.public_key().public_bytes_raw()
STUDY = StudyConfig(name="north-and-south")
SIGNATURE = sign(KEY, STUDY.digest)


def test_a_signature_vouches_for_one_study_by_one_signer() -> None:
    assert is_signed(PUBLIC, STUDY.digest, SIGNATURE)
    assert not is_signed(OTHER.public_key().public_bytes_raw(), STUDY.digest, SIGNATURE)
    assert not is_signed(PUBLIC, STUDY.with_changes("privacy", epsilon=11.0).digest, SIGNATURE)
    assert not is_signed(PUBLIC, STUDY.digest, sign(OTHER, STUDY.digest))


def test_settings_of_speed_may_change_after_signing() -> None:
    assert is_signed(PUBLIC, STUDY.with_changes("performance", mixed_precision=False).digest, SIGNATURE)


def test_what_the_key_signs_elsewhere_is_no_signature_on_a_study() -> None:
    for text in (
        STUDY.digest.encode(),
        bytes.fromhex(STUDY.digest),
        b"synthward ledger v1\x00" + STUDY.digest.encode(),
    ):
        assert not is_signed(PUBLIC, STUDY.digest, KEY.sign(text))


@pytest.mark.parametrize("length", [0, 1, 32, 63])
def test_a_truncated_signature_is_refused(length: int) -> None:
    assert not is_signed(PUBLIC, STUDY.digest, SIGNATURE[:length])


def test_a_signature_with_something_behind_it_is_refused() -> None:
    assert not is_signed(PUBLIC, STUDY.digest, SIGNATURE + b"\0")


@pytest.mark.parametrize("bit", range(512))
def test_a_signature_with_one_bit_changed_is_refused(bit: int) -> None:
    flipped = (int.from_bytes(SIGNATURE, "big") ^ 1 << bit).to_bytes(64, "big")
    assert not is_signed(PUBLIC, STUDY.digest, flipped)


@pytest.mark.parametrize("public", [b"", PUBLIC[:31], PUBLIC + b"\0", b"\xff" * 32])
def test_what_is_no_key_has_signed_nothing(public: bytes) -> None:
    assert not is_signed(public, STUDY.digest, SIGNATURE)


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.text("0123456789abcdef", min_size=64, max_size=64), st.binary())
def test_every_key_signs_every_study_and_arbitrary_bytes_are_no_signature(
    seed: bytes, digest: str, noise: bytes
) -> None:
    key = Ed25519PrivateKey.from_private_bytes(seed)
    public = key.public_key().public_bytes_raw()
    assert is_signed(public, digest, sign(key, digest))
    assert not is_signed(public, digest, noise)
