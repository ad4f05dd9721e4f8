"""A head start for both networks from images of nobody: public phantoms, or a checkpoint made from public data.

It reads no patient, so it costs no privacy; the hospitals' private steps then adapt what it learned.
"""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from common import progress
from common.config import StudyConfig
from common.errors import ConfigError
from common.gan import networks
from common.gan.parameters import to_vector
from common.gan.training import GanTrainer, RealBatch
from server import checkpoints
from server.aggregation import GanState
from server.record import WarmStartRecord

BATCH_SIZE = 64
NUM_PHANTOMS = 3000
AVERAGE_DECAY = 0.995
LEARNING_RATE = 1e-3  # of both networks; the study's own rates are for the private steps
RECIPE_VERSION = 1  # raise it when phantoms or this training change, so that no stale cache is used
LESION_LABELS = ("lesion", "opacity")


@dataclass(frozen=True)
class WarmStart:
    """The first shared state, and where it came from (None for untrained networks)."""

    state: GanState
    record: WarmStartRecord | None


def warm_start(study: StudyConfig, device: torch.device) -> WarmStart:
    """The study's first shared state, as ``gan.warm_start`` says: ``none``, ``phantom``, or a checkpoint's path.

    Raises:
        ConfigError: the checkpoint is missing, or its networks are not the study's.
    """
    start = time.monotonic()
    if study.gan.warm_start == "none":
        return WarmStart(_state(GanTrainer(study, device, None, BATCH_SIZE, study.seed)), None)
    if study.gan.warm_start == "phantom":
        path = cache_folder() / f"{_recipe_digest(study)}.pt"
        cached = path.exists()
        if not cached:
            trained = _train_on_phantoms(study, device)
            checkpoints.save(path.parent, trained).replace(path)
        source = f"public phantoms ({study.gan.warm_start_anatomy}), {study.gan.warm_start_steps} steps"
    else:
        path, cached = Path(study.gan.warm_start), False
        source = "a checkpoint given by the study"
    state = checkpoints.load(path)
    _check_fits(study, state)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    seconds = round(time.monotonic() - start, 3)
    fresh = GanState(0, state.generator, state.discriminator, state.generator_average)
    return WarmStart(fresh, WarmStartRecord(source=source, digest=digest, seconds=seconds, from_cache=cached))


def cache_folder() -> Path:
    """Where warm starts are kept between runs: ``$SYNTHWARD_CACHE``, else the user's cache folder."""
    base = os.environ.get("SYNTHWARD_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "synthward")
    return Path(base).expanduser() / "warm-start"


def phantom_labels(study: StudyConfig, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Uniform labels (count,); phantoms of a label called ``lesion`` or ``opacity`` will show one."""
    return rng.integers(study.image.num_classes, size=count)


def draw_phantoms(study: StudyConfig, labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
    """Public phantoms of the study's anatomy and size: (count, 1, size, size) in [-1, 1]."""
    from common.phantom import brain, chest

    shows = np.array([name in LESION_LABELS for name in study.image.labels] or [False])[labels]
    size = study.image.size
    match study.gan.warm_start_anatomy:
        case "brain":
            return brain.draw_slices(rng, len(labels), size, lesion=shows, look=brain.PUBLIC_LOOK)
        case "skull_stripped_brain":
            return brain.draw_slices(rng, len(labels), size, lesion=shows, look=brain.PUBLIC_STRIPPED_LOOK)
        case "chest":
            return chest.draw_radiographs(rng, len(labels), size, opacity=shows)


def _train_on_phantoms(study: StudyConfig, device: torch.device) -> GanState:
    """Ordinary GAN training: a fixed pool of phantoms, Adam, and a running average of the generator."""
    rng = np.random.default_rng([study.seed, RECIPE_VERSION])
    labels = phantom_labels(study, NUM_PHANTOMS, rng)
    phantoms = draw_phantoms(study, labels, rng)
    fast = study.with_changes("gan", generator_learning_rate=LEARNING_RATE, discriminator_learning_rate=LEARNING_RATE)
    trainer = GanTrainer(fast, device, None, BATCH_SIZE, study.seed)
    average = to_vector(trainer.generator)
    owner = np.arange(BATCH_SIZE, dtype=np.int64)
    for step in range(study.gan.warm_start_steps):
        drawn = rng.integers(NUM_PHANTOMS, size=BATCH_SIZE)
        trainer.discriminator_step(RealBatch(phantoms[drawn], labels[drawn], owner))
        trainer.generator_step()
        average += np.float32(1 - AVERAGE_DECAY) * (to_vector(trainer.generator) - average)
        progress.report(step + 1, study.gan.warm_start_steps)
    # The average is the better generator, and what the sites start from is what the report shows as "before".
    return GanState(0, average, to_vector(trainer.discriminator), average.copy())


def _state(trainer: GanTrainer) -> GanState:
    generator = to_vector(trainer.generator)
    return GanState(0, generator, to_vector(trainer.discriminator), generator.copy())


def _recipe_digest(study: StudyConfig) -> str:
    """Of all that the trained networks depend on; what only steers the private steps is left out."""
    private_steps = {
        "generator_learning_rate",
        "discriminator_learning_rate",
        "discriminator_steps_per_generator_step",
        "ema_decay",
    }
    recipe = [
        RECIPE_VERSION,
        study.seed,
        study.image.model_dump(mode="json"),
        study.gan.model_dump(mode="json", exclude=private_steps),
        [NUM_PHANTOMS, BATCH_SIZE, AVERAGE_DECAY, LEARNING_RATE],
    ]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _check_fits(study: StudyConfig, state: GanState) -> None:
    expected = (
        networks.num_parameters(networks.build_generator, study),
        networks.num_parameters(networks.build_discriminator, study),
    )
    found = (len(state.generator), len(state.discriminator))
    if expected != found:
        raise ConfigError(
            f"gan.warm_start: expected networks of {expected} parameters (generator, discriminator), found {found}.",
            "Give a checkpoint that was made with the same image and gan tables.",
        )
