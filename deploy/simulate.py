"""The one-machine federation: prepare the sites' folders, then run server and sites of one study in this process."""

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from client.log import site_log
from client.settings import SiteSettings
from client.simulated import allow, simulated_roster
from common import progress
from common.config import StudyConfig
from common.errors import INTERNAL, ConfigError, FederationError, SiteError
from common.files import write_atomically
from deploy.local_grid import LocalGrid, UserConfig
from deploy.progress_bars import ProgressBars

STUDY_FILE, REFUSED_FILE = "study.toml", "refused-sites.json"


@dataclass(frozen=True)
class Simulation:
    """What to run.

    Args:
        study: the study; its contract with the sites is filled in from their data where it has none.
        sites: settings of every site, their folders under ``out``.
        out: the run's folder.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    study: StudyConfig
    sites: Sequence[SiteSettings]
    out: Path
    device: str


def simulate(simulation: Simulation) -> None:
    """Run a new simulation to its end.

    Raises:
        ConfigError: the study cannot be run.
        SiteError: too few sites have usable data.
        TooFewSurvivors: too few sites answered.
        KeyboardInterrupt: the user stopped it; it can be resumed.
    """
    with ProgressBars() as bars:
        study, refused = _prepare_sites(simulation, bars)
        write_atomically(simulation.out / REFUSED_FILE, json.dumps(refused).encode())
        study.save(simulation.out / STUDY_FILE)
        _run(study, simulation.out, simulation.device, resume=False, bars=bars)


def resume(out: Path, device: str | None) -> None:
    """Go on with a simulation from its last checkpoint, on the sites' own device or another. Raises like ``simulate``.

    Args:
        out: the run's folder.
        device: ``auto``, ``cpu`` or ``cuda`` from now on; None for what the sites' settings say.
    """
    if not can_resume(out):
        raise ConfigError(
            f"{out} holds no run to go on with: no {STUDY_FILE}, which is written when all data are checked.",
            "Give the folder that --out of `synthward simulate` named, or start again with another --out.",
        )
    study = StudyConfig.from_toml(out / STUDY_FILE)
    device = _use_device(study, out, device)
    with ProgressBars() as bars:
        _run(study, out, device, resume=True, bars=bars)


def audit(out: Path, device: str | None) -> None:
    """Audit what a simulation has made: the sites compare it with their patients, and a verdict is written.

    Args:
        out: the run's folder.
        device: as for ``resume``.

    Raises:
        ConfigError: the run cannot be audited: not finished, audited already, or without a plan from before.
        TooFewSurvivors: a site did not answer.
    """
    if not can_resume(out):
        raise ConfigError(f"{out} holds no run.", "Give the folder that --out of `synthward simulate` named.")
    study = StudyConfig.from_toml(out / STUDY_FILE)
    device = _use_device(study, out, device)
    with ProgressBars(audits=True) as bars:
        _run(study, out, device, resume=True, bars=bars, audit=True)


def can_resume(out: Path) -> bool:
    """Whether a simulation in ``out`` came as far as its training."""
    return (out / STUDY_FILE).exists()


def _use_device(study: StudyConfig, out: Path, device: str | None) -> str:
    """Write the device into the sites' settings, or read it from there. A site without settings refuses by itself."""
    sites = []
    for name in study.federation.contracted_patients:
        with suppress(SiteError):
            sites.append(SiteSettings.load((out / "sites" / name).resolve()))
    if device is None:
        return sites[0].device if sites else "auto"
    from common.gan.devices import choose_device  # imports torch

    choose_device(device)  # a device that is not there changes nothing
    for settings in sites:
        SiteSettings.checked(**settings.model_dump() | {"device": device}).save()
    return device


