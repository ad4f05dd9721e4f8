"""Whole simulations through the phases moments, joint and local, under secure aggregation: the user's command."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from client.accountant import open_ledger
from common.config import StudyConfig
from common.privacy import accounting
from common.privacy.plan import make_plan, same_kind
from deploy.phantoms import write_bids
from server import checkpoints, joint_round, moments_round, record
from server.joint_trainer import JointTrainer
from server.record import RunRecord
from tests.deploy.command import Result, phased_study, synthward
from tests.deploy.test_secure_federation import between

NAMES = ("site-1", "site-2", "site-3", "site-4")
JOINT_STEPS, LOCAL_STEPS = 4, 3
PHASES = [
    {"algorithm": "moments", "share": 0.5},
    {"algorithm": "joint", "share": 0.3, "rounds": 2, "steps": JOINT_STEPS},
    {"algorithm": "local", "share": 0.2, "steps": LOCAL_STEPS},
]
ALGORITHMS = ["moments", "joint", "joint", "local"]
"""Of rounds 1 to 4."""
Serve = Callable[[], Message]


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four phantom hospitals of six patients."""
    folders = write_bids(tmp_path_factory.mktemp("four"), sites=4, patients=6, seed=3, shape=(40, 40, 24))
    return {folder.name: folder for folder in folders}


def three_phases(path: Path, **changes: Any) -> Path:
    """The study; what comes of the warm start and of the moments is not looked at here."""
    defaults: dict[str, Any] = {
        "federation__minimum_patients": 5,
        "federation__phase": PHASES,
        "gan__warm_start": "none",
        "gan__moments_steps": 12,
        "gan__discriminator_steps_per_generator_step": 2,
    }
    return phased_study(path, **{**defaults, **changes})


def simulate(hospitals: dict[str, Path], names: Sequence[str], study: Path, out: Path) -> Result:
    sites = [word for name in names for word in ("--site", f"{name}={hospitals[name]}")]
    return synthward("simulate", study, *sites, "--out", out)


def charged(out: Path, site: str) -> list[tuple[int, int]]:
    """Round and steps of every line of a site's own ledger."""
    return [(line.round, line.steps) for line in open_ledger(out / "sites" / site).lines()]


def check_accounts(out: Path, names: Sequence[str]) -> RunRecord:
    """Every site has charged what is planned at most, by mechanisms of the plan, and the record no less."""
    facts, study = RunRecord.load(out), StudyConfig.from_toml(out / "study.toml")
    plan = make_plan(study)
    assert plan is not None and plan.epsilon <= study.privacy.epsilon
    for name in names:
        history: accounting.History = ()
        for line in open_ledger(out / "sites" / name).lines():
            planned = plan.phases[study.phase_number(line.round)].mechanism
            assert same_kind(line.mechanism, planned)
            history = accounting.append(history, line.mechanism)
        assert plan.covers(history)
        recorded = record.history(facts.site(name))
        assert plan.covers(recorded)
        for mechanism in plan.history:
            steps = [sum(m.steps for m in each if same_kind(m, mechanism)) for each in (history, recorded)]
            assert steps[0] <= steps[1] <= mechanism.steps
        assert 0 < (facts.site(name).epsilon or 0) <= study.privacy.epsilon
    return facts


