import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from PIL import Image

import deploy.simulate
from client import ledger
from client.accountant import open_ledger
from client.data.inventory import list_patients
from client.settings import SiteSettings
from common.config import StudyConfig
from common.privacy import accounting
from deploy.local_grid import LocalGrid
from deploy.runs import _kind_of_data
from server import checkpoints, record
from server.record import RunRecord
from tests.deploy.command import ONE_SITE, PLAIN, Result, synthward, tiny_study
from tests.deploy.conftest import MARK, Run


def charged(facts: RunRecord) -> list[int]:
    """Steps that the record charges each site."""
    return [accounting.num_steps(record.history(site)) for site in facts.sites]


def spent(out: Path) -> list[int]:
    """Steps in each site's own ledger, of the sites that have one."""
    ledgers = sorted(out.glob("sites/*/ledger.db"))
    return [sum(line.steps for line in open_ledger(path.parent).lines()) for path in ledgers]


# ---------------------------------------------------------------- what a run leaves


def test_the_user_is_told_where_the_report_is(run: Run) -> None:
    assert run.result.out == f"{run.folder / 'report.html'}\n"
    assert "round 2 of 2" in run.result.err
    assert "Traceback" not in run.result.err


def test_every_part_of_a_run_is_there(run: Run) -> None:
    found = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*")}
    rounds = {f"checkpoints/round-{n:04d}.pt" for n in range(3)} | {f"samples/round-{n:04d}.png" for n in range(3)}
    sites = {f"sites/{site}/{name}" for site, name in product(("north", "south"), ("holdout.key", "site.log"))}
    assert found >= {"run.json", "metrics.jsonl", "report.html", "study.toml"} | rounds | sites


def test_the_record_holds_what_was_promised(run: Run) -> None:
    facts = RunRecord.load(run.folder)
    study = StudyConfig.from_toml(run.folder / "study.toml")
    assert (facts.schema_version, facts.status, facts.error, facts.rounds_completed) == (2, "completed", "", 2)
    assert StudyConfig.model_validate(facts.study) == study
    assert facts.study_digest == study.digest
    assert facts.private
    assert "one patient" in facts.notice
    assert set(facts.versions) >= {"python", "synthward", "torch", "opacus", "flwr"}
    assert facts.device in ("cpu", "cuda")
    assert facts.aggregation == "secure"
    assert facts.seconds["total"] >= facts.seconds["enrolment"]
    started, finished = datetime.fromisoformat(facts.started), datetime.fromisoformat(facts.finished or "")
    assert timedelta(0) <= finished - started
    assert started.utcoffset() == timedelta(0)
    assert facts.warm_start is not None
    for site in facts.sites:
        assert site.rounds == [1, 2]
        assert (site.patients_trained, site.patients_held_out) == study.contracted_split(site.name) == (17, 8)
        assert len(site.holdout_commitment) == 64
        assert not site.record_is_patient


def test_epsilon_is_that_of_the_mechanisms_and_within_the_study(run: Run) -> None:
    facts = RunRecord.load(run.folder)
    assert [site.name for site in facts.sites] == ["north", "south"]
    for site in facts.sites:
        history = record.history(site)
        assert accounting.num_steps(history) == 2 * 3
        assert site.epsilon == accounting.epsilon(history, 1e-5)
        assert 7.9 < site.epsilon <= 8.0
        assert (site.delta, site.accountant) == (1e-5, "prv")
        lines = open_ledger(run.folder / "sites" / site.name).lines()
        assert {(line.sampling_probability, line.noise_multiplier) for line in lines} == {
            (0.25, facts.phases[0].noise_multiplier)
        }
        assert [(line.round, line.steps, line.run) for line in lines] == [(1, 3, facts.run), (2, 3, facts.run)]
        assert site.budget is not None
        assert (site.budget.epsilon, site.budget.delta, site.budget.spent_before) == (8.0, 1e-5, 0.0)
        assert site.budget.spent_here == site.budget.spent_after == site.epsilon


def test_a_site_with_too_few_patients_is_named_with_its_code(run: Run) -> None:
    facts = RunRecord.load(run.folder)
    assert facts.refused_sites == {"small": "site"}
    assert "small" not in facts.study["federation"]["contracted_patients"]
    assert "found 5" in (run.folder / "sites" / "small" / "site.log").read_text()
    report = (run.folder / "report.html").read_text()
    assert "small" in report
    assert "found 5" not in report + (run.folder / "run.json").read_text()