def _prepare_sites(simulation: Simulation, bars: ProgressBars) -> tuple[StudyConfig, dict[str, str]]:
    """Make each site's folder, check its data, and write the contract into the study where it has none.

    Returns the study with the contract of the sites that take part, and the code of each of the others.
    """
    study = simulation.study
    contract = dict(study.federation.contracted_patients)
    roster = simulated_roster({settings.name: settings.folder for settings in simulation.sites})
    taking_part: dict[str, int] = {}
    refused: dict[str, str] = {}
    for settings in simulation.sites:
        bars.say(f"checking the data of {settings.name}")
        try:
            num_patients = _prepare(settings, study)
        except Exception as error:  # one site's trouble does not end the run
            refused[settings.name] = error.code if isinstance(error, FederationError) else INTERNAL
            bars.say(f"{settings.name} takes no part: {error}")
            continue
        taking_part[settings.name] = contract.get(settings.name, num_patients)
    if len(taking_part) < study.federation.minimum_sites:
        minimum = study.federation.minimum_sites
        raise SiteError(
            f"Expected at least {minimum} sites with usable data, found {len(taking_part)}.",
            "Each site's reason stands above and in its site.log.",
        )
    study = study.with_changes("federation", contracted_patients=taking_part)
    for settings in simulation.sites:
        if settings.name in taking_part:
            allow(settings, study, roster)
    return study, refused


def check_number(study: StudyConfig, num_sites: int) -> None:
    """Raise ConfigError for a number of sites that no data can help: ask before any data are made or read."""
    if num_sites < study.federation.minimum_sites:
        raise ConfigError(
            f"Expected at least {study.federation.minimum_sites} sites, found {num_sites}.",
            'Give more sites; one alone needs federation.minimum_sites = 1 and aggregation = "plain".',
        )
    if study.federation.aggregation == "secure":
        try:
            study.secure_aggregation.encoding_for(num_sites)
        except ValueError as error:
            raise ConfigError(f"secure_aggregation: {error}.", "Correct the study.") from None


def _prepare(settings: SiteSettings, study: StudyConfig) -> int:
    """The site's number of patients, its data checked and prepared; why not stands in its log."""
    from client.enrolment import prepare_data

    with site_log(settings.folder) as log:
        try:
            return prepare_data(settings, study)
        except Exception as error:
            log.error("the site takes no part: %s", error)
            raise


def _run(study: StudyConfig, out: Path, device: str, *, resume: bool, bars: ProgressBars, audit: bool = False) -> None:
    import torch
    from flwr.app import Context, RecordDict

    import client.app
    import server.app

    refused = json.loads((out / REFUSED_FILE).read_bytes())
    run_config: UserConfig = {
        **study.to_run_config(),
        "run.out": str(out.resolve()),
        "run.device": device,
        "run.resume": resume,
        "run.audit": audit,
        "run.sites": "",
        "run.refused_sites": ",".join(f"{name}={code}" for name, code in refused.items()),
    }
    names = dict(enumerate(study.federation.contracted_patients, start=2))  # Flower's node ids; 1 is the server
    folder = (out / "sites").resolve()
    nodes: dict[int, UserConfig] = {node: {"site": str(folder / name)} for node, name in names.items()}
    num_workers = max(1, min(len(nodes), os.cpu_count() or 1))
    # Sites train side by side and share the cores; the warm start before them has all of them.
    threads_each = max(1, torch.get_num_threads() // num_workers)
    grid = LocalGrid(
        client.app.app,
        nodes,
        run_config,
        num_workers,
        prepare_worker=lambda: torch.set_num_threads(threads_each),
        watcher=bars.watcher(study, names),
    )
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)
    try:
        with progress.listening(bars.server_stepped), _stopped_by_ctrl_c(grid):
            server.app.app(grid, context)
    finally:
        grid.close()


@contextmanager
def _stopped_by_ctrl_c(grid: LocalGrid) -> Iterator[None]:
    """Ctrl-C stops the sites at once, and not when the server has written its record: what they finish until then
    leaves masked and could never be sent again."""

    def stop(number: int, frame: FrameType | None) -> None:
        grid.stop()
        signal.default_int_handler(number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
