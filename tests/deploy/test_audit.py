"""``synthward audit`` on real federations: plan before training, one verdict, what is spent, what is refused."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

import deploy.simulate
from client.ledger import Ledger
from common.audit.plan import load_signed_plan
from common.audit.verdict import FAIL, NO_RELEASE, PASS
from common.identity import make_identity
from deploy.local_grid import LocalGrid
from deploy.phantoms import write_bids
from server.audit import is_signed, read_audit
from server.audit_plan import PLAN_FILE
from server.record import RunRecord
from tests.client.sites import ledger_key_of
from tests.deploy.command import Result, synthward, tiny_study
from tests.deploy.conftest import bytes_of

SITES = ("east", "north", "west")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run of three sites with 25 patients each, not audited."""
    folder = tmp_path_factory.mktemp("audit")
    found = write_bids(folder / "data", sites=3, patients=25, seed=5, shape=(40, 40, 24))
    sites = [word for name, path in zip(SITES, found, strict=True) for word in ("--site", f"{name}={path}")]
    changes = {"federation__minimum_sites": 3, "audit": {"candidates": 1000}, "gan__warm_start_steps": 60}
    study = tiny_study(folder / "study.toml", **changes)
    result = synthward("simulate", study, *sites, "--out", folder / "run")
    assert result.status == 0, result.err
    return folder / "run"


@pytest.fixture(scope="module")
def audited(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, list[bytes]]:
    """The same run with its verdict, and all that the sites sent for it."""
    out = moved(trained, tmp_path_factory.mktemp("audited"))
    replies: list[bytes] = []

    class Listening(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            pulled = super().pull_messages(message_ids)
            replies.extend(map(bytes_of, pulled))
            return pulled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy.simulate, "LocalGrid", Listening)
        result = synthward("audit", out)
    return out, result, replies


def moved(run: Path, folder: Path) -> Path:
    """A copy of a run, whose sites know where they are."""
    out = Path(shutil.copytree(run, folder / "run"))
    for path in [*out.glob("sites/*/site.toml"), *out.glob("sites/*/policy.toml")]:
        path.write_text(path.read_text().replace(str(run), str(out)))
    return out


def lines_of(out: Path, site: str) -> int:
    """How many lines a site's ledger has."""
    folder = out / "sites" / site
    return len(Ledger(folder, ledger_key_of(folder)).read().lines)


def test_the_plan_is_registered_at_every_site_before_training(trained: Path) -> None:
    signed = load_signed_plan(trained / PLAN_FILE)
    assert signed.is_signed and signed.plan.fewest_sites == 3
    registered = list(trained.glob("sites/*/studies/*/audit-plan.json"))
    assert len(registered) == 3 and all(load_signed_plan(path) == signed for path in registered)


def test_an_audit_ends_with_a_signed_verdict_that_the_exit_status_tells(
    audited: tuple[Path, Result, list[bytes]],
) -> None:
    out, result, _ = audited
    found = read_audit(out)
    assert found is not None and is_signed(found)
    assert not is_signed({**found, "verdict": {**found["verdict"], "outcome": PASS + "!"}})
    outcome = found["verdict"]["outcome"]
    assert outcome in (PASS, FAIL, NO_RELEASE) and outcome in result.out
    assert result.status == (0 if outcome == PASS else 5)
    assert found["generator_digest"] == RunRecord.load(out).generator_digest
    assert outcome in (out / "report.html").read_text()


def test_an_audit_is_in_every_ledger_and_in_the_record(
    trained: Path, audited: tuple[Path, Result, list[bytes]]
) -> None:
    out = audited[0]
    for site in SITES:
        assert lines_of(out, site) == lines_of(trained, site) + 2
    for site in RunRecord.load(out).sites:
        assert site.audits is not None and site.audits.verdicts == 1


def test_a_second_verdict_is_refused(audited: tuple[Path, Result, list[bytes]]) -> None:
    out = audited[0]
    before = {site: lines_of(out, site) for site in SITES}
    again = synthward("audit", out)
    assert again.status == 2 and "has a verdict already" in again.err
    (out / "audit.json").rename(out / "kept.json")  # a server that forgets: the sites do not
    counts = out / "audit" / "counts.npz"
    counts.rename(counts.with_suffix(".kept"))
    again = synthward("audit", out)
    assert again.status == 4 and "budget_exhausted" in again.err
    assert {site: lines_of(out, site) for site in SITES} == before
    (out / "kept.json").rename(out / "audit.json")
    counts.with_suffix(".kept").rename(counts)


