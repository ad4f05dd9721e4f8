"""``synthward generate``: synthetic images from a run's generator, as files with their labels and their notice."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.config import StudyConfig
from common.errors import ConfigError
from common.gan.synthesis import Synthetic, synthesize, to_gray
from server import checkpoints
from server.record import RunRecord
from server.synthesis import save_png


def generate(run_folder: Path, count: int, out: Path, label: str | None, image_format: str, seed: int) -> Path:
    """Write ``count`` images and ``images.tsv`` into the new folder ``out``. Returns ``out``.

    Raises:
        ConfigError: no usable run, an unknown label, or ``out`` is not empty.
    """
    run = RunRecord.load(run_folder)
    study = StudyConfig.model_validate(run.study)
    state = checkpoints.latest(run_folder / "checkpoints")
    if state is None:
        raise ConfigError(f"{run_folder} holds no checkpoint.", "Train the run first.")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty.", "Give a new folder.")
    labels = _labels(study, count, label)
    synthetic = synthesize(study, state.generator_average, labels, seed)
    out.mkdir(parents=True, exist_ok=True)
    if image_format == "png":
        names = _write_pngs(out, synthetic, run.notice)
    else:
        names = _write_niftis(out, synthetic, _short_notice(run))
    with (out / "images.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["filename", "label", "synthetic", "notice"])
        for name, index in zip(names, labels, strict=True):
            writer.writerow([name, study.image.labels[index] if study.image.labels else "", "true", run.notice])
    return out


def _labels(study: StudyConfig, count: int, label: str | None) -> NDArray[np.int64]:
    if label is None:
        return np.arange(count, dtype=np.int64) % study.image.num_classes
    if label not in study.image.labels:
        known = ", ".join(study.image.labels) or "none: the study has no labels"
        raise ConfigError(
            f"The run has no label {label!r}; its labels are {known}.", "Give one of them, or leave it out."
        )
    return np.full(count, study.image.labels.index(label), dtype=np.int64)


def _write_pngs(out: Path, synthetic: Synthetic, notice: str) -> list[str]:
    names = [f"synthetic-{number:06d}.png" for number in range(len(synthetic.images))]
    for name, pixels in zip(names, to_gray(synthetic.images[:, 0]), strict=True):
        save_png(out / name, pixels, notice)
    return names


def _short_notice(run: RunRecord) -> str:
    """The notice for a NIfTI header, which holds 80 characters."""
    if not run.private:
        return "SYNTHETIC; NOT PRIVATE"
    return f"SYNTHETIC; DP, unit: one {'image' if any(site.record_is_patient for site in run.sites) else 'patient'}"


def _write_niftis(out: Path, synthetic: Synthetic, notice: str) -> list[str]:
    """One slice a file: (size, size, 1), RAS, so that a viewer shows it as the PNG does. Pixels have no size: 1 mm."""
    import nibabel

    names = [f"synthetic-{number:06d}.nii.gz" for number in range(len(synthetic.images))]
    for name, pixels in zip(names, to_gray(synthetic.images[:, 0]), strict=True):
        # (row, column) of an axial slice, anterior up and patient's right on the left, to (x, y, z) in RAS.
        volume = np.ascontiguousarray(pixels.T[::-1, ::-1, None])
        image = nibabel.Nifti1Image(volume, np.eye(4))
        image.header["descrip"] = notice.encode()
        image.set_sform(np.eye(4), code=1)
        image.set_qform(np.eye(4), code=1)
        nibabel.save(image, out / name)
    return names
