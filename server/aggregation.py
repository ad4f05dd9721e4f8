"""Updates of the sites to a new shared state."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from common.config import StudyConfig
from common.messages import LocalUpdate, Vector


@dataclass(frozen=True)
class GanState:
    """The federation's shared state after ``round`` rounds; flat float32 vectors.

    Args:
        round: rounds completed.
        generator: shared generator.
        discriminator: shared discriminator, private: only noisy updates made it.
        generator_average: exponential moving average of the generator, from which images are drawn.
    """

    round: int
    generator: Vector
    discriminator: Vector
    generator_average: Vector


def site_weights(study: StudyConfig, sites: list[str]) -> dict[str, float]:
    """Each site's share of the mean, from public facts only; the shares of ``sites`` add up to 1."""
    if study.federation.weights == "equal":
        sizes = {site: 1 for site in sites}
    else:
        sizes = {site: study.federation.contracted_patients[site] for site in sites}
    total = sum(sizes.values())
    return {site: size / total for site, size in sizes.items()}


def aggregate(study: StudyConfig, state: GanState, updates: Mapping[str, LocalUpdate]) -> GanState:
    """Add the weighted mean of the updates; move the generator's average by as many steps as the round had.

    Args:
        updates: at least one, by site name, each of the state's own lengths.
    """
    weights = site_weights(study, list(updates))
    generator, discriminator = state.generator.copy(), state.discriminator.copy()
    for site, update in updates.items():
        generator += np.float32(weights[site]) * update.generator
        discriminator += np.float32(weights[site]) * update.discriminator
    steps = study.federation.local_steps // study.gan.discriminator_steps_per_generator_step
    decay = np.float32(study.gan.ema_decay**steps)
    average = decay * state.generator_average + (1 - decay) * generator
    return replace(
        state, round=state.round + 1, generator=generator, discriminator=discriminator, generator_average=average
    )
