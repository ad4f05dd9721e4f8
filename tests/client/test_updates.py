"""Which update is at hand, and which has left masked: read back after any order of notes, never guessed."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.updates import FILE_NAME, MadeSum, MadeUpdate, Updates, give_up, note_left, note_made, read
from common.errors import SiteError
from common.secagg.encoding import Encoding

ONE, OTHER = "1a" * 32, "2b" * 32


def test_an_update_waits_from_when_it_is_made_until_it_has_left(tmp_path: Path) -> None:
    assert read(tmp_path) == Updates() and not read(tmp_path).pending
    note_made(tmp_path, ONE)
    assert read(tmp_path) == Updates(made=ONE) and read(tmp_path).pending
    note_left(tmp_path, ONE)
    assert read(tmp_path) == Updates(made=ONE, left=ONE) and not read(tmp_path).pending
    note_made(tmp_path, OTHER)
    assert read(tmp_path) == Updates(made=OTHER, left=ONE) and read(tmp_path).pending


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["made", "left", "given up"]), st.sampled_from([ONE, OTHER])), max_size=6))
def test_every_note_keeps_what_the_other_said(notes: list[tuple[str, str]]) -> None:
    expected = Updates()
    with TemporaryDirectory() as name:
        for kind, update in notes:
            if kind == "made":
                note_made(Path(name), update)
                expected = Updates(update, expected.left)
            elif kind == "left":
                note_left(Path(name), update)
                expected = Updates(expected.made, update)
            else:
                give_up(Path(name))
                expected = Updates(expected.left, expected.left)
        assert read(Path(name)) == expected


def test_the_file_is_for_its_owner_only(tmp_path: Path) -> None:
    note_made(tmp_path, ONE)
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"made": ""}', b'{"made": null, "left": ""}', b"\xff"]
)
def test_a_damaged_file_stops_the_site_rather_than_letting_an_update_leave_twice(
    content: bytes, tmp_path: Path
) -> None:
    note_left(tmp_path, ONE)
    (tmp_path / FILE_NAME).write_bytes(content)
    for use in (lambda: read(tmp_path), lambda: note_made(tmp_path, OTHER), lambda: note_left(tmp_path, ONE)):
        with pytest.raises(SiteError, match="damaged"):
            use()
    assert (tmp_path / FILE_NAME).read_bytes() == content


def test_integers_leave_as_the_numbers_they_stand_for_where_nothing_masks_them() -> None:
    # Steps of 2^-3: 12 are 1.5.
    integers = MadeSum(1, np.array([12, -1, 0], np.int64), Encoding(2.0**20, 3, 32), "id")
    assert integers.floats.dtype == np.float32
    assert integers.floats.tolist() == [1.5, -0.125, 0.0]
    floats = MadeUpdate(1, np.array([1.5, -0.125], np.float32), "id")
    assert floats.floats.tolist() == [1.5, -0.125]
