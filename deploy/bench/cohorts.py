"""Which cohort size is worth which epsilon: distance of the generator's images to other patients of the same hospitals.

    python -m deploy.bench.cohorts --patients 100 300 1000 --epsilon 1 8 [--sites 3]

Phantom hospitals of growing size train the built-in phantom study from one warm start. Prints, for each pair, the noise
multiplier, the distance and the seconds. The flow of a round runs
without Flower, so that what is measured is the training alone.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.slices import PreparedCohort
from client.training import SiteStudy, train_round
from common.config import StudyConfig
from common.messages import TrainRequest
from common.orientation import SLICE_RANGE
from common.phantom import brain
from common.privacy.plan import make_plan
from deploy.bench.account import account_for
from deploy.bench.distance import features, frechet
from deploy.runs import EXAMPLES
from server.aggregation import AggregateUpdate, GanState, aggregate
from server.synthesis import synthesize
from server.warm_start import warm_start

SLICES_A_PATIENT = 6
NUM_TEST = 1998


def main() -> None:
    """Run every pair of cohort size and epsilon and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, nargs="+", default=[100, 300, 1000], help="contracted, a site")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 8.0])
    parser.add_argument("--sites", type=int, default=3)
    options = parser.parse_args()
    base = StudyConfig.from_toml(EXAMPLES / "phantom.toml")
    start = warm_start(base, torch.device("cpu")).state
    names = [f"site-{number}" for number in range(1, options.sites + 1)]
    test, other = (
        np.concatenate(
            [_patients(number, NUM_TEST // len(names), seed, 1, base.image.size)[0] for number in range(len(names))]
        )
        for seed in (1, 2)
    )
    real = features(_floats(test))
    print(
        f"other patients {frechet(real, features(_floats(other))):.2f}, warm start {_distance(base, start, real):.2f}"
    )
    print("patients a site | epsilon | noise_multiplier | distance | seconds", flush=True)
    for patients in options.patients:
        for epsilon in options.epsilon:
            study = base.with_changes("privacy", epsilon=epsilon).with_changes(
                "federation", contracted_patients=dict.fromkeys(names, patients)
            )
            began = time.monotonic()
            state, noise = _train(study, start)
            distance, seconds = _distance(study, state, real), time.monotonic() - began
            print(f"{patients} | {epsilon:g} | {noise:.2f} | {distance:.2f} | {seconds:.0f}", flush=True)


def _train(study: StudyConfig, state: GanState) -> tuple[GanState, float]:
    with tempfile.TemporaryDirectory() as folder:
        sites = {}
        for number, name in enumerate(study.federation.contracted_patients):
            trained, _ = study.contracted_split(name)
            images, labels, starts = _patients(number, trained, 3, SLICES_A_PATIENT, study.image.size)
            site_folder = Path(folder, name)
            site_folder.mkdir()
            ids = tuple(str(patient) for patient in range(trained))
            cohort = PreparedCohort(images, labels, ids, starts, ())
            sites[name] = SiteStudy(
                study, name, site_folder, cohort, trained, "cpu", account_for(study, site_folder, ids)
            )
        for _ in range(study.federation.rounds):
            request = TrainRequest(study.digest, state.round + 1, state.generator, state.discriminator)
            total = np.sum([train_round(site, request).vector for site in sites.values()], axis=0)
            state = aggregate(study, state, AggregateUpdate(total, tuple(sites)))
    plan = make_plan(study)
    return state, plan.mechanism.noise_multiplier if plan else 0.0


def _patients(
    site: int, count: int, seed: int, slices: int, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Images (count * slices, 1, size, size), labels, and where each patient's images start."""
    rng = np.random.default_rng([seed, site])
    look = brain.site_look(site + 1)
    low, high = brain.percentiles(look)
    lesion = rng.integers(2, size=count).astype(bool)
    anatomies = brain.draw_anatomies(rng, lesion=lesion)
    planes = [
        brain.render_slices(anatomies, [look] * count, rng.uniform(*SLICE_RANGE, size=count), size, rng=rng)
        for _ in range(slices)
    ]
    scaled = np.clip((np.stack(planes, axis=1) - low) / (high - low), 0, 1)  # (count, slices, size, size)
    images = (scaled * 255).astype(np.uint8).reshape(count * slices, 1, size, size)
    return images, np.repeat(lesion.astype(np.int64), slices), np.arange(count + 1, dtype=np.int64) * slices


def _distance(study: StudyConfig, state: GanState, real: NDArray[np.float64]) -> float:
    labels = np.arange(NUM_TEST, dtype=np.int64) % study.image.num_classes
    return frechet(real, features(synthesize(study, state.generator_average, labels, seed=9).images))


def _floats(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


if __name__ == "__main__":
    main()
