import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import client.training
from common.config import StudyConfig
from deploy.runs import EXAMPLES
from server import record
from tests.deploy.command import synthward, tiny_study

MOST_MEGABYTES_A_SITE = 40
PEAK = "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
PEAK += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"


def peak_megabytes(study: Path, data: Path, sites: int, out: Path) -> float:
    """The most memory that a simulation of ``sites`` sites held."""
    command = [str(Path(sys.executable).with_name("synthward")), "simulate", str(study), "--out", str(out)]
    for number in range(sites):
        command += ["--site", f"site-{number}={data}"]
    done = subprocess.run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert record.RunRecord.load(out).rounds_completed == 2
    return int(done.stdout.splitlines()[-1]) / 1024


@pytest.mark.slow
def test_fifty_more_sites_take_less_than_40_mb_each(hospitals: dict[str, Path], tmp_path: Path) -> None:
    # The networks of the built-in study, which are larger than those of the other tests.
    changes = {"gan__generator_width": 16, "gan__discriminator_width": 8, "gan__latent_size": 64, "image__size": 32}
    study = tiny_study(tmp_path / "study.toml", **changes)
    assert StudyConfig.from_toml(study).federation.rounds == 2
    few, many = (peak_megabytes(study, hospitals["south"], sites, tmp_path / f"run-{sites}") for sites in (5, 55))
    a_site = (many - few) / 50
    print(f"{few:.0f} MB with 5 sites, {many:.0f} MB with 55: {a_site:.1f} MB a site")
    assert a_site < MOST_MEGABYTES_A_SITE


@pytest.mark.slow
def test_everything_but_training_is_less_than_a_tenth_of_the_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local rounds of the built-in networks. A moment counts as training when at least one site trains."""
    local = {"phase": [], "rounds": 3, "local_steps": 30}
    study = StudyConfig.from_toml(EXAMPLES / "phantom.toml").with_changes("federation", **local)
    study = study.with_changes("gan", warm_start="none").with_changes("privacy", sampling_probability=0.5)
    study.save(tmp_path / "study.toml")
    trained: list[tuple[float, float]] = []
    train = client.training._train

    def timed(*arguments: Any) -> None:
        started = time.monotonic()
        train(*arguments)
        trained.append((started, time.monotonic()))

    monkeypatch.setattr(client.training, "_train", timed)
    result = synthward("simulate", tmp_path / "study.toml", "--phantom", 100, "--sites", 3, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    training, until = 0.0, 0.0
    for start, end in sorted(trained):
        training += max(0.0, end - max(start, until))
        until = max(until, end)
    rounds = sum(line["seconds"]["round"] for line in record.read_metrics(tmp_path / "run"))
    share = 1 - training / rounds
    print(f"rounds {rounds:.2f} s, at least one site training {training:.2f} s, the rest {100 * share:.1f} %")
    assert share < 0.1
