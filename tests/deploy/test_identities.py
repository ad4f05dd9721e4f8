import json
import stat
import subprocess
from pathlib import Path

import pytest

from client.identity import load_member
from client.policy import Policy
from client.settings import SiteSettings
from common.errors import SiteError
from common.identity import read_public
from common.secagg.roster import load_roster
from tests.deploy.command import synthward


@pytest.fixture
def consortium(tmp_path: Path) -> Path:
    """Two sites with keys and settings, and their roster."""
    for name in ("north", "south"):
        assert synthward("site", "keygen", tmp_path / name).status == 0
        SiteSettings.checked(name=name, data=tmp_path, folder=tmp_path / name).save()
        assert synthward("policy", "init", tmp_path / name, "--epsilon", 8, "--delta", 1e-5).status == 0
    made = synthward(
        "roster", "make", *(f"{name}={tmp_path / name}/identity.pub" for name in ("north", "south")),
        "--out", tmp_path / "roster.json",
    )  # fmt: skip
    assert made.status == 0
    assert made.out.strip() == load_roster(tmp_path / "roster.json").digest
    return tmp_path


def test_keygen_makes_a_key_that_only_its_owner_reads_and_openssl_understands(tmp_path: Path) -> None:
    done = synthward("site", "keygen", tmp_path / "north")
    assert done.status == 0
    assert stat.S_IMODE((tmp_path / "north/identity.key").stat().st_mode) == 0o600
    assert read_public(tmp_path / "north/identity.pub").hex() in done.out
    assert "PRIVATE" not in done.out
    public = subprocess.run(
        ["openssl", "pkey", "-in", tmp_path / "north/identity.key", "-pubout"], capture_output=True, check=True
    ).stdout
    assert public == (tmp_path / "north/identity.pub").read_bytes()


def test_keygen_never_replaces_a_key(tmp_path: Path) -> None:
    synthward("site", "keygen", tmp_path)
    before = (tmp_path / "identity.key").read_bytes()
    done = synthward("site", "keygen", tmp_path)
    assert done.status == 2
    assert "exists already" in done.err
    assert (tmp_path / "identity.key").read_bytes() == before


def test_a_roster_is_shown_with_every_key_and_its_digest(consortium: Path) -> None:
    roster = consortium / "roster.json"
    digest = synthward("roster", "digest", roster).out.strip()
    shown = synthward("roster", "show", roster).out
    tree = json.loads(synthward("roster", "show", roster, "--json").out)
    assert tree["digest"] == digest
    for name in ("north", "south"):
        key = read_public(consortium / name / "identity.pub").hex()
        assert tree["sites"][name] == key
        assert f"{name}" in shown and key in shown
    assert digest in shown


def test_a_site_pins_the_roster_whose_digest_it_heard(consortium: Path) -> None:
    roster = consortium / "roster.json"
    with pytest.raises(SiteError, match="pinned no roster"):
        load_member(SiteSettings.load(consortium / "north"), Policy.load(consortium / "north"))
    done = synthward("site", "pin", consortium / "north", roster, "--digest", load_roster(roster).digest)
    assert done.status == 0
    member = load_member(SiteSettings.load(consortium / "north"), Policy.load(consortium / "north"))
    assert member.site == "north"
    assert set(member.roster.sites) == {"north", "south"}


def test_another_digest_or_another_key_pins_nothing(consortium: Path) -> None:
    roster, north = consortium / "roster.json", consortium / "north"
    before = (north / "policy.toml").read_bytes()
    done = synthward("site", "pin", north, roster, "--digest", "0" * 64)
    assert (done.status, "by telephone" in done.err) == (2, True)

    synthward("site", "keygen", consortium / "other")
    other = consortium / "other.json"
    synthward("roster", "make", f"north={consortium}/other/identity.pub", "--out", other)
    done = synthward("site", "pin", north, other, "--digest", load_roster(other).digest)
    assert (done.status, "another key" in done.err) == (3, True)
    assert (north / "policy.toml").read_bytes() == before
    assert not (north / "roster.json").exists()


def test_wrong_files_and_names_are_refused_and_nothing_is_overwritten(consortium: Path) -> None:
    public, out = consortium / "north/identity.pub", consortium / "new.json"
    for keys, reason in (
        ([f"north={consortium}/roster.json"], "no Ed25519 public key"),
        ([f"north={consortium}/north/identity.key"], "no Ed25519 public key"),
        ([f"north={consortium}/missing"], "Cannot read"),
        ([f"north={public}", f"north={public}"], "same name"),
        ([f"north={public}", f"south={public}"], "same key"),
        ([f"a b={public}"], "letters, digits"),
    ):
        done = synthward("roster", "make", *keys, "--out", out)
        assert (done.status, reason in done.err) == (2, True), done.err
        assert not out.exists()
    done = synthward("roster", "make", f"north={public}", "--out", consortium / "roster.json")
    assert (done.status, "exists already" in done.err) == (2, True)
    assert synthward("roster", "digest", consortium / "north/site.toml").status == 2


def test_init_writes_the_settings_that_the_other_commands_need(tmp_path: Path) -> None:
    scans, folder = tmp_path / "scans", tmp_path / "north"
    scans.mkdir()
    arguments = ("site", "init", folder, "--name", "north", "--data", scans)
    assert synthward(*arguments).status == 0
    settings = SiteSettings.load(folder)
    assert (settings.name, settings.data) == ("north", scans.resolve())
    again = synthward(*arguments)
    assert (again.status, "exists already" in again.err) == (2, True)
    for wrong, reason in (
        (("--name", "a b", "--data", scans), "name"),
        (("--name", "a", "--data", tmp_path / "missing"), "not a folder"),
    ):
        done = synthward("site", "init", tmp_path / "other", *wrong)
        assert (done.status, reason in done.err) == (2, True), done.err
        assert not (tmp_path / "other" / "site.toml").exists()
