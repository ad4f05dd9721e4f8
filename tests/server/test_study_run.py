from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import StudyConfig
from common.errors import ConfigError, TooFewSurvivors
from common.messages import Enrolment, EnrolRequest, LocalUpdate, Refusal, Reply, TrainRequest
from common.privacy import accounting
from common.privacy.accounting import Budget, Mechanism
from common.privacy.plan import make_plan, same_kind
from server import checkpoints, record
from server.aggregation import GanState
from server.record import RunRecord
from server.study_run import run_study
from tests.server.scripted import TRAINED, WAITED_SECONDS, Scripted, honest, planned, two_sites


def run(study: StudyConfig, sites: Scripted, out: Path, *, resume: bool = False) -> RunRecord:
    run_study(study, sites, out, "cpu", resume)
    return RunRecord.load(out)


def stop(at: str, error: type[BaseException]) -> Callable[[str], None]:
    """For ``Scripted.before``: raise when the messages of this group have gone out."""

    def before(group: str) -> None:
        if group == at:
            raise error

    return before


BUDGET = Budget(8.0, 1e-5)


def stop_in(sites: Scripted, out: Path, at: str, error: type[BaseException]) -> RunRecord:
    """Begin a run that stops while it waits for the answers of this group. The sites are then there for another."""
    with pytest.raises(error):
        run(sites.study, replace(sites, before=stop(at, error)), out)  # shares what the sites have spent
    return RunRecord.load(out)


def steps(facts: RunRecord) -> dict[str, int]:
    return {site.name: accounting.num_steps(record.history(site)) for site in facts.sites}


def test_a_study_runs_to_its_last_round(tmp_path: Path) -> None:
    study = two_sites()
    sites = Scripted(study)
    facts = run(study, sites, tmp_path)
    assert sites.asked == ["enrol", "1", "2"]
    assert (facts.status, facts.rounds_completed) == ("completed", 2)
    assert steps(facts) == {"north": 6, "south": 6}
    first, last = (checkpoints.load(tmp_path / "checkpoints" / f"round-000{n}.pt") for n in (0, 2))
    np.testing.assert_allclose(last.generator, first.generator + 2 * TRAINED, rtol=1e-5)
    np.testing.assert_allclose(last.discriminator, first.discriminator + 2 * TRAINED, rtol=1e-5)
    assert facts.aggregation == "plain"


def test_the_metrics_split_a_round_into_waiting_and_work(tmp_path: Path) -> None:
    study = two_sites()
    run(study, Scripted(study), tmp_path)
    for line in record.read_metrics(tmp_path):
        seconds = line["seconds"]
        assert seconds["waiting_for_sites"] == WAITED_SECONDS  # of this round alone: enrolment waited as well
        assert seconds["round"] == pytest.approx(seconds["waiting_for_sites"] + seconds["server"], abs=0.002)
        assert all(set(site) == {"steps_charged", "epsilon_rdp"} for site in line["sites"].values())


def test_a_second_run_does_not_write_over_the_first(tmp_path: Path) -> None:
    study = two_sites()
    run(study, Scripted(study), tmp_path)
    with pytest.raises(ConfigError, match="already holds a run"):
        run(study, Scripted(study), tmp_path)


def test_another_study_cannot_take_over(tmp_path: Path) -> None:
    study = two_sites()
    run(study, Scripted(study), tmp_path)
    other = two_sites(rounds=3)
    with pytest.raises(ConfigError, match="another study"):
        run(other, Scripted(other), tmp_path, resume=True)


# ---------------------------------------------------------------- enrolment


