"""Runs that are killed at random moments and resumed, over and over, until enough have been killed. A program.

    python -m tests.deploy.killed_runs HOSPITALS FOLDER KILLS

HOSPITALS has a folder of images a site. A child that has all imports behind it makes or resumes a run; the parent kills
it. Every draw of patients leaves a byte in a file beside the run before it is made, so that what was really trained can
be held against what was charged. Prints one JSON line a kill, and one a completed run.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from client import training
from client.accountant import open_ledger
from client.training import SiteStudy
from common.config import StudyConfig
from common.gan.training import RealBatch
from common.privacy import accounting
from common.privacy.plan import make_plan
from deploy import simulate
from deploy.cli import main as command
from server import record, study_run
from server.record import RunRecord
from tests.deploy.command import tiny_study

SITES = ("north", "south")
ROUNDS, STEPS = 6, 5


def main() -> None:
    hospitals, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    study = tiny_study(folder / "s.toml", federation__rounds=ROUNDS, federation__local_steps=STEPS)
    contracted = StudyConfig.from_toml(study).with_changes("federation", contracted_patients=dict.fromkeys(SITES, 25))
    assert make_plan(contracted) is not None  # calibrated once, before the children
    assert study_run
    longest = 0.0  # the first run is left alone: as long as it takes, the others are killed at any moment of
    killed = number = 0
    while killed < kills:
        number += 1
        run = folder / f"run-{number}"
        before: dict[str, float] = {}
        while True:
            child = os.fork()
            if child == 0:
                _make(study, hospitals, run)
            began = time.monotonic()
            if longest and killed < kills:
                time.sleep(random.uniform(0, longest))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            longest = longest or time.monotonic() - began
            after = {site: _epsilon(run, site) for site in SITES}
            spent = {site: [_charged(run, site), _made(run, site)] for site in SITES}
            died = os.WIFSIGNALED(status)
            killed += died
            line: dict[str, Any] = {"killed": died, "status": None if died else os.WEXITSTATUS(status), "spent": spent}
            line["went_down"] = [site for site in SITES if after[site] < before.get(site, 0.0)]
            before = after
            if not died:
                facts = RunRecord.load(run)
                line |= {"run": facts.status, "rounds": facts.rounds_completed, "error": facts.error}
                line["recorded"] = {site.name: accounting.num_steps(record.history(site)) for site in facts.sites}
                line["epsilon"] = after
            print(json.dumps(line), flush=True)
            if not died:
                break


def _make(study: Path, hospitals: Path, run: Path) -> None:
    """Begin the run, or go on with it; never returns."""
    draw = training.draw

    def traced(at: SiteStudy) -> RealBatch:
        with (run.parent / f"{run.name}-{at.site}.steps").open("ab", buffering=0) as file:
            file.write(b"x")
        return draw(at)

    training.draw = traced
    if simulate.can_resume(run):
        arguments = ["simulate", "--resume", str(run)]
    else:
        shutil.rmtree(run, ignore_errors=True)  # killed before its data were checked: nothing was spent
        sites = [word for site in SITES for word in ("--site", f"{site}={hospitals / site}")]
        arguments = ["simulate", str(study), *sites, "--out", str(run)]
    status = 1
    try:
        with (run.parent / "log.txt").open("a") as log, redirect_stderr(log), redirect_stdout(log):
            command(arguments)
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        os._exit(status)


def _lines(run: Path, site: str) -> accounting.History:
    folder = run / "sites" / site
    if not (folder / "ledger-head.json").exists():
        return ()
    history: accounting.History = ()
    for line in open_ledger(folder).lines():
        history = accounting.append(history, line.mechanism)
    return history


def _charged(run: Path, site: str) -> int:
    return accounting.num_steps(_lines(run, site))


def _epsilon(run: Path, site: str) -> float:
    return accounting.epsilon(_lines(run, site), 1e-5)


def _made(run: Path, site: str) -> int:
    path = run.parent / f"{run.name}-{site}.steps"
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    main()