@pytest.mark.parametrize("aggregation", ["secure", "plain"])
def test_a_study_of_moments_joint_and_local_completes_within_its_plan(
    aggregation: str, hospitals: dict[str, Path], tmp_path: Path
) -> None:
    out, names = tmp_path / "run", NAMES[:3]
    study_path = three_phases(tmp_path / "s.toml", federation__aggregation=aggregation)
    result = simulate(hospitals, names, study_path, out)
    assert result.status == 0, result.err
    facts = check_accounts(out, names)
    assert (facts.status, facts.error, facts.rounds_completed) == ("completed", "", 4)
    study = StudyConfig.from_toml(out / "study.toml")
    plan = make_plan(study)
    assert plan is not None
    for name in names:
        assert charged(out, name) == [(1, 1), (2, JOINT_STEPS), (3, JOINT_STEPS), (4, LOCAL_STEPS)]
        site = facts.site(name)
        assert site.rounds == [1, 2, 3, 4] and site.refusals == {}
        assert record.history(site) == plan.history
        assert site.epsilon == pytest.approx(plan.epsilon, rel=1e-6)
    assert [(phase.algorithm, phase.rounds, phase.steps) for phase in facts.phases] == [
        ("moments", 1, 1), ("joint", 2, JOINT_STEPS), ("local", 1, LOCAL_STEPS)
    ]  # fmt: skip
    for told, planned in zip(facts.phases, plan.phases, strict=True):
        assert (told.noise_multiplier, told.clip_norm) == (planned.mechanism.noise_multiplier, planned.clip_norm)
    lines = record.read_metrics(out)
    assert [line["algorithm"] for line in lines] == ALGORITHMS
    assert [line.get("joint_steps") for line in lines] == [None, JOINT_STEPS, JOINT_STEPS, None]
    assert lines[0]["features"] > 100 and np.isfinite(lines[0]["residual_after"])
    states = [checkpoints.load(out / "checkpoints" / f"round-{number:04d}.pt") for number in range(5)]
    for before, after, algorithm in zip(states[:-1], states[1:], ALGORITHMS, strict=True):
        changed = not np.array_equal(before.discriminator, after.discriminator)
        assert changed == (algorithm != "moments")
    assert not (np.abs(states[4].generator - states[1].generator) == 0).all()


# ---------------------------------------------------------------- sites that fall out of a session


