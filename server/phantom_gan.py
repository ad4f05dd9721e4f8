"""Training both networks on phantoms, without privacy, fast: what the warm start is made of.

The study's discriminator is small, because every weight of it will carry noise; alone it teaches a generator slowly and
lets it collapse. So a larger critic teaches the generator here and is thrown away, and the study's discriminator learns
beside it from the same images, so that the hospitals' first private step meets two networks that know each other.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from common import progress
from common.config import StudyConfig, start_size
from common.gan import losses
from common.gan.parameters import to_vector
from common.gan.training import GanTrainer, RealBatch
from common.phantom.draw import draw_labels, draw_phantoms
from server.aggregation import GanState

NUM_PHANTOMS = 3000
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
AVERAGE_DECAY = 0.99
CRITIC_WIDTH = 16
PENALTY_EVERY, PENALTY = 4, 0.05
RECIPE = (1, NUM_PHANTOMS, BATCH_SIZE, LEARNING_RATE, AVERAGE_DECAY, CRITIC_WIDTH, PENALTY_EVERY, PENALTY)
"""Everything here that the result depends on. Raise the first number when the code changes it."""


def train_on_phantoms(study: StudyConfig, device: torch.device) -> GanState:
    """Train ``gan.warm_start_steps`` steps from fresh weights. Deterministic by the study's seed on one machine."""
    rng = np.random.default_rng([study.seed, RECIPE[0]])
    labels = draw_labels(study, NUM_PHANTOMS, rng)
    phantoms = draw_phantoms(study, labels, rng)
    trainer = GanTrainer(study, device, None, BATCH_SIZE, study.seed)
    critic = PhantomCritic(study.image.num_classes, study.image.size, trainer.random).to(device)
    critic.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # Momentum hurts two networks that both move fast (as in Karras et al. 2018: beta_1 = 0, beta_2 = 0.99).
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=LEARNING_RATE, betas=(0.0, 0.99))
    generator_optimizer = torch.optim.Adam(trainer.generator.parameters(), lr=LEARNING_RATE, betas=(0.0, 0.99))
    average = to_vector(trainer.generator)
    owner = np.arange(BATCH_SIZE, dtype=np.int64)
    for step in range(study.gan.warm_start_steps):
        drawn = rng.integers(NUM_PHANTOMS, size=BATCH_SIZE)
        real = torch.from_numpy(phantoms[drawn]).to(device)
        real_labels = torch.from_numpy(labels[drawn]).to(device)
        critic_optimizer.zero_grad()
        _critic_loss(critic, trainer, real, real_labels, penalize=step % PENALTY_EVERY == 0).backward()  # type: ignore[no-untyped-call]
        critic_optimizer.step()
        trainer.discriminator_step(RealBatch(phantoms[drawn], labels[drawn], owner))
        generator_optimizer.zero_grad()
        fakes, fake_labels = trainer.draw_fakes(BATCH_SIZE)
        losses.generator_loss("hinge", critic(fakes, fake_labels)).mean().backward()  # type: ignore[no-untyped-call]
        generator_optimizer.step()
        average += np.float32(1 - AVERAGE_DECAY) * (to_vector(trainer.generator) - average)
        progress.report(step + 1, study.gan.warm_start_steps)
    # The average is the better generator, and what the sites start from is what the report shows as "before".
    return GanState(0, average, to_vector(trainer.discriminator), average.copy())


class PhantomCritic(nn.Module):
    """A wider discriminator that also sees how much its batch varies (Karras et al. 2018, section 3).

    It mixes samples, so it must never see a patient; it sees phantoms only and is not kept.
    """

    def __init__(self, num_classes: int, size: int, random: torch.Generator) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, after = 1, CRITIC_WIDTH
        for level in range((size // start_size(size)).bit_length() - 1):
            after = CRITIC_WIDTH * min(2**level, 8)
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            before = after
        self.body = nn.Sequential(*layers)
        self.top = nn.Sequential(nn.Conv2d(after + 1, after, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten())
        self.head = nn.Linear(after * start_size(size) ** 2, num_classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(part.weight, generator=random)
                nn.init.zeros_(part.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, label: Tensor) -> Tensor:
        hidden = self.body(images)
        count, _, rows, columns = hidden.shape
        spread = torch.sqrt(hidden.reshape(4, count // 4, -1).var(dim=0, unbiased=False) + 1e-8).mean(dim=1)
        spread = spread.repeat(4).view(count, 1, 1, 1).expand(count, 1, rows, columns)
        logits: Tensor = self.head(self.top(torch.cat([hidden, spread], dim=1)))
        return logits.gather(1, label[:, None])[:, 0]


def _critic_loss(critic: nn.Module, trainer: GanTrainer, real: Tensor, labels: Tensor, *, penalize: bool) -> Tensor:
    """Hinge loss, every few steps with the R1 penalty on phantoms (Mescheder et al. 2018)."""
    with torch.no_grad():
        fakes, fake_labels = trainer.draw_fakes(BATCH_SIZE)
    real.requires_grad_(penalize)
    logits = critic(real, labels)
    loss: Tensor = relu(1 - logits).mean() + relu(1 + critic(fakes, fake_labels)).mean()
    if penalize:
        (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        loss = loss + PENALTY_EVERY * PENALTY / 2 * slope.flatten(1).pow(2).sum(dim=1).mean()
    return loss
