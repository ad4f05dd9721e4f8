"""A site's key and roster: made once, for its owner only, and refused whenever one does not fit the other."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from client.identity import ROSTER_FILE, Member, load_member, pin_roster
from client.policy import Policy, set_roster_digest
from client.settings import SiteSettings
from client.simulated import simulated_roster
from common.errors import ConfigError, PolicyError, SiteError
from common.identity import KEY_FILE, PUBLIC_FILE, make_identity, read_public
from common.secagg.roster import Roster, make_roster


def settings_of(folder: Path, name: str = "north") -> SiteSettings:
    return SiteSettings(name=name, data=folder / "data", folder=folder)


def pinned(folder: Path) -> SiteSettings:
    """Two sites; the settings of north, which has pinned their roster."""
    roster = simulated_roster({name: folder / name for name in ("north", "south")})
    settings = settings_of(folder / "north")
    Policy(minimum_cohort=3, largest_sampling_probability=0.5, minimum_patients=1).save(settings.folder)
    pin_roster(settings, roster)
    return settings


def member_of(settings: SiteSettings) -> Member:
    return load_member(settings, Policy.load(settings.folder))


# ---------------------------------------------------------------- the key


def test_a_key_is_its_owners_alone_and_its_public_half_lies_beside_it(tmp_path: Path) -> None:
    before = os.umask(0)  # however open the site's own default is
    try:
        public = make_identity(tmp_path / "site")
    finally:
        os.umask(before)
    key = tmp_path / "site" / KEY_FILE
    assert key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "site").stat().st_mode & 0o777 == 0o700
    assert public == tmp_path / "site" / PUBLIC_FILE
    assert b"PRIVATE" in key.read_bytes() and b"PRIVATE" not in public.read_bytes()
    assert len(read_public(public)) == 32


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    make_identity(tmp_path)
    before = (tmp_path / KEY_FILE).read_bytes(), (tmp_path / PUBLIC_FILE).read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        make_identity(tmp_path)
    assert before == ((tmp_path / KEY_FILE).read_bytes(), (tmp_path / PUBLIC_FILE).read_bytes())


def test_two_sites_have_two_keys(tmp_path: Path) -> None:
    assert read_public(make_identity(tmp_path / "a")) != read_public(make_identity(tmp_path / "b"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620, 0o601])
def test_a_key_that_others_can_touch_is_refused(mode: int, tmp_path: Path) -> None:
    settings = pinned(tmp_path)
    (settings.folder / KEY_FILE).chmod(mode)
    with pytest.raises(SiteError, match="chmod 600"):
        member_of(settings)
    (settings.folder / KEY_FILE).chmod(0o400)  # stricter is fine
    assert member_of(settings).site == "north"


def other_kind() -> bytes:
    return X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def with_password() -> bytes:
    password = BestAvailableEncryption(b"secret")
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, password)


def public_only() -> bytes:
    return Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 100, other_kind(), with_password(), public_only()])
def test_a_garbled_key_or_one_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    settings = pinned(tmp_path)
    (settings.folder / KEY_FILE).write_bytes(content)
    with pytest.raises(SiteError, match="no Ed25519 private key") as caught:
        member_of(settings)
    assert not content or content.decode("latin-1") not in str(caught.value)


def test_a_key_cut_in_the_middle_is_refused(tmp_path: Path) -> None:
    settings = pinned(tmp_path)
    whole = (settings.folder / KEY_FILE).read_bytes()
    (settings.folder / KEY_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SiteError) as caught:
        member_of(settings)
    assert whole.split(b"\n")[1].decode() not in str(caught.value)


def test_a_missing_key_says_how_to_make_one(tmp_path: Path) -> None:
    settings = pinned(tmp_path)
    (settings.folder / KEY_FILE).unlink()
    with pytest.raises(SiteError, match="synthward site keygen"):
        member_of(settings)


@pytest.mark.parametrize("content", [None, b"", b"garbage", other_kind(), with_password()])
def test_a_public_file_that_holds_no_public_key_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / PUBLIC_FILE
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=PUBLIC_FILE):
        read_public(path)


# ---------------------------------------------------------------- the roster


def test_a_member_knows_its_roster_and_never_shows_its_key(tmp_path: Path) -> None:
    settings = pinned(tmp_path)
    member = member_of(settings)  # the pin is in the policy
    assert (member.site, member.minimum_cohort, set(member.roster.sites)) == ("north", 3, {"north", "south"})
    assert member.roster.sites["north"] == member.identity.public_key().public_bytes_raw()
    private = member.identity.private_bytes_raw()
    for text in (repr(member), str(member), f"{member}", repr([member])):
        assert private.hex() not in text and repr(private)[2:-1] not in text and "identity" not in text


def test_a_site_without_a_pinned_roster_is_refused(tmp_path: Path) -> None:
    settings = pinned(tmp_path)
    set_roster_digest(settings.folder, "")
    with pytest.raises(SiteError, match="pinned no roster"):
        member_of(settings)


def test_a_site_without_a_policy_pins_nothing(tmp_path: Path) -> None:
    settings = pinned(tmp_path)
    (settings.folder / "policy.toml").unlink()
    with pytest.raises(PolicyError, match="Without a policy"):
        pin_roster(settings, make_roster({"north": bytes(32)}))


def test_another_roster_than_the_pinned_one_is_refused_even_with_the_same_key_for_this_site(tmp_path: Path) -> None:
    settings = pinned(tmp_path)
    own = read_public(settings.folder / PUBLIC_FILE)
    for other in (
        make_roster({"north": own}),
        make_roster({"north": own, "south": bytes(32)}),
        make_roster({"north": own, "south": read_public(tmp_path / "south" / PUBLIC_FILE), "visitor": bytes(32)}),
    ):
        other.save(settings.folder / ROSTER_FILE)
        with pytest.raises(SiteError, match="not the roster that this site has pinned"):
            member_of(settings)


def test_a_pinned_roster_with_another_key_for_this_site_or_none_is_refused(tmp_path: Path) -> None:
    settings = pinned(tmp_path)
    south = read_public(tmp_path / "south" / PUBLIC_FILE)
    stranger = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    for other in (make_roster({"south": south}), make_roster({"north": stranger, "south": south})):
        with pytest.raises(SiteError, match="another key, or none, for north"):
            pin_roster(settings, other)
            member_of(settings)
    # Nor does another site's name help this key.
    with pytest.raises(SiteError, match="another key, or none, for south"):
        member_of(pinned(tmp_path).model_copy(update={"name": "south"}))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", b'{"version": 2, "sites": {}}'])
def test_a_missing_or_damaged_roster_is_the_sites_own_error(content: bytes | None, tmp_path: Path) -> None:
    settings = pinned(tmp_path)
    path = settings.folder / ROSTER_FILE
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SiteError, match=ROSTER_FILE):
        member_of(settings)


# ---------------------------------------------------------------- simulations


def test_a_simulated_roster_keeps_the_keys_that_are_there(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("a", "b", "c")}
    public = read_public(make_identity(folders["b"]))
    first = simulated_roster(folders)
    assert first.sites["b"] == public
    assert simulated_roster(folders) == first == simulated_roster(dict(reversed(folders.items())))
    assert simulated_roster(folders).digest == first.digest
    assert all((folder / KEY_FILE).stat().st_mode & 0o777 == 0o600 for folder in folders.values())


def test_threads_that_start_side_by_side_make_one_roster(tmp_path: Path) -> None:
    folders = {f"site-{number}": tmp_path / f"site-{number}" for number in range(6)}
    with ThreadPoolExecutor(8) as pool:
        rosters = list(pool.map(lambda _: simulated_roster(folders), range(16)))
    assert {roster.digest for roster in rosters} == {rosters[0].digest}


def test_processes_that_start_side_by_side_make_one_roster(tmp_path: Path) -> None:
    folders = {f"site-{number}": tmp_path / f"site-{number}" for number in range(6)}
    code = "import sys; from pathlib import Path; from client.simulated import simulated_roster; "
    code += "print(simulated_roster({Path(name).name: Path(name) for name in sys.argv[1:]}).digest)"
    command = [sys.executable, "-c", code, *map(str, folders.values())]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    digests = {process.communicate(timeout=60)[0].strip() for process in running}
    assert digests == {simulated_roster(folders).digest}


def test_a_simulation_killed_between_the_two_files_of_a_key_goes_on(tmp_path: Path) -> None:
    folders = {"a": tmp_path / "a", "b": tmp_path / "b"}
    before = simulated_roster(folders)
    (folders["a"] / PUBLIC_FILE).unlink()  # the private key was written, its public half not yet
    assert isinstance(simulated_roster(folders), Roster)
    assert simulated_roster(folders) == before
