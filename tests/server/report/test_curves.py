from dataclasses import replace
from typing import Any

import pytest

from common.config import StudyConfig
from common.privacy import accounting
from common.privacy.accounting import Mechanism
from server import record
from server.record import MechanismRecord
from server.report import curves
from server.report.curves import epsilon_curves, phase_of, prefix, spread
from tests.server.report.runs import (
    DELTA,
    NOISE,
    STEPS,
    charged_by,
    line,
    make_phased_run,
    make_run,
    phased_lines,
    spent,
)


def test_spread_takes_all_when_few_and_always_the_last() -> None:
    assert spread(3, 10) == [0, 1, 2]
    assert spread(10, 5) == [1, 3, 5, 7, 9]
    for length in range(1, 200):
        found = spread(length, 10)
        assert found[-1] == length - 1 and len(found) == min(length, 10) == len(set(found))


def test_prefix_splits_a_mechanism() -> None:
    first, second = Mechanism(0.25, 2.0, 10), Mechanism(0.5, 1.0, 5)
    assert prefix((first, second), 0) == ()
    assert prefix((first, second), 4) == (Mechanism(0.25, 2.0, 4),)
    assert prefix((first, second), 12) == (first, Mechanism(0.5, 1.0, 2))
    assert prefix((first, second), 99) == (first, second)


def test_a_missed_round_keeps_what_was_known() -> None:
    run = make_run(("north",))
    run.sites[0].mechanisms[0].steps = 2 * STEPS
    record.set_epsilon(run.sites[0], "prv")
    metrics = [line(1, {"north": STEPS}), line(2, {}), line(3, {"north": 2 * STEPS})]
    (curve,) = epsilon_curves(run, metrics)
    assert curve.points == ((0, 0.0), (1, spent(STEPS)), (2, spent(STEPS)), (3, spent(2 * STEPS)))


def test_the_final_figure_of_the_run_wins() -> None:
    run = make_run(("north",), rounds=2)
    run.sites[0].mechanisms[0].steps = 50  # a killed process charged more than its two rounds show
    record.set_epsilon(run.sites[0], "prv")
    (curve,) = epsilon_curves(run, [line(1, {"north": 10}), line(2, {"north": 20})])
    assert curve.points == ((0, 0.0), (1, spent(10)), (2, spent(50)))


def test_points_use_the_whole_history_and_the_accountant_of_the_figure() -> None:
    run = make_run(("north",))
    run.sites[0].mechanisms = [
        MechanismRecord(sampling_probability=0.25, noise_multiplier=NOISE, steps=10),
        MechanismRecord(sampling_probability=0.1, noise_multiplier=1.0, steps=20),
    ]
    record.set_epsilon(run.sites[0], "rdp")
    (curve,) = epsilon_curves(run, [line(1, {"north": 10}), line(2, {"north": 20}), line(3, {"north": 30})])
    halfway = accounting.rdp_epsilon((Mechanism(0.25, NOISE, 10), Mechanism(0.1, 1.0, 10)), DELTA)
    assert curve.points[2] == (2, halfway)
    assert curve.points[3] == (3, run.sites[0].epsilon)


def test_unlike_curves_stand_alone_highest_first() -> None:
    run = make_run(("low", "high", "high-too"))
    run.sites[0].mechanisms[0].steps = STEPS
    record.set_epsilon(run.sites[0], "prv")
    metrics = [line(n, {"low": STEPS, "high": n * STEPS, "high-too": n * STEPS}) for n in (1, 2, 3)]
    assert [curve.sites for curve in epsilon_curves(run, metrics)] == [("high", "high-too"), ("low",)]


def test_no_guarantee_no_curve() -> None:
    run = make_run(private=False)
    assert epsilon_curves(run, [line(1, {"north": 0})]) == []
    assert epsilon_curves(make_run(), []) == []


