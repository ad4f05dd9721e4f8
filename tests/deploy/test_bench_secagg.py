"""The benchmark of secure sums: both implementations really make the sum they are timed for."""

import json
from pathlib import Path

import numpy as np
import pytest

from deploy.bench import secagg
from deploy.bench.meter import Case, Meter
from deploy.bench.secagg import our_sum
from deploy.bench.secaggplus import their_sum

CASE = Case(dim=5000, sites=5, dropped=1)


def test_both_sums_are_those_of_the_sites_that_stay() -> None:
    # A vector more or less would be off by about 0.1 at each coordinate.
    assert 0 < our_sum(CASE).error <= 4 * 2**-15
    assert 0 < their_sum(CASE).error <= 4 * 16 / 2**22  # 16 wide, in 2^22 steps


def test_a_sum_that_lacks_a_site_would_show() -> None:
    everyone = sum(CASE.vector(site).astype(np.float64) for site in range(CASE.sites))
    assert CASE.error_of(everyone) > 0.2
    assert CASE.error_of(everyone - CASE.vector(0)) < 1e-12


def test_ours_sends_eight_bytes_for_three_coordinates_and_theirs_for_one() -> None:
    case = Case(dim=100_000, sites=3)
    assert 8 / 3 * case.dim <= our_sum(case).up_bytes <= 8 / 3 * case.dim + 5000
    assert 8 * case.dim <= their_sum(case).up_bytes <= 8 * case.dim + 10_000


def test_time_is_counted_on_both_sides() -> None:
    for cost in (our_sum(CASE), their_sum(CASE)):
        assert 0 < cost.client_cpu_seconds < 5
        assert 0 < cost.server_cpu_seconds < 5
        assert cost.down_bytes > 0


def test_traced_memory_is_the_vector_and_the_most_that_came_on_top() -> None:
    case = Case(dim=1_000_000, sites=1)
    meter = Meter(case, tracing=True)
    earlier = np.zeros(3 * case.dim, np.float32)
    before = meter.begin_peak()
    passing = np.zeros(2 * case.dim, np.float32)
    del passing
    meter.end_client_peak(before)
    meter.serve(lambda: np.zeros(case.dim, np.float32))
    cost = meter.cost()
    assert cost.client_vectors == pytest.approx(1 + 2, abs=0.01)
    assert cost.server_vectors == pytest.approx(3 + 1, abs=0.01)
    assert len(earlier) == 3 * case.dim


def test_ours_on_disk_makes_the_same_sum(tmp_path: Path) -> None:
    assert our_sum(CASE, folder=tmp_path).error <= 4 * 2**-15
    assert len(list(tmp_path.iterdir())) == CASE.sites


def test_the_command_prints_a_line_each_and_the_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "numbers.json"
    secagg.main(["--dim", "2000", "--sites", "5", "--drop", "0.2", "--repeats", "2", "--json", str(table)])
    machine, head, *lines = capsys.readouterr().out.splitlines()
    assert "cores" in machine and "numpy" in machine
    assert [line.split(" | ")[:4] for line in lines] == [
        ["2e+03", "5", "1", who] for who in ("ours", "SecAgg+", "ratio")
    ]
    assert {len(line.split(" | ")) for line in (head, *lines)} == {14}
    numbers = json.loads(table.read_text())["rows"]
    assert [row["whose"] for row in numbers] == ["ours", "SecAgg+"]
    assert numbers[0]["on_disk"]["client_seconds"] > 0


def test_growth_is_ours_alone_and_masks_stop_growing_with_the_cohort(capsys: pytest.CaptureFixture[str]) -> None:
    secagg.main(["--growth", "--dim", "1000", "--sites", "10", "60"])
    _, head, ten, sixty = capsys.readouterr().out.splitlines()
    masks = [float(line.split(" | ")[head.split(" | ").index("masks a site")]) for line in (ten, sixty)]
    assert masks[0] == 10
    assert 32 < masks[1] < 60  # its own 31 picks, those who picked it, and its own mask