def test_every_site_is_told_the_run_and_the_studys_signature(tmp_path: Path) -> None:
    study = two_sites()
    sites = Scripted(study)
    facts = run_study(study, sites, tmp_path, "cpu", resume=False, signature=b"signed")
    assert sites.enrolments == [EnrolRequest(study.digest, facts.run, b"signed")] * 2
    assert len(facts.run) == 16
    run_study(study, sites, tmp_path, "cpu", resume=True)
    assert sites.enrolments[2:] == [EnrolRequest(study.digest, facts.run, b"")] * 2  # the same run goes on


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (Enrolment("north", "cd" * 32, False), "malformed"),  # a name that another node has
        (Enrolment("stranger", "cd" * 32, False), "malformed"),  # no contract
        (Refusal("site"), "site"),
        (Refusal("no_answer"), "no_answer"),
    ],
)
def test_who_cannot_enrol_takes_no_part(reply: Reply, code: str, tmp_path: Path) -> None:
    study = two_sites()
    facts = run(study, Scripted(study, enrol={3: reply}), tmp_path)
    assert facts.status == "completed"
    assert [site.name for site in facts.sites] == ["north"]
    assert facts.sites[0].holdout_commitment == "ab" * 32
    assert (facts.refused_sites, facts.refused_nodes) == ({}, [code])


def test_what_sites_commit_themselves_to_is_on_disk_before_the_first_round(tmp_path: Path) -> None:
    study = two_sites()
    seen: list[list[str]] = []

    def before(group: str) -> None:
        seen.append([site.holdout_commitment for site in RunRecord.load(tmp_path).sites])

    run(study, Scripted(study, before=before), tmp_path)
    assert seen[:2] == [[], ["ab" * 32, "ab" * 32]]  # asked to enrol, asked for round 1


@pytest.mark.parametrize(
    "changed", [Enrolment("south", "cd" * 32, False, budget=BUDGET), Enrolment("south", "ab" * 32, True, budget=BUDGET)]
)
def test_a_site_cannot_come_back_with_another_split_or_unit(changed: Enrolment, tmp_path: Path) -> None:
    study = two_sites()
    sites = Scripted(study)
    stop_in(sites, tmp_path, "2", KeyboardInterrupt)
    changed = replace(changed, history=planned(study, 3))
    facts = run(study, replace(sites, enrol={3: changed}), tmp_path, resume=True)
    assert facts.refused_sites == {"south": "enrolment_changed"}
    assert facts.site("south").holdout_commitment == "ab" * 32
    assert [site.rounds for site in facts.sites] == [[1, 2], [1]]
    assert steps(facts) == {"north": 6, "south": 6}  # what the record charged south stays: round 2 may be trained


def test_a_resumed_run_asks_refused_sites_anew_but_not_those_without_a_contract(tmp_path: Path) -> None:
    study = two_sites()
    with pytest.raises(KeyboardInterrupt):
        sites = Scripted(study, enrol={3: Refusal("site")}, before=stop("2", KeyboardInterrupt))
        run_study(study, sites, tmp_path, "cpu", False, {"west": "privacy"})
    assert RunRecord.load(tmp_path).refused_nodes == ["site"]
    facts = run(study, Scripted(study, spent=sites.spent, last=sites.last), tmp_path, resume=True)
    assert (facts.refused_sites, facts.refused_nodes) == ({"west": "privacy"}, [])


def test_a_site_may_check_its_data_as_long_as_a_round_takes(tmp_path: Path) -> None:
    study = two_sites(round_timeout_seconds=7200.0)
    sites = Scripted(study)
    run(study, sites, tmp_path)
    assert sites.timeouts == [7200.0] * 3


def test_too_few_enrolled_sites_fail_the_run(tmp_path: Path) -> None:
    study = two_sites(minimum_sites=2)
    with pytest.raises(TooFewSurvivors, match=r"at least 2 sites to enrol, got 1 \(missing: north; refused: site\)"):
        run(study, Scripted(study, enrol={2: Refusal("site")}), tmp_path)
    facts = RunRecord.load(tmp_path)
    assert (facts.status, facts.error) == ("failed", "too_few_survivors")
    assert facts.finished


def test_a_site_that_counts_records_is_in_the_notice(tmp_path: Path) -> None:
    study = two_sites()
    facts = run(study, Scripted(study, enrol={3: Enrolment("south", "cd" * 32, True, budget=BUDGET)}), tmp_path)
    assert "one record (image)" in facts.notice