def test_metrics_have_a_line_a_round(run: Run) -> None:
    lines = record.read_metrics(run.folder)
    assert [line["round"] for line in lines] == [1, 2]
    for number, line in enumerate(lines, start=1):
        assert {name: site["steps_charged"] for name, site in line["sites"].items()} == dict(
            north=3 * number, south=3 * number
        )
        seconds = line["seconds"]
        assert seconds["round"] == pytest.approx(seconds["server"] + seconds["waiting_for_sites"], abs=0.01)
        assert np.isfinite([line["generator_loss"], line["discriminator_fake_loss"]]).all()


# ---------------------------------------------------------------- what stays at the sites


def public_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] != "sites"]


def test_the_mark_is_recognisable_at_its_site(run: Run) -> None:
    north = run.folder / "sites" / "north"
    assert any(MARK.encode() in path.read_bytes() for path in north.rglob("*.json"))


def test_no_patient_id_or_file_name_is_outside_the_sites(run: Run, hospitals: dict[str, Path]) -> None:
    secrets = {MARK} | {patient for path in hospitals.values() for patient in list_patients(path)}
    assert len(secrets) > 50
    for path in public_files(run.folder):
        content = path.read_bytes() + path.name.encode()
        assert [secret for secret in secrets if secret.encode() in content] == [], path


def test_no_reply_of_a_site_holds_a_patient_id_or_a_path(run: Run, hospitals: dict[str, Path]) -> None:
    secrets = {MARK} | {patient for path in hospitals.values() for patient in list_patients(path)}
    secrets |= {str(path) for path in hospitals.values()}
    # Of two sites: enrolment, the audit's plan, the first keys, and the four stages of two rounds.
    assert len(run.replies) == 2 * (1 + 1 + 1 + 4 * 2)
    assert sum(len(content) > 40_000 for content in run.replies) == 2 * 2  # the masked vectors
    for content in run.replies:
        assert len(content) > 100
        assert [secret for secret in secrets if secret.encode() in content] == []


def test_no_sample_is_a_real_slice(run: Run) -> None:
    real = [np.load(path) for path in run.folder.glob("sites/*/prepared/*/*.npy")]
    slices = np.concatenate(real).reshape(-1, 28 * 28).astype(np.float64)
    assert len(slices) >= 50 * 5
    grids = [np.asarray(Image.open(path)) for path in run.folder.glob("samples/*.png")]
    tiles = np.concatenate([grid.reshape(6, 28, 8, 28).swapaxes(1, 2).reshape(-1, 28 * 28) for grid in grids])

    def normalised(rows: np.ndarray) -> np.ndarray:
        centred = rows - rows.mean(1, keepdims=True)
        return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)

    assert (normalised(tiles.astype(np.float64)) @ normalised(slices).T).max() < 0.999


# ---------------------------------------------------------------- where data come from


