"""Writes phantom data sets for a federation on one machine: every site a folder, every site its own scanner."""

import gzip
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError
from common.phantom.brain import affine, draw_anatomy, render_volume, site_look

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
            _write_site(path, site, patients, seed, shape, skull_stripped)
    except OSError as error:
        raise ConfigError(
            f"Cannot write {error.filename or folder}: {error.strerror}.", "Name another folder."
        ) from error
    return paths


def _write_site(
    path: Path, site: int, patients: int, seed: int, shape: tuple[int, int, int], skull_stripped: bool
) -> None:
    look = site_look(seed * 1000 + site, skull_stripped=skull_stripped)
    groups = _groups(seed, site, patients)
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


def _groups(seed: int, site: int, patients: int) -> list[str]:
    """Patients with a lesion and healthy ones, one of each in every pair of neighbours, in a random order."""
    pairs = np.random.default_rng([seed, site, 0, 2]).random(2 * patients) < 0.5
    return ["lesion" if pairs[number // 2] == bool(number % 2) else "healthy" for number in range(patients)]


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