def secure_study(minimum_sites: int = 3) -> StudyConfig:
    contract = {"north": 25, "south": 75, "west": 40}
    return two_sites(aggregation="secure", minimum_sites=minimum_sites, contracted_patients=contract)


def member(site: str, **changes: object) -> Enrolment:
    return replace(Enrolment(site, "ab" * 32, False, (), (), BUDGET, 0, "1d" * 32, "aa" * 32), **changes)  # type: ignore[arg-type]


def enrolled(study: StudyConfig, out: Path, west: Enrolment) -> RunRecord:
    """The record of a run that west's enrolment ends: the study needs all three."""
    replies: dict[int, Reply] = {2: member("north"), 3: member("south"), 4: west}
    sites = Scripted(study, names=("north", "south", "west"), enrol=replies)
    with pytest.raises(TooFewSurvivors, match="at least 3 sites to enrol, got 2"):
        run(study, sites, out)
    assert sites.asked == ["enrol"]
    return RunRecord.load(out)


def test_a_site_that_pinned_another_roster_than_the_most_takes_no_part(tmp_path: Path) -> None:
    """It could verify none of the others' keys, and they not its own."""
    facts = enrolled(secure_study(), tmp_path, member("west", roster_digest="bb" * 32))
    assert (facts.refused_sites, facts.refused_nodes) == ({"west": "other_roster"}, [])
    assert [site.name for site in facts.sites] == ["north", "south"]
    assert facts.aggregation == "secure"


@pytest.mark.parametrize("identity", ["", "1d" * 31, "1D" * 32, "xy" * 32, "1d" * 32 + "\n"])
def test_a_secure_study_needs_a_public_key_of_every_site(identity: str, tmp_path: Path) -> None:
    facts = enrolled(secure_study(), tmp_path, member("west", identity=identity))
    assert (facts.refused_sites, facts.refused_nodes) == ({}, ["malformed"])


@pytest.mark.parametrize(
    "history",
    [
        (Mechanism(1.0, 0.5, 3),),  # another noise than the study plans
        (Mechanism(0.5, 1.0, 3),),  # another sampling
        "more than the plan",
    ],
)
def test_a_history_that_cannot_be_true_is_refused_at_enrolment(
    history: tuple[Mechanism, ...] | str, tmp_path: Path
) -> None:
    study = two_sites()
    said = planned(study, 7) if isinstance(history, str) else history
    facts = run(study, Scripted(study, enrol={3: Enrolment("south", "ab" * 32, False, said, budget=BUDGET)}), tmp_path)
    assert facts.refused_sites == {"south": "enrolment_changed"}
    assert [site.name for site in facts.sites] == ["north"]


def test_a_site_that_answered_cannot_come_back_with_less_than_it_answered(tmp_path: Path) -> None:
    study = two_sites()
    sites = Scripted(study)
    stop_in(sites, tmp_path, "2", KeyboardInterrupt)
    less = Enrolment("south", "ab" * 32, False, planned(study, 2), budget=BUDGET)
    facts = run(study, replace(sites, enrol={3: less}), tmp_path, resume=True)
    assert facts.refused_sites == {"south": "enrolment_changed"}
    assert steps(facts)["south"] == 6  # as the record had it


def test_what_a_site_has_spent_before_it_joins_counts(tmp_path: Path) -> None:
    study = two_sites(rounds=3)
    facts = run(study, Scripted(study, spent={"south": 4}), tmp_path)
    assert steps(facts) == {"north": 9, "south": 9}
    first = record.read_metrics(tmp_path)[0]["sites"]
    assert (first["north"]["steps_charged"], first["south"]["steps_charged"]) == (3, 7)


