"""A crash leaves the old content or the new one: every step of the write is made to fail once."""

import os
import stat
from pathlib import Path

import pytest

from common.files import write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"new", b"x" * 1_000_000])
def test_the_content_is_written(content: bytes, tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content
    write_atomically(tmp_path / "file", b"again")
    assert (tmp_path / "file").read_bytes() == b"again"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failing_write_leaves_the_old_content(
    call: str, old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert names(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old


def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert names(tmp_path) == []


@pytest.mark.parametrize("mode", [0o600, 0o644])
@pytest.mark.parametrize("old_mode", [None, 0o644])
def test_the_permission_bits_are_those_asked_for(mode: int, old_mode: int | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if old_mode is not None:
        path.write_bytes(b"old")
        path.chmod(old_mode)
    umask = os.umask(0o022)
    try:
        write_atomically(path, b"new", mode=mode)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_the_content_is_on_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths))[1])
    write_atomically(tmp_path / "file", b"new")
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "file", b"new")
