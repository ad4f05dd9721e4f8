"""The command as a process of its own, stopped politely and not: what is spent is never forgotten."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from client.accountant import open_ledger
from common.privacy import accounting
from common.privacy.accounting import Mechanism
from server import record
from server.record import RunRecord
from tests.deploy.command import synthward, tiny_study

ROUNDS, STEPS = 6, 10


def start(hospitals: dict[str, Path], folder: Path) -> subprocess.Popen[str]:
    """A run of some seconds in a process of its own, into ``folder / "run"``."""
    study = tiny_study(folder / "s.toml", federation__rounds=ROUNDS, federation__local_steps=STEPS)
    command = [str(Path(sys.executable).with_name("synthward")), "simulate", str(study), "--out", str(folder / "run")]
    for name in ("north", "south"):
        command += ["--site", f"{name}={hospitals[name]}"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Where the tests run in the background, Ctrl-C is ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def spent(run: Path) -> dict[str, int]:
    """Steps in each site's ledger, of the sites that have charged."""
    found = {path.parent.name: open_ledger(path.parent).lines() for path in run.glob("sites/*/ledger-head.json")}
    return {site: sum(line.steps for line in lines) for site, lines in found.items() if lines}


def check_completed(run: Path, before: dict[str, int]) -> RunRecord:
    """The run is complete, its figures are those of the ledgers, and nothing spent ``before`` is forgotten."""
    facts = RunRecord.load(run)
    after = spent(run)
    assert facts.status == "completed"
    for site in facts.sites:
        assert before.get(site.name, 0) <= after[site.name] <= ROUNDS * STEPS
        assert accounting.num_steps(record.history(site)) == after[site.name]
        mechanism = Mechanism(0.25, facts.phases[0].noise_multiplier or 0.0, after[site.name])
        assert site.epsilon == accounting.epsilon((mechanism,), 1e-5) <= 8.0
        assert site.rounds == list(range(1, facts.rounds_completed + 1))
    if facts.rounds_completed < ROUNDS:  # steps of a round that was cut were paid for and lost
        assert facts.error == "budget_exhausted"
        assert facts.rounds_completed == ROUNDS - 1
    else:
        assert facts.error == ""
    assert [line["round"] for line in record.read_metrics(run)] == list(range(1, facts.rounds_completed + 1))
    assert (run / "report.html").exists()
    return facts


def test_ctrl_c_leaves_a_run_that_can_be_resumed(hospitals: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(hospitals, tmp_path)
    # In the middle of training: an update that has left masked could not leave again, so its round would be lost.
    wait_for(lambda: max(spent(run).values(), default=0) > STEPS, process)
    interrupted = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - interrupted < 10
    assert "Traceback" not in error
    hint = re.search(r"synthward simulate (--resume .*)", error)
    assert hint
    facts = RunRecord.load(run)
    assert facts.status == "interrupted"
    assert 1 <= facts.rounds_completed < ROUNDS
    assert "interrupted" in (run / "report.html").read_text()
    epsilons = [site.epsilon or 0.0 for site in facts.sites]
    before = spent(run)

    assert synthward("simulate", *hint.group(1).split()).status == 0
    after = check_completed(run, before)
    assert after.rounds_completed == ROUNDS  # stopped between two steps, so nothing was lost
    assert all((site.epsilon or 0.0) >= old > 0 for site, old in zip(after.sites, epsilons, strict=True))


def test_ctrl_c_before_training_says_so(hospitals: dict[str, Path], tmp_path: Path) -> None:
    process = start(hospitals, tmp_path)
    wait_for(lambda: (tmp_path / "run" / "sites").exists(), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "before training began" in error or "--resume" in error
    assert "Traceback" not in error


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "warm start": lambda run: (run / "study.toml").exists(),
    "enrolment": lambda run: (run / "run.json").exists(),
    "first charge": lambda run: bool(spent(run)),
    "first checkpoint": lambda run: (run / "checkpoints" / "round-0001.pt").exists(),
    "third metrics": lambda run: len(record.read_metrics(run)) == 3,
    "last round": lambda run: (run / "checkpoints" / f"round-{ROUNDS - 1:04d}.pt").exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_loses_no_spent_step(moment: str, hospitals: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(hospitals, tmp_path)
    wait_for(lambda: MOMENTS[moment](run), process)
    time.sleep(random.uniform(0, 0.15))
    process.kill()
    process.communicate()
    before = spent(run)
    kept = Path(shutil.copytree(run, tmp_path / "kept"))
    result = synthward("simulate", "--resume", run)
    assert result.status == 0, (result.err, sorted(path.name for path in kept.iterdir()))
    check_completed(run, before)


@pytest.mark.slow
def test_killed_again_and_again_it_still_ends(hospitals: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(hospitals, tmp_path)
    wait_for(lambda: (run / "study.toml").exists(), process)
    before: dict[str, int] = {}
    command = [str(Path(sys.executable).with_name("synthward")), "simulate", "--resume", str(run)]
    for _ in range(3):
        wait_for(lambda: (run / "run.json").exists(), process)
        time.sleep(random.uniform(1, 6))
        process.kill()
        process.communicate()
        now = spent(run)
        assert all(now[site] >= steps for site, steps in before.items())
        before = now
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    facts = RunRecord.load(run)
    assert facts.status == "completed"
    for site in facts.sites:
        assert before.get(site.name, 0) <= spent(run)[site.name] <= ROUNDS * STEPS
        assert accounting.num_steps(record.history(site)) == spent(run)[site.name]
        assert (site.epsilon or 9.0) <= 8.0