def test_an_audit_that_was_cut_after_the_answer_goes_on_for_nothing(
    audited: tuple[Path, Result, list[bytes]], tmp_path: Path
) -> None:
    out = moved(audited[0], tmp_path)
    (out / "audit.json").unlink()
    before = {site: lines_of(out, site) for site in SITES}
    again = synthward("audit", out)
    assert again.status == audited[1].status, again.err
    assert {site: lines_of(out, site) for site in SITES} == before


def test_nothing_of_a_patient_is_in_what_the_sites_send(audited: tuple[Path, Result, list[bytes]]) -> None:
    out, _, replies = audited
    everything = b"".join(replies)
    assert len(everything) > 10_000
    for pixels in out.glob("sites/*/prepared/*/*.npy"):
        for image in np.load(pixels)[:, 0]:
            row = image[len(image) // 2]
            assert len(set(row.tolist())) < 4 or row.tobytes() not in everything
    for pairs in out.glob("sites/*/studies/*/audit/pairs.npz"):
        with np.load(pairs) as saved:
            for name in ("matched", "training_scores", "held_out_scores", "sims"):
                assert saved[name].tobytes() not in everything


# ---------------------------------------------------------------- refused, and nothing spent


@pytest.mark.parametrize("spoilt", ["checkpoint", "running", "no plan", "other study"])
def test_a_run_that_cannot_be_audited_is_refused(spoilt: str, trained: Path, tmp_path: Path) -> None:
    out = moved(trained, tmp_path)
    facts = json.loads((out / "run.json").read_text())
    if spoilt == "checkpoint":
        newest = sorted((out / "checkpoints").glob("round-*.pt"))
        newest[-1].write_bytes(newest[-2].read_bytes())
    elif spoilt == "running":
        (out / "run.json").write_text(json.dumps({**facts, "status": "failed"}))
    elif spoilt == "no plan":
        (out / PLAN_FILE).unlink()
    else:
        (out / "run.json").write_text(json.dumps({**facts, "study_digest": "0" * 64}))
    result = synthward("audit", out)
    assert result.status == 2, result.err
    assert all(lines_of(out, site) == lines_of(trained, site) for site in SITES)


def test_a_site_that_is_missing_means_no_audit(trained: Path, tmp_path: Path) -> None:
    out = moved(trained, tmp_path)
    (out / "sites" / "north" / "policy.toml").unlink()
    result = synthward("audit", out)
    assert result.status == 4 and "north" in result.err
    assert all(lines_of(out, site) == lines_of(trained, site) for site in SITES)


def test_a_changed_roster_means_no_audit(
    trained: Path, audited: tuple[Path, Result, list[bytes]], tmp_path: Path
) -> None:
    out = moved(trained, tmp_path)
    (out / "audit").mkdir()
    shutil.copy(audited[0] / "audit" / "candidates.npz", out / "audit")  # making them takes long
    folder = out / "sites" / "north"
    make_identity(tmp_path / "visitor")
    keys = [f"{site}={out / 'sites' / site / 'identity.pub'}" for site in SITES]
    roster = tmp_path / "roster.json"
    made = synthward("roster", "make", *keys, f"visitor={tmp_path / 'visitor' / 'identity.pub'}", "--out", roster)
    assert made.status == 0, made.err
    digest = synthward("roster", "digest", roster).out.split()[0]
    for site in SITES:
        pinned = synthward("site", "pin", out / "sites" / site, roster, "--digest", digest)
        assert pinned.status == 0, pinned.err
    result = synthward("audit", out)
    assert result.status == 4 and "bad_peer" in result.err
    assert "another roster" in (folder / "site.log").read_text()
    assert all(lines_of(out, site) == lines_of(trained, site) for site in SITES)


# ---------------------------------------------------------------- the plan's own command


def test_a_plan_is_made_once_and_says_what_it_is(trained: Path, tmp_path: Path) -> None:
    make_identity(tmp_path / "coordinator")
    roster = next(trained.glob("sites/*/roster.json"))
    key, out = tmp_path / "coordinator" / "identity.key", tmp_path / "plan.json"
    words = ("audit", "plan", trained / "study.toml", "--roster", roster, "--key", key, "--out", out)
    made = synthward(*words)
    assert made.status == 0, made.err
    assert load_signed_plan(out).plan == load_signed_plan(trained / PLAN_FILE).plan
    assert synthward(*words).status == 2
    other = synthward("audit", trained, "--plan", out)  # the same plan, but of another coordinator
    assert other.status == 2 and "is not the plan" in other.err