def test_what_other_studies_spent_is_told_beside_this_one_and_the_budget(tmp_path: Path) -> None:
    study, earlier = two_sites(), (Mechanism(0.5, 3.0, 40),)
    south = Enrolment("south", "ab" * 32, False, (), earlier, Budget(12.0, 1e-6))
    facts = run(study, Scripted(study, enrol={3: south}), tmp_path)
    budgets = {site.name: site.budget for site in facts.sites}
    own = record.history(facts.site("south"))
    assert budgets["south"] == record.BudgetRecord(
        epsilon=12.0,
        delta=1e-6,
        spent_before=accounting.epsilon(earlier, 1e-6),
        spent_here=accounting.epsilon(own, 1e-6),
        spent_after=accounting.epsilon((*earlier, *own), 1e-6),
    )
    assert budgets["north"] is not None
    assert (budgets["north"].spent_before, budgets["north"].spent_after) == (0.0, facts.site("north").epsilon)


def test_a_private_study_needs_a_budget_of_every_site(tmp_path: Path) -> None:
    study = two_sites()
    facts = run(study, Scripted(study, enrol={3: Enrolment("south", "ab" * 32, False)}), tmp_path)
    assert (facts.refused_sites, facts.refused_nodes) == ({}, ["malformed"])


def test_a_site_whose_budget_ends_stops_and_the_others_go_on(tmp_path: Path) -> None:
    study = two_sites(rounds=3)
    sites = Scripted(study)
    sites.train = {3: lambda r: Refusal("over_budget") if r.round > 1 else sites.trained("south", r)}
    facts = run(study, sites, tmp_path)
    assert (facts.status, facts.error, facts.rounds_completed) == ("completed", "", 3)
    assert steps(facts) == {"north": 9, "south": 3}  # what was refused before it was charged is not charged
    assert facts.site("south").refusals == {"over_budget": 2}


def test_when_every_budget_ends_the_run_ends_with_what_it_has(tmp_path: Path) -> None:
    study = two_sites(rounds=3, minimum_sites=2)
    sites = Scripted(study)
    sites.train = {3: lambda r: Refusal("over_budget") if r.round > 1 else sites.trained("south", r)}
    facts = run(study, sites, tmp_path)
    assert (facts.status, facts.error, facts.rounds_completed) == ("completed", "budget_exhausted", 1)


# ---------------------------------------------------------------- what a site is charged


def late(request: TrainRequest) -> Reply:
    return Refusal("no_answer")


def test_a_round_is_charged_on_disk_before_it_is_asked_for(tmp_path: Path) -> None:
    """So that a kill at any moment leaves no figure below a site's accountant."""
    study = two_sites()
    seen: list[dict[str, int]] = []
    run(study, Scripted(study, before=lambda group: seen.append(steps(RunRecord.load(tmp_path)))), tmp_path)
    assert seen == [{}, {"north": 3, "south": 3}, {"north": 6, "south": 6}]


def test_a_late_site_is_charged_as_planned(tmp_path: Path) -> None:
    """What was asked may have come to it, so nothing is taken back while the run goes on."""
    study = two_sites(rounds=3)
    seen: list[dict[str, int]] = []
    sites = Scripted(study, before=lambda group: seen.append(steps(RunRecord.load(tmp_path))))
    sites.train = {3: lambda request: late(request) if request.round == 1 else sites.trained("south", request)}
    facts = run(study, sites, tmp_path)
    assert [charged["south"] for charged in seen[1:]] == [3, 6, 9]
    assert steps(facts) == {"north": 9, "south": 9}
    assert sites.spent == {"north": 9, "south": 6}
    assert [(site.rounds, site.refusals) for site in facts.sites] == [([1, 2, 3], {}), ([2, 3], {"no_answer": 1})]


