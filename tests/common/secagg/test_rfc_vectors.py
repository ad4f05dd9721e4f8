"""The published vectors of every primitive, through the functions that the protocol calls.

The files of ``tests/vectors`` name the standard that published each vector and the program that confirmed it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import BadPeer
from common.secagg import masks
from common.secagg.keys import agree, check_signature, derive, load, public_half

FOLDER = Path(__file__).parents[2] / "vectors"


def golden(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return tree


def as_bytes(vector: dict[str, str]) -> dict[str, bytes]:
    return {name: bytes.fromhex(text) for name, text in vector.items() if name != "published"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_golden_file_names_two_sources(path: Path) -> None:
    source = golden(path.stem)["source"]
    assert len({source.get("published", source.get("written_by")), source["confirmed_by"]} - {None, ""}) == 2


# ------------------------------------------------------------ X25519


@pytest.mark.parametrize("vector", golden("x25519")["multiplications"])
def test_x25519(vector: dict[str, str]) -> None:
    of = as_bytes(vector)
    assert agree(load(of["scalar"]), of["point"]) == of["result"]


def test_x25519_a_thousand_times() -> None:
    expected = golden("x25519")["iterated"]
    scalar = point = (9).to_bytes(32, "little")
    for times in range(1, 1001):
        scalar, point = agree(load(scalar), point), scalar
        assert scalar.hex() == expected.get(str(times), scalar.hex())
    assert set(expected) == {"1", "1000"}


def test_x25519_agreement() -> None:
    vector = golden("x25519")["agreement"]
    (one, other), publics = map(bytes.fromhex, vector["private"]), list(map(bytes.fromhex, vector["public"]))
    assert [public_half(one), public_half(other)] == publics
    assert agree(load(one), publics[1]) == agree(load(other), publics[0]) == bytes.fromhex(vector["shared"])


# ------------------------------------------------------------ HKDF-SHA256


@pytest.mark.parametrize("vector", golden("hkdf_sha256")["vectors"])
def test_hkdf(vector: dict[str, str]) -> None:
    of = as_bytes(vector)
    whole = HKDF(hashes.SHA256(), len(of["output"]), of["salt"], of["info"]).derive(of["secret"])
    assert whole == of["output"]
    assert derive(of["secret"], of["salt"], of["info"]) == of["output"][:32]  # a shorter output is a prefix


# ------------------------------------------------------------ ChaCha20-Poly1305


@pytest.mark.parametrize("vector", golden("chacha20_poly1305")["vectors"])
def test_chacha20_poly1305(vector: dict[str, str]) -> None:
    of = as_bytes(vector)
    cipher = ChaCha20Poly1305(of["key"])
    assert cipher.encrypt(of["nonce"], of["text"], of["associated"]) == of["sealed"]
    assert cipher.decrypt(of["nonce"], of["sealed"], of["associated"]) == of["text"]


# ------------------------------------------------------------ Ed25519


@pytest.mark.parametrize("vector", golden("ed25519")["vectors"], ids=lambda vector: f"message {vector['message']}")
def test_ed25519(vector: dict[str, str]) -> None:
    of = as_bytes(vector)
    identity = Ed25519PrivateKey.from_private_bytes(of["private"])
    assert identity.public_key().public_bytes_raw() == of["public"]
    assert identity.sign(of["message"]) == of["signature"]
    check_signature(of["public"], of["signature"], of["message"])
    with pytest.raises(BadPeer):
        check_signature(of["public"], of["signature"], of["message"] + b"x")


# ------------------------------------------------------------ AES-256, as the masks use it


def keystream(key: bytes, counter: int, count: int) -> bytes:
    """The mask of ``key`` from a block on: two words a block."""
    buffer = bytearray(8 * count + 15)
    return masks._next(masks._stream(key, counter), count, buffer).tobytes()


@pytest.mark.parametrize("vector", golden("aes256")["blocks"], ids=lambda vector: vector["published"])
def test_a_block_of_a_mask_is_its_counter_encrypted(vector: dict[str, str]) -> None:
    of = as_bytes(vector)
    assert keystream(of["key"], int.from_bytes(of["block"], "big"), 2) == of["result"]


@pytest.mark.parametrize("vector", golden("aes256")["counter_mode"], ids=lambda vector: vector["published"])
def test_a_mask_is_the_keystream_of_counter_mode(vector: dict[str, str]) -> None:
    of = as_bytes(vector)
    stream = keystream(of["key"], int.from_bytes(of["counter"], "big"), len(of["text"]) // 8)
    assert bytes(one ^ other for one, other in zip(of["text"], stream, strict=True)) == of["encrypted"]


def test_the_first_block_of_a_mask_is_that_of_counter_zero() -> None:
    """The block of zeros under the key of zeros, as words of the vector that the mask is added to."""
    [vector] = [as_bytes(each) for each in golden("aes256")["blocks"] if not int(each["block"], 16)]
    total = np.zeros(2, np.uint64)
    masks.apply(total, [(vector["key"], True)])
    assert total.astype("<u8").tobytes() == vector["result"]
