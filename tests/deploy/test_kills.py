"""kill -9 at fifty random moments: what is spent is never forgotten, never under-counted, and the run completes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.killed_runs import ROUNDS, SITES, STEPS


@pytest.mark.slow
def test_fifty_kills_at_random_moments(hospitals: dict[str, Path], tmp_path: Path) -> None:
    for site in SITES:
        (tmp_path / site).symlink_to(hospitals[site])
    command = [sys.executable, "-m", "tests.deploy.killed_runs", str(tmp_path), str(tmp_path), "50"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(line["killed"] for line in lines) == 50
    for line in lines:
        assert line["went_down"] == []
        for charged, made in line["spent"].values():
            assert made <= charged <= ROUNDS * STEPS  # a step is charged before anybody is drawn for it
    ended = [line for line in lines if not line["killed"]]
    assert ended
    for line in ended:
        assert (line["status"], line["run"]) == (0, "completed"), (tmp_path / "log.txt").read_text()[-3000:]
        for site, (charged, _) in line[
            "spent"
        ].items():  # the record may count a round that was asked for and never made
            assert charged <= line["recorded"][site] <= ROUNDS * STEPS
        assert all(epsilon <= 8.0 for epsilon in line["epsilon"].values())
        assert line["error"] == ("" if line["rounds"] == ROUNDS else "budget_exhausted")
    # The kills fell into training as well: otherwise nothing was shown.
    assert any(0 < made < ROUNDS * STEPS for line in lines if line["killed"] for _, made in line["spent"].values())
    assert any(made < charged for line in lines if line["killed"] for charged, made in line["spent"].values())
