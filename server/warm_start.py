"""A head start for both networks from images of nobody: public phantoms, or a checkpoint made from public data.

It reads no patient, so it costs no privacy; the hospitals' private steps then adapt what it learned.
"""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.config import StudyConfig
from common.errors import ConfigError
from common.gan import networks
from common.gan.parameters import to_vector
from common.gan.training import GanTrainer
from server import checkpoints
from server.aggregation import GanState
from server.phantom_gan import RECIPE, train_on_phantoms
from server.record import WarmStartRecord


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
        return WarmStart(_state(GanTrainer(study, device, None, 1, study.seed)), None)
    if study.gan.warm_start == "phantom":
        path = cache_folder() / f"{_recipe_digest(study)}.pt"
        cached = _is_readable(path)
        if not cached:
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoints.write(path, train_on_phantoms(study, device), "Trained on public phantoms, on no patient.")
        source = f"public phantoms ({study.gan.warm_start_anatomy}), {study.gan.warm_start_steps} steps"
    else:
        path, cached = Path(study.gan.warm_start), False
        _, notice = checkpoints.load_with_notice(path)
        source = f"a checkpoint given by the study, whose own notice is: {notice}"
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
        "moments_steps",
    }
    recipe = [
        study.seed,
        study.image.model_dump(mode="json"),
        study.gan.model_dump(mode="json", exclude=private_steps),
        RECIPE,
    ]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _is_readable(path: Path) -> bool:
    """Whether the cache holds a checkpoint of this version; an older or damaged one is made anew."""
    try:
        checkpoints.load(path)
    except ConfigError:
        return False
    return True


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
