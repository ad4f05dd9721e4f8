"""A round of ``moments``: the sites tell the noisy sum of their patients' features, the server trains by it.

The sum is on disk before the training, which takes minutes: a run that is interrupted there goes on with it when it is
resumed. To ask the sites again would be another release, which the study may not have planned.
"""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from common.config import StudyConfig
from common.errors import ConfigError
from common.files import write_atomically
from common.gan.feature_map import FeatureMap
from common.messages import MomentsRequest, Vector
from common.noisy_sums import encoding_of, noise_for
from common.privacy.plan import PhasePlan
from server.aggregation import GanState
from server.moments import fit, make_feature_map
from server.round import Charge, RoundOutcome, Sums, WantedSum


@dataclass(frozen=True)
class _Released:
    """A noisy sum: the map it is of, (dim,) float32, and the sites in it."""

    feature_map: FeatureMap
    total: Vector
    answered: tuple[str, ...]


def moments_round(
    study: StudyConfig,
    phase: PhasePlan | None,
    sums: Sums,
    state: GanState,
    device: torch.device,
    folder: Path,
    charge: Charge,
) -> RoundOutcome:
    """One attempt at the round after ``state``. Everything after the sum is post-processing: it costs no privacy.

    Raises ConfigError when ``folder`` holds a damaged sum of this round.
    """
    number = state.round + 1
    path = sum_path(folder, number)
    refusals: Mapping[str, str] = {}
    if path.exists():
        released = _read(study, path)
    else:
        feature_map = _feature_map(study, phase, state, device)
        length = feature_map.length(study.image.num_classes)
        request = MomentsRequest(study.digest, number, feature_map.to_vector())
        found = sums.sum(WantedSum(request, length, encoding_of(noise_for(study, phase, length))), charge)
        if found.total is None:
            return found.failed
        released, refusals = _Released(feature_map, found.total, found.answered), found.refusals
        _write(path, released)
        sum_path(folder, number - 1).unlink(missing_ok=True)
    noise = noise_for(study, phase, len(released.total))
    total, stddev = released.total.astype(np.float64), noise.stddev_of_sum(len(released.answered))
    seed, steps = study.seed + number, study.gan.moments_steps
    after, facts = fit(study, state, released.feature_map, total, stddev, device, seed, steps)
    return RoundOutcome(after, released.answered, refusals, facts=asdict(facts))


def sum_path(folder: Path, number: int) -> Path:
    """Where the noisy sum of a round is kept."""
    return folder / f"moments-sum-{number:04d}.npz"


def _feature_map(study: StudyConfig, phase: PhasePlan | None, state: GanState, device: torch.device) -> FeatureMap:
    patients = sum(study.contracted_split(site)[0] for site in study.federation.contracted_patients)
    # Of the sum over all sites: what those that do not collude make is the declared noise, the others add theirs.
    expected = phase.noise_stddev * (len(study.federation.contracted_patients) / study.num_noisy) ** 0.5 if phase else 0
    return make_feature_map(study, state, patients, expected, device)


def _write(path: Path, released: _Released) -> None:
    buffer = io.BytesIO()
    features, answered = released.feature_map.to_vector(), np.array(released.answered, np.str_)
    np.savez(buffer, features=features, total=released.total, answered=answered)
    write_atomically(path, buffer.getvalue())


def _read(study: StudyConfig, path: Path) -> _Released:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as saved:
            feature_map = FeatureMap.from_vector(study, saved["features"])
            return _Released(feature_map, saved["total"], tuple(str(name) for name in saved["answered"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        remedy = "Delete it: the sites are asked again, and charge another release."
        raise ConfigError(f"{path} is damaged: {type(error).__name__}.", remedy) from None
