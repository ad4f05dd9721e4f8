"""The roster: the same for everybody who holds the same names and keys, and refused whenever it is not one."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.secagg.roster import Roster, load_roster, make_roster
from tests.strategies import site_names

KEYS = {"north": bytes(range(32)), "south": b"s" * 32, "st.mary-2_b": b"\xff" * 32}
rosters = st.dictionaries(site_names, st.binary(min_size=32, max_size=32), min_size=1, max_size=6).filter(
    lambda sites: len(set(sites.values())) == len(sites)
)


def tree() -> dict[str, object]:
    return {"version": 1, "sites": {name: key.hex() for name, key in KEYS.items()}}


def refusal(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_roster(path)
    assert caught.value.remedy
    return caught.value


def refusal_of(content: bytes, tmp_path: Path) -> ConfigError:
    path = tmp_path / "roster.json"
    path.write_bytes(content)
    return refusal(path)


# ------------------------------------------------------------ there and back


def test_by_hand(tmp_path: Path) -> None:
    make_roster({"b": b"\2" * 32, "a": b"\1" * 32}).save(tmp_path / "roster.json")
    assert (tmp_path / "roster.json").read_text() == (
        '{\n  "sites": {\n    "a": "' + "01" * 32 + '",\n    "b": "' + "02" * 32 + '"\n  },\n  "version": 1\n}\n'
    )


def test_the_digest_by_hand() -> None:
    """sha256sum of {"sites":{"a":"0101..."},"version":1} without a newline."""
    assert make_roster({"a": b"\1" * 32}).digest == "7479e99f9c3fbeeb32efd4ac78a67f9490066df0137dc8f3fba6337f5da2c5b7"


@given(sites=rosters)
def test_saved_and_loaded_it_is_the_same(sites: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("roster") / "roster.json"
    roster = make_roster(sites)
    roster.save(path)
    loaded = load_roster(path)
    assert dict(loaded.sites) == sites
    assert loaded.digest == roster.digest


@given(rosters, st.randoms())
def test_the_digest_does_not_depend_on_the_order(sites: dict[str, bytes], coins: object) -> None:
    items = list(sites.items())
    coins.shuffle(items)  # type: ignore[attr-defined]
    assert make_roster(dict(items)).digest == make_roster(sites).digest


def test_the_file_may_be_laid_out_otherwise(tmp_path: Path) -> None:
    """Spaces, order and capitals of the hexadecimal are no part of what the digest stands for."""
    path = tmp_path / "roster.json"
    sites = dict(reversed([(name, key.hex().upper()) for name, key in KEYS.items()]))
    path.write_text(json.dumps({"sites": sites, "version": 1}, indent=7))
    assert load_roster(path).digest == make_roster(KEYS).digest


def test_the_digest_changes_with_every_byte_of_every_name_and_key() -> None:
    found = [make_roster(KEYS).digest]
    for name, key in KEYS.items():
        others = {other: kept for other, kept in KEYS.items() if other != name}
        for byte in range(32):
            changed = key[:byte] + bytes([key[byte] ^ 1 << byte % 8]) + key[byte + 1 :]
            found.append(make_roster({**others, name: changed}).digest)
        for letter in range(len(name)):
            found.append(make_roster({**others, name[:letter] + "X" + name[letter + 1 :]: key}).digest)
        found.append(make_roster(others).digest)
    found.append(make_roster({"north": KEYS["south"], "south": KEYS["north"], "st.mary-2_b": b"\xff" * 32}).digest)
    assert len(set(found)) == len(found)


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "-a", ".a", "_a", "a/b", "../a", "a\n", "\u00e4", "a" * 65, "a,b", "a=b", "\u0661"]
)
def test_wrong_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Rename the site"):
        make_roster({name: b"k" * 32})
    content = json.dumps({"version": 1, "sites": {name: "00" * 32}}).encode()
    assert "Rename the site" in str(refusal_of(content, tmp_path))


@pytest.mark.parametrize("name", ["a", "0", "A.b-c_d", "a" * 64])
def test_names_that_are_fine(name: str) -> None:
    assert list(make_roster({name: b"k" * 32}).sites) == [name]


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_keys_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(ConfigError, match=f"32 bytes for south, found {length}. Ask the site for its key"):
        make_roster({"north": b"n" * 32, "south": bytes(length)})


def test_two_sites_with_one_key_are_refused() -> None:
    with pytest.raises(ConfigError, match="same key. Every site makes a key of its own"):
        make_roster({"north": b"k" * 32, "south": b"k" * 32})


def test_no_site_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one site"):
        make_roster({})


def test_a_name_twice_in_the_file_is_refused(tmp_path: Path) -> None:
    """JSON readers differ in which of the two they take: two sites would trust two keys under one file."""
    content = json.dumps(tree()).replace('"south"', '"north"').encode()
    assert "is not a roster of version 1. Ask the coordinator" in str(refusal_of(content, tmp_path))
    content = json.dumps(tree()).replace('{"version": 1', '{"version": 1, "version": 1').encode()
    assert "is not a roster of version 1" in str(refusal_of(content, tmp_path))


TREES: dict[str, object] = {
    "version 2": {**tree(), "version": 2},
    "version as text": {**tree(), "version": "1"},
    "no version": {"sites": tree()["sites"]},
    "no sites": {"version": 1},
    "more than a roster": {**tree(), "signature": "00"},
    "sites as a list": {"version": 1, "sites": ["north"]},
    "sites as nothing": {"version": 1, "sites": None},
    "a key as a number": {"version": 1, "sites": {"north": 7}},
    "a key as nothing": {"version": 1, "sites": {"north": None}},
    "a key of no hexadecimal": {"version": 1, "sites": {"north": "zz" * 32}},
    "half a byte": {"version": 1, "sites": {"north": "0" * 63}},
    "a list": ["version", "sites"],
    "a number": 1,
    "a text": "sites",
    "nothing": None,
}


@pytest.mark.parametrize("found", TREES.values(), ids=TREES.keys())
def test_other_trees_are_refused(found: object, tmp_path: Path) -> None:
    assert "is not a roster of version 1. Ask the coordinator" in str(refusal_of(json.dumps(found).encode(), tmp_path))


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b"", b"{", b"not json", b"\xff\xfe\xff", b"\0" * 9, b'{"version": 1} {}']
)
def test_what_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    assert "is not a roster of version 1. Ask the coordinator" in str(refusal_of(content, tmp_path))


def test_a_short_key_in_the_file_is_refused_by_name(tmp_path: Path) -> None:
    content = json.dumps({"version": 1, "sites": {"north": "00" * 31}}).encode()
    assert "32 bytes for north, found 31" in str(refusal_of(content, tmp_path))


def test_a_missing_file_says_what_to_give(tmp_path: Path) -> None:
    error = refusal(tmp_path / "none.json")
    assert "No such file" in error.message
    assert "synthward roster make" in error.remedy


def test_a_folder_is_no_roster(tmp_path: Path) -> None:
    assert "Is a directory" in refusal(tmp_path).message


def test_a_roster_cut_anywhere_is_refused(tmp_path: Path) -> None:
    Roster(KEYS).save(tmp_path / "whole.json")
    whole = (tmp_path / "whole.json").read_bytes().rstrip()
    for length in range(len(whole)):
        refusal_of(whole[:length], tmp_path)