@pytest.mark.parametrize("dies", ["before it answers", "after its work", "refuses"])
def test_a_site_that_dies_in_a_session_is_back_in_the_next_round(
    dies: str, hospitals: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    seen: list[tuple[str, str, int]] = []

    def handle(site: str, stage: str, number: int, serve: Serve) -> Message:
        if stage == "begin_step" and number == 2:
            seen.append((site, stage, number))
        second = (site, number, stage) == ("site-1", 2, "begin_step") and seen.count((site, stage, number)) == 2
        if second and dies != "after its work":
            if dies == "refuses":
                (folder,) = (out / "sites" / site / "studies").iterdir()
                (folder / "secure-sum.sealed").unlink()  # as after a restart with another disk
                return serve()
            raise ConnectionError("the site is gone")
        reply = serve()
        if second:
            raise ConnectionError("the answer is lost")
        return reply

    study = three_phases(tmp_path / "s.toml", federation__minimum_sites=3)
    with between(handle):
        result = simulate(hospitals, NAMES, study, out)
    assert result.status == 0, result.err
    facts = check_accounts(out, NAMES)
    assert (facts.status, facts.error, facts.rounds_completed) == ("completed", "", 4)
    lines = record.read_metrics(out)
    code = "out_of_order" if dies == "refuses" else "node_error"
    assert [line["refused"] for line in lines] == [{}, {"site-1": code}, {}, {}]
    assert [line.get("joint_steps") for line in lines] == [None, JOINT_STEPS, JOINT_STEPS, None]
    assert [sorted(line["sites"]) for line in lines] == [list(NAMES)] * 4
    # The round was paid for whole before its first step, whatever became of it.
    for name in NAMES:
        assert charged(out, name) == [(1, 1), (2, JOINT_STEPS), (3, JOINT_STEPS), (4, LOCAL_STEPS)]


def test_a_session_that_too_few_are_left_in_ends_and_the_run_says_so(
    hospitals: dict[str, Path], tmp_path: Path
) -> None:
    """Two of four die in the third step of round 2: a shorter round; then they are dead for good, and the run fails."""
    out, count = tmp_path / "run", [0]

    def handle(site: str, stage: str, number: int, serve: Serve) -> Message:
        count[0] += (site, number, stage) == ("site-1", 2, "begin_step")
        if site in NAMES[:2] and (number > 2 or count[0] >= 3 and number == 2):
            raise ConnectionError("the site is gone")
        return serve()

    study = three_phases(tmp_path / "s.toml", federation__minimum_sites=3)
    with between(handle):
        result = simulate(hospitals, NAMES, study, out)
    assert result.status == 4
    assert "The secure sum of round 3 ended after" in result.err and "Traceback" not in result.err
    facts = check_accounts(out, NAMES)
    assert (facts.status, facts.error, facts.rounds_completed) == ("failed", "too_few_survivors", 2)
    lines = record.read_metrics(out)
    assert lines[1]["joint_steps"] == 2
    assert set(lines[1]["refused"]) == set(NAMES[:2])
    assert "too_few_survivors" in (out / "report.html").read_text()

    result = synthward("simulate", "--resume", out)  # all are back
    assert result.status == 0, result.err
    assert check_accounts(out, NAMES).rounds_completed == 4


# ---------------------------------------------------------------- Ctrl-C


def test_ctrl_c_in_a_joint_round_goes_on_from_the_trainer_that_was_kept(
    hospitals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, names, taken = tmp_path / "run", NAMES[:3], [0]
    step = JointTrainer.step

    def stopping(self: JointTrainer, total: Any) -> None:
        taken[0] += 1
        if taken[0] == JOINT_STEPS + 2:  # the second step of round 3
            raise KeyboardInterrupt
        step(self, total)

    phases = [dict(phase) for phase in PHASES]
    phases[1]["rounds"] = 3
    with monkeypatch.context() as patch:
        patch.setattr(JointTrainer, "step", stopping)
        result = simulate(hospitals, names, three_phases(tmp_path / "s.toml", federation__phase=phases), out)
    assert result.status == 130 and "--resume" in result.err
    facts = check_accounts(out, names)
    assert (facts.status, facts.rounds_completed) == ("interrupted", 2)
    kept = joint_round.trainer_path(out / "checkpoints", 2)
    assert kept.exists()

    opened: list[bytes] = []
    open_trainer = joint_round.open_trainer

    def listening(*arguments: Any) -> JointTrainer:
        trainer = open_trainer(*arguments)
        opened.append(trainer.to_bytes())
        return trainer

    before = kept.read_bytes()
    monkeypatch.setattr("server.rounds.open_trainer", listening)
    result = synthward("simulate", "--resume", out)
    assert result.status == 0, result.err
    assert opened[0] == before
    facts = check_accounts(out, names)
    # The round that was cut is paid for and lost: one of the three is not made, and the phase after it is.
    assert (facts.status, facts.error) == ("completed", "budget_exhausted")
    assert [line["round"] for line in record.read_metrics(out)] == [1, 2, 3, 5]
    for name in names:
        assert charged(out, name) == [(1, 1), *((n, JOINT_STEPS) for n in (2, 3, 3)), (5, LOCAL_STEPS)]


def test_ctrl_c_while_the_server_fits_the_moments_loses_no_release(
    hospitals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, names = tmp_path / "run", NAMES[:3]

    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(moments_round, "fit", stopped)
        result = simulate(hospitals, names, three_phases(tmp_path / "s.toml"), out)
    assert result.status == 130
    facts = check_accounts(out, names)
    assert (facts.status, facts.rounds_completed) == ("interrupted", 0)
    assert [charged(out, name) for name in names] == [[(1, 1)]] * 3

    result = synthward("simulate", "--resume", out)
    assert result.status == 0, result.err
    facts = check_accounts(out, names)
    assert (facts.status, facts.error, facts.rounds_completed) == ("completed", "", 4)
    assert [charged(out, name)[:1] for name in names] == [[(1, 1)]] * 3
    assert all(charged(out, name)[1][0] == 2 for name in names)
    assert [sorted(line["sites"]) for line in record.read_metrics(out)] == [list(names)] * 4


def test_a_kept_sum_that_is_damaged_is_named(
    hospitals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, names = tmp_path / "run", NAMES[:3]

    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(moments_round, "fit", stopped)
        simulate(hospitals, names, three_phases(tmp_path / "s.toml"), out)
    path = moments_round.sum_path(out / "checkpoints", 1)
    path.write_bytes(path.read_bytes()[:100])
    result = synthward("simulate", "--resume", out)
    assert result.status == 2 and "moments-sum-0001.npz is damaged" in result.err