def test_a_resumed_run_takes_over_what_the_sites_themselves_have_charged(tmp_path: Path) -> None:
    """South was late and never trained round 1; north trained round 2, and the server never saw it."""
    study = two_sites(rounds=3)
    sites = Scripted(study, train={3: late})
    assert steps(stop_in(sites, tmp_path, "2", KeyboardInterrupt)) == {"north": 6, "south": 6}
    sites.spent["north"] += 3
    seen: list[dict[str, int]] = []

    def before(group: str) -> None:
        seen.append(steps(RunRecord.load(tmp_path)))

    facts = run(study, replace(sites, train={}, before=before), tmp_path, resume=True)
    assert seen[1] == {"north": 9, "south": 3}  # 6 and 0, and the round that they are about to be asked for
    assert steps(facts) == {"north": 9, "south": 6}
    assert sites.spent == {"north": 9, "south": 6}


def test_a_site_late_for_ever_is_charged_no_more_than_the_plan(tmp_path: Path) -> None:
    study = two_sites(rounds=3)
    facts = run(study, Scripted(study, train={3: late}), tmp_path)
    assert steps(facts) == {"north": 9, "south": 9}
    assert facts.sites[1].epsilon == facts.sites[0].epsilon
    assert facts.sites[1].rounds == []


def test_an_update_that_does_not_fit_is_charged_too(tmp_path: Path) -> None:
    study = two_sites()

    def train(request: TrainRequest) -> Reply:
        return replace(honest(study, "south", request), vector=np.zeros(1, np.float32))

    facts = run(study, Scripted(study, train={3: train}), tmp_path)
    assert steps(facts) == {"north": 6, "south": 6}
    assert facts.sites[1].refusals == {"malformed": 2}


def test_a_refusal_costs_nothing(tmp_path: Path) -> None:
    study = two_sites()
    facts = run(study, Scripted(study, train={3: lambda request: Refusal("site")}), tmp_path)
    assert steps(facts) == {"north": 6, "south": 0}
    assert facts.sites[1].epsilon == 0.0


def test_an_update_of_a_round_that_failed_counts(tmp_path: Path) -> None:
    study = two_sites(minimum_sites=2, rounds=3)
    sites = Scripted(study)
    sites.train = {3: lambda request: sites.trained("south", request) if request.round == 1 else Refusal("internal")}
    with pytest.raises(
        TooFewSurvivors, match=r"Round 2 needs updates of at least 2 sites, got 1\. \(south: internal\)"
    ):
        run(study, sites, tmp_path)
    assert sites.asked == ["enrol", "1", "2", "2"]
    facts = RunRecord.load(tmp_path)
    assert (facts.status, facts.error, facts.rounds_completed) == ("failed", "too_few_survivors", 1)
    assert steps(facts) == {"north": 9, "south": 9}  # two attempts at round 2, each planned and charged
    assert facts.site("south").refusals == {"internal": 2}
    assert [site.rounds for site in facts.sites] == [[1], [1]]


def once(sites: Scripted, code: str) -> Callable[[TrainRequest], Reply]:
    """South refuses one time in each round, then does what it is asked."""
    refused: set[int] = set()

    def train(request: TrainRequest) -> Reply:
        if request.round in refused:
            return sites.trained("south", request)
        refused.add(request.round)
        return Refusal(code)

    return train


def test_a_round_that_failed_is_tried_once_more(tmp_path: Path) -> None:
    """And the next one has two attempts of its own."""
    study = two_sites(minimum_sites=2)
    sites = Scripted(study)
    sites.train = {3: once(sites, "site")}
    facts = run(study, sites, tmp_path)
    assert sites.asked == ["enrol", "1", "1", "2", "2"]
    assert (facts.status, facts.rounds_completed) == ("completed", 2)
    assert [site.rounds for site in facts.sites] == [[1, 2], [1, 2]]
    assert facts.site("south").refusals == {"site": 2}
    first, last = (checkpoints.load(tmp_path / "checkpoints" / f"round-000{n}.pt") for n in (0, 2))
    np.testing.assert_allclose(last.generator, first.generator + 2 * TRAINED, rtol=1e-5)  # each round once


