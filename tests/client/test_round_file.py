"""What lies on a site's disk during a secure sum: sealed, for its owner, overwritten and gone when it is over."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client import round_file
from client.round_file import ROUND_FILE, SERVED_FILE, RoundFile, last_attempt
from client.secagg import SiteRound
from common.errors import BadPeer, OutOfOrder, SiteError
from common.messages import EnrolRequest
from deploy.phantoms import write_bids
from server.secagg import SecureSum
from tests.client.attacker import Attacker, Folders
from tests.client.secure_sites import NAMES, ask, flower_task, make_sites, secure_study
from tests.consortium import ENCODING, STUDY, Consortium, members_of, vectors_of

SITES = ("a", "b", "c")
ORDER = ("advertise_keys", "share_keys", "opened", "masked_input", "confirm_survivors")


class OnDisk:
    """Three sites in one attempt, each of which lives in its file only: read, one stage, written, forgotten."""

    def __init__(self, folder: Path) -> None:
        self.members = members_of(SITES)
        self.consortium = Consortium(SITES, 50, members=self.members)
        self.vectors = vectors_of(SITES, 50)
        self.folders = {name: folder / name for name in SITES}
        for path in self.folders.values():
            path.mkdir(parents=True)
        self.server: SecureSum | None = None

    def file(self, name: str) -> RoundFile:
        """A new object every time, as in a new process."""
        return RoundFile(self.folders[name], self.members[name], STUDY)

    def path(self, name: str) -> Path:
        return self.folders[name] / ROUND_FILE

    def walk(self) -> Iterator[str]:
        """One stage after the other, up to the one named by each value."""
        for name in SITES:
            self.consortium.keys[name] = self.file(name).begin(1, 2)
        yield "advertise_keys"
        server = self.server = SecureSum(self.consortium.plan, self.consortium.keys)
        for name, share_request in server.share_keys_requests().items():
            with self.file(name).stage(1) as site:
                server.take_sealed_shares(name, site.share_keys(share_request))
        yield "share_keys"
        masked_requests = server.masked_input_requests(self.consortium.train)
        for name, masked_request in masked_requests.items():
            with self.file(name).stage(1) as site:
                site.open_shares(masked_request)
        yield "opened"
        for name in SITES:
            with self.file(name).stage(1) as site:
                server.take_masked_input(name, site.masked_input(self.vectors[name], ENCODING, 1)[0])
        yield "masked_input"
        for name, confirm_request in server.confirm_requests().items():
            with self.file(name).stage(1) as site:
                server.take_confirmation(name, site.confirm_survivors(confirm_request))
        yield "confirm_survivors"
        for name, unmask_request in server.unmask_requests().items():
            with self.file(name).stage(1) as site:
                server.take_unmask_shares(name, site.unmask(unmask_request))
            self.file(name).end(10**9)
        yield "unmask"

    def up_to(self, stage: str) -> "OnDisk":
        for reached in self.walk():
            if reached == stage:
                break
        return self

    def now(self, name: str) -> SiteRound:
        with self.file(name).stage(1) as site:
            return SiteRound.from_tree(site.member, site.to_tree())


def secrets_in(site: SiteRound) -> list[bytes]:
    halves = [held[half : half + 33] for held in site.held.values() for half in (0, 33)]
    return [secret for secret in (site.share_private, site.mask_private, site.self_mask, *halves) if secret]


def found_in(folder: Path, secret: bytes) -> list[str]:
    """The files below a folder that hold a secret, raw, in hex or as Python writes bytes."""
    forms = (secret, secret.hex().encode(), secret.hex().upper().encode(), repr(secret)[2:-1].encode())
    return [
        f"{path.name}"
        for path in folder.rglob("*")
        if path.is_file() and any(form in path.read_bytes() for form in forms)
    ]


@pytest.mark.parametrize("stage", ORDER)
def test_no_secret_is_on_disk_in_clear_in_any_stage(stage: str, tmp_path: Path) -> None:
    sites = OnDisk(tmp_path).up_to(stage)
    for name in SITES:
        secrets = secrets_in(sites.now(name))
        assert secrets  # or there would be nothing to find
        for secret in secrets:
            assert found_in(tmp_path, secret) == []
        assert found_in(tmp_path, sites.members[name].identity.private_bytes_raw()) == []
    # The control: what is looked for would be found.
    (tmp_path / "control").write_text(json.dumps(sites.now("a").to_tree()))
    assert all(found_in(tmp_path, secret) for secret in secrets_in(sites.now("a"))[:3])


@pytest.mark.parametrize("stage", ORDER)
def test_the_files_are_for_their_owner_only(stage: str, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        sites = OnDisk(tmp_path).up_to(stage)
    finally:
        os.umask(before)
    for name in SITES:
        files = [path for path in sites.folders[name].iterdir() if path.is_file()]
        assert {ROUND_FILE, SERVED_FILE} <= {path.name for path in files}
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)


def test_a_sum_whose_sites_live_on_disk_only_gives_the_sum_and_leaves_nothing(tmp_path: Path) -> None:
    sites = OnDisk(tmp_path).up_to("unmask")
    assert sites.server is not None
    plain = np.sum(list(sites.vectors.values()), axis=0)
    assert np.abs(sites.server.result() - plain).max() < 3 * 2.0**-ENCODING.fraction_bits
    for name in SITES:
        assert not sites.path(name).exists()
        assert last_attempt(sites.folders[name]) == 1


def test_every_version_of_the_file_is_overwritten_when_it_is_replaced_or_ended(tmp_path: Path) -> None:
    # A second link keeps each version's blocks: what is in them after the next stage is what a thief of the disk finds.
    sites, links = OnDisk(tmp_path), list[Path]()
    for stage in sites.walk():
        for link in links:
            content = link.read_bytes()
            assert len(content) > 200 and not any(content)
        if stage != "unmask":
            links.append(tmp_path / f"link-{stage}")
            os.link(sites.path("b"), links[-1])
            assert any(links[-1].read_bytes())
    assert len(links) == 5 and not sites.path("b").exists()


@pytest.mark.parametrize("stage", ORDER)
def test_a_refusal_in_any_stage_overwrites_and_unlinks(stage: str, tmp_path: Path) -> None:
    sites = OnDisk(tmp_path).up_to(stage)
    link = tmp_path / "link"
    os.link(sites.path("b"), link)
    with pytest.raises(BadPeer), sites.file("b").stage(1):
        raise BadPeer("whatever the site refuses")
    assert not sites.path("b").exists()
    assert len(link.read_bytes()) > 200 and not any(link.read_bytes())
    with pytest.raises(OutOfOrder), sites.file("b").stage(1):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_whatever_ends_a_stage_ends_the_attempt(error: type[BaseException], tmp_path: Path) -> None:
    sites = OnDisk(tmp_path).up_to("share_keys")
    with pytest.raises(error), sites.file("b").stage(1):
        raise error
    assert not sites.path("b").exists()


def test_a_newer_attempt_overwrites_the_one_before(tmp_path: Path) -> None:
    sites = OnDisk(tmp_path).up_to("masked_input")
    link = tmp_path / "link"
    os.link(sites.path("b"), link)
    sites.file("b").begin(2, 2)
    assert not any(link.read_bytes())
    with sites.file("b").stage(2) as newer:
        assert newer.stage == "advertise_keys"


def test_a_message_of_another_attempt_disturbs_nothing(tmp_path: Path) -> None:
    sites = OnDisk(tmp_path).up_to("share_keys")
    before = sites.path("b").read_bytes()
    for number in (0, 2, 99):
        with pytest.raises(OutOfOrder), sites.file("b").stage(number):
            pytest.fail("entered")
    with pytest.raises(OutOfOrder):
        sites.file("b").begin(1, 2)
    assert sites.path("b").read_bytes() == before


def test_the_attempt_is_on_disk_before_its_keys_leave(tmp_path: Path) -> None:
    sites = OnDisk(tmp_path)
    assert last_attempt(sites.folders["a"]) == 0
    sites.file("a").begin(7, 2)  # and the process dies here: nothing has left yet
    assert last_attempt(sites.folders["a"]) == 7
    for number in (7, 6, 1, 0):
        with pytest.raises(OutOfOrder):
            sites.file("a").begin(number, 2)
    assert sites.file("a").begin(8, 2).site == "a"
    assert last_attempt(sites.folders["a"]) == 8


def test_no_attempt_begins_when_it_cannot_be_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = OnDisk(tmp_path)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(round_file, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        sites.file("a").begin(1, 2)
    assert last_attempt(sites.folders["a"]) == 0


def test_a_disk_that_fills_up_ends_the_attempt_and_leaves_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = OnDisk(tmp_path).up_to("share_keys")
    link = tmp_path / "link"
    os.link(sites.path("b"), link)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(round_file, "write_atomically", full)
    with pytest.raises(OSError, match="No space"), sites.file("b").stage(1):
        pass
    assert not sites.path("b").exists() and not any(link.read_bytes())


@pytest.mark.parametrize("how", ["empty", "cut", "flipped", "zeros", "text", "longer"])
def test_a_damaged_file_is_named_and_the_next_attempt_works(how: str, tmp_path: Path) -> None:
    sites = OnDisk(tmp_path).up_to("share_keys")
    path = sites.path("b")
    content = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut": content[:-1],
        "flipped": content[:50] + bytes([content[50] ^ 1]) + content[51:],
        "zeros": bytes(len(content)),  # as a crash in the middle of overwriting leaves it
        "text": b"{}",
        "longer": content + b"\0",
    }[how]
    path.write_bytes(damaged)
    with pytest.raises(SiteError, match="damaged"), sites.file("b").stage(1):
        pytest.fail("entered")
    assert not path.exists()
    sites.file("b").begin(2, 2)
    with sites.file("b").stage(2) as again:
        assert again.stage == "advertise_keys"


def test_the_file_of_another_site_or_study_is_refused(tmp_path: Path) -> None:
    sites = OnDisk(tmp_path).up_to("share_keys")
    content = sites.path("a").read_bytes()
    sites.path("b").write_bytes(content)
    with pytest.raises(SiteError, match="damaged"), sites.file("b").stage(1):
        pytest.fail("entered")
    other_study = RoundFile(sites.folders["a"], sites.members["a"], "00" * 32)
    with pytest.raises(SiteError, match="damaged"), other_study.stage(1):
        pytest.fail("entered")


def test_an_old_version_of_the_file_put_back_after_the_attempt_is_of_no_use(tmp_path: Path) -> None:
    # Whoever can write the site's disk can put a stage back; the attempt's number still keeps it to that attempt.
    sites = OnDisk(tmp_path).up_to("share_keys")
    old = sites.path("b").read_bytes()
    sites.file("b").begin(2, 2)
    sites.path("b").write_bytes(old)
    with pytest.raises(OutOfOrder), sites.file("b").stage(2):
        pytest.fail("entered")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"attempt": -1}', b'{"attempt": "1"}', b'{"attempt": true}', b"\xff"]
)
def test_a_damaged_record_of_attempts_stops_the_site(content: bytes, tmp_path: Path) -> None:
    sites = OnDisk(tmp_path)
    (sites.folders["a"] / SERVED_FILE).write_bytes(content)
    with pytest.raises(SiteError, match="served twice"):
        sites.file("a").begin(5, 2)
    assert (sites.folders["a"] / SERVED_FILE).read_bytes() == content


def test_no_secret_and_no_share_is_in_the_log_of_a_whole_round_or_in_any_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the app, with training: every secret that any site ever held is noted, and looked for everywhere."""
    study, seen = secure_study(), set[bytes]()
    data = {name: tmp_path / "data" / f"site-{number}" for number, name in enumerate(NAMES, start=1)}
    write_bids(tmp_path / "data", sites=len(NAMES), patients=12, seed=1, shape=(24, 24, 12))
    folders = make_sites(tmp_path / "sites", data=data)
    keep = RoundFile._save

    def noting(file: RoundFile, current: SiteRound) -> None:
        seen.update(secrets_in(current))
        keep(file, current)

    monkeypatch.setattr(RoundFile, "_save", noting)
    with flower_task():
        for site in folders.values():
            ask(site, study, EnrolRequest(study.digest))
        sites = Folders(folders, study, tmp_path)
        attacker = Attacker(sites)
        attacker.walk("unmask")
        # And what goes wrong: refused keys, shares that do not open, an attempt served before.
        later = Attacker(sites, 9)
        later.walk("share_keys")
        spoilt = {name: bytes(82) for name in ("north", "south")}
        later.refused("east", later.masked_input("east", NAMES, spoilt), "bad_peer")
        later.refused("west", later.share_keys([]), "out_of_order")
        later.refused("south", later.request("advertise_keys", "south"), "out_of_order")
    assert len(seen) > 4 * (3 + 2 * 4)
    text = b"".join((site / "site.log").read_bytes() for site in folders.values())
    assert text.count(b"bad_peer") == 1 and text.count(b"out_of_order") == 2  # the log does say what happened
    for secret in seen:
        assert found_in(tmp_path / "sites", secret) == []
    for site in folders.values():
        identity = (site / "identity.key").read_bytes()
        assert identity.split(b"\n")[1] not in text
