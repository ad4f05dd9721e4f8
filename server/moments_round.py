"""A round of ``moments``: the sites tell the noisy sum of their patients' features, the server trains by it."""

from dataclasses import asdict

import numpy as np
import torch

from common.config import StudyConfig
from common.messages import MomentsRequest
from common.noisy_sums import encoding_of, noise_for
from common.privacy.plan import PhasePlan
from server.aggregation import GanState
from server.moments import fit, make_feature_map
from server.round import Charge, RoundOutcome, Sums, WantedSum


def moments_round(
    study: StudyConfig, phase: PhasePlan | None, sums: Sums, state: GanState, device: torch.device, charge: Charge
) -> RoundOutcome:
    """One attempt at the round after ``state``. Everything after the sum is post-processing: it costs no privacy."""
    number = state.round + 1
    patients = sum(study.contracted_split(site)[0] for site in study.federation.contracted_patients)
    # Of the sum over all sites: what those that do not collude make is the declared noise, the others add theirs.
    expected = phase.noise_stddev * (len(study.federation.contracted_patients) / study.num_noisy) ** 0.5 if phase else 0
    feature_map = make_feature_map(study, state, patients, expected, device)
    length = feature_map.length(study.image.num_classes)
    noise = noise_for(study, phase, length)
    request = MomentsRequest(study.digest, number, feature_map.to_vector())
    found = sums.sum(WantedSum(request, length, encoding_of(noise)), charge)
    if found.total is None:
        return found.failed
    stddev = noise.stddev_of_sum(len(found.answered))
    after, facts = fit(
        study, state, feature_map, np.asarray(found.total, np.float64), stddev, device, study.seed + number
    )
    return RoundOutcome(after, found.answered, found.refusals, facts=asdict(facts))