def test_an_attempt_that_failed_is_charged_and_the_second_one_too(tmp_path: Path) -> None:
    study = two_sites(minimum_sites=2, rounds=4)
    sites = Scripted(study)
    sites.train = {3: once(sites, "no_answer")}
    seen: list[dict[str, int]] = []
    sites.before = lambda group: seen.append(steps(RunRecord.load(tmp_path)))
    run(study, sites, tmp_path)
    assert seen[1:4] == [{"north": 3, "south": 3}, {"north": 6, "south": 6}, {"north": 9, "south": 9}]
    assert max(max(charged.values()) for charged in seen[1:]) == 12  # no more than the plan


def test_spent_budgets_complete_the_run(tmp_path: Path) -> None:
    study = two_sites(minimum_sites=2)

    def train(request: TrainRequest) -> Reply:
        return honest(study, "north", request) if request.round == 1 else Refusal("budget_exhausted")

    sites = Scripted(study, train={2: train, 3: train})
    facts = run(study, sites, tmp_path)
    assert sites.asked == ["enrol", "1", "2"]  # a second attempt would change nothing
    assert (facts.status, facts.error, facts.rounds_completed) == ("completed", "budget_exhausted", 1)
    assert steps(facts) == {"north": 6, "south": 6}  # they have spent all, though nobody saw the last update


# ---------------------------------------------------------------- stopped


@pytest.mark.parametrize(
    ("error", "status", "code"), [(KeyboardInterrupt, "interrupted", ""), (ZeroDivisionError, "failed", "internal")]
)
def test_a_run_that_stops_says_how_and_goes_on(
    error: type[BaseException], status: str, code: str, tmp_path: Path
) -> None:
    study = two_sites()
    sites = Scripted(study)
    stopped = stop_in(sites, tmp_path, "2", error)
    assert (stopped.status, stopped.error, stopped.rounds_completed) == (status, code, 1)
    assert stopped.sites[0].accountant == "prv"
    assert steps(stopped) == {"north": 6, "south": 6}  # whoever was asked for round 2 may have charged it

    sites.asked.clear()
    facts = run(study, sites, tmp_path, resume=True)
    assert sites.asked == ["enrol", "2"]
    assert (facts.status, facts.error, facts.rounds_completed) == ("completed", "", 2)
    assert [site.rounds for site in facts.sites] == [[1, 2], [1, 2]]
    assert facts.started == stopped.started
    assert facts.seconds["total"] >= stopped.seconds["total"]


