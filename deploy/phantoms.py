"""Writes phantom data sets for a federation on one machine: every site a folder, every site its own scanner."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import ConfigError
from common.phantom.brain import affine, draw_anatomy, render_volume, site_look
from common.phantom.chest import draw_radiographs

_FULL_SCALE = 1000.0  # signal 1 in the integers of a volume


def write_bids(
    folder: Path,
    *,
    sites: int,
    patients: int,
    seed: int,
    shape: tuple[int, int, int] = (64, 64, 48),
    skull_stripped: bool = False,
) -> list[Path]:
    """T1-weighted heads as BIDS folders ``site-1``, ``site-2``, ...; half of each site's patients have a lesion.

    A patient's picture depends on the seed, the site and the patient's number only.

    Args:
        folder: where the sites' folders go; made when absent.
        sites: number of sites, 1 or more.
        patients: patients at each site, 1 or more.
        seed: 0 or more; equal seeds write equal files.
        shape: voxels along x, y, z.
        skull_stripped: leave everything but the brain at 0.

    Returns:
        The sites' folders.

    Raises:
        ConfigError: a site's folder exists and is not empty, or cannot be written.
    """

    def write_site(site: int, path: Path) -> None:
        look = site_look(_site_seed(seed, site), skull_stripped=skull_stripped)
        groups = _groups(seed, site, patients, "lesion", "healthy")
        subjects = [f"sub-{name}" for name in _names(site, patients)]
        for number, (subject, group) in enumerate(zip(subjects, groups, strict=True)):
            rng = np.random.default_rng([seed, site, number])
            anatomy = draw_anatomy(rng, lesion=group == "lesion")
            volume = render_volume(anatomy, look, shape, rng=rng)
            anat = path / subject / "anat"
            anat.mkdir(parents=True)
            voxels = np.rint(volume * _FULL_SCALE).astype(np.int16)
            _write_nifti(anat / f"{subject}_T1w.nii.gz", voxels, affine(look, shape))
        _write_bids_tables(path, site, subjects, groups, np.random.default_rng([seed, site, 0, 1]))

    return _write_sites(folder, sites, patients, write_site)


def write_radiographs(folder: Path, *, sites: int, patients: int, seed: int, size: int = 128) -> list[Path]:
    """Chest radiographs as PNG with a table ``images.tsv``, one of each patient; half the patients have opacities.

    Args:
        folder: where the sites' folders go; made when absent.
        sites: number of sites, 1 or more.
        patients: patients at each site, 1 or more.
        seed: 0 or more; equal seeds write equal files.
        size: pixels along each side.

    Returns:
        The sites' folders.

    Raises:
        ConfigError: a site's folder exists and is not empty, or cannot be written.
    """

    def write_site(site: int, path: Path) -> None:
        groups = _groups(seed, site, patients, "opacity", "clear")
        (path / "images").mkdir()
        lines = ["filename\tpatient_id\tlabel"]
        # Sites develop their films differently.
        gamma = float(np.exp(np.random.default_rng(_site_seed(seed, site)).uniform(-0.3, 0.3)))
        for number, (name, group) in enumerate(zip(_names(site, patients), groups, strict=True)):
            rng = np.random.default_rng([seed, site, number])
            film = draw_radiographs(rng, 1, size, opacity=np.array([group == "opacity"]))[0, 0]
            pixels = np.rint(255 * ((film + 1) / 2) ** gamma).astype(np.uint8)
            Image.fromarray(pixels).save(path / "images" / f"{name}.png")
            lines.append(f"images/{name}.png\t{name}\t{group}")
        (path / "images.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return _write_sites(folder, sites, patients, write_site)


def _write_sites(folder: Path, sites: int, patients: int, write_site: Callable[[int, Path], None]) -> list[Path]:
    if sites < 1 or patients < 1:
        raise ConfigError(f"Expected at least 1 site and 1 patient, found {sites} and {patients}.", "Ask for more.")
    paths = [folder / f"site-{site}" for site in range(1, sites + 1)]
    try:
        for path in paths:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ConfigError(
                    f"Expected {path} to be absent or an empty folder, but it is in use; nothing was written.",
                    "Name another folder, or remove this one.",
                )
        for site, path in enumerate(paths, start=1):
            path.mkdir(parents=True, exist_ok=True)
            write_site(site, path)
    except OSError as error:
        raise ConfigError(
            f"Cannot write {error.filename or folder}: {error.strerror}.", "Name another folder."
        ) from error
    return paths


def _site_seed(seed: int, site: int) -> int:
    return seed * 1000 + site


def _groups(seed: int, site: int, patients: int, ill: str, well: str) -> list[str]:
    """Ill and well patients, one of each in every pair of neighbours, in a random order."""
    pairs = np.random.default_rng([seed, site, 0, 2]).random(2 * patients) < 0.5
    return [ill if pairs[number // 2] == bool(number % 2) else well for number in range(patients)]


def _names(site: int, patients: int) -> list[str]:
    """A001, A002, ... at the first site, B001, ... at the second; alphanumeric, as BIDS labels must be."""
    letters = ""
    while site:
        site, letter = divmod(site - 1, 26)
        letters = chr(ord("A") + letter) + letters
    return [f"{letters}{number:03d}" for number in range(1, patients + 1)]


def _write_nifti(path: Path, voxels: NDArray[np.int16], matrix: NDArray[np.float64]) -> None:
    image: Any = nib.Nifti1Image(voxels, matrix)  # type: ignore[no-untyped-call]
    image.set_sform(matrix, code=1)
    image.set_qform(matrix, code=1)
    image.header.set_xyzt_units("mm")
    # No time in the file, so that equal seeds write equal bytes.
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _write_bids_tables(path: Path, site: int, subjects: list[str], groups: list[str], rng: np.random.Generator) -> None:
    description = {
        "Name": f"Phantom heads, site {site}",
        "BIDSVersion": "1.9.0",
        "DatasetType": "raw",
        "License": "CC0",
        "Authors": ["Synthward"],
    }
    columns = {
        "age": {"Description": "age of the phantom patient", "Units": "year"},
        "sex": {"Description": "sex of the phantom patient", "Levels": {"F": "female", "M": "male"}},
        "group": {"Description": "what the picture shows", "Levels": {"healthy": "no lesion", "lesion": "a lesion"}},
    }
    lines = ["participant_id\tage\tsex\tgroup"]
    for subject, group in zip(subjects, groups, strict=True):
        lines.append(f"{subject}\t{rng.integers(20, 80)}\t{'FM'[rng.integers(2)]}\t{group}")
    (path / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    (path / "participants.json").write_text(json.dumps(columns, indent=2) + "\n", encoding="utf-8")
    (path / "participants.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (path / "README.md").write_text("Computed phantoms: no picture and no row shows a person.\n", encoding="utf-8")
