"""Any threshold of shares rebuilds the secret; fewer say nothing about it, counted over a whole small field."""

import itertools
import json
import random
import secrets
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg.shares import PRIME, SECRET_BYTES, SHARE_BYTES, evaluate, interpolate, rebuild, split

GOLDEN = json.loads((Path(__file__).parents[2] / "vectors" / "shamir.json").read_text())


# ------------------------------------------------------------ by hand


def test_a_line_by_hand() -> None:
    # 5 + 4x mod 11 is 9 at 1, 2 at 2 and 6 at 3
    assert [evaluate([5, 4], point, 11) for point in (0, 1, 2, 3)] == [5, 9, 2, 6]
    assert interpolate({1: 9, 2: 2}, 11) == 5
    assert interpolate({3: 6, 1: 9}, 11) == 5


def test_a_parabola_by_hand() -> None:
    # 7 + x + 2x^2 mod 13 is 10 at 1, 4 at 2 and 2 at 3
    assert [evaluate([7, 1, 2], point, 13) for point in (1, 2, 3)] == [10, 4, 2]
    assert interpolate({1: 10, 2: 4, 3: 2}, 13) == 7


def test_a_threshold_of_one_is_the_secret_itself() -> None:
    shares = split(b"s" * 32, [4, 9], 1)
    assert shares == {4: b"\0" + b"s" * 32, 9: b"\0" + b"s" * 32}


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, b"\0" * 31 + b"\1", b"\x80" + bytes(31)])
def test_the_edges_of_the_secrets(secret: bytes) -> None:
    shares = split(secret, range(1, 6), 3)
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}
    assert rebuild(dict(list(shares.items())[2:])) == secret


# ------------------------------------------------------------ another program's values


@pytest.mark.parametrize("vector", GOLDEN["vectors"], ids=lambda vector: f"threshold {vector['threshold']}")
def test_golden(vector: dict[str, Any]) -> None:
    assert int(GOLDEN["prime"], 16) == PRIME
    secret, points = bytes.fromhex(vector["secret"]), vector["points"]
    coefficients = [int.from_bytes(secret, "big"), *(int(each, 16) for each in vector["coefficients"])]
    shares = dict(zip(points, map(bytes.fromhex, vector["shares"]), strict=True))
    assert len(coefficients) == vector["threshold"]
    for point, share in shares.items():
        assert evaluate(coefficients, point, PRIME) == int.from_bytes(share, "big")
    for start in range(len(points) - len(coefficients) + 1):
        chosen = points[start : start + len(coefficients)]
        assert rebuild({point: shares[point] for point in chosen}) == secret