def test_the_record_is_on_disk_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two repeats the round; the other order would forget what its updates cost."""
    study = two_sites(rounds=1)
    save = checkpoints.save

    def killed(folder: Path, state: GanState, notice: str) -> Path:
        if state.round == 1:
            raise SystemExit("killed")
        return save(folder, state, notice)

    sites = Scripted(study)
    monkeypatch.setattr(checkpoints, "save", killed)
    with pytest.raises(SystemExit):
        run(study, sites, tmp_path)
    assert steps(RunRecord.load(tmp_path)) == {"north": 3, "south": 3}
    monkeypatch.setattr(checkpoints, "save", save)
    facts = run(study, sites, tmp_path, resume=True)
    assert (facts.rounds_completed, steps(facts)) == (1, {"north": 3, "south": 3})
    assert [site.rounds for site in facts.sites] == [[1], [1]]
    assert len(record.read_metrics(tmp_path)) == 1


def test_a_lost_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    study = two_sites()
    run(study, Scripted(study), tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="holds no checkpoint to resume from"):
        run(study, Scripted(study), tmp_path, resume=True)


def test_only_contracted_sizes_weigh(tmp_path: Path) -> None:
    """What a site claims to have spent changes nothing: 25 patients against 75, whatever is said."""
    study = two_sites(weights="contracted")

    def train(request: TrainRequest) -> Reply:
        update = honest(study, "south", request)
        return LocalUpdate(update.round, 3 * update.vector)

    run(study, Scripted(study, spent={"south": 6}, train={3: train}), tmp_path)
    first, last = (checkpoints.load(tmp_path / "checkpoints" / f"round-000{n}.pt") for n in (0, 1))
    np.testing.assert_allclose(last.generator - first.generator, TRAINED * (0.25 + 0.75 * 3), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- everything says how private it is


@pytest.mark.parametrize("private", [True, False])
def test_every_file_of_a_run_says_whether_it_is_private(private: bool, tmp_path: Path) -> None:
    study = two_sites(rounds=1).with_changes("privacy", enabled=private)
    facts = run(study, Scripted(study), tmp_path)
    assert ("NOT PRIVATE" in facts.notice) is not private
    for number in range(2):
        with Image.open(tmp_path / "samples" / f"round-{number:04d}.png") as picture:
            assert picture.text["Description"] == f"SYNTHETIC image. {facts.notice}"
        checkpoint = torch.load(tmp_path / "checkpoints" / f"round-{number:04d}.pt", weights_only=True)
        assert checkpoint["notice"] == facts.notice
    assert [line["private"] for line in record.read_metrics(tmp_path)] == [private]


# ---------------------------------------------------------------- phases


def two_phases(**federation: object) -> StudyConfig:
    """Two rounds of three steps, then two rounds of four with noise of their own: six steps and eight."""
    table = [
        {"algorithm": "local", "share": 0.4, "rounds": 2, "steps": 3},
        {"algorithm": "local", "share": 0.6, "rounds": 2, "steps": 4},
    ]
    return two_sites(phase=table, **federation)


def by_phase(facts: RunRecord, site: str) -> list[int]:
    """Steps that a site is charged, of each phase of the plan."""
    plan = make_plan(StudyConfig.model_validate(facts.study))
    assert plan is not None
    mechanisms = [phase.mechanism for phase in plan.phases]
    history = record.history(facts.site(site))
    assert plan.covers(history)
    return [accounting.num_steps(m for m in history if same_kind(m, planned)) for planned in mechanisms]


def test_a_study_runs_through_its_phases(tmp_path: Path) -> None:
    study = two_phases()
    sites = Scripted(study)
    facts = run(study, sites, tmp_path)
    assert sites.asked == ["enrol", "1", "2", "3", "4"]
    assert (facts.status, facts.error, facts.rounds_completed) == ("completed", "", 4)
    assert by_phase(facts, "north") == by_phase(facts, "south") == [6, 8]
    assert [(line["round"], line["algorithm"]) for line in record.read_metrics(tmp_path)] == [
        (1, "local"), (2, "local"), (3, "local"), (4, "local")
    ]  # fmt: skip
    plan = make_plan(study)
    assert plan is not None
    assert facts.site("north").epsilon == plan.epsilon <= 8.0
    for told, phase, planned_phase in zip(facts.phases, study.phases, plan.phases, strict=True):
        assert (told.algorithm, told.share, told.rounds, told.steps) == tuple(phase.model_dump().values())
        mechanism = Mechanism(told.sampling_probability or 0, told.noise_multiplier or 0, told.rounds * told.steps)
        assert (mechanism, told.clip_norm) == (planned_phase.mechanism, planned_phase.clip_norm)


def test_without_privacy_phases_have_no_noise(tmp_path: Path) -> None:
    facts = run(off := two_phases().with_changes("privacy", enabled=False), Scripted(off), tmp_path)
    assert [(phase.noise_multiplier, phase.sampling_probability, phase.clip_norm) for phase in facts.phases] == [
        (None, None, None)
    ] * 2


def test_a_phase_that_is_spent_does_not_stop_the_next(tmp_path: Path) -> None:
    """Round 1 was paid for and lost before: what the first phase has left does not reach to its last round."""
    study = two_phases(minimum_sites=2)
    sites = Scripted(study)

    def train(request: TrainRequest) -> Reply:
        return Refusal("budget_exhausted") if request.round == 2 else sites.trained("south", request)

    sites.train = {3: train}
    facts = run(study, sites, tmp_path)
    assert sites.asked == ["enrol", "1", "2", "3", "4"]  # a second attempt at round 2 would change nothing
    assert (facts.status, facts.error, facts.rounds_completed) == ("completed", "budget_exhausted", 4)
    assert [site.rounds for site in facts.sites] == [[1, 3, 4], [1, 3, 4]]
    assert by_phase(facts, "south") == [6, 8]
    made = sorted(path.stem for path in (tmp_path / "checkpoints").iterdir())
    assert made == ["round-0000", "round-0001", "round-0003", "round-0004"]
    first, last = (checkpoints.load(tmp_path / "checkpoints" / f"round-000{n}.pt") for n in (0, 4))
    np.testing.assert_allclose(last.generator, first.generator + 3 * TRAINED, rtol=1e-5)  # three rounds were summed


def test_a_last_phase_that_is_spent_ends_the_run_with_what_it_has(tmp_path: Path) -> None:
    study = two_phases(minimum_sites=2)
    sites = Scripted(study)

    def train(request: TrainRequest) -> Reply:
        return Refusal("over_budget") if request.round > 2 else sites.trained("south", request)

    sites.train = {3: train}
    facts = run(study, sites, tmp_path)
    assert sites.asked == ["enrol", "1", "2", "3"]
    assert (facts.status, facts.error, facts.rounds_completed) == ("completed", "budget_exhausted", 2)
    assert by_phase(facts, "south") == [6, 0]


@pytest.mark.parametrize(("stopped", "rounds"), [("2", 1), ("3", 2), ("4", 3)])
def test_a_run_goes_on_in_the_phase_where_it_stopped(stopped: str, rounds: int, tmp_path: Path) -> None:
    study = two_phases()
    sites = Scripted(study)
    assert stop_in(sites, tmp_path, stopped, KeyboardInterrupt).rounds_completed == rounds
    sites.asked.clear()
    facts = run(study, sites, tmp_path, resume=True)
    assert sites.asked == ["enrol", *("1", "2", "3", "4")[rounds:]]
    assert (facts.status, facts.rounds_completed, by_phase(facts, "north")) == ("completed", 4, [6, 8])


def test_a_run_that_stopped_after_a_spent_phase_does_not_go_back_to_it(tmp_path: Path) -> None:
    study = two_phases(minimum_sites=2)
    sites = Scripted(study)
    sites.train = {3: lambda r: Refusal("budget_exhausted") if r.round <= 2 else sites.trained("south", r)}
    stop_in(sites, tmp_path, "4", KeyboardInterrupt)
    sites.asked.clear()
    sites.spent |= {"north": 6 + 4, "south": 6 + 4}  # what they lost in the first phase is in their own ledgers
    facts = run(study, sites, tmp_path, resume=True)
    assert sites.asked == ["enrol", "4"]
    assert (facts.status, facts.rounds_completed) == ("completed", 4)
    assert by_phase(facts, "south") == [6, 8]


def test_a_site_comes_back_with_what_it_charged_in_both_phases_and_with_nothing_else(tmp_path: Path) -> None:
    study = two_phases()
    sites = Scripted(study)
    stop_in(sites, tmp_path, "4", KeyboardInterrupt)  # rounds 1 to 3 are done: six steps and four
    for said, expected in (
        (planned(study, 6 + 4), {}),
        (planned(study, 6 + 3), {"south": "enrolment_changed"}),  # less than it answered in the second phase
        (planned(study, 6 + 8)[1:], {"south": "enrolment_changed"}),  # nothing of the first
        ((Mechanism(1.0, 0.5, 6), *planned(study, 6 + 8)[1:]), {"south": "enrolment_changed"}),
    ):
        back = Enrolment("south", "ab" * 32, False, said, budget=BUDGET)
        with pytest.raises(KeyboardInterrupt):
            again = replace(sites, enrol={3: back}, before=stop("4", KeyboardInterrupt))
            run_study(study, again, tmp_path, "cpu", resume=True)
        assert RunRecord.load(tmp_path).refused_sites == expected
