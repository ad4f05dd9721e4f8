"""Updates of the sites to a new shared state."""

from dataclasses import dataclass, replace

import numpy as np

from common.config import StudyConfig
from common.messages import Vector


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


@dataclass(frozen=True)
class AggregateUpdate:
    """What the server learns in a round.

    Args:
        total: the sum of the sites' weighted updates: generator, then discriminator, (dim,) float32.
        sites: whose updates are in it.
    """

    total: Vector
    sites: tuple[str, ...]


def aggregate(study: StudyConfig, state: GanState, update: AggregateUpdate) -> GanState:
    """Add the weighted mean of the updates; move the generator's average by as many steps as the round had.

    Args:
        update: of at least one site, as long as both of the state's networks.
    """
    mean: Vector = update.total / np.float32(sum(study.site_weight(site) for site in update.sites))
    split = len(state.generator)
    generator, discriminator = state.generator + mean[:split], state.discriminator + mean[split:]
    phase = study.phases[study.phase_number(state.round + 1)]
    steps = phase.steps // study.gan.discriminator_steps_per_generator_step
    decay = np.float32(study.gan.ema_decay**steps)
    average: Vector = decay * state.generator_average + np.float32(1 - decay) * generator
    return replace(
        state, round=state.round + 1, generator=generator, discriminator=discriminator, generator_average=average
    )
