"""The same study through `flwr run .`: Flower's SuperLink and its simulation engine on Ray."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.privacy import accounting
from server import record
from server.record import RunRecord

REPOSITORY = Path(__file__).parents[2]
TINY = """
study.image.size=28 study.gan.generator_width=8 study.gan.discriminator_width=4 study.gan.latent_size=16
study.gan.warm_start_steps=10 study.gan.generator_batch_size=8 study.privacy.sampling_probability=1.0
study.gan.moments_steps=10
study.federation.phase="moments share=0.5; joint share=0.3 steps=2; local share=0.2 steps=3"
study.federation.contracted_patients="north=25,south=25"
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_of(home: Path) -> list[int]:
    """Every process that was started with this FLWR_HOME: the SuperLink detaches itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"FLWR_HOME={home}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # ended, or another user's
            continue
    return found


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Flower installation of its own, which leaves no process behind."""
    home = tmp_path / "flower"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    yield environment
    for process in processes_of(home):
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the detached SuperLink in /proc")
def test_two_sites_train_through_flower(hospitals: dict[str, Path], tmp_path: Path, flower: dict[str, str]) -> None:
    sites, out = tmp_path / "sites", tmp_path / "run"
    sites.mkdir()
    for name in ("north", "south"):
        (sites / name).symlink_to(hospitals[name])
    config = f'{TINY} run.out="{out}" run.sites="{sites}"'.replace("\n", " ")
    shares = "num-supernodes=2 client-resources-num-cpus=1 client-resources-num-gpus=0.0"
    command = ["flwr", "run", ".", "--stream", "--run-config", config, "--federation-config", shares]
    done = subprocess.run(command, cwd=REPOSITORY, env=flower, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = subprocess.run(["flwr", "ls", "--format", "json"], cwd=REPOSITORY, env=flower, capture_output=True)
    (flower_run,) = json.loads(listed.stdout)["runs"]
    assert flower_run["status"] == "finished:completed", done.stdout  # `flwr run` exits 0 in any case

    facts = RunRecord.load(out)
    assert (facts.status, facts.rounds_completed, facts.refused_sites) == ("completed", 3, {})
    assert facts.aggregation == "secure"
    assert [site.name for site in facts.sites] == ["north", "south"]
    for site in facts.sites:
        assert site.rounds == [1, 2, 3]
        assert accounting.num_steps(record.history(site)) == 1 + 2 + 3
        assert site.epsilon == accounting.epsilon(record.history(site), 1e-5) <= 8.0
        assert (out / "sites" / site.name / "holdout.key").exists()
    assert (out / "report.html").exists()
    assert facts.versions["synthward"]
