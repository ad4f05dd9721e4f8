"""The one-machine federation: prepare the sites' folders, then run server and sites of one study in this process."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.settings import SiteSettings
from common import progress
from common.config import StudyConfig
from common.errors import SiteError
from deploy.local_grid import LocalGrid, UserConfig
from deploy.progress_bars import ProgressBars

STUDY_FILE = "study.toml"


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
        study, sites = _prepare_sites(simulation, bars)
        study.save(simulation.out / STUDY_FILE)
        _run(study, sites, simulation.out, simulation.device, resume=False, bars=bars)


def resume(out: Path, device: str) -> None:
    """Go on with a simulation from its last checkpoint. Raises like ``simulate``."""
    study = StudyConfig.from_toml(out / STUDY_FILE)
    sites = {name: SiteSettings.load((out / "sites" / name).resolve()) for name in study.federation.contracted_patients}
    with ProgressBars() as bars:
        _run(study, sites, out, device, resume=True, bars=bars)


def _prepare_sites(simulation: Simulation, bars: ProgressBars) -> tuple[StudyConfig, dict[str, SiteSettings]]:
    """Make each site's folder, check its data, and write the contract into the study where it has none."""
    from client.enrolment import prepare_data

    study = simulation.study
    contract = dict(study.federation.contracted_patients)
    prepared: dict[str, SiteSettings] = {}
    refused: list[str] = []
    for settings in simulation.sites:
        bars.say(f"checking the data of {settings.name}")
        settings.save()
        try:
            num_patients = prepare_data(settings, study)
        except SiteError as error:
            refused.append(f"{settings.name}: {error}")
            bars.say(f"{settings.name} takes no part: {error}")
            continue
        contract.setdefault(settings.name, num_patients)
        prepared[settings.name] = settings
    if len(prepared) < study.federation.minimum_sites:
        minimum = study.federation.minimum_sites
        raise SiteError(
            f"Expected at least {minimum} sites with usable data, found {len(prepared)}. {' '.join(refused)}"
        )
    taking_part = {name: contract[name] for name in prepared}
    return study.with_changes("federation", contracted_patients=taking_part), prepared


def _run(
    study: StudyConfig, sites: Mapping[str, SiteSettings], out: Path, device: str, *, resume: bool, bars: ProgressBars
) -> None:
    import torch
    from flwr.app import Context, RecordDict

    import client.app
    import server.app

    run_config: UserConfig = {
        **study.to_run_config(),
        "run.out": str(out),
        "run.device": device,
        "run.resume": resume,
        "run.sites": "",
    }
    names = dict(enumerate(sites, start=2))  # Flower's node ids; 1 is the server
    nodes: dict[int, UserConfig] = {node: {"site": str(sites[name].folder)} for node, name in names.items()}
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
        with progress.listening(bars.warm_start_stepped):
            server.app.app(grid, context)
    finally:
        grid.close()