@pytest.mark.parametrize(("num_sites", "points"), [(1, 10), (2, 10), (50, 2)])
def test_many_unlike_sites_are_computed_at_fewer_points(
    monkeypatch: pytest.MonkeyPatch, num_sites: int, points: int
) -> None:
    computed: set[Any] = set()
    names = [f"site-{number}" for number in range(num_sites)]
    run = make_run(names, rounds=0)
    for site in run.sites:
        site.mechanisms = [MechanismRecord(sampling_probability=0.25, noise_multiplier=NOISE, steps=100_000)]
        site.epsilon = 5.0
    monkeypatch.setattr(accounting, "epsilon", lambda history, delta: float(computed.add(history) or len(computed)))
    metrics = [line(n, {name: 1000 * n + i for i, name in enumerate(names)}) for n in range(1, 41)]
    found = epsilon_curves(run, metrics)
    assert len(found) == num_sites and all(len(curve.points) == 1 + points for curve in found)
    assert len(computed) <= curves.MOST_EVALUATIONS


# ---------------------------------------------------------------- phases


def after(rounds: int) -> float:
    """Epsilon of a site that took part in the first rounds of the study with phases."""
    study = StudyConfig.model_validate(make_phased_run().study)
    return accounting.epsilon(charged_by(study, rounds), DELTA)


def test_rounds_count_through_the_phases() -> None:
    run = make_phased_run()
    assert [phase_of(run, number) for number in range(1, 11)] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    run.phases = []
    assert phase_of(run, 1) == 0


def test_each_round_costs_what_its_phase_says() -> None:
    run = make_phased_run()
    (curve,) = epsilon_curves(run, phased_lines(run))
    assert curve.points == tuple((number, after(number)) for number in range(10))
    assert [value for _, value in curve.points] == sorted({value for _, value in curve.points})


@pytest.mark.parametrize(("rounds", "wanted"), [(3, {2, 3}), (9, {2, 5, 9})])
def test_the_end_of_a_phase_is_always_a_point(rounds: int, wanted: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "POINT_COUNTS", (1,))
    run = make_phased_run(rounds)
    (curve,) = epsilon_curves(run, phased_lines(run))
    assert {number for number, _ in curve.points} == {0, *wanted}
    assert all(value == after(number) for number, value in curve.points)


def test_steps_that_were_not_made_are_not_filled_up_with_those_of_a_later_phase() -> None:
    """South was late in round 1, so the record counts a release that its own ledger, after a resume, does not have."""
    run = make_phased_run(3)
    study = StudyConfig.model_validate(run.study)
    release, joint = charged_by(study, 3)
    south = run.site("south")
    south.mechanisms = record.mechanisms((replace(release, steps=1), joint))
    record.set_epsilon(south, "prv")
    lines = phased_lines(run)  # steps charged: 1, 2 and, as if all were made, 42
    found = {curve.sites: dict(curve.points) for curve in epsilon_curves(run, lines)}
    one_release = accounting.epsilon((replace(release, steps=1),), DELTA)
    assert found["south",] == {0: 0.0, 1: one_release, 2: one_release, 3: south.epsilon}
    assert found["north", "west"] == {number: after(number) for number in range(4)}


def test_a_phase_that_was_skipped_costs_nothing_until_the_next() -> None:
    run = make_phased_run(5)
    study = StudyConfig.model_validate(run.study)
    release, joint = charged_by(study, 5)
    for site in run.sites:
        site.mechanisms = record.mechanisms((joint,))
        record.set_epsilon(site, "prv")
    steps = {3: 40, 4: 80, 5: 120}
    lines = [line(number, dict.fromkeys(("north", "south", "west"), charged)) for number, charged in steps.items()]
    (curve,) = epsilon_curves(run, lines)
    assert curve.points == (
        (0, 0.0), *((n, accounting.epsilon((replace(joint, steps=charged),), DELTA)) for n, charged in steps.items())
    )  # fmt: skip