def test_split_evaluates_the_polynomial_of_its_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden shares come out of ``split`` when its coins are the golden coefficients, lowest first."""
    for vector in GOLDEN["vectors"]:
        coins, asked = iter([int(each, 16) for each in vector["coefficients"]]), list[int]()

        def next_coin(bound: int, coins: Iterator[int] = coins, asked: list[int] = asked) -> int:
            asked.append(bound)
            return next(coins)

        monkeypatch.setattr(secrets, "randbelow", next_coin)
        shares = split(bytes.fromhex(vector["secret"]), vector["points"], vector["threshold"])
        assert [share.hex() for share in shares.values()] == vector["shares"]
        assert asked == [PRIME] * (vector["threshold"] - 1)  # uniform over the whole field


# ------------------------------------------------------------ any threshold rebuilds


@st.composite
def dealings(draw: st.DrawFn) -> tuple[bytes, list[int], int, list[int]]:
    """A secret, points, a threshold, and a choice of at least that many points."""
    points = draw(st.lists(st.integers(1, 10_000) | st.integers(1, PRIME - 1), min_size=1, max_size=12, unique=True))
    threshold = draw(st.integers(1, len(points)))
    chosen = draw(st.permutations(points))[: draw(st.integers(threshold, len(points)))]
    return draw(st.binary(min_size=32, max_size=32)), points, threshold, chosen


@settings(max_examples=200)
@given(dealings())
def test_any_threshold_of_shares_rebuilds(case: tuple[bytes, list[int], int, list[int]]) -> None:
    secret, points, threshold, chosen = case
    shares = split(secret, points, threshold)
    assert list(shares) == points
    assert rebuild({point: shares[point] for point in chosen}) == secret


@settings(max_examples=100)
@given(dealings())
def test_one_share_fewer_does_not(case: tuple[bytes, list[int], int, list[int]]) -> None:
    secret, points, threshold, chosen = case
    shares = split(secret, points, threshold)
    try:
        found = rebuild({point: shares[point] for point in chosen[: threshold - 1]})
    except ValueError:
        return
    assert found != secret or (threshold == 1 and secret == bytes(32))  # no share at all rebuilds to 0


def test_a_hundred_holders() -> None:
    secret = secrets.token_bytes(32)
    shares = split(secret, range(1, 101), 67)
    chosen = random.Random(1).sample(sorted(shares), 67)
    assert rebuild({point: shares[point] for point in chosen}) == secret


def test_every_dealing_is_fresh() -> None:
    one, two = (split(b"s" * 32, [1, 2, 3], 2) for _ in range(2))
    assert all(one[point] != two[point] for point in one)


def test_a_wrong_share_rebuilds_another_secret() -> None:
    shares = split(b"s" * 32, [1, 2, 3], 3)
    for bit in range(8 * SECRET_BYTES):
        wrong = (int.from_bytes(shares[2], "big") ^ 1 << bit).to_bytes(SHARE_BYTES, "big")
        try:
            assert rebuild({**shares, 2: wrong}) != b"s" * 32
        except ValueError:  # rare: beyond the field, or beyond 32 bytes
            pass


# ------------------------------------------------------------ fewer say nothing


@pytest.mark.parametrize(("prime", "threshold"), [(11, 2), (13, 2), (11, 3), (7, 4)])
def test_fewer_shares_leave_every_secret_equally_likely(prime: int, threshold: int) -> None:
    """All polynomials are counted: whatever threshold - 1 holders see, every secret made it equally often."""
    polynomials = list(itertools.product(range(prime), repeat=threshold))
    tables = {point: [evaluate(each, point, prime) for each in polynomials] for point in range(1, prime)}
    for holders in itertools.combinations(range(1, prime), threshold - 1):
        seen = zip(*(tables[point] for point in holders), strict=True)
        counts = Counter((view, each[0]) for view, each in zip(seen, polynomials, strict=True))
        assert len(counts) == prime**threshold  # every view with every secret
        assert set(counts.values()) == {1}


@pytest.mark.parametrize(("prime", "threshold"), [(11, 2), (7, 3)])
def test_as_many_as_the_threshold_leave_one_secret(prime: int, threshold: int) -> None:
    for each in itertools.product(range(prime), repeat=threshold):
        for holders in itertools.combinations(range(1, prime), threshold):
            assert interpolate({point: evaluate(each, point, prime) for point in holders}, prime) == each[0]


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_secrets_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"expected a secret of 32 bytes, found {length}"):
        split(bytes(length), [1, 2], 2)


@pytest.mark.parametrize("points", [[0, 1], [1, -1], [1, 1], [1, PRIME], [1, PRIME + 1]], ids=str)
def test_points_that_would_open_the_secret_or_coincide_are_refused(points: list[int]) -> None:
    with pytest.raises(ValueError, match="expected different points of at least 1"):
        split(bytes(32), points, 2)


@pytest.mark.parametrize("threshold", [-1, 0, 4])
def test_thresholds_out_of_range_are_refused(threshold: int) -> None:
    with pytest.raises(ValueError, match=f"expected a threshold of 1 to 3, found {threshold}"):
        split(bytes(32), [1, 2, 3], threshold)


def test_no_points_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a threshold of 1 to 0"):
        split(bytes(32), [], 1)


@pytest.mark.parametrize("length", [0, 32, 34])
def test_shares_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match="expected shares of 33 bytes"):
        rebuild({1: bytes(33), 2: bytes(length)})


@pytest.mark.parametrize("value", [PRIME, PRIME + 1, 2**264 - 1])
def test_shares_beyond_the_field_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="expected an element of the field"):
        rebuild({1: bytes(33), 2: value.to_bytes(33, "big")})


def test_a_secret_beyond_32_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        rebuild({1: (2**256).to_bytes(33, "big")})
    assert rebuild({1: (2**256 - 1).to_bytes(33, "big")}) == b"\xff" * 32
