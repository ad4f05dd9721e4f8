"""From the options of ``synthward simulate`` to a simulation: which study, which sites, which folder."""

import argparse
import random
from pathlib import Path

from client.settings import SiteSettings
from common.config import StudyConfig
from common.errors import ConfigError
from deploy.simulate import Simulation, check_number, resume, simulate

EXAMPLES = Path(__file__).parent / "examples"
DEFAULT_SITES = 3


def choose_study(options: argparse.Namespace) -> StudyConfig:
    """The study of a new run: the file given or the built-in one, with what the options change."""
    path = options.study or EXAMPLES / f"{_kind_of_data(options)}.toml"
    study = StudyConfig.from_toml(path)
    if options.seed is not None:
        study = study.with_changes("", seed=options.seed)
    if options.rounds is not None:
        study = study.with_changes("federation", rounds=options.rounds)
    return study


def new_run(options: argparse.Namespace, study: StudyConfig, out: Path) -> None:
    """Start a new run in the folder ``out``. Raises ConfigError, SiteError, ProtocolError, KeyboardInterrupt."""
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty.", "Give another --out, or continue that run with --resume.")
    check_number(study, len(options.site) if options.site else options.sites or DEFAULT_SITES)
    device = options.device or "auto"
    simulate(Simulation(study, _sites(options, out, study, device), out, device))


def resume_run(options: argparse.Namespace) -> None:
    """Go on with a run."""
    fixed = [name for name in ("study", "rounds", "seed", "out") if getattr(options, name) is not None]
    if fixed:
        raise ConfigError(
            f"--resume goes on with the run's own study: {', '.join(fixed)} cannot change.", "Leave them out."
        )
    resume(options.resume, options.device)


def _kind_of_data(options: argparse.Namespace) -> str:
    """The built-in study for the data: phantoms, pictures without volumes (chest X-ray), else volumes (brain T1)."""
    if options.phantom is not None:
        return "phantom"
    names = [path.name.lower() for path in (options.data or options.site[0][1]).rglob("*")]
    pictures = any(name.endswith((".png", ".jpg", ".jpeg")) for name in names)
    volumes = any(name.endswith((".nii", ".nii.gz")) for name in names)
    return "chest-xray" if pictures and not volumes else "brain-t1"


def _sites(options: argparse.Namespace, out: Path, study: StudyConfig, device: str) -> list[SiteSettings]:
    """Settings of every site; its folder is under the run's."""
    patients: dict[str, tuple[str, ...]] = {}
    if options.phantom is not None:
        from deploy.phantoms import write_bids

        folders = write_bids(
            out / "phantoms", sites=options.sites or DEFAULT_SITES, patients=options.phantom, seed=study.seed
        )
        data = {folder.name: folder for folder in folders}
    elif options.data is not None:
        names = [f"site-{number}" for number in range(1, (options.sites or DEFAULT_SITES) + 1)]
        data = dict.fromkeys(names, options.data)
        patients = _deal_patients(options, names, study)
    else:
        data = dict(options.site)
        if len(data) < len(options.site):
            raise ConfigError("Two --site options have the same name.", "Give every site its own name.")
    return [
        SiteSettings.checked(
            name=name,
            data=path.resolve(),
            folder=(out / "sites" / name).resolve(),
            record_is_patient=options.record_is_patient,
            device=device,
            patients=patients.get(name),
        )
        for name, path in data.items()
    ]


def _deal_patients(options: argparse.Namespace, names: list[str], study: StudyConfig) -> dict[str, tuple[str, ...]]:
    """Deal the data set's patients over the sites, all images of a patient to one, as hospitals treat their own."""
    from client.data.inventory import list_patients

    patients = sorted(list_patients(options.data, record_is_patient=options.record_is_patient))
    random.Random(study.seed).shuffle(patients)  # noqa: S311  who is treated where is no secret and no privacy step
    return {name: tuple(sorted(patients[position :: len(names)])) for position, name in enumerate(names)}
