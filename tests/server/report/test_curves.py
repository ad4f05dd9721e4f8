from typing import Any

import pytest

from common.privacy import accounting
from common.privacy.accounting import Mechanism
from server import record
from server.record import MechanismRecord
from server.report import curves
from server.report.curves import epsilon_curves, prefix, spread
from tests.server.report.runs import DELTA, NOISE, STEPS, line, make_run, spent


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