def test_data_are_split_by_patient(hospitals: dict[str, Path], tmp_path: Path) -> None:
    study = tiny_study(tmp_path / "s.toml", federation__rounds=1, federation__minimum_patients=5)
    result = synthward("simulate", study, "--data", hospitals["south"], "--sites", 3, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    facts = RunRecord.load(tmp_path / "run")
    assert [site.name for site in facts.sites] == ["site-1", "site-2", "site-3"]
    owned: list[str] = []
    for site in facts.sites:
        (prepared,) = (tmp_path / "run" / "sites" / site.name / "prepared").iterdir()
        for index in (json.loads((prepared / f"{name}.json").read_text()) for name in ("training", "held_out")):
            owned += index["patient_ids"]
    assert len(owned) == 25
    assert sorted(owned) == sorted(list_patients(hospitals["south"]))  # hence nobody twice


def test_phantoms_need_no_data_and_no_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deploy.runs.EXAMPLES", tmp_path)
    tiny_study(tmp_path / "phantom.toml", **ONE_SITE)
    result = synthward("simulate", "--phantom", 20, "--sites", 1, "--rounds", 1, "--seed", 5)
    assert result.status == 0, result.err
    facts = RunRecord.load(tmp_path / "runs" / "tiny")  # the default folder has the study's name
    assert facts.study["seed"] == 5
    assert (tmp_path / "runs" / "tiny" / "phantoms" / "site-1" / "participants.tsv").exists()
    # All the privacy of the study is planned for the rounds asked for.
    assert facts.study["federation"]["rounds"] == facts.rounds_completed == 1
    assert accounting.num_steps(record.history(facts.sites[0])) == 3
    assert 7.9 < (facts.sites[0].epsilon or 0.0) <= 8.0


@pytest.mark.parametrize("kind", ["phantom", "brain-t1", "chest-xray"])
def test_the_built_in_studies_are_valid(kind: str) -> None:
    assert StudyConfig.from_toml(Path(deploy.simulate.__file__).parent / "examples" / f"{kind}.toml").name


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["images.tsv", "images/a.png"], "chest-xray"),
        (["a.JPG", "table.csv"], "chest-xray"),
        (["sub-1/anat/sub-1_T1w.nii.gz", "figures/overview.png"], "brain-t1"),
        (["series/1.dcm"], "brain-t1"),
        ([], "brain-t1"),
    ],
)
def test_the_data_choose_the_built_in_study(files: list[str], kind: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert _kind_of_data(Namespace(phantom=None, data=None, site=[("north", tmp_path)])) == kind


def test_without_privacy_everything_says_so(hospitals: dict[str, Path], tmp_path: Path) -> None:
    study = tiny_study(tmp_path / "s.toml", privacy__enabled=False, federation__rounds=1)
    sites = ("--site", f"north={hospitals['north']}", "--site", f"south={hospitals['south']}")
    assert synthward("simulate", study, *sites, "--out", tmp_path / "run").status == 0
    facts = RunRecord.load(tmp_path / "run")
    assert not facts.private
    assert [(phase.noise_multiplier, phase.sampling_probability) for phase in facts.phases] == [(None, None)]
    assert facts.notice.startswith("NOT PRIVATE")
    assert [(site.epsilon, site.delta, site.mechanisms) for site in facts.sites] == [(None, None, [])] * 2
    assert "NOT PRIVATE" in (tmp_path / "run" / "report.html").read_text()
    for form, marks in (("png", b"NOT PRIVATE"), ("nifti", None)):
        out = tmp_path / form
        assert synthward("generate", tmp_path / "run", "--count", 2, "--out", out, "--format", form).status == 0
        for path in out.glob("synthetic-*"):
            if marks is None:
                import nibabel

                assert nibabel.load(path).header["descrip"].item() == b"SYNTHETIC; NOT PRIVATE"
            else:
                assert marks in path.read_bytes()
        assert (out / "images.tsv").read_text().count("NOT PRIVATE") == 2


# ---------------------------------------------------------------- one site fails


def simulate_with(
    at: str, damage: Callable[[], None], arguments: tuple[object, ...], patch: pytest.MonkeyPatch
) -> Result:
    """Simulate, and do the damage once, just before the messages of group ``at`` are handed out."""
    groups: list[str] = []

    class Sabotaged(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            messages = list(messages)
            group = messages[0].metadata.group_id
            if group == at and at not in groups:
                damage()
            groups.append(group)
            return super().push_messages(messages)

    with patch.context() as context:
        context.setattr(deploy.simulate, "LocalGrid", Sabotaged)
        return synthward(*arguments)


def test_a_failing_site_leaves_a_code_and_keeps_the_reason(
    hospitals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    north, south = hospitals["north"], hospitals["south"]
    study = tiny_study(tmp_path / "s.toml", **ONE_SITE)

    def damage() -> None:
        shutil.rmtree(out / "sites" / "north" / "prepared")
        (state,) = (out / "sites" / "south" / "studies").glob("*/state.pt")
        state.write_bytes(b"not a state")

    sites = ("--site", f"north={north}", "--site", f"south={south}", "--site", f"west={south}")
    result = simulate_with("2", damage, ("simulate", study, *sites, "--out", out), monkeypatch)
    assert result.status == 0, result.err
    facts = RunRecord.load(out)
    assert (facts.status, facts.rounds_completed) == ("completed", 2)
    assert [(site.rounds, site.refusals) for site in facts.sites] == [
        ([1], {"site": 1}),
        ([1], {"site": 1}),
        ([1, 2], {}),
    ]
    assert [accounting.num_steps(record.history(site)) for site in facts.sites] == [3, 3, 6]
    assert "There are no prepared images" in (out / "sites" / "north" / "site.log").read_text()
    assert "state.pt is damaged" in (out / "sites" / "south" / "site.log").read_text()
    for path in public_files(out):
        assert not any(text in path.read_bytes() for text in (b"prepared images 'training'", b"is damaged"))
    assert record.read_metrics(out)[1]["refused"] == {"north": "site", "south": "site"}


def test_data_that_are_gone_after_enrolment_do_not_matter(
    hospitals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    north = Path(shutil.copytree(hospitals["north"], tmp_path / "north"))
    study = tiny_study(tmp_path / "s.toml")
    sites = ("--site", f"north={north}", "--site", f"south={hospitals['south']}")
    arguments = ("simulate", study, *sites, "--out", tmp_path / "run")
    assert simulate_with("2", lambda: shutil.rmtree(north), arguments, monkeypatch).status == 0
    assert [site.rounds for site in RunRecord.load(tmp_path / "run").sites] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("aggregation", ["plain", "secure"])
def test_too_few_survivors_is_4_and_can_be_resumed(
    aggregation: str, hospitals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    # A masked update never leaves twice, so under masks each attempt at a round costs a round of the plan.
    rounds = {"plain": 2, "secure": 4}[aggregation]
    study = tiny_study(tmp_path / "s.toml", federation__aggregation=aggregation, federation__rounds=rounds)
    sites = ("--site", f"north={hospitals['north']}", "--site", f"south={hospitals['south']}")
    prepared = out / "sites" / "north" / "prepared"
    result = simulate_with(
        "2", lambda: prepared.rename(tmp_path / "away"), ("simulate", study, *sites, "--out", out), monkeypatch
    )
    assert result.status == 4
    assert {
        "plain": "Round 2 needs updates of at least 2 sites, got 1. (north: site)",
        "secure": "The secure sum of round 2 ended after advertise_keys: it needs 2 sites, 1 left. (north: site)",
    }[aggregation] in result.err
    assert "Traceback" not in result.err
    failed = RunRecord.load(out)
    assert (failed.status, failed.error, failed.rounds_completed) == ("failed", "too_few_survivors", 1)
    # South's update of round 2 left the site, so it counts although the round did not.
    assert charged(failed) == [3, 6]
    assert charged(failed) == spent(out)
    assert "Failed: too_few_survivors" in (out / "report.html").read_text()

    (tmp_path / "away").rename(prepared)
    assert synthward("simulate", "--resume", out).status == 0
    facts = RunRecord.load(out)
    assert (facts.status, facts.rounds_completed) == ("completed", {"plain": 2, "secure": 3}[aggregation])
    assert facts.error == {"plain": "", "secure": "budget_exhausted"}[aggregation]
    assert charged(facts) == spent(out) == {"plain": [6, 6], "secure": [9, 12]}[aggregation]


def test_a_site_whose_folder_is_gone_does_not_stop_a_resumed_run(copied: Path) -> None:
    study = StudyConfig.from_toml(copied / "study.toml")
    (copied / "checkpoints" / "round-0002.pt").unlink()
    shutil.rmtree(copied / "sites" / "north")
    result = synthward("simulate", "--resume", copied)
    assert result.status == 4  # this study needs both
    assert study.federation.minimum_sites == 2
    facts = RunRecord.load(copied)
    assert (facts.refused_sites, facts.refused_nodes) == ({"small": "site"}, ["site"])


# ---------------------------------------------------------------- resuming


def test_resuming_a_completed_run_changes_nothing(copied: Path) -> None:
    before = RunRecord.load(copied)
    assert synthward("simulate", "--resume", copied).status == 0
    after = RunRecord.load(copied)
    assert after.rounds_completed == 2
    assert [(s.epsilon, s.rounds, s.mechanisms) for s in after.sites] == [
        (s.epsilon, s.rounds, s.mechanisms) for s in before.sites
    ]


def test_a_repeated_plain_round_is_answered_from_the_state_and_costs_nothing(
    hospitals: dict[str, Path], tmp_path: Path
) -> None:
    """As after a kill between the sites' answers and the checkpoint, in the middle of a line of metrics."""
    out, study = tmp_path / "run", tiny_study(tmp_path / "s.toml", **PLAIN)
    sites = ("--site", f"north={hospitals['north']}", "--site", f"south={hospitals['south']}")
    assert synthward("simulate", study, *sites, "--out", out).status == 0
    first = checkpoints.latest(out / "checkpoints")
    (out / "checkpoints" / "round-0002.pt").unlink()
    metrics = out / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-40])
    assert synthward("simulate", "--resume", out).status == 0
    facts = RunRecord.load(out)
    assert (facts.status, facts.rounds_completed) == ("completed", 2)
    assert charged(facts) == spent(out) == [6, 6]
    assert [site.rounds for site in facts.sites] == [[1, 2], [1, 2]]
    assert [line["round"] for line in record.read_metrics(out)] == [1, 2]
    again = checkpoints.latest(out / "checkpoints")
    assert again is not None and first is not None
    np.testing.assert_array_equal(again.generator, first.generator)


@pytest.mark.parametrize("state_is_gone", [True, False])
def test_spent_budgets_end_the_run_as_completed(state_is_gone: bool, copied: Path) -> None:
    """As after an interruption in the middle of a round: its steps are charged, its result is lost.

    So it is also when the sites still have their updates: those left masked once, and never leave a second time.
    """
    (copied / "checkpoints" / "round-0002.pt").unlink()
    for state in copied.glob("sites/*/studies/*/state.pt"):
        if state_is_gone:
            state.unlink()
    result = synthward("simulate", "--resume", copied)
    assert result.status == 0, result.err
    facts = RunRecord.load(copied)
    assert (facts.status, facts.error, facts.rounds_completed) == ("completed", "budget_exhausted", 1)
    assert charged(facts) == spent(copied) == [6, 6]
    assert [site.rounds for site in facts.sites] == [[1], [1]]


def test_a_run_stopped_before_its_record_begins_again(copied: Path) -> None:
    """As after a kill in the warm start."""
    for name in ("run.json", "metrics.jsonl"):
        (copied / name).unlink()
    for folder in ("checkpoints", "samples", "sites/north/studies", "sites/south/studies"):
        shutil.rmtree(copied / folder)
    for site in ("north", "south"):
        for path in (copied / "sites" / site).glob("ledger*"):
            path.unlink()
        ledger.create(copied / "sites" / site)
    assert synthward("simulate", "--resume", copied).status == 0
    facts = RunRecord.load(copied)
    assert (facts.status, facts.rounds_completed) == ("completed", 2)
    assert [accounting.num_steps(record.history(site)) for site in facts.sites] == [6, 6]
    assert facts.refused_sites == {"small": "site"}  # refused in preparation, before there was a record


def test_a_resumed_run_computes_where_it_is_told_or_where_it_did(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resumed(*arguments: str) -> tuple[int, str, list[str]]:
        facts = RunRecord.load(copied)
        facts.device = "elsewhere"
        facts.save(copied)
        status = synthward("simulate", "--resume", copied, *arguments).status
        sites = [SiteSettings.load(copied / "sites" / name).device for name in ("north", "south")]
        return status, RunRecord.load(copied).device, sites

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resumed() == (0, "cpu", ["auto", "auto"])
    assert resumed("--device", "cuda") == (2, "elsewhere", ["auto", "auto"])
    assert resumed("--device", "cpu") == (0, "cpu", ["cpu", "cpu"])
    assert resumed() == (0, "cpu", ["cpu", "cpu"])
    north = copied / "sites" / "north" / "site.toml"
    north.write_text(north.read_text().replace('"cpu"', '"cuda"'))
    assert resumed() == (2, "elsewhere", ["cuda", "cpu"])  # the sites' own device is the run's


@pytest.mark.parametrize("lost", ["ledger.db", "ledger*", "policy.toml"])
def test_a_lost_ledger_or_policy_is_never_replaced(lost: str, copied: Path) -> None:
    (copied / "checkpoints" / "round-0002.pt").unlink()
    for path in copied.glob(f"sites/*/{lost}"):
        path.unlink()
    result = synthward("simulate", "--resume", copied)
    assert result.status == 4
    facts = RunRecord.load(copied)  # each site itself refuses, before it says that it has spent nothing
    code = "policy" if lost == "policy.toml" else "ledger"
    assert (facts.refused_sites, facts.refused_nodes) == ({"small": "site"}, [code, code])
    assert charged(facts) == [6, 6]
    assert not [path for path in copied.glob(f"sites/*/{lost}") if path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("sites", "changes", "reason"),
    [
        (1, {}, "at least 2 sites, found 1"),
        (32, {"secure_aggregation": {"modulus_bits": 21}}, "modulus_bits=21 cannot hold 32 sites"),
    ],
)
def test_a_number_of_sites_that_no_data_can_help_is_refused_before_any_are_made(
    sites: int, changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    study = tiny_study(tmp_path / "study.toml", **changes)
    result = synthward("simulate", study, "--phantom", 20, "--sites", sites, "--out", tmp_path / "run")
    assert (result.status, reason in result.err) == (2, True), result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["phantom", "brain-t1", "chest-xray"])
def test_the_built_in_studies_hold_two_hundred_sites_and_more(kind: str) -> None:
    study = StudyConfig.from_toml(Path(deploy.simulate.__file__).with_name("examples") / f"{kind}.toml")
    for sites in (2, 31, 32, 200, 10_000):
        deploy.simulate.check_number(study, sites)
